"""The MeCoVQA builder: what it says is what the masks say, in MeCoVQA's format, split by case."""

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sa_med2d
from PIL import Image
from sa_med2d import SIZE, rectangle

from medplib.data import ImageSample, Record, Structure, keyed_rng, load_mini, read
from medplib.data.builder import (
    AbsencePolicy,
    BuildSettings,
    RecordSamples,
    SAMed2DFolder,
    build_mecovqa,
    check_answer,
    split_of,
)
from medplib.data.builder.components import component_sizes
from medplib.data.builder.facts import Thing, image_facts, place, relation
from medplib.data.builder.words import both, fill, indefinite, is_abnormal, is_plural
from medplib.data.files import Bytes, File, Held, ImageFile
from medplib.errors import InputError, MedPLIBError

TASKS = ("Grounding", "Region", "Complex")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sa_med2d.write(tmp_path_factory.mktemp("source") / "sa")


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "mecovqa"
    return build_mecovqa(SAMed2DFolder(source), out, BuildSettings(seed=4, per_image=6, test_share=0.3))


def rows_of(out, split=("train", "test"), tasks=TASKS):
    return [
        {**row, "task": task, "split": s}
        for s in split
        for task in tasks
        for row in json.loads((Path(out) / s / f"MeCoVQA-{task}.json").read_text())
    ]


def turns_of(row):
    said = [turn["value"] for turn in row["conversations"]]
    return list(zip(said[0::2], said[1::2], strict=True))


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def thing(*boxes, name="x", size=SIZE, spacing=None):
    parts = tuple(rectangle(*box, size=size) > 0 for box in boxes)
    return Thing(name, name, np.logical_or.reduce(parts), parts, (None,) * len(parts), spacing)


def pixels(out, path):
    with Image.open(Path(out) / path) as image:
        return np.array(image) > 0


def flood_sizes(mask):
    """One pixel at a time."""
    left, sizes = {tuple(at) for at in np.argwhere(mask)}, []
    while left:
        stack, size = [left.pop()], 0
        while stack:
            row, column = stack.pop()
            size += 1
            for near in ((row + a, column + b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        sizes.append(size)
    return sorted(sizes, reverse=True)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.45, 0.6, 0.9, 1.0])
def test_components_agree_with_flood_fill(density):
    for seed in range(6):
        mask = keyed_rng("components", seed).random((23, 31)) < density
        assert component_sizes(mask) == flood_sizes(mask)


def test_components_of_shapes_that_meet_late():
    comb = np.zeros((9, 11), bool)
    comb[:, ::2], comb[-1] = True, True
    assert component_sizes(comb) == [int(comb.sum())]
    assert component_sizes(np.eye(7, dtype=bool)) == [7]  # diagonal neighbours belong together


def test_places_by_thirds_and_the_patients_side():
    found = {}
    for row, y in zip(("upper", "middle", "lower"), (0, 25, 50), strict=True):
        for column, x in zip(("left", "middle", "right"), (0, 35, 70), strict=True):
            found[row, column] = place(thing((x, y, x + 10, y + 10)))
    assert found["upper", "left"] == "the upper left part of the image"
    assert found["middle", "middle"] == "the center of the image"
    assert found["middle", "right"] == "the right part of the image"
    assert found["lower", "middle"] == "the lower middle part of the image"
    assert len(set(found.values())) == 9
    assert place(thing((0, 25, 9, 34)), radiological=True).endswith(", on the patient's right side")
    assert place(thing((70, 0, 80, 9)), radiological=True).endswith(", on the patient's left side")
    assert "patient" not in place(thing((35, 0, 45, 9)), radiological=True)


def test_relations_between_structures():
    a, b = thing((5, 5, 15, 15)), thing((60, 5, 70, 15))
    assert relation(a, b) == "to the left of"
    assert relation(b, a) == "to the right of"
    assert relation(thing((5, 45, 15, 55)), b) == "below and to the left of"
    assert relation(thing((60, 45, 70, 55)), b) == "below"
    assert relation(thing((7, 7, 12, 12)), a) == "inside"
    assert relation(a, thing((7, 7, 12, 12))) is None  # around it: neither left nor above
    assert relation(a, thing((6, 6, 16, 16))) is None
    scattered = thing((0, 0, 8, 8), (70, 50, 78, 58), (40, 0, 48, 8))
    assert relation(scattered, b) is None


