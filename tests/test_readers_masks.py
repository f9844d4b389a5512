"""Readers of sets with masks, each on a small copy of its real format."""

import csv
import json
import pickle
import shutil
import zipfile

import datasets
import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from medplib.data import read
from medplib.data.files import Bytes, File, ImageFile, MaskFile
from medplib.data.readers.coco import polygons_mask
from medplib.errors import InputError
from medplib.prompts.types import Box, Point

NAME = "ct_00--Abdomen.CT-1K--Case_0.1--x_0040"
CLASSES = {"Abdomen.CT-1K": {"liver": 1, "left_kidney": 2, "union_kidney": 3}, "QUBIQ2020": {"brain": 1}}


def picture(path, value=90, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def mask(path, pixels, size=(20, 30), value=255):
    """The first `pixels` pixels are foreground."""
    array = np.zeros(size, np.uint8)
    array.reshape(-1)[:pixels] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------ MeCoVQA


def mecovqa_row(question, answer, image=f"images/{NAME}.png", **more):
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": talk, **more}


@pytest.fixture
def mecovqa(tmp_path):
    root = tmp_path / "MeCoVQA"
    picture(root / "images" / f"{NAME}.png")
    tag = f"masks/{NAME}--0002_000.png"
    mask(root / tag, 40)
    mask(root / "masks" / f"{NAME}--0001_000.png", 7, (10, 15))  # half the image's size
    segment = "Segment the kidney."
    put(root / "train" / "MeCoVQA-Complex.json", [mecovqa_row("Which modality?", "CT.", answer_type="OPEN")])
    put(
        root / "train" / "MeCoVQA-Region.json", [mecovqa_row(f"What is <region>{tag}</region>?", "A kidney.")]
    )
    put(
        root / "train" / "MeCoVQA-Grounding.json",
        [
            mecovqa_row(segment, f"The <ref>kidney</ref> <SEG><mask>{tag}</mask>."),
            mecovqa_row(segment, f"<SEG><mask>masks/{NAME}--0001_000.png</mask>"),
            mecovqa_row(segment, f"<SEG><mask>{tag}</mask>", image=f"images/{NAME}"),
            mecovqa_row(segment, f"<SEG><SEG><mask><mask>{tag}</mask></mask>"),
            mecovqa_row(segment, f"Here: <mask>{tag[:-4]}</mask>"),
            mecovqa_row(segment, f"<SEG><mask>masks/{NAME}--0009_000.png</mask>"),
            mecovqa_row(segment, "<SEG>"),
            mecovqa_row(segment, "<SEG><mask>../../secret.png</mask>"),
            mecovqa_row("", "x"),
            {"image": 3},
        ],
    )
    put(root / "test" / "MeCoVQA_Region_VQA_test.json", [mecovqa_row(f"<region>{tag}</region>?", "Kidney.")])
    put(root / "zeroshot4grounding" / "mr.json", [mecovqa_row(segment, f"<SEG><mask>{tag}</mask>")])
    put(root / "statistics.json", {"no": "conversations"})
    put(tmp_path / "secret.png", {})
    return root


def test_mecovqa_all_three_kinds_and_splits(mecovqa):
    (plain,) = read("mecovqa", mecovqa, split="train", kind="complex")
    assert (plain.turns, plain.task, plain.answer_type) == ((("Which modality?", "CT."),), "vqa", "open")
    assert (plain.modality, plain.case, plain.split) == ("CT", "Abdomen.CT-1K/Case_0.1", "train")
    (region,) = read("mecovqa", mecovqa, split="train", kind="region")
    assert (region.turns[0][0], region.task) == ("What is <region>?", "region")
    assert region.to_sample().prompts[0].to_mask((20, 30)).sum() == 40
    assert [(r.task, r.extra["kind"]) for r in read("mecovqa", mecovqa, split="test")] == [
        ("region", "region")
    ]
    assert [r.split for r in read("mecovqa", mecovqa, split="zeroshot")] == ["zeroshot"]
    assert len(read("mecovqa", mecovqa)) == 9
    assert "no image named" not in read("mecovqa", mecovqa, split="test").report.counts["dropped"]
    with pytest.raises(InputError, match=r"No MeCoVQA file of split 'val'.*train/complex"):
        read("mecovqa", mecovqa, split="val")


def test_mecovqa_repairs_and_reports_its_defects(mecovqa):
    records = read("mecovqa", mecovqa, split="train", kind="grounding")
    assert [r.turns[0][1] for r in records] == [
        "The <ref>kidney</ref> <SEG>.", "<SEG>", "<SEG>", "<SEG>", "Here: <SEG>",
    ]  # fmt: skip
    assert records[0].labels == ("kidney",)
    assert [r.to_sample().masks[0].sum() for r in records] == [40, 28, 40, 40, 40]  # the small one is fitted
    assert records.report.counts["repaired"] == {
        "image path without .png": 1,
        "double tag": 1,
        "mask path without .png": 1,
        "mask without <SEG>": 1,
    }
    assert records.report.counts["dropped"] == {
        "mask missing": 2,
        "a <SEG> without its mask": 1,
        "empty question or answer": 1,
        "no image named": 1,
    }
    assert [r.row for r in records] == [0, 1, 2, 3, 4]
    assert "mask missing, as in masks/" in str(records.report)


def test_mecovqa_takes_pictures_from_a_zip_and_names_from_the_class_table(mecovqa, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(mecovqa.glob("*s/*.png")):
            out.write(file, file.relative_to(mecovqa))
        out.writestr("SAMed2D_v1_class_mapping_id.json", json.dumps(CLASSES))
    json_file = mecovqa / "train" / "MeCoVQA-Region.json"
    (record,) = read("mecovqa", json_file, images=archive)
    assert record.labels == ("left kidney",)
    assert record.to_sample().prompts[0].to_mask((20, 30)).sum() == 40


def test_mecovqa_finds_its_folder_when_the_first_picture_is_missing(mecovqa):
    file = mecovqa / "train" / "MeCoVQA-Complex.json"
    put(file, [mecovqa_row("Which?", "CT.", image="images/gone.png"), *json.loads(file.read_text())])
    records = read("mecovqa", file)
    assert len(records) == 1
    assert records.report.counts["dropped"] == {"image missing": 1}


# ------------------------------------------------------------------------------------------ SA-Med2D


@pytest.fixture
def sa_med2d(tmp_path):
    root = tmp_path / "SAMed2Dv1"
    bad = "mr_00--QUBIQ2020--c--x_0000"
    other = "us_9--Abdomen.CT-1K--c-2--2d_none"
    listed = {
        f"images/{NAME}.png": [f"masks/{NAME}--{end}.png" for end in ("0001_000", "0001_001", "0002_000")],
        f"images/{bad}.png": [f"masks/{bad}--0001_000.png"],
        f"images/{other}.png": [f"masks/{other}--{end}.png" for end in ("0003_000", "0002_000", "0007_000")],
        "images/gone--Abdomen.CT-1K--c--x_0.png": [],
    }
    for name in (NAME, bad, other):
        picture(root / "images" / f"{name}.png")
    for masks in listed.values():
        for number, name in enumerate(masks):
            mask(root / name, 10 * number + 10, value=1 if number % 2 else 255)
    (root / "masks" / f"{other}--0002_000.png").unlink()
    union = np.zeros((20, 30), np.uint8)
    union[-1] = 1  # the second instance of class 1 lies elsewhere
    Image.fromarray(union).save(root / "masks" / f"{NAME}--0001_001.png")
    put(root / "SAMed2D_v1.json", listed)
    put(root / "SAMed2D_v1_class_mapping_id.json", CLASSES)
    return root


def zipped(folder, target, method):
    with zipfile.ZipFile(target, "w", method) as out:
        for file in sorted(folder.rglob("*.*")):
            out.write(file, file.relative_to(folder.parent))
    return target


def test_sa_med2d_has_a_record_per_image_and_class(sa_med2d):
    records = read("sa_med2d", sa_med2d)
    assert [r.labels for r in records] == [("liver",), ("left kidney",), ("kidney",)]
    assert records[0].turns == (("Segment the liver.", "Here is the <ref>liver</ref> <SEG>."),)
    assert [r.to_sample().masks[0].sum() for r in records] == [40, 30, 10]  # 10 + 30: two instances, one mask
    assert [r.modality for r in records] == ["CT", "CT", None]
    assert records[2].case == "Abdomen.CT-1K/c-2"
    assert records.report.counts == {
        "repaired": {},
        "dropped": {
            "data set QUBIQ2020 excluded": 1,
            "mask missing": 1,
            "class without a name": 1,
            "image missing": 1,
        },
        "unknown": {"modality prefix 'us_9'": 1},
    }
    assert records.nbytes == 8 * 5 + 8 * 3  # four images and the end of the file, three records
    assert len(read("sa_med2d", sa_med2d, known_bad=True)) == 4
    for others in ("XR", ()):
        dropped = read("sa_med2d", sa_med2d, exclude=others, verify=False).report.counts["dropped"]
        assert dropped["data set QUBIQ2020 excluded"] == 1
    with pytest.raises(InputError, match="no list of split 'train'"):
        read("sa_med2d", sa_med2d, split="train")


def test_sa_med2d_leaves_out_a_data_set_given_as_a_text(sa_med2d):
    listed = [f"images/{NAME}.png", "images/mr_00--XR--c--2d_none.png"]
    mask(sa_med2d / "masks" / "mr_00--XR--c--2d_none--0001_000.png", 9)
    picture(sa_med2d / listed[1])
    rows = {name: [name.replace("images", "masks").replace(".png", "--0001_000.png")] for name in listed}
    put(sa_med2d / "SAMed2D_v1.json", rows)
    put(sa_med2d / "SAMed2D_v1_class_mapping_id.json", CLASSES | {"XR": {"lung": 1}})
    for exclude in ("XR", ["XR"], {"XR"}):
        assert [r.extra["dataset"] for r in read("sa_med2d", sa_med2d, exclude=exclude)] == ["Abdomen.CT-1K"]


def test_sa_med2d_has_a_record_per_image_if_wanted(sa_med2d):
    first, second = read("sa_med2d", sa_med2d, per="image")
    assert [q for q, _ in first.turns] == ["Segment the liver.", "Segment the left kidney."]
    assert [m.sum() for m in first.to_sample().masks] == [40, 30]
    assert second.labels == ("kidney",)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_sa_med2d_is_read_straight_from_its_zip(sa_med2d, tmp_path, method):
    archive = zipped(sa_med2d, tmp_path / "SA-Med2D.zip", method)
    records = read("sa_med2d", archive, cache=tmp_path / "cache")
    folder = read("sa_med2d", sa_med2d)
    assert [(r.turns, r.labels, r.case) for r in records] == [(r.turns, r.labels, r.case) for r in folder]
    assert records.fingerprint() == folder.fingerprint()
    for mine, theirs in zip(records, folder, strict=True):
        assert (mine.load_images()[0] == theirs.load_images()[0]).all()
        assert (mine.load_masks((20, 30))[0] == theirs.load_masks((20, 30))[0]).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the list alone is unpacked
    assert pickle.loads(pickle.dumps(records))[1].load_masks((20, 30))[0].sum() == 30  # noqa: S301


def test_sa_med2d_split_archives_are_named_with_the_remedy(sa_med2d, tmp_path):
    archive = zipped(sa_med2d, tmp_path / "SA-Med2D-20M.zip", zipfile.ZIP_STORED)
    archive.with_suffix(".z01").write_bytes(b"part")
    for path in (archive, archive.with_suffix(".z01")):
        with pytest.raises(InputError, match=r"split archive.*`zip -s 0 SA-Med2D-20M\.zip --out whole\.zip`"):
            read("sa_med2d", path)


def test_sam_med2d_lists_are_read_both_ways(sa_med2d):
    masks = [f"data_demo/masks/{NAME}--{end}.png" for end in ("0001_000", "0002_000")]
    image = f"data_demo/images/{NAME}.png"
    put(sa_med2d / "image2label_train.json", {image: masks})
    put(sa_med2d / "label2image_test.json", dict.fromkeys(masks, image))
    for name, split in (("image2label_train", "train"), ("label2image_test", "test")):
        table = sa_med2d / "SAMed2D_v1_class_mapping_id.json"
        records = read("sa_med2d", sa_med2d / f"{name}.json", classes=table)
        assert [(r.labels, r.split) for r in records] == [(("liver",), split), (("left kidney",), split)]
        assert [r.to_sample().masks[0].sum() for r in records] == [10, 30]
    (sa_med2d / "SAMed2D_v1.json").unlink()
    assert len(read("sa_med2d", sa_med2d, split="test")) == 2


# ------------------------------------------------------------------------------------------ a folder, a table


def test_folder_of_images_and_masks(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / "images" / "a.jpg")
        picture(tmp_path / split / "images" / "alone.png")
        mask(tmp_path / split / "masks" / "left_lung" / "a.png", 20)
        mask(tmp_path / split / "masks" / "tumor" / "b.png", 20)
    records = read("folder", tmp_path, modality="x-ray", source="mine")
    assert [(r.split, r.labels, r.modality) for r in records] == [
        ("train", ("left lung",), "X-ray"),
        ("val", ("left lung",), "X-ray"),
    ]
    assert records[0].to_sample().masks[0].sum() == 20
    assert records.report.counts["dropped"] == {"mask without an image": 2, "image without a mask": 2}
    assert [r.split for r in read("folder", tmp_path, split="val")] == ["val"]
    assert read("folder", tmp_path / "train")[0].split is None
    with pytest.raises(InputError, match="modality must be one of"):
        read("folder", tmp_path, modality="smell")
    with pytest.raises(InputError, match="holds no folder images/"):
        read("folder", tmp_path / "train" / "masks")


def test_csv_with_columns_of_your_own(tmp_path):
    picture(tmp_path / "a.png")
    mask(tmp_path / "m.png", 5)
    mask(tmp_path / "n.png", 9)
    (tmp_path / "table.csv").write_text(
        "file,prompt,reply,mask,region,box,point,name,modality,fold,patient\n"
        "a.png,What is it?,A scan.,,,,,,MRI,train,p1\n"
        "a.png,,,m.png,,,,the spot,MRI,train,p1\n"
        "a.png,Find both.,Here.,m.png;n.png,,,,,CT,validation,p2\n"
        "a.png,What is here?,Fat.,,n.png,1 2 10 12,3 4,,,train,p1\n"
        "a.png,,,,,1 2 10 12,,fat,,train,p1\n"
        "gone.png,What?,That.,,,,,,,train,p1\n"
        "a.png,What?,That.,,,1 2 3,,,,train,p1\n"
        "a.png,What?,,,,,,,,train,p1\n"
    )
    columns = {
        "image": "file", "question": "prompt", "answer": "reply", "mask": "mask", "region": "region",
        "box": "box", "point": "point", "label": "name", "modality": "modality", "split": "fold",
        "case": "patient",
    }  # fmt: skip
    records = read("folder", tmp_path / "table.csv", columns=columns, modality="ultrasound")
    assert [r.turns[0] for r in records] == [
        ("What is it?", "A scan."),
        ("Segment the the spot.", "Here is the <ref>the spot</ref> <SEG>."),
        ("Find both.", "Here. <SEG> <SEG>"),
        ("What is here? <region> <region> <region>", "Fat."),
        ("What is in <region>?", "This is the fat."),
    ]
    assert [r.modality for r in records] == ["MR", "MR", "CT", "ultrasound", "ultrasound"]
    assert [m.sum() for m in records[2].to_sample().masks] == [5, 9]
    assert records[3].regions[:2] == (Box(1, 2, 10, 12), Point(3, 4))
    assert records.report.counts["dropped"] == {
        "file missing": 1, "box without 4 numbers": 1, "empty question or answer": 1,
    }  # fmt: skip
    assert [r.case for r in read("folder", tmp_path / "table.csv", split="val", columns=columns)] == ["p2"]
    with pytest.raises(InputError, match=r"no column 'question'. There: file, prompt"):
        read("folder", tmp_path / "table.csv", columns={"question": "question"})
    with pytest.raises(InputError, match="No column can be called 'picture'"):
        read("folder", tmp_path / "table.csv", columns={"picture": "file"})


def table(path, *rows):
    """A CSV of image, question, answer, modality, answer_type, split; short rows are filled up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["image", "question", "answer", "modality", "answer_type", "split"])
        out.writerows([*row, *[""] * (6 - len(row))] for row in rows)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "Image,Question,Answer,Mask\na.png,What?,Fat.,\na.png,Where?,Here.,m.png\n"),
        ("t.csv", "image,question,answer,mask,Box\na.png,What?,Fat.,,no\na.png,Where?,Here.,m.png,no\n"),
        ("t.csv", "image;question;answer;mask\na.png;What?;Fat.;\na.png;Where?;Here.;m.png\n"),
        ("t.csv", "image;question;answer;mask;from (x, y, z)\na.png;What?;Fat.;;\n"
         "a.png;Where?;Here.;m.png;\n"),
        ("t.tsv", "image\tquestion\tanswer\tmask\tnotes, others, dates\na.png\tWhat?\tFat.\t\t\n"
         "a.png\tWhere?\tHere.\tm.png\t\n"),
        ("t.tsv", "image\tquestion\tanswer\tmask\na.png\tWhat?\tFat.\t\na.png\tWhere?\tHere.\tm.png\n"),
        ("t.json", '[{"image": "a.png", "question": "What?", "answer": "Fat."}, {"image": "a.png", '
         '"question": "Where?", "answer": "Here.", "mask": "m.png"}]'),
        ("t.jsonl", '{"image": "a.png", "question": "What?", "answer": "Fat."}\n{"image": "a.png", '
         '"question": "Where?", "answer": "Here.", "mask": ["m.png"]}\n'),
    ],
)  # fmt: skip
def test_a_table_may_be_of_any_common_kind(tmp_path, name, text):
    picture(tmp_path / "a.png")
    mask(tmp_path / "m.png", 5)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    records = read("folder", tmp_path / name)
    assert [r.turns[0] for r in records] == [("What?", "Fat."), ("Where?", "Here. <SEG>")]
    assert [m.sum() for m in records[1].to_sample().masks] == [5]


def test_a_table_without_rows_or_with_line_ends_of_no_kind_is_refused(tmp_path):
    (tmp_path / "t.json").write_text('{"image": "a.png", "question": "What?"}')
    with pytest.raises(InputError, match="must hold a list of rows"):
        read("folder", tmp_path / "t.json")
    (tmp_path / "t.csv").write_bytes(b"image,question\ra.png,What?\r")
    with pytest.raises(InputError, match="is no CSV table near byte 0"):
        read("folder", tmp_path / "t.csv")


def test_an_empty_mask_is_a_denial_where_that_is_said(tmp_path):
    for name, pixels in (("ill", 5), ("well", 0)):
        picture(tmp_path / "images" / f"{name}.png")
        mask(tmp_path / "masks" / "lesion" / f"{name}.png", pixels)
    (tmp_path / "images" / "._ill.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "masks" / "lesion" / "._ill.png").write_bytes(b"what a Mac leaves")
    assert [len(r.masks) for r in read("folder", tmp_path)] == [1, 1]
    ill, well = read("folder", tmp_path, empty="absent")
    assert (ill.task, ill.labels, ill.load_masks((20, 30))[0].sum()) == ("grounding", ("lesion",), 5)
    assert (well.turns, well.masks) == ((("Segment the lesion.", "There is no lesion in this image."),), ())
    with pytest.raises(InputError, match="empty must be 'drawn' or 'absent', got 'left'"):
        read("folder", tmp_path, empty="left")


def test_masks_without_a_folder_per_class_are_named_by_an_option(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png", 5)
    with pytest.raises(InputError, match=r"no folder per class; say what its masks show by label=NAME"):
        read("folder", tmp_path)
    records = read("folder", tmp_path, label="polyp")
    assert [(r.labels, r.load_masks((20, 30))[0].sum()) for r in records] == [(("polyp",), 5)] * 2
    assert not records.report


def test_a_folder_may_hold_dicom_and_names_what_is_no_picture(tmp_path):
    files = pytest.importorskip("pydicom.data", reason="reading DICOM needs pydicom")
    scan = files.get_testdata_file("CT_small.dcm", download=False)
    (tmp_path / "images").mkdir()
    shutil.copy(scan, tmp_path / "images" / "ct.DCM")
    (tmp_path / "images" / "notes.txt").write_text("x")
    mask(tmp_path / "masks" / "body" / "ct.png", 50, size=(128, 128))
    records = read("folder", tmp_path)
    assert records[0].load_images()[0].shape == (128, 128, 3)
    assert records.report.examples == {
        ("unknown", "file that is no picture by its name"): ["images/notes.txt"]
    }


def test_masks_of_a_lossy_file_have_no_halo(tmp_path):
    y, x = np.mgrid[:120, :150]
    truth = ((x - 70) / 30) ** 2 + ((y - 60) / 20) ** 2 < 1
    picture(tmp_path / "images" / "a.png", size=truth.shape)
    for folder, ending in (("j", "jpg"), ("w", "webp")):
        (tmp_path / "masks" / folder).mkdir(parents=True)
        white = Image.fromarray(truth.astype(np.uint8) * np.uint8(255))
        white.save(tmp_path / "masks" / folder / f"a.{ending}", quality=75)
    for record in read("folder", tmp_path):
        np.testing.assert_array_equal(record.load_masks(truth.shape)[0], truth)


def test_csv_reports_what_it_leaves_out(tmp_path):
    picture(tmp_path / "a.png")
    file = table(
        tmp_path / "table.csv",
        ("a.png", "Heat?", "Yes.", "Thermography", "essay"),
        ("a.png", "Slice?", "Yes.", "MRI", "Closed"),
        ("", "Nothing?", "Yes."),
    )
    records = read("folder", file)
    assert [(r.modality, r.answer_type) for r in records] == [(None, None), ("MR", "closed")]
    assert records.report.counts["unknown"] == {"modality 'Thermography'": 1, "answer_type 'essay'": 1}
    assert records.report.counts["dropped"] == {"image missing": 1}
    assert records.report.examples["dropped", "image missing"] == ["row 2 of table.csv"]


def test_csv_paths_may_be_absolute_but_do_not_lead_out(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    there = str(tmp_path / "elsewhere" / "a.png")
    rows = [(there, "Q", "A"), (f"{there}x", "Q", "A"), ("../elsewhere/a.png", "Q", "A")]
    records = read("folder", table(tmp_path / "here" / "table.csv", *rows))
    assert [r.row for r in records] == [0]
    assert records[0].load_images()[0].shape == (20, 30, 3)
    assert records.report.counts["dropped"] == {
        "file missing": 1,
        "file outside the folder that paths start from": 1,
    }


def test_csv_names_its_splits(tmp_path):
    picture(tmp_path / "a.png")
    rows = [("a.png", "Q", "A", "CT", "", split) for split in ("train", "test", "")]
    with pytest.raises(InputError, match=r"table.csv' has no split 'tset'\. Known: test, train\."):
        read("folder", table(tmp_path / "table.csv", *rows), split="tset")


def test_a_colour_of_a_lossy_mask_counts_as_white_does_and_lossless_webp_keeps_small_values(tmp_path):
    values = np.zeros((64, 64), np.uint8)
    values[20:40, 20:40], values[48:60, 48:60] = 255, 60
    coloured = np.zeros((64, 64, 3), np.uint8)
    coloured[20:40, 20:40], coloured[48:60, 48:60] = (255, 0, 0), 255
    for name, pixels, options in (
        ("grey.webp", values, {"lossless": True}),
        ("colour.webp", coloured, {"lossless": True}),
        ("colour.jpg", coloured, {"quality": 95, "subsampling": 0}),
        ("red.jpg", coloured * (values == 255)[..., None], {"quality": 95, "subsampling": 0}),
    ):
        Image.fromarray(pixels).save(tmp_path / name, **options)
        found = MaskFile(File(str(tmp_path / name))).load()
        np.testing.assert_array_equal(found, pixels.reshape(64, 64, -1).any(axis=2), err_msg=name)


def test_a_split_of_what_has_none_is_refused_with_the_remedy(tmp_path):
    picture(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "lesion" / "a.png", 5)
    put(tmp_path / "records.jsonl", {"turns": [["Q", "A"]], "images": ["images/a.png"]})
    file = table(tmp_path / "table.csv", ("images/a.png", "Q", "A"))
    for name, path in (("folder", tmp_path), ("folder", file), ("jsonl", tmp_path)):
        with pytest.raises(InputError, match=r"no split 'train', and no other; without one \(null\)"):
            read(name, path, split="train")


def test_csv_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "table.csv").write_bytes("image,question,answer\na.png,où,là\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"table.csv' is not UTF-8 text: byte 29 is 0xf9\. Save it as UTF-8"):
        read("folder", tmp_path / "table.csv")


@pytest.mark.parametrize("name", ["mecovqa", "folder"])
def test_paths_with_backslashes_are_repaired(mecovqa, tmp_path, name):
    if name == "mecovqa":
        file = mecovqa / "train" / "MeCoVQA-Region.json"
        put(file, json.loads(file.read_text().replace("images/", r"images\\").replace("masks/", r"masks\\")))
    else:
        file = table(mecovqa / "table.csv", (rf"images\{NAME}.png", "Which?", "A kidney.", "CT"))
    (record,) = records = read(name, file)
    assert record.modality == "CT"
    assert record.load_images()[0].shape == (20, 30, 3)
    assert [m.mask.sum() for m in record.load_regions((20, 30))] == ([40] if name == "mecovqa" else [])
    assert records.report.counts["repaired"] == {"path with backslashes": 1 + (name == "mecovqa")}


# ------------------------------------------------------------------------------------------ nnU-Net


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_slices_lie_as_a_radiologist_sees_them(tmp_path, version):
    root = tmp_path / "Dataset001_Toy"
    labels = np.zeros((12, 16, 9), np.uint8)  # x to the right, y to the front, z up
    labels[8:12, 4:10, 1] = 1  # at the patient's right
    labels[0, 0, 1], labels[0:4, 0:5, 2] = 1, 2
    scan = np.where(labels == 1, 300, -100).astype(np.int16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])  # stored from right to left, back to front reversed
    for folder, values, name in (("labelsTr", labels, "case.1"), ("imagesTr", scan, "case.1_0000")):
        (root / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(values[::-1, ::-1], lps)
        nibabel.save(image, root / folder / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), root / "labelsTr" / "lonely.nii.gz")
    about = {
        1: {"labels": {"0": "background", "1": "left_kidney", "2": "tumor"}, "modality": {"0": "CT"}},
        2: {
            "labels": {"background": 0, "left_kidney": 1, "tumor": 2},
            "channel_names": {"0": "CT"},
            "file_ending": ".nii.gz",
        },
    }[version]
    put(root / "dataset.json", about)
    records = read("nnunet", root, window=(-100, 300), min_pixels=2)
    assert [(r.labels, r.extra["slice"], r.case, r.modality) for r in records] == [
        (("left kidney",), 1, "case.1", "CT"),
        (("tumor",), 2, "case.1", "CT"),
    ]
    sample = records[0].to_sample()
    assert sample.images[0].shape == (16, 12, 3)
    wanted = np.zeros((16, 12), bool)
    wanted[6:12, 0:4] = wanted[15, 11] = True  # the front is up, the patient's right is left
    assert (sample.masks[0] == wanted).all()
    assert (sample.images[0][..., 0] == np.where(wanted, 255, 0)).all()
    assert records.report.counts["dropped"] == {"image missing": 1}
    assert records.nbytes < 8 * 2 + 20
    (small,) = read("nnunet", root, min_pixels=25)
    assert small.labels == ("left kidney",)
    front = read("nnunet", root, axis="coronal", min_pixels=2).filter(lambda r: r.labels == ("left kidney",))
    assert [r.extra["slice"] for r in front] == [4, 5, 6, 7, 8, 9]
    wanted = np.zeros((9, 12), bool)
    wanted[7, 0:4] = True  # the head is up
    assert (front[0].load_masks((9, 12))[0] == wanted).all()
    assert front[0].load_images()[0].shape == (9, 12, 3)
    with pytest.raises(InputError, match="axis must be one of sagittal"):
        read("nnunet", root, axis="z")
    with pytest.raises(InputError, match="no split 'val'"):
        read("nnunet", root, split="val")
    (root / "labelsTr" / "lonely.nii.gz").unlink()
    (root / "labelsTr" / "case.1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match="labels unreadable"):
        read("nnunet", root)


def toy_volume(root, labels):
    """nnU-Net data of one case whose only slice has these values, with dataset.json's `labels`."""
    values = np.array([[0, 1, 2], [3, 4, 2], [0, 0, 2]], np.uint8)[..., None]
    for folder, name in (("labelsTr", "c"), ("imagesTr", "c_0000")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / folder / f"{name}.nii.gz")
    put(root / "dataset.json", {"labels": labels, "channel_names": {"0": "CT"}})
    return root


def test_nnunet_regions_are_unions_of_labels(tmp_path):
    regions = {"background": 0, "whole_tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    records = read("nnunet", toy_volume(tmp_path, regions), min_pixels=1)
    found = {record.labels[0]: int(record.load_masks((3, 3))[0].sum()) for record in records}
    assert found == {"whole tumor": 5, "core": 4, "enhancing": 1}
    assert records.report.counts["unknown"] == {"pixels to be ignored, taken as background": 1}
    records = read("nnunet", toy_volume(tmp_path, {"background": 0, "core": [2, 3]}), min_pixels=1)
    assert [record.labels for record in records] == [("core",)]
    assert records.report.counts["unknown"] == {"label 1": 1, "label 4": 1}
    with pytest.raises(InputError, match="names no labels besides the background"):
        read("nnunet", toy_volume(tmp_path, {"background": 0, "ignore": 4}))


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_nnunet_sets_of_pictures(tmp_path, ending):
    labels = np.zeros((20, 30), np.uint8)
    labels[2:6, 3:9], labels[10:15, 12:20] = 1, 2
    picture(tmp_path / "imagesTr" / f"c_0000{ending}", 70)
    (tmp_path / "labelsTr").mkdir()
    Image.fromarray(labels).save(tmp_path / "labelsTr" / f"c{ending}")
    about = {"labels": {"background": 0, "cyst": 1, "all": [1, 2]}, "channel_names": {"0": "R", "1": "G"}}
    put(tmp_path / "dataset.json", {**about, "file_ending": ending})
    cyst, both = sorted(read("nnunet", tmp_path), key=lambda record: record.labels, reverse=True)
    assert (cyst.labels, cyst.case, cyst.load_images()[0].max()) == (("cyst",), "c", 70)
    np.testing.assert_array_equal(cyst.load_masks((20, 30))[0], labels == 1)
    np.testing.assert_array_equal(both.load_masks((20, 30))[0], labels > 0)
    Image.fromarray(labels).save(
        tmp_path / "labelsTr" / "c.tif", save_all=True, append_images=[Image.fromarray(labels)]
    )
    if ending == ".tif":
        with pytest.raises(InputError, match="holds 2 pictures; a case of pictures has one"):
            read("nnunet", tmp_path)


# ------------------------------------------------------------------------------------------ COCO


@pytest.fixture
def coco(tmp_path):
    picture(tmp_path / "images" / "a.png", size=(40, 60))
    packed = coco_mask.encode(np.asfortranarray(np.pad(np.ones((5, 6), np.uint8), ((3, 32), (2, 52)))))
    loose = {"size": [40, 60], "counts": [0, 10, 2390]}
    polygon = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]
    notes = [
        (1, 1, [polygon]),
        (1, 2, {"size": packed["size"], "counts": packed["counts"].decode()}),
        (1, 1, loose),
        (1, 3, [polygon]),
        (9, 1, [polygon]),
        (2, 1, [polygon]),
        (1, 1, []),
    ]
    put(
        tmp_path / "annotations" / "instances_train.json",
        {
            "info": {"year": 2026},
            "images": [
                {"id": 1, "file_name": "a.png", "height": 40, "width": 60},
                {"id": 2, "file_name": "gone.png", "height": 40, "width": 60},
            ],
            "annotations": [
                {"id": i, "image_id": image, "category_id": kind, "segmentation": shape, "iscrowd": 0}
                for i, (image, kind, shape) in enumerate(notes)
            ]
            + [{"id": 99, "image_id": 1, "category_id": 1, "segmentation": loose, "iscrowd": 1}],
            "categories": [{"id": 1, "name": "nucleus"}, {"id": 2, "name": "big_vessel"}],
        },
    )
    return tmp_path


def test_coco_has_a_record_per_image_and_category(coco):
    nucleus, vessel = records = read("coco", coco, modality="microscopy")
    assert records.nbytes == 8 * (2 + 8 + 1) + 8 * 3 + 16 * 2 + 8  # of 8 annotations 3 are used
    assert nucleus.turns == (("Segment the nucleus.", "Here is the <ref>nucleus</ref> <SEG>."),)
    assert (nucleus.split, nucleus.modality, nucleus.extra) == (
        "train", "microscopy", {"image_id": 1, "instances": 2},
    )  # fmt: skip
    drawn = nucleus.to_sample().masks[0]
    assert drawn[10:20, 10:30].all()
    assert drawn.sum() == 200 + 10
    assert drawn[:10, 0].all()  # runs go down the columns
    assert vessel.to_sample().masks[0][3:8, 2:8].all()
    assert vessel.load_masks((40, 60))[0].sum() == 30
    assert len(read("coco", coco / "annotations" / "instances_train.json", crowds=True)) == 2
    assert read("coco", coco).report.counts["dropped"] == {
        "image missing": 1,
        "annotation without a segmentation or image": 1,
        "crowd": 1,
        "annotation without an image": 2,
        "unknown category": 1,
    }


def change(file, **lists):
    """Put more into the lists of a COCO file."""
    whole = json.loads(file.read_text())
    for name, more in lists.items():
        whole[name] += more
    put(file, whole)


def read_now(path):
    """The records of a COCO folder, made before the file changes, and the report."""
    records = read("coco", path)
    return list(records), records.report


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ([[1, 1]], "damaged segmentation"),
        ([[1, 1, 5, 1, 5, float("nan")]], "damaged segmentation"),
        ({"size": [40, 60], "counts": "no such text"}, "damaged segmentation"),
        ({"size": [40, 60], "counts": [5, 5]}, "damaged segmentation"),
        ({"size": [60, 40], "counts": [0, 10, 2390]}, "run-length encoding of another size than its image"),
    ],
)
def test_coco_drops_a_bad_instance_and_keeps_the_one_beside_it(coco, shape, kind):
    before, report = read_now(coco)
    note = {"id": 50, "image_id": 1, "category_id": 1, "segmentation": shape}
    change(coco / "annotations" / "instances_train.json", annotations=[note])
    records = read("coco", coco)
    assert [r.extra["instances"] for r in records] == [2, 1]
    assert (records[0].to_sample().masks[0] == before[0].to_sample().masks[0]).all()
    assert records.report.counts["dropped"] == report.counts["dropped"] | {kind: 1}


