"""check_records: each defect planted in a sound data set is found under its name, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medplib.data import File, ImageFile, MaskFile, Record, load_mini, read
from medplib.data.check import KINDS, check_records
from medplib.data.report import ReadReport
from medplib.errors import InputError
from medplib.prompts.types import Box, Point


def texture(seed, size=(48, 64)):
    """Smooth noise: pictures that differ from each other."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8), np.uint8))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture
def make(tmp_path):
    """Records of a sound data set; keywords change one."""

    def image(name, array):
        Image.fromarray(array).save(tmp_path / name)
        return ImageFile(File(str(tmp_path / name)))

    def mask(name, array):
        Image.fromarray(array.astype(np.uint8) * 255).save(tmp_path / name)
        return MaskFile(File(str(tmp_path / name)))

    def record(number, **changes):
        pixels = changes.pop("pixels", texture(number))
        area = np.zeros(pixels.shape[:2], bool)
        area[5:20, 5:20] = True
        fields = dict(
            turns=(("Segment the liver.", "Here is the <ref>liver</ref> <SEG>."),),
            images=(image(f"{number}.png", pixels),),
            masks=(mask(f"{number}_mask.png", changes.pop("area", area)),),
            source="toy",
            row=number,
            modality="CT",
            case=f"case {number}",
            split="train" if number % 2 else "test",
            labels=("liver",),
        )
        return Record(**{**fields, **changes})

    return record


def kinds(report):
    return {problem.kind: problem.count for problem in report.problems}


def test_a_sound_data_set_is_fit_and_counted(make):
    records = [make(i) for i in range(6)]
    records.append(make(6, turns=(("What?", "A liver."),), masks=(), labels=(), answer_type="open"))
    report = check_records(records)
    assert report.problems == []
    assert report.fit
    assert (report.records, report.images) == (7, 7)
    assert report.counts["task"] == {"grounding": 6, "vqa": 1}
    assert report.counts["split"] == {"test": 4, "train": 3}
    assert report.counts["modality"] == {"CT": 7}
    assert report.counts["source"] == {"toy": 7}
    assert report.counts["class"] == {"liver": 6}
    assert report.counts["token"] == {"<ref>": 6, "</ref>": 6, "<SEG>": 6}
    assert report.samples[:2] == [0, 6]
    assert json.loads(json.dumps(report.as_dict()))["fit"] is True


def planted(make, kind):
    """Two records more, of which something is wrong in one way."""
    plain = dict(masks=(), labels=())
    words = (("What?", "That."),)
    if kind == "unreadable":
        bad = make(10)
        Path(bad.images[0].file.path).write_bytes(b"no picture")
        return [bad]
    if kind == "empty mask":
        return [make(10, area=np.zeros((48, 64), bool))]
    if kind == "mask shape":
        return [make(10, area=np.ones((48, 48), bool))]
    if kind == "mask size":
        return [make(10, area=np.ones((24, 32), bool))]
    if kind == "region outside":
        asked = (("What are <region> and <region>?", "Fat."),)
        return [make(10, turns=asked, regions=(Box(0, 0, 65, 10), Point(3, 3)), **plain)]
    if kind == "case in splits":
        return [make(10, case="p", split="train"), make(11, case="p", split="test")]
    if kind == "control token":
        texts = ("Yes <mask>.", "Yes </s>", "The <ref>liver.", "<region> is fat", "<gen_7>")
        return [make(10 + i, turns=(("What?", text),), **plain) for i, text in enumerate(texts)]
    if kind == "long text":
        return [make(10, turns=(("Why? " * 400, "So."), ("And?", "So. " * 900)), **plain)]
    if kind == "unknown tag":
        return [make(10, turns=(("Is it <b>large</b>? p<0.05, <5 mm", "Yes."),), **plain)]
    if kind == "duplicate":
        same = texture(10)
        return [
            make(10, pixels=same, turns=words, split="train", **plain),
            make(11, pixels=same, split="train"),
        ]
    if kind == "near duplicate":
        return [make(10), make(12, pixels=(texture(10) * 0.9 + 5).astype(np.uint8))]
    if kind == "blank picture":
        return [
            make(10, pixels=np.full((48, 64), 7, np.uint8)),
            make(12, pixels=np.full((48, 64), 7, np.uint8)),
        ]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "unreadable", "empty mask", "mask shape", "mask size", "region outside", "case in splits",
        "control token", "unknown tag", "long text", "duplicate", "near duplicate", "blank picture",
    ],
)  # fmt: skip
def test_each_defect_is_found_under_its_name_and_no_other(make, kind):
    bad = planted(make, kind)
    report = check_records([make(i) for i in range(4)] + bad)
    counts = {"control token": 5, "unknown tag": 2, "blank picture": 2}
    assert kinds(report) == {kind: counts.get(kind, 1)}
    assert report.fit == (KINDS[kind][0] == "warning")
    assert all(problem.examples for problem in report.problems)
    assert check_records(bad, allow=[kind]).fit