def test_sizes_and_counts():
    assert thing((0, 0, 40, 30)).size == "25% of the image"
    assert thing((0, 0, 8, 10)).size == "1.7% of the image"
    assert thing((0, 0, 2, 1)).size == "less than 0.1% of the image"
    assert thing((0, 0, 10, 10), spacing=(0.5, 2.0)).size == "2.1% of the image (100 mm²)"
    assert thing((0, 0, 40, 30), spacing=(2.0, 2.0)).size == "25% of the image (48.0 cm²)"
    assert thing((0, 0, 10, 10), (5, 5, 20, 20)).count == 2  # listed one by one, though they touch
    joined = thing((0, 0, 10, 10), (30, 0, 40, 10), (60, 0, 61, 5)).mask
    assert Thing("x", "x", joined, (joined,), (None,)).count == 2  # five pixels are no area


@pytest.mark.parametrize(
    ("name", "plural", "a"),
    [
        ("cell nuclei", True, "cell nuclei"),
        ("retinal vessels", True, "retinal vessels"),
        ("pancreas", False, "a pancreas"),
        ("thalamus", False, "a thalamus"),
        ("optic disc", False, "an optic disc"),
        ("edema", False, "edema"),
        ("vertebrae of the neck", True, "vertebrae of the neck"),
    ],
)
def test_grammar_of_names(name, plural, a):
    assert is_plural(name) == plural
    assert indefinite(name) == a
    assert fill("{The} {is}", name) == f"The {name} {'are' if plural else 'is'}"


def test_findings_and_pairs_of_sides():
    for name in ("lung tumor", "Polyp", "skin lesion", "GTV mass", "COVID-19 infection", "microaneurysms"):
        assert is_abnormal(name), name
    for name in ("liver", "white matter", "cell nuclei", "optic disc", "left lung", "massa intermedia"):
        assert not is_abnormal(name), name
    assert both("left lung") == "both lungs"
    assert both("left kidney") == "both kidneys"
    assert both("left ovary") == "both ovaries"
    assert [both(n) for n in ("left atrium", "lung", "left rib 1", "left bronchus")] == [None] * 4


def test_sa_med2d_folder_names_structures_and_leaves_bad_sets_out(tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=3)
    images = SAMed2DFolder(folder)
    first = images[0]
    assert (first.modality, first.dataset, first.case) == ("CT", "Abdomen", "p-1.0")
    assert first.names.count("kidney tumor") == 1  # the union has the same name and is left out
    assert {"left kidney", "liver"} <= set(first.names)
    assert images[-1].modality == "endoscopy"
    assert images[-1].names == ("polyp",) * 3
    assert images[2:4][1].case == images[3].case
    index = json.loads((folder / "SAMed2D_v1.json").read_text())
    (folder / "SAMed2D_v1.json").write_text(json.dumps({**index, "images/mr_00--Brain_PTM--1--z_1.png": []}))
    assert SAMed2DFolder(folder).skipped == 1
    assert len(SAMed2DFolder(folder)) == len(index)


def abdomen(names, case="a", dataset="D"):
    shape = rectangle(0, 0, 9, 9) > 0
    return ImageSample(
        np.zeros((*SIZE, 3), np.uint8), "CT", dataset, case, "", "real",
        tuple(Structure(n, shape, "expert") for n in names),
    )  # fmt: skip


def test_only_what_was_looked_for_is_called_absent():
    samples = [
        abdomen(["liver", "left lung", "kidney", "kidney tumor"]),
        abdomen(["liver", "spleen"], "b"),
        abdomen(["optic disc"], dataset="E"),
    ]
    policy = AbsencePolicy(
        samples, {"D": ["liver", "spleen", "kidney", "kidney_tumor", "left_lung", "colon"]}
    )
    assert policy.absent(samples[0], samples[0].names) == ["spleen"]  # not colon: nobody ever drew it
    assert policy.absent(samples[1], samples[1].names) == ["kidney", "kidney tumor", "left lung"]
    assert policy.absent(samples[2], ["optic disc"]) == []
    for lungs in ("lung", "lungs"):
        assert policy.absent(abdomen(["kidney", lungs]), []) == ["kidney tumor", "liver", "spleen"]
    assert policy.absent(abdomen(["kidney tumor"]), []) == ["left lung", "liver", "spleen"]
    assert "spleen" not in policy.absent(samples[0], [*samples[0].names, "spleen"])  # seen, but tiny
    by_case = AbsencePolicy([*samples, abdomen(["spleen"])], scope="case")
    assert by_case.absent(samples[0], samples[0].names) == ["spleen"]
    assert by_case.absent(samples[1], samples[1].names) == []
    unsure = AbsencePolicy(samples, unsure={"D": ["spleen"]})
    assert unsure.absent(samples[0], samples[0].names) == []
    with pytest.raises(InputError, match="dataset, case"):
        AbsencePolicy(samples, scope="world")


