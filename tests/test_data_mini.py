"""The mini set reads as it says it does, and a damaged copy is refused with the reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medplib.data import ImageSample, Structure, default_mini_root, keyed_rng, load_mini
from medplib.errors import InputError, UnknownNameError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def samples():
    return load_mini(REPOSITORY / "examples" / "mini")


@pytest.fixture
def small_copy(tmp_path):
    """A mini set of two images that a test may damage."""
    source = REPOSITORY / "examples" / "mini"
    rows = json.loads((source / "mini.json").read_text())[:2]
    listed = {row["image"]: [m["mask"] for m in row["masks"]] for row in rows}
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in [*listed, *(mask for masks in listed.values() for mask in masks)]:
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "mini.json").write_text(json.dumps(rows))
    (tmp_path / "SAMed2D_v1.json").write_text(json.dumps(listed))
    shutil.copy(source / "SAMed2D_v1_class_mapping_id.json", tmp_path)
    return tmp_path


def test_every_image_and_mask_of_the_mini_set_loads(samples):
    assert len(samples) == 282
    assert sum(len(sample.structures) for sample in samples) == 868
    for sample in samples:
        image, masks = sample.load_image(), sample.load_masks()
        assert image.shape == (256, 256, 3)
        assert image.dtype == np.uint8
        assert masks.shape == (len(sample.structures), 256, 256)
        assert masks.dtype == bool
        assert masks.any(axis=(1, 2)).all()
        assert sample.tier == "real"


def test_splits_are_disjoint_and_make_up_the_whole(samples):
    root = REPOSITORY / "examples" / "mini"
    train, test = ({s.image for s in load_mini(root, split=name)} for name in ("train", "test"))
    assert not train & test
    assert train | test == {s.image for s in samples}


def test_no_ct_or_brain_tumor_case_is_in_both_splits(samples):
    for dataset in ("ChestCT", "BrainT1c"):
        cases = {(s.case, s.split) for s in samples if s.dataset == dataset}
        assert len({case for case, _ in cases}) == len(cases)


def test_the_right_lung_is_on_the_left_of_the_image(samples):
    seen = 0
    for sample in samples:
        if {"right lung", "left lung"} <= set(sample.names):
            right, left = (np.nonzero(sample.load_mask(n))[1].mean() for n in ("right lung", "left lung"))
            assert right < left
            seen += 1
    assert seen > 50


def test_the_example_pictures_are_copies_of_test_images(samples):
    of_test = {s.image.read_bytes() for s in samples if s.split == "test"}
    pictures = sorted((REPOSITORY / "examples" / "images").glob("*.png"))
    assert {"brain_mr.png", "chest_ct.png", "nuclei.png", "retina.png"} <= {p.name for p in pictures}
    for name in ("brain_mr.png", "chest_ct.png", "nuclei.png", "retina.png"):
        assert (REPOSITORY / "examples" / "images" / name).read_bytes() in of_test


def test_microscopy_comes_with_a_count_and_the_rest_without(samples):
    assert all((s.count is not None) == (s.modality == "microscopy") for s in samples)


def test_missing_files_are_named(small_copy):
    mask = sorted((small_copy / "masks").iterdir())[0]
    mask.unlink()
    with pytest.raises(InputError, match=mask.name):
        load_mini(small_copy)


def test_index_files_that_disagree_are_refused(small_copy):
    listed = json.loads((small_copy / "SAMed2D_v1.json").read_text())
    first = next(iter(listed))
    (small_copy / "SAMed2D_v1.json").write_text(json.dumps({**listed, first: listed[first][1:]}))
    with pytest.raises(InputError, match="different masks"):
        load_mini(small_copy)


def test_a_class_name_that_is_not_the_masks_number_is_refused(small_copy):
    rows = json.loads((small_copy / "mini.json").read_text())
    rows[0]["masks"][0]["name"] = "white matter"
    (small_copy / "mini.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="white matter"):
        load_mini(small_copy)


def test_a_folder_without_the_index_an_unknown_split_and_bad_json_are_refused(small_copy, tmp_path):
    with pytest.raises(InputError, match=r"mini\.json"):
        load_mini(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="validation"):
        load_mini(small_copy, split="validation")
    (small_copy / "mini.json").write_text("[{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_mini(small_copy)


def test_the_environment_chooses_the_folder(small_copy, monkeypatch):
    monkeypatch.setenv("MEDPLIB_MINI", str(small_copy))
    assert default_mini_root() == small_copy
    assert len(load_mini()) == 2
    monkeypatch.setenv("MEDPLIB_MINI", str(small_copy / "images"))
    with pytest.raises(InputError, match="MEDPLIB_MINI"):
        default_mini_root()


def test_without_a_checkout_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDPLIB_MINI", raising=False)
    monkeypatch.setattr("medplib.data.mini.__file__", str(tmp_path / "a" / "b" / "c" / "mini.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="set MEDPLIB_MINI"):
        default_mini_root()


def test_a_sample_loads_from_arrays_and_from_files_alike(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mask = image[..., 0] > 100
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")  # 0 and 1, as some sets have it
    here = ImageSample(image, "CT", "d", "c", "train", "real", (Structure("body", mask, "expert"),))
    there = ImageSample(
        tmp_path / "image.png",
        "CT",
        "d",
        "c",
        "train",
        "real",
        (Structure("body", tmp_path / "mask.png", "expert"),),
    )
    for sample in (here, there):
        np.testing.assert_array_equal(sample.load_image(), image)
        np.testing.assert_array_equal(sample.load_mask("body"), mask)
        np.testing.assert_array_equal(sample.load_masks(), mask[None])
    with pytest.raises(UnknownNameError, match="liver"):
        here.load_mask("liver")
    with pytest.raises(UnknownNameError, match="number 1"):
        here.load_mask(1)


def test_a_sample_refuses_what_cannot_be(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match="modality"):
        ImageSample(image, "xray", "d", "c", "train", "real")
    with pytest.raises(InputError, match="tier"):
        ImageSample(image, "CT", "d", "c", "train", "fake")
    other = Structure("body", np.zeros((8, 9), bool), "expert")
    with pytest.raises(InputError, match="8 x 9"):
        ImageSample(image, "CT", "d", "c", "train", "real", (other,)).load_masks()
    with pytest.raises(InputError, match=r"gone\.png"):
        ImageSample(tmp_path / "gone.png", "CT", "d", "c", "train", "real").load_image()


def test_keys_decide_the_random_numbers():
    assert keyed_rng("a", 1).random() == keyed_rng("a", 1).random()
    draws = {keyed_rng(*k).random() for k in (("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a", 1, 0), ("a1",))}
    assert len(draws) == 6


def test_the_data_package_needs_no_torch():
    code = (
        "import sys, medplib.data as d; [getattr(d, n) for n in d.__all__]; import medplib.data.augment; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
