"""Damaged files: a reader gives records or one kind of error, whatever stands in the file."""

import json
import random

import numpy as np
import pytest
from test_readers import put, slake, talk, write_parquet  # noqa: F401, fixtures
from test_readers_masks import coco, mecovqa, sa_med2d, zipped  # noqa: F401, fixtures

from medplib.data import read
from medplib.data.check import check_records
from medplib.errors import MedPLIBError

TRIES = 40
VALUES = [None, True, -1, 1.5, "", "x", [], {}, [None], {"a": 1}, "<SEG>", "<region>", 10**30, "../x", "a\0b"]
PIECES = [b'"', b"{", b"}", b"[", b"]", b"null", b"1e999", b"\xff", b"<SEG>", b",", b"|", b"\\u0000", b"\0"]


def damaged(data, rng):
    """Bytes changed, left out, put in, or the end cut off."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        del data[at : at + rng.randrange(1, 30)]
    elif kind == 2:
        data[at:at] = rng.choice(PIECES)
    else:
        del data[at:]
    return bytes(data)


def confused(data, rng):
    """JSON with one value of another type, or missing."""
    whole, places = json.loads(data), []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(whole)
    inside, key = rng.choice(places)
    if rng.random() < 0.2:
        del inside[key]
    else:
        inside[key] = rng.choice(VALUES)
    return json.dumps(whole).encode()


def try_damage(name, path, file, **options):
    """Damage the file many times; returns how often it could be read all the same."""
    whole, rng, good = file.read_bytes(), random.Random(file.name), 0
    for _ in range(TRIES):
        change = confused if file.suffix == ".json" and rng.random() < 0.6 else damaged
        file.write_bytes(change(whole, rng))
        try:
            check_records(read(name, path, **options))
        except MedPLIBError:
            continue
        good += 1
    file.write_bytes(whole)
    read(name, path, **options)
    return good


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "name", "files"),
    [
        ("slake", "slake", ["train.json", "mask.txt"]),
        ("mecovqa", "mecovqa", ["train/MeCoVQA-Grounding.json", "train/MeCoVQA-Region.json"]),
        ("sa_med2d", "sa_med2d", ["SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"]),
        ("coco", "coco", ["annotations/instances_train.json"]),
    ],
)
def test_damaged_lists_give_records_or_an_input_error(request, kind, name, files):
    root = request.getfixturevalue(kind)
    options = {"masks": True} if name == "slake" else {}
    assert sum(try_damage(name, root, root / file, **options) for file in files) > 0


def test_damaged_archives_and_tables_too(sa_med2d, tmp_path):  # noqa: F811
    archive = zipped(sa_med2d, tmp_path / "all.zip", 8)
    try_damage("sa_med2d", archive, archive, cache=tmp_path / "cache")
    picture = next(iter((sa_med2d / "images").iterdir())).read_bytes()
    rows = [{"image": {"bytes": picture, "path": None}, "question": f"Q{i}", "answer": "A"} for i in range(9)]
    write_parquet(tmp_path / "train.parquet", rows)
    try_damage("vqa_rad", tmp_path / "train.parquet", tmp_path / "train.parquet")
    put(tmp_path / "llava.json", [{"id": "1", "image": "a.png", "conversatons": talk("Q", "A")}] * 3)
    put(tmp_path / "a.png")
    try_damage("llava_med", tmp_path / "llava.json", tmp_path / "llava.json")


def test_damaged_volumes_too(tmp_path):
    import nibabel

    values = (np.arange(10 * 10 * 4).reshape(10, 10, 4) % 3).astype(np.uint8)
    for folder, name in (("labelsTr", "c"), ("imagesTr", "c_0000")):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / folder / f"{name}.nii")
    put(tmp_path / "dataset.json", {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii"})
    for file in ("dataset.json", "labelsTr/c.nii", "imagesTr/c_0000.nii"):
        try_damage("nnunet", tmp_path, tmp_path / file)