def test_broken_masks_are_left_out_and_never_called_absent(tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=2)
    sample = SAMed2DFolder(folder)[0]
    files = {s.name: s.mask for s in sample.structures}
    files["liver"].unlink()
    Image.fromarray(rectangle(0, 0, 9, 9, (30, 30))).save(
        files["spleen"] if "spleen" in files else files["left kidney"]
    )
    files["right kidney"].write_bytes(b"no picture")
    skipped = Counter()
    facts = image_facts(sample, skipped=skipped)
    assert skipped == {"mask missing": 1, "mask of another size": 1, "mask unreadable": 1}
    assert facts.names == ["kidney tumor"]
    assert "liver" not in AbsencePolicy(SAMed2DFolder(folder)).absent(sample, facts.tiny)


def test_a_structure_counts_all_its_instances_or_is_left_out(tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=2)
    sample = next(one for one in SAMed2DFolder(folder) if one.dataset == "Polyps")
    files = [structure.mask for structure in sample.structures]
    Image.fromarray(rectangle(1, 1, 4, 4) * np.uint8(255)).save(files[0])  # 9 pixels
    (polyps,) = image_facts(sample).things
    assert polyps.count == len(files)
    assert polyps.pixels == sum(pixels(folder, file.relative_to(folder)).sum() for file in files)
    files[1].unlink()
    facts = image_facts(sample)
    assert (facts.things, facts.tiny) == ((), ("polyp",))


def test_no_case_is_in_both_splits(built):
    cases = {s: {r["image"].split("--")[1:3][0] + r["image"].split("--")[2] for r in rows_of(built.out, [s])}
             for s in ("train", "test")}  # fmt: skip
    assert cases["train"]
    assert cases["test"]
    assert not cases["train"] & cases["test"]
    assert sum(n["cases"] for by in built.split.values() for n in by.values()) == 15
    assert set(built.split) == {"CT, Abdomen", "endoscopy, Polyps"}


def test_patients_named_in_cases_stay_together(source, tmp_path):
    samples = [
        dataclasses.replace(s, case=f"patient{i // 6}_frame{i}")
        for i, s in enumerate(SAMed2DFolder(source)[:18])
    ]
    report = build_mecovqa(
        samples, tmp_path / "out", BuildSettings(case_pattern=r"(patient\d+)_", test_share=0.5), sheet=False
    )
    assert sum(n["cases"] for by in report.split.values() for n in by.values()) == 3
    with pytest.raises(InputError, match="needs a group"):
        build_mecovqa(samples, tmp_path / "o", BuildSettings(case_pattern="patient"))


def test_split_is_stable_and_keyed():
    cases = [f"D--{i}" for i in range(2000)]
    test = {c for c in cases if split_of(c, 0, 0.2) == "test"}
    assert 0.17 < len(test) / len(cases) < 0.23
    assert test < {c for c in cases if split_of(c, 0, 0.4) == "test"}
    assert test != {c for c in cases if split_of(c, 1, 0.2) == "test"}
    assert {split_of(c, 0, 0.0) for c in cases} == {"train"}
    assert {split_of(c, 0, 1.0) for c in cases} == {"test"}


