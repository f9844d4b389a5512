"""convert: what is written reads as the records it was made of, and a failure leaves nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from medplib.data import Bytes, File, ImageFile, MaskFile, Record, load_mini, read
from medplib.data.convert import convert
from medplib.data.files import Held
from medplib.errors import InputError, MedPLIBError
from medplib.prompts.types import Box, Point

SIZE = (24, 32)


@pytest.fixture
def records(tmp_path):
    """A record of each task, and what the layouts have to bend."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "b.jpg")
    for name, rows in (("one", 5), ("two", 9)):
        array = np.zeros(SIZE, np.uint8)
        array[:rows] = 1
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    Image.fromarray(np.ones((12, 16), np.uint8)).save(tmp_path / "half.png")
    a, b = (ImageFile(File(str(tmp_path / name))) for name in ("a.png", "b.jpg"))
    one, two, half = (MaskFile(File(str(tmp_path / f"{name}.png"))) for name in ("one", "two", "half"))
    held = ImageFile(Bytes((tmp_path / "a.png").read_bytes()))
    common = dict(source="toy", modality="X-ray", case="p 1", split="train")
    return [
        Record((("Is it?", "Yes."), ("Why?", "So.")), (a,), answer_type="closed", **common),
        Record((("What is <region>?", "Lung."),), (a,), (one,), labels=("left lung",), **common),
        Record(
            (("Find both.", "<ref>x</ref> <SEG>, <SEG>"), ("Again?", "<SEG>")),
            (b,), (), (one, two, half), labels=("left lung", "heart", "heart"), **common,
        ),
        Record(
            (("What is <region>?", "Fat."),),
            (a,), (Box(1, 2, 9, 12),), source="toy", split="val", modality="X-ray",
        ),
        Record((("And <region>?", "Fat."),), (held,), (Point(30, 3),), source="toy", case="set/p.2"),
    ]  # fmt: skip


def loaded(records):
    """What a trainer sees of records."""
    seen = []
    for record in records:
        size = record.load_images()[-1].shape[:2]
        regions = [prompt.to_mask(size) for prompt in record.load_regions(size)]
        pixels = [*record.load_images(), *regions, *record.load_masks(size)]
        seen.append(
            (record.turns, record.answer_type, record.modality, [array.tobytes() for array in pixels])
        )
    return sorted(seen, key=lambda one: one[0])


def test_mecovqa_layout_reads_back(records, tmp_path):
    done = convert(records, tmp_path / "out")
    assert (done.records, done.images, done.masks) == (5, 3, 6)
    assert sorted(done.files) == [
        "train/MeCoVQA-Complex.json", "train/MeCoVQA-Grounding.json", "train/MeCoVQA-Region.json",
        "val/MeCoVQA-Region.json",
    ]  # fmt: skip
    again = read("mecovqa", tmp_path / "out")
    assert not again.report
    assert loaded(again) == loaded(records)
    assert {r.split for r in again} == {"train", "val"}
    cases = {r.turns[0][0]: r.case for r in again}
    assert cases["Is it?"] == "toy/p_1"
    assert cases["And <region>?"] == "set/p.2"
    (grounding,) = read("mecovqa", tmp_path / "out", kind="grounding")
    assert grounding.labels == ("left lung", "heart", "heart")
    row = json.loads((tmp_path / "out" / "train" / "MeCoVQA-Complex.json").read_text())[0]
    assert row["conversations"][0] == {"from": "human", "value": "<image>\nIs it?"}
    assert (row["answer_type"], row["image"].startswith("images/x_ray--toy--p_1--")) == ("CLOSED", True)
    assert done.report.counts["repaired"] == {
        "box written as a mask": 1,
        "point written as a mask": 1,
        "mask fitted to its picture": 1,
        "no split: written to train/": 1,
    }


def test_a_denial_stays_among_the_grounding_conversations(records, tmp_path):
    denial = Record(
        (("Segment the heart.", "There is no heart."),), records[0].images, extra={"kind": "grounding"}
    )
    convert([denial], tmp_path / "out")
    assert [r.extra for r in read("mecovqa", tmp_path / "out", kind="grounding")] == [{"kind": "grounding"}]


def test_arrays_that_differ_in_the_middle_alone_are_told_apart(tmp_path):
    pictures = [np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)]
    masks = [np.zeros((64, 64), bool), np.zeros((64, 64), bool)]
    pictures[1][30], masks[0][20:30, 20:30], masks[1][40, 40] = 9, True, True
    rows = [
        Record((("Segment it.", "<SEG>"),), (Held(picture),), masks=(Held(mask),))
        for picture in pictures for mask in masks
    ]  # fmt: skip
    done = convert(rows, tmp_path / "out", "jsonl")
    assert (done.images, done.masks) == (2, 4)
    assert loaded(read("jsonl", tmp_path / "out")) == loaded(rows)


def test_jsonl_layout_keeps_everything(records, tmp_path):
    both = Record((("Compare.", "Same."),), (*records[0].images, *records[2].images), choices=("Same", "Not"))
    convert([*records, both], tmp_path / "out", to="jsonl")
    again = read("jsonl", tmp_path / "out")
    assert loaded(again) == loaded([*records, both])
    for name in ("source", "row", "case", "split", "labels", "choices", "extra", "answer_type", "modality"):
        assert [getattr(r, name) for r in again] == [getattr(r, name) for r in [*records, both]]
    assert again[3].regions == (Box(1, 2, 9, 12),)
    assert [r.split for r in read("jsonl", tmp_path / "out", split="validation")] == ["val"]


def test_what_does_not_fit_the_layout_or_cannot_be_read_is_left_out(records, tmp_path):
    several = Record((("Compare.", "Same."),), (*records[0].images, *records[2].images))
    gone = Record((("What?", "That."),), (ImageFile(File(str(tmp_path / "gone.png"))),))
    done = convert([several, gone, records[0]], tmp_path / "out")
    assert done.records == 1
    assert done.report.counts["dropped"] == {"not written": 2}
    assert any("gone.png" in example for example in done.report.examples["dropped", "not written"])
    with pytest.raises(InputError, match="No record could be written"):
        convert([several], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_mini_set_goes_to_mecovqa_and_back(tmp_path):
    records = read("sa_med2d", load_mini()[0].image.parents[1])[:40]
    convert(records, tmp_path / "out")
    again = read("mecovqa", tmp_path / "out")
    assert [(r.labels, r.case, r.modality) for r in again] == [
        (r.labels, r.case, r.modality) for r in records
    ]
    assert loaded(again) == loaded(records)


def test_a_failure_leaves_nothing(records, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="to must be one of mecovqa, jsonl"):
        convert(records, tmp_path / "out", to="csv")
    with pytest.raises(InputError, match="exists already"):
        convert(records, tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(MedPLIBError, match="No space left"):
        convert(records, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