def test_a_modality_in_other_words_is_understood_and_an_unknown_one_refused(coco, tmp_path):
    assert {r.modality for r in read("coco", coco, modality="light microscopy")} == {"microscopy"}
    for name, path in (("coco", coco), ("huggingface", tmp_path)):
        with pytest.raises(InputError, match=r"modality must be one of CT, MR, .*, got 'smell'"):
            read(name, path, modality="smell")


def test_coco_takes_whole_numbers_written_with_a_point(coco):
    file = coco / "annotations" / "instances_train.json"
    before, report = read_now(coco)
    whole = json.loads(file.read_text())
    for row in (*whole["images"], *whole["annotations"], *whole["categories"]):
        row |= {name: float(value) for name, value in row.items() if isinstance(value, int)}
    put(file, whole)
    records = read("coco", coco)
    assert records.report.counts == report.counts
    assert [r.turns for r in records] == [r.turns for r in before]
    assert [m.sum() for r in records for m in r.load_masks((40, 60))] == [210, 30]


def test_coco_reports_ids_used_twice_empty_names_and_bare_images(coco):
    before, report = read_now(coco)
    change(
        coco / "annotations" / "instances_train.json",
        images=[{"id": number, "file_name": "a.png", "height": 40, "width": 60} for number in (1, 5, 6)],
        categories=[{"id": 1, "name": "other"}, {"id": 7, "name": " "}],
        annotations=[{"id": 50, "image_id": 5, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
    )
    records = read("coco", coco)
    assert [r.turns for r in records] == [r.turns for r in before]
    assert records.report.counts["dropped"] == report.counts["dropped"] | {
        "image id used twice": 1,
        "category id used twice": 1,
        "category without a name": 1,
        "unknown category": 2,
        "image without annotations": 2,
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")
def test_polygons_agree_with_pycocotools_but_for_the_outline():
    rng = np.random.default_rng(0)
    for _ in range(30):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(8, 30, 9)
        points = np.stack([45 + radius * np.cos(angles), 40 + radius * np.sin(angles)], 1)
        theirs = coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], 80, 90))[..., 0] > 0
        mine = polygons_mask([points.reshape(-1).tolist()], (80, 90))
        assert (mine & theirs).sum() / (mine | theirs).sum() > 0.94
        differs = mine != theirs
        inner = (
            theirs[1:-1, 1:-1] & theirs[:-2, 1:-1] & theirs[2:, 1:-1] & theirs[1:-1, :-2] & theirs[1:-1, 2:]
        )
        assert not (differs[1:-1, 1:-1] & inner).any()
    assert polygons_mask([[-9, -9, 200, -9, 200, 200, -9, 200]], (8, 9)).all()
    for bad in ([[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[0, 0, 1, float("nan"), 2, 2]]):
        with pytest.raises(InputError, match=r"polygon"):
            polygons_mask(bad, (8, 9))


# ------------------------------------------------------------------------------------------ Hugging Face


def hf_rows():
    image = Image.fromarray(np.full((20, 30), 50, np.uint8))
    seg = np.zeros((20, 30), np.uint8)
    seg[:4] = 1
    return {
        "scan": [image, image, image],
        "prompt": ["What?", "Find it.", ""],
        "reply": ["That.", "Here <SEG>.", "x"],
        "seg": [None, Image.fromarray(seg), None],
    }


def test_hugging_face_data_sets_of_every_form(tmp_path):
    features = datasets.Features(
        {
            "scan": datasets.Image(),
            "prompt": datasets.Value("string"),
            "reply": datasets.Value("string"),
            "seg": datasets.Image(),
        }
    )
    whole = datasets.Dataset.from_dict(hf_rows(), features=features)
    split = datasets.DatasetDict({"train": whole, "validation": whole.select([0])})
    split.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    whole.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    vqa = {"image": "scan", "question": "prompt", "answer": "reply"}
    for given in (split, tmp_path / "saved", tmp_path / "parquet"):
        records = read("huggingface", given, split="train", columns=vqa, modality="CT", source="mine")
        assert [r.turns for r in records] == [(("What?", "That."),)]
        assert (records[0].source, records[0].split, records[0].modality) == ("mine", "train", "CT")
        assert (records[0].load_images()[0] == 50).all()
        assert isinstance(records[0].images[0], ImageFile)
        assert isinstance(records[0].images[0].file, Bytes)
        assert records.report.counts["dropped"] == {"not a record": 1, "empty question or answer": 1}
        again = pickle.loads(pickle.dumps(records))  # noqa: S301
        assert again[0].load_images()[0].shape == (20, 30, 3)
    assert [r.split for r in read("huggingface", split, split="val", columns=vqa)] == ["val"]
    grounding = read("huggingface", whole.select([1]), columns={**vqa, "mask": "seg"})
    assert grounding[0].to_sample().masks[0].sum() == 4 * 30
    with pytest.raises(InputError, match="no column 'picture'"):
        read("huggingface", whole, columns={"image": "picture", "question": "prompt"})
    with pytest.raises(InputError, match="needs a column question"):
        read("huggingface", whole)
    with pytest.raises(InputError, match="a Dataset or a DatasetDict, got list"):
        read("huggingface", [1, 2])


@pytest.mark.parametrize("form", ["loaded", "saved", "parquet"])
def test_hugging_face_classes_have_names_and_missing_pictures_are_reported(tmp_path, form):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["liver", "spleen"]),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    seg = Image.fromarray(np.eye(20, 30, dtype=np.uint8))
    rows = {
        "image": [seg, None, seg, seg],
        "mask": [seg, seg, None, None],
        "label": [1, 0, None, 0],
        "question": ["", "", "Is it large?", "Is it?"],
        "answer": [None, None, 1, -1],
    }
    given = datasets.Dataset.from_dict(rows, features=features)
    if form == "saved":
        given.save_to_disk(tmp_path / "saved")
        given = tmp_path / "saved"
    elif form == "parquet":
        given.to_parquet(tmp_path / "rows.parquet", batch_size=1)
        given = tmp_path / "rows.parquet"
    records = read("huggingface", given)
    assert [r.turns[0] for r in records] == [
        ("Segment the spleen.", "Here is the <ref>spleen</ref> <SEG>."),
        ("Is it large?", "yes"),
    ]
    assert records[0].labels == ("spleen",)
    assert [len(r.to_sample().masks) for r in records] == [1, 0]
    assert records.report.counts["dropped"] == {"image missing": 1, "empty question or answer": 1}