def test_rows_are_in_mecovqas_format(built):
    rows = rows_of(built.out)
    assert {row["task"] for row in rows} == set(TASKS)
    for row in rows:
        assert set(row) <= {"image", "conversations", "answer_type", "task", "split"}
        assert (built.out / row["image"]).is_file()
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        for i, (question, answer) in enumerate(turns_of(row)):
            assert question.startswith("<image>\n") == (i == 0)
            assert question.count("<image>") == (i == 0)
            assert question.count("<region>") == len(
                re.findall(r"<region>masks/[^<]+\.png</region>", question)
            )
            assert answer.count("<SEG>") == len(re.findall(r"<SEG><mask>masks/[^<]+\.png</mask>", answer))
            assert question.count("<region>") <= 1
            assert answer.count("<SEG>") <= 1
            assert "{" not in question + answer
            for path in re.findall(r"masks/[^<]+", question + answer):
                assert pixels(built.out, path).shape == SIZE
                assert pixels(built.out, path).any()
            if row["task"] == "Region":
                assert "<region>" in question
            if row["task"] != "Grounding":
                assert "<SEG>" not in answer


def test_masks_show_what_the_answers_name(built):
    boxes = {name.replace("_", " "): box for name, box in sa_med2d.BOXES.items()}
    seen = set()
    for row in rows_of(built.out, tasks=["Grounding"]):
        for _, answer in turns_of(row):
            found = re.search(r"<ref>(.*?)</ref>.*?<mask>(.*?)</mask>", answer)
            if not found:
                continue
            name, mask = found[1], pixels(built.out, found[2])
            seen.add(name)
            if name == "both kidneys":
                wanted = rectangle(*boxes["left kidney"]) | rectangle(*boxes["right kidney"])
            elif name in ("polyp", "polyps"):
                assert mask.sum() == (80 if name == "polyp" else 240)  # one, or all three
                continue
            else:
                wanted = rectangle(*boxes[name])
            np.testing.assert_array_equal(mask, wanted > 0)
    assert seen >= {"liver", "left kidney", "kidney tumor", "both kidneys", "spleen", "polyp", "polyps"}


def test_absent_structures_are_absent(built):
    kinds = Counter()
    for row in rows_of(built.out):
        case = int(row["image"].split("--")[2].split(".")[-1])
        for question, answer in turns_of(row):
            assert "gallbladder" not in question + answer
            for name, there in (("kidney tumor", case % 2 == 0), ("spleen", case % 3 != 0)):
                if (
                    name in question
                    and "Abdomen" in row["image"]
                    and re.search(r"\b[Nn]ot?\b|nothing", answer)
                ):
                    kinds[row["task"], name] += 1
                    assert not there
    assert kinds["Grounding", "kidney tumor"]
    assert kinds["Complex", "kidney tumor"]
    assert kinds["Grounding", "spleen"]
    negative = built.to_dict()["negative share of grounding turns"]
    assert 0.03 < negative < 0.4


def test_regions_are_masks_boxes_or_squares_of_what_is_named(built):
    boxes = {name.replace("_", " "): rectangle(*box) > 0 for name, box in sa_med2d.BOXES.items()}
    forms = Counter()
    for row in rows_of(built.out, tasks=["Region"]):
        question, answer = turns_of(row)[0]
        path = re.search(r"<region>(.*?)</region>", question)[1]
        form = re.search(r"--(box|point)_", path)
        forms[form[1] if form else "mask"] += 1
        for name, mask in boxes.items():
            if answer.rstrip(".").endswith(name) and form is None:
                np.testing.assert_array_equal(pixels(built.out, path), mask)
    assert min(forms[form] for form in ("mask", "box", "point")) >= 3


def test_complex_answers_follow_from_the_masks(built):
    said = Counter()
    for row in rows_of(built.out, tasks=["Complex"]):
        for question, answer in turns_of(row):
            question = question.removeprefix("<image>\n")
            if "liver" in question and (found := re.search(r"about ([\d.]+)% of the image", answer)):
                assert abs(float(found[1]) - 100 * 25 * 22 / 4800) < 0.5
                said["size"] += 1
            if re.search(r"How many|Count", question) and "Polyps" in row["image"]:
                assert "three" in answer
                said["count"] += 1
            if "right kidney" in answer and "lower left" in answer:
                said["position"] += 1
            if answer.startswith("The liver lies") and "spleen in the image" in answer:
                assert "to the left of the spleen" in answer
                said["relation"] += 1
            if re.search(r"abnormal|finding\b|signs of", question) and "Abdomen" in row["image"]:
                assert answer == "Yes, the image shows a kidney tumor."
                said["abnormal"] += 1
            if "odality" in question:
                assert ("CT" in answer) == ("Abdomen" in row["image"])
                said["modality"] += 1
    assert set(said) == {"size", "count", "position", "relation", "abnormal", "modality"}
    kinds = built.to_dict()["kinds"]
    assert set(kinds) >= {
        "modality", "organ", "presence", "position", "size", "count", "relation", "abnormality", "segment",
        "absent", "each", "name",
    }  # fmt: skip


