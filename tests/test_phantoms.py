"""Phantoms and simulated PET: exact masks, honest tiers, the same image for the same seed."""

from pathlib import Path

import numpy as np
import pytest

from medplib.data import PHANTOMS, ImageSample, Structure, keyed_rng, load_mini, make_phantom, simulate_pet
from medplib.data.phantoms import SMALLEST
from medplib.data.textures import blur, look_up
from medplib.errors import InputError, UnknownNameError

SEEDS = range(12)
STRUCTURES = {
    "dermoscopy": {"skin lesion"},
    "endoscopy": {"polyp", "instrument"},
    "ultrasound": {"cyst", "solid mass"},
    "fundus": {"optic disc", "fovea", "retinal vessels"},
}


@pytest.fixture(scope="module")
def phantoms():
    return {kind: [make_phantom(kind, seed, size=96) for seed in SEEDS] for kind in PHANTOMS}


@pytest.fixture(scope="module")
def ct():
    root = Path(__file__).resolve().parents[1] / "examples" / "mini"
    return [s for s in load_mini(root, split="train") if s.modality == "CT"]


def contrast(sample, name):
    """Mean grey inside the structure, and in the ring of 3 pixels around it."""
    grey, mask = sample.load_image().mean(axis=2), sample.load_mask(name)
    wide = blur(mask.astype(np.float32), 2) > 0.05
    ring = wide & ~sample.load_masks().any(axis=0) & (grey > 12)  # not the black beyond the picture
    return grey[mask].mean(), grey[ring].mean()


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_a_phantom_is_a_labelled_synthetic_sample(phantoms, kind):
    for sample in phantoms[kind]:
        assert sample.tier == "synthetic"
        assert sample.modality == kind
        assert sample.load_image().shape == (96, 96, 3)
        assert sample.load_image().dtype == np.uint8
        assert sample.load_image().std() > 5
        assert sample.structures
        assert set(sample.names) <= STRUCTURES[kind]
        assert all(structure.provenance == "exact" for structure in sample.structures)
        assert (sample.load_masks().sum(axis=(1, 2)) >= SMALLEST).all()


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_every_structure_occurs(phantoms, kind):
    assert {name for sample in phantoms[kind] for name in sample.names} == STRUCTURES[kind]


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_the_same_seed_gives_the_same_phantom_and_another_seed_or_split_another(phantoms, kind):
    again = make_phantom(kind, 3, size=96)
    np.testing.assert_array_equal(again.load_image(), phantoms[kind][3].load_image())
    np.testing.assert_array_equal(again.load_masks(), phantoms[kind][3].load_masks())
    other = make_phantom(kind, 3, size=96, split="test")
    assert (other.split, again.split) == ("test", "train")
    assert other.case != again.case
    for different in (other, phantoms[kind][4]):
        assert (different.load_image() != again.load_image()).mean() > 0.2


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_phantoms_come_in_the_size_asked_for(kind):
    sample = make_phantom(kind, 0, size=64)
    assert sample.load_image().shape == (64, 64, 3)
    assert sample.load_masks().shape[1:] == (64, 64)


def test_masks_lie_on_what_the_image_shows(phantoms):
    """Darker lesions, black cysts, bright discs, dark vessels: of the structure against its surroundings."""
    darker = [(s, n) for k in ("dermoscopy", "ultrasound", "fundus") for s in phantoms[k] for n in s.names]
    for sample, name in darker:
        if name in ("skin lesion", "cyst", "retinal vessels"):
            inside, around = contrast(sample, name)
            assert inside < around, (sample.case, name)
        elif name == "optic disc" and sample.load_mask(name).sum() > 60:
            inside, around = contrast(sample, name)
            assert inside > around


def test_an_instrument_hides_the_polyp_behind_it():
    both = [s for seed in range(40) if len((s := make_phantom("endoscopy", seed, size=48)).names) == 2]
    assert both
    for sample in both:
        assert not (sample.load_mask("polyp") & sample.load_mask("instrument")).any()


def test_the_disc_of_a_right_eye_is_right_of_its_fovea(phantoms):
    seen = set()
    for sample in phantoms["fundus"]:
        if {"optic disc", "fovea"} <= set(sample.names):
            disc, fovea = (np.nonzero(sample.load_mask(n))[1].mean() for n in ("optic disc", "fovea"))
            assert sample.laterality == ("right" if disc > fovea else "left")
            seen.add(sample.laterality)
    assert seen == {"left", "right"}


def test_nothing_is_marked_outside_the_scan(phantoms):
    for sample in phantoms["ultrasound"] + phantoms["fundus"]:
        height = sample.load_image().shape[0]
        corner = np.add(*np.indices((height, height))) < 4
        assert not sample.load_masks()[:, corner & (sample.load_image().max(axis=2) == 0)].any()


def test_unknown_kinds_and_tiny_sizes_are_refused():
    with pytest.raises(UnknownNameError, match="dermoscopy"):
        make_phantom("dermoscope", 0)
    with pytest.raises(InputError, match="32"):
        make_phantom("fundus", 0, size=8)


def test_pet_keeps_the_body_of_its_ct_and_is_called_simulated(ct):
    for i, slice_ in enumerate(ct[::8]):
        pet = simulate_pet(slice_, keyed_rng("pet", i))
        assert (pet.modality, pet.tier, pet.case, pet.split) == (
            "PET",
            "simulated",
            slice_.case,
            slice_.split,
        )
        assert pet.names[0] == "body"
        np.testing.assert_array_equal(pet.load_mask("body"), slice_.load_mask("body"))
        image, body = pet.load_image().astype(float), pet.load_mask("body")
        assert image.shape == slice_.load_image().shape
        assert abs(image[body].mean() - image[~body].mean()) > 15
        again = simulate_pet(slice_, keyed_rng("pet", i))
        np.testing.assert_array_equal(pet.load_image(), again.load_image())


def test_a_lung_tumor_is_the_hottest_thing_in_its_pet(ct):
    tumors = [s for s in ct if "lung tumor" in s.names]
    assert tumors
    for slice_ in tumors:
        pet = simulate_pet(slice_, keyed_rng("hot", slice_.image.name))
        image, mask = pet.load_image()[..., 0].astype(float), slice_.load_mask("lung tumor")
        assert pet.names == ("body", "lung tumor")
        rest = image[slice_.load_mask("body") & ~mask].mean()
        background = image[~slice_.load_mask("body")].mean()
        assert abs(image[mask].mean() - background) > abs(rest - background)


def test_pet_is_simulated_from_ct_only():
    image = np.zeros((32, 32, 3), np.uint8)
    body = Structure("body", np.ones((32, 32), bool), "derived")
    with pytest.raises(InputError, match="MR"):
        simulate_pet(ImageSample(image, "MR", "d", "c", "train", "real", (body,)), keyed_rng(0))
    with pytest.raises(InputError, match="no masks"):
        simulate_pet(ImageSample(image, "CT", "d", "c", "train", "real"), keyed_rng(0))


def test_blur_keeps_the_total_and_look_up_reads_between_pixels():
    field = np.zeros((21, 31), np.float32)
    field[10, 15] = 1
    assert blur(field, 1.5).sum() == pytest.approx(1, abs=1e-5)
    assert blur(field, (0, 2.0))[9].sum() == 0
    ramp = np.add.outer(np.arange(5.0), 10 * np.arange(6.0))
    assert look_up(ramp, np.array(1.25), np.array(2.5)) == pytest.approx(26.25)