def test_parquet_pictures_named_by_path_are_looked_for(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        {"image": {"bytes": None, "path": name}, "question": "Q", "answer": "A"}
        for name in ("a.png", "gone.png")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (record,) = records = read("huggingface", tmp_path / "rows.parquet")
    assert record.load_images()[0].shape == (20, 30, 3)
    assert records.report.counts["dropped"] == {"file missing": 1}


def test_parquet_class_out_of_range_is_refused(tmp_path):
    names = {"label": {"names": ["liver"], "_type": "ClassLabel"}}
    table = pa.table({"question": ["Q"], "label": [7]})
    about = json.dumps({"info": {"features": names}})
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="column 'label' holds 7, but its classes are 0 to 0"):
        read("huggingface", tmp_path / "rows.parquet", columns={"question": "question", "answer": "label"})


def test_parquet_with_lists_of_masks_and_conversations(tmp_path):
    mask(tmp_path / "m.png", 3)
    picture(tmp_path / "a.png")
    data = {"bytes": (tmp_path / "m.png").read_bytes(), "path": None}
    talk = [{"from": "human", "value": "<image>\nBoth?"}, {"from": "gpt", "value": "<SEG> and <SEG>"}]
    table = pa.Table.from_pylist([{"image": "a.png", "conversations": talk, "mask": [data, data]}])
    pq.write_table(table, tmp_path / "rows.parquet")
    (record,) = read("huggingface", tmp_path / "rows.parquet")
    assert record.turns == (("Both?", "<SEG> and <SEG>"),)
    assert [m.sum() for m in record.to_sample().masks] == [3, 3]