def test_spacing_and_convention_are_used_only_where_given(source, tmp_path):
    settings = BuildSettings(
        seed=1, types=("complex",), per_image=5, radiological=("Abdomen",), spacing={"Abdomen": [1, 0.5]}
    )
    out = build_mecovqa(SAMed2DFolder(source), tmp_path / "out", settings, sheet=False).out
    texts = {True: "", False: ""}
    for row in rows_of(out, tasks=["Complex"]):
        texts["Abdomen" in row["image"]] += " ".join(answer for _, answer in turns_of(row))
    assert "(275 mm²)" in texts[True]  # the liver: 25 x 22 pixels of 0.5 mm²
    assert "on the patient's right side" in texts[True]
    assert "mm" not in texts[False]
    assert "patient" not in texts[False]


def test_several_structures_in_one_answer_and_names_without_tags(source, tmp_path):
    settings = BuildSettings(seed=2, types=("grounding",), per_image=8, several="answer", refs=False)
    out = build_mecovqa(SAMed2DFolder(source), tmp_path / "out", settings, sheet=False).out
    counts = Counter()
    for row in rows_of(out, tasks=["Grounding"]):
        ((_, answer),) = turns_of(row)
        counts[answer.count("<SEG>")] += 1
        assert answer.count("<SEG><mask>masks/") == answer.count("<SEG>")
        assert "<ref>" not in answer
        if answer.startswith("From left to right"):
            columns = [np.nonzero(pixels(out, p))[1].mean() for p in re.findall(r"masks/[^<]+", answer)]
            assert columns == sorted(columns)
            counts["each"] += 1
    assert counts[2]
    assert counts[3]
    assert counts["each"]


def test_same_seed_same_bytes_other_seed_other_words(source, tmp_path):
    settings = BuildSettings(seed=7)
    for name in ("a", "b"):
        build_mecovqa(SAMed2DFolder(source), tmp_path / name, settings)
    build_mecovqa(SAMed2DFolder(source), tmp_path / "c", BuildSettings(seed=8))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")
    assert (tmp_path / "a" / "sheet.png").stat().st_size > 10_000


def test_new_images_leave_the_other_rows_alone(tmp_path):
    few = sa_med2d.write(tmp_path / "few", cases=6)
    many = sa_med2d.write(tmp_path / "many", cases=12)
    for folder in (few, many):
        build_mecovqa(SAMed2DFolder(folder), tmp_path / f"{folder.name}-out", sheet=False)
    old, new = (
        {
            (r["split"], r["task"], r["image"], json.dumps(r["conversations"]))
            for r in rows_of(tmp_path / name)
        }
        for name in ("few-out", "many-out")
    )
    assert old < new


def test_files_are_linked_or_copied(source, built, tmp_path):
    copied = build_mecovqa(SAMed2DFolder(source), tmp_path / "out", link=False, sheet=False).out
    name = next((built.out / "images").iterdir()).name
    assert (built.out / "images" / name).samefile(source / "images" / name)
    assert not (copied / "images" / name).samefile(source / "images" / name)
    assert (copied / "images" / name).read_bytes() == (source / "images" / name).read_bytes()


def test_arrays_and_other_picture_formats_become_png(tmp_path):
    image = np.full((*SIZE, 3), 90, np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=95)
    mask = rectangle(10, 10, 30, 30) > 0
    samples = [
        ImageSample(image, "X-ray", "Chest", f"c{i}", "", "real", (Structure("heart", mask, "expert"),))
        for i in range(3)
    ]
    samples.append(dataclasses.replace(samples[0], image=tmp_path / "photo.jpg"))
    out = build_mecovqa(samples, tmp_path / "out", BuildSettings(test_share=0), sheet=False).out
    images = {row["image"] for row in rows_of(out)}
    cases = ("c0", "c1", "c2", "c0")
    assert images == {f"images/x_ray--Chest--{case}--{i:06d}.png" for i, case in enumerate(cases)}
    assert {(r.modality, r.case) for r in read("mecovqa", out)} == {("X-ray", f"Chest/{c}") for c in cases}
    with Image.open(out / "images/x_ray--Chest--c0--000003.png") as opened:
        assert (opened.format, opened.size) == ("PNG", SIZE[::-1])