def test_a_mask_that_fitting_empties_is_empty(make):
    area = np.zeros((480, 640), bool)
    area[3, 3] = True
    assert kinds(check_records([make(10, area=area)])) == {"empty mask": 1, "mask size": 1}


def test_equal_and_similar_pictures_across_splits(make):
    same = texture(10)
    file = make(10, split="train", case=None)
    other = make(11, pixels=same, split="test")
    again = Record(turns=(("What?", "That."),), images=file.images, source="toy", split="test")
    assert kinds(check_records([file, other])) == {"picture in splits": 1, "duplicate": 1}
    assert kinds(check_records([file, again])) == {"picture in splits": 1}
    similar = make(13, pixels=(same * 0.9 + 5).astype(np.uint8), split="test")
    report = check_records([file, similar])
    assert kinds(report) == {"near duplicate": 1, "alike in splits": 1}
    assert report.fit
    assert "10.png and" in report.problems[0].examples[0]


def test_slices_of_one_case_are_no_near_duplicates(make):
    near = dict(pixels=(texture(10) * 0.9 + 5).astype(np.uint8))
    assert check_records([make(10, case="p"), make(12, case="p", **near)]).problems == []
    assert kinds(check_records([make(10, case=None), make(12, case=None, **near)])) == {"near duplicate": 1}


def test_what_the_reader_met_counts_too(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks" / "liver").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(texture(number)).save(tmp_path / "images" / f"{number}.png")
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "masks" / "liver" / "0.png")
    report = check_records(read("folder", tmp_path))
    assert kinds(report) == {"dropped": 1}
    assert "image without a mask: 1.png" in report.problems[0].examples
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    rows = [{"image": f"{n}.png", "conversations": talk} for n in ("0", "gone")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = check_records(read("llava_med", tmp_path / "rows.json", images=tmp_path / "images"))
    assert kinds(report) == {"missing": 1}
    assert not report.fit
    met = ReadReport()
    met.add("unknown", "label 2", "labelsTr/case.nii.gz", 3)
    (problem,) = check_records([], met).problems
    assert (problem.kind, problem.level, problem.count) == ("unknown", "warning", 3)
    assert problem.examples == ["label 2: labelsTr/case.nii.gz"]


def test_a_picture_is_read_once_and_settings_are_checked(make, monkeypatch):
    record = make(1)
    loads = []
    original = ImageFile.load
    monkeypatch.setattr(ImageFile, "load", lambda self: loads.append(self) or original(self))
    assert check_records([record] * 5).images == 1
    assert len(loads) == 1
    with pytest.raises(InputError, match="No kind of problem is called 'blur'"):
        check_records([record], allow=["blur"])
    with pytest.raises(InputError, match="0 to 15 bits, got 16"):
        check_records([record], distance=16)


def test_the_mini_set_is_fit():
    records = read("sa_med2d", load_mini()[0].image.parents[1])
    report = check_records(records)
    assert report.fit, [vars(problem) for problem in report.problems]
    assert report.images == 282
    assert report.counts["modality"]["CT"] > 50