def test_records_of_any_reader_become_questions_about_their_masks(tmp_path):
    rng = np.random.default_rng(0)
    truth = {}
    for split in ("train", "test"):
        for case in ("a b", "c"):
            image = rng.integers(0, 60_000, SIZE).astype(np.uint16)
            (tmp_path / "set" / split / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / split / "images" / f"{case}.tif")
            for label, box in (("left_lung", (5, 5, 25, 40)), ("tumor", (40, 20, 60, 44))):
                folder = tmp_path / "set" / split / "masks" / label
                folder.mkdir(parents=True, exist_ok=True)
                shape = rectangle(*box[:2], box[2] + len(truth), box[3])
                truth[split, case, label.replace("_", " ")] = shape > 0
                Image.fromarray(shape * np.uint8(255)).save(folder / f"{case}.png")
    records = read("folder", tmp_path / "set", split="train", modality="CT", source="mine")
    samples = RecordSamples(records)
    assert [(s.case, s.names, s.dataset) for s in samples] == [
        ("a b", ("left lung", "tumor"), "mine"), ("c", ("left lung", "tumor"), "mine"),
    ]  # fmt: skip
    build_mecovqa(samples, tmp_path / "out", BuildSettings(types=("grounding",), per_image=4))
    built = read("mecovqa", tmp_path / "out", kind="grounding")
    assert {(r.modality, r.case) for r in built} == {("CT", "mine/a_b"), ("CT", "mine/c")}
    seen = set()
    for record in built:
        case = record.case.removeprefix("mine/").replace("_", " ")
        for label, mask in zip(record.labels, record.load_masks(SIZE), strict=True):
            np.testing.assert_array_equal(mask, truth["train", case, label])
            seen.add((case, label))
    assert len(seen) == 4
    assert 0 < built[0].load_images()[0].mean() < 200  # 16 bits, stretched and not cut off
    deep = Image.fromarray(rng.integers(0, 60_000, SIZE).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    sample = ImageSample(tmp_path / "deep.png", "CT", "mine", "a", "train", "real")
    np.testing.assert_array_equal(sample.load_image(), ImageFile(File(str(tmp_path / "deep.png"))).load())
    with pytest.raises(InputError, match="says no modality"):
        RecordSamples(read("folder", tmp_path / "set"))
    with pytest.raises(InputError, match="No record has a mask with a name"):
        RecordSamples([Record((("Q", "A"),), records[0].images, modality="CT")])


def test_names_in_other_scripts_have_files_of_their_own(tmp_path):
    for name, box in (("肺", (5, 5, 25, 40)), ("肝", (40, 20, 60, 44))):
        (tmp_path / "set" / "masks" / name).mkdir(parents=True)
        Image.fromarray(rectangle(*box) * np.uint8(255)).save(tmp_path / "set" / "masks" / name / "a.png")
    (tmp_path / "set" / "images").mkdir()
    Image.fromarray(rectangle(5, 5, 60, 44)).save(tmp_path / "set" / "images" / "a.png")
    samples = RecordSamples(read("folder", tmp_path / "set", modality="CT"))
    build_mecovqa(samples, tmp_path / "out", BuildSettings(types=("grounding",), per_image=4))
    masks = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert {f"ct_00--folder--a--000000--{name}.png" for name in "肺肝"} <= masks


def test_a_picture_in_memory_is_a_case_of_its_own(tmp_path):
    rng, area = np.random.default_rng(0), rectangle(5, 5, 25, 40)
    said = (("Segment the cyst.", "Here is the <ref>cyst</ref> <SEG>."),)
    records = []
    for _ in range(8):
        picture, file = rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8), io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        for image in (Held(picture[::-1]), ImageFile(Bytes(file.getvalue(), "image"))):
            records.append(Record(said, (image,), masks=(Held(area > 0),), modality="CT", labels=("cyst",)))
    samples = RecordSamples(records)
    assert len({sample.case for sample in samples}) == len(records)
    report = build_mecovqa(samples, tmp_path / "out", BuildSettings(types=("grounding",), test_share=0.5))
    (shares,) = report.split.values()
    assert sum(share["images"] for share in shares.values()) == len(records)
    assert all(share["cases"] > 1 for share in shares.values())


def test_the_folder_appears_whole_or_not_at_all(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        build_mecovqa(SAMed2DFolder(source), out)
    with pytest.raises(InputError, match="did not build it"):
        build_mecovqa(SAMed2DFolder(source), out, overwrite=True)
    assert content(out) == {"mine.txt": b"keep me"}
    (out / "mine.txt").unlink()

    class Broken:
        calls = 0

        def write(self, facts, question, draft):
            Broken.calls += 1
            if Broken.calls > 20:
                raise MedPLIBError("the server is gone")
            return draft

    with pytest.raises(MedPLIBError, match="server is gone"):
        build_mecovqa(SAMed2DFolder(source), out, writer=Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(out.iterdir())
    build_mecovqa(SAMed2DFolder(source), out, BuildSettings(seed=1))
    before = content(out)
    with pytest.raises(MedPLIBError, match="server is gone"):
        build_mecovqa(SAMed2DFolder(source), out, writer=Broken(), overwrite=True)
    assert content(out) == before
    build_mecovqa(SAMed2DFolder(source), out, BuildSettings(seed=2), overwrite=True)
    assert content(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_statistics_count_what_is_there(built):
    kept = json.loads((built.out / "statistics.json").read_text())
    assert kept == built.to_dict()
    rows = rows_of(built.out)
    for task in TASKS:
        for split in ("train", "test"):
            here = [r for r in rows if r["task"] == task and r["split"] == split]
            assert kept["rows"][task.lower()][split] == len(here)
            assert kept["turns"][task.lower()][split] == sum(len(turns_of(r)) for r in here)
    words = [
        len(a.split("<mask>")[0].split()) for r in rows for _, a in turns_of(r) if r["task"] == "Complex"
    ]
    assert kept["answer length in words"]["complex"]["mean"] == round(sum(words) / len(words), 2)
    assert kept["images"] == 25


@pytest.mark.parametrize(
    ("draft", "answer", "why"),
    [
        ("The <ref>liver</ref> <SEG>.", "You see the <ref>liver</ref> <SEG> here.", None),
        ("The <ref>liver</ref> <SEG>.", "You see the <ref>liver</ref> here.", "control tokens"),
        ("The <ref>liver</ref> <SEG>.", "The <ref>spleen</ref> <SEG>.", "names"),
        ("The <ref>liver</ref> <SEG>.", "The <ref>liver</ref> <SEG><SEG>.", "control tokens"),
        ("The liver.", "The liver <mask>masks/x.png</mask>.", "control tokens"),
        ("It covers 3.2% of the image.", "About 3.2% of it.", None),
        ("It covers 3.2% of the image.", "About 3.2% of it, or 12 mm.", "invented numbers"),
        ("It covers 3.2% of the image.", "A small part.", "lost numbers"),
        ("No, no tumor is visible.", "Yes, there is no tumor.", "yes or no"),
        ("There is no liver in this image.", "The liver is here.", "lost negation"),
        ("It is CT.", "It is CT. USER: and now?", "a role"),
        ("This is the liver.", "The liver is marked here.", None),
        ("This is the liver.", "This is the spleen.", "names"),
        ("This is the liver.", "This is the liver, near the spleen.", "names"),
        ("This is the liver.", "This is not the liver.", "added negation"),
        ("This is the liver.", "No, this is the liver.", "yes or no"),
        ("This is the liver.", "This is a healthy liver.", "place or finding"),
        ("This is the left lung.", "This is the right lung.", "names"),
        ("It covers 3.2% of the image.", "The liver covers 3.2%.", None),
        ("It covers 3.2% of the image.", "The spleen covers 3.2%.", "names"),
        ("There are three.", "I count 3.", None),
        ("There are three.", "There are five.", "invented numbers"),
        ("There are three.", "There are some.", "lost numbers"),
        ("The liver lies to the left of the left lung.", "To the left of the left lung is it.", "names"),
        ("It is in the upper left part.", "It is in the upper right part.", "place or finding"),
        ("It is in the upper left part.", "It is in the lower left part.", "place or finding"),
        ("No, the liver is not visible.", "No, the liver is here.", "lost negation"),
        ("Yes, no polyp is visible.", "Yes, it is free of a polyp.", None),
        ("It is CT.", "This is MR.", "names"),
        ("It is CT.", " ", "empty"),
        ("It is CT.", "CT " * 900, "too long"),
    ],
)
def test_no_writer_escapes_the_check(draft, answer, why):
    names, others = ("liver", "left lung", "polyp", "CT"), ("spleen", "right lung", "MR")
    assert check_answer(answer, "What is it?", draft, names, others) == why


def test_a_writer_that_renames_a_structure_changes_no_answer(source, tmp_path):
    class Wrong:
        def write(self, facts, question, draft):
            return re.sub("liver", "spleen", draft, flags=re.IGNORECASE)

    wanted = build_mecovqa(SAMed2DFolder(source), tmp_path / "right", sheet=False)
    report = build_mecovqa(SAMed2DFolder(source), tmp_path / "out", writer=Wrong(), sheet=False)
    assert report.fallbacks["names"] == sum(report.fallbacks.values()) > 10
    assert rows_of(report.out) == rows_of(wanted.out)


def test_answers_of_a_writer_are_taken_or_replaced_and_counted(source, tmp_path):
    given = []

    class Writer:
        def write(self, facts, question, draft):
            given.append(facts)
            return (
                draft + " <gen_1>" if "liver" in draft else "Well: " + draft if draft[:2] != "No" else draft
            )

    report = build_mecovqa(SAMed2DFolder(source), tmp_path / "out", writer=Writer(), sheet=False)
    answers = [a for row in rows_of(report.out) for _, a in turns_of(row)]
    assert not any("gen_1" in a for a in answers)
    assert report.fallbacks["control tokens"] == sum("liver" in a for a in answers)
    assert sum(a.startswith("Well: ") for a in answers) > 50
    told = json.dumps(given)
    assert "Abdomen" not in told  # nothing says whose image it is
    assert "p-1" not in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"types": ("vqa",)}, "types must be some of grounding, region, complex"),
        ({"types": ()}, "got none"),
        ({"per_image": 0}, "per_image must be at least 1"),
        ({"negatives": 1.2}, "negatives must be between 0 and 1"),
        ({"several": "both"}, "'turns' or 'answer'"),
        ({"spacing": {"D": [1]}}, "spacing of 'D'"),
        ({"unsure": {"D": [1]}}, r"unsure must list names for 'D'.*got \[1\]"),
        ({"unsure": {"D": "bone"}}, "unsure must list names for 'D'.*got 'bone'"),
    ],
)
def test_unusable_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        BuildSettings(**settings)


def test_unusable_sources_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no SAMed2D_v1\.json"):
        SAMed2DFolder(tmp_path)
    folder = sa_med2d.write(tmp_path / "sa", cases=1)
    with pytest.raises(InputError, match="no images to build from"):
        build_mecovqa([], tmp_path / "out")
    (folder / "SAMed2D_v1_class_mapping_id.json").write_text('{"Abdomen": {"liver": 1}}')
    with pytest.raises(InputError, match="class '0002'"):
        build_mecovqa(SAMed2DFolder(folder), tmp_path / "out")
    (folder / "SAMed2D_v1.json").write_text('{"images/what.png": []}')
    with pytest.raises(InputError, match="is not named like"):
        SAMed2DFolder(folder)
    (folder / "SAMed2D_v1.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        SAMed2DFolder(folder)
    assert not (tmp_path / "out").exists()


def test_missing_images_are_left_out_and_counted(tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=4)
    for path in sorted((folder / "images").iterdir())[:3]:
        path.unlink()
    report = build_mecovqa(SAMed2DFolder(folder), tmp_path / "out", sheet=False)
    assert report.skipped["image missing or unreadable"] == 3
    assert report.images == 7


def test_the_mini_set_can_be_counted_from_python(tmp_path):
    samples = [s for s in load_mini() if s.count is not None][:6]
    report = build_mecovqa(
        samples, tmp_path / "out", BuildSettings(types=("complex",), per_image=8), sheet=False
    )
    asked = [
        (question, answer, row["image"])
        for row in rows_of(report.out, tasks=["Complex"])
        for question, answer in turns_of(row)
        if re.search(r"How many cell nuclei|Count the cell nuclei", question)
    ]
    truth = {f"images/{s.image.name}": s.count for s in samples}
    assert asked
    assert all(answer == f"There are {truth[image]}." for _, answer, image in asked)
