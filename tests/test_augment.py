"""Augmentation: image and masks move together, left stays left, and a key decides everything."""

import math

import numpy as np
import pytest

from medplib.data.augment import Move, augment, change_intensity, draw_move, resample, strip_skull
from medplib.data.samples import MODALITIES, keyed_rng
from medplib.data.textures import Blob, fractal, grid
from medplib.errors import InputError

IDENTITY = Move(np.eye(2), np.zeros(2))


def scene(seed, size=96):
    """A bright smooth shape on black, and its masks at two thresholds."""
    x, y = grid(size)
    blob = Blob.draw(keyed_rng(seed), (0.35, 0.5), 0.1)
    level = (1.5 - blob.polar(x, y)[0]).clip(0, 1) * 255
    image = np.repeat(level.astype(np.uint8)[..., None], 3, axis=2)
    return image, np.stack([image[..., 0] >= 64, image[..., 0] >= 160])


def slow_resample(image, masks, move, outside):
    """One pixel at a time."""
    height, width, channels = image.shape
    new_image, new_masks = np.zeros_like(image), np.zeros_like(masks)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])

    def index(p, length):
        if outside == "black":
            return p if 0 <= p < length else None
        if outside == "mirror" and p < 0:
            p = -p
        if outside == "mirror" and p > length - 1:
            p = 2 * (length - 1) - p
        return min(max(p, 0), length - 1)

    def value(array, row, column):
        row, column = index(row, height), index(column, width)
        return 0 if row is None or column is None else array[row, column]

    for row in range(height):
        for column in range(width):
            sx, sy = move.matrix @ (np.array([column, row]) - centre) + centre + move.offset
            if move.bend is not None:
                sx, sy = sx + move.bend[0, row, column], sy + move.bend[1, row, column]
            left, top = math.floor(sx), math.floor(sy)
            fx, fy = sx - left, sy - top
            for c in range(channels):
                plane = image[..., c].astype(float)
                upper = value(plane, top, left) * (1 - fx) + value(plane, top, left + 1) * fx
                lower = value(plane, top + 1, left) * (1 - fx) + value(plane, top + 1, left + 1) * fx
                new_image[row, column, c] = int(upper * (1 - fy) + lower * fy + 0.5)
            for m, mask in enumerate(masks):
                new_masks[m, row, column] = value(mask, math.floor(sy + 0.5), math.floor(sx + 0.5))
    return new_image, new_masks


@pytest.mark.parametrize("outside", ["black", "edge", "mirror"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resampling_agrees_with_one_pixel_at_a_time(outside, channels):
    rng = keyed_rng("slow", outside)
    image = rng.integers(0, 256, (23, 31, channels), np.uint8)
    masks = rng.random((10, 23, 31)) < 0.5  # more than eight: more than one byte of bits
    move = draw_move(rng, (23, 31), flips=outside == "mirror")
    fast, slow = resample(image, masks, move, outside), slow_resample(image, masks, move, outside)
    assert np.abs(fast[0].astype(int) - slow[0]).max() <= 1
    assert (fast[1] != slow[1]).mean() < 0.002  # positions half way between two pixels round either way


def test_not_moving_changes_nothing():
    image, masks = scene(0)
    for outside in ("black", "edge", "mirror"):
        same_image, same_masks = resample(image, masks, IDENTITY, outside)
        np.testing.assert_array_equal(same_image, image)
        np.testing.assert_array_equal(same_masks, masks)


@pytest.mark.parametrize("modality", MODALITIES)
def test_masks_stay_on_what_they_mark(modality):
    """The masks are the image above two levels; after any move they still are, but for the outlines."""
    for seed in range(6):
        image, masks = scene(seed, 160)
        rng = keyed_rng(modality, seed)
        move = draw_move(rng, image.shape[:2], flips=modality in ("histopathology", "microscopy"))
        moved, moved_masks = resample(image, masks, move, "black")
        for level, mask in zip((64, 160), moved_masks, strict=True):
            again = moved[..., 0] >= level
            assert (again & mask).sum() / (again | mask).sum() > 0.96


def test_shapes_and_types_are_kept_and_the_input_is_not_touched():
    image, masks = scene(1, 64)
    image, masks = image[:, :50], masks[:, :, :50]
    before = image.copy(), masks.copy()
    for modality in MODALITIES:
        new_image, new_masks = augment(image, masks, keyed_rng(modality), modality=modality)
        assert new_image.shape == image.shape
        assert new_image.dtype == np.uint8
        assert new_masks.shape == masks.shape
        assert new_masks.dtype == bool
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(masks, before[1])
    none, no_masks = augment(image, masks[:0], keyed_rng(0), modality="CT")
    assert none.shape == image.shape
    assert no_masks.shape == (0, 64, 50)


def test_the_same_key_gives_the_same_variant_and_another_key_another():
    image, masks = scene(2)
    first, second, other = (augment(image, masks, keyed_rng(k), modality="MR") for k in ("a", "a", "b"))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("modality", [m for m in MODALITIES if m not in ("histopathology", "microscopy")])
def test_left_and_right_are_never_swapped(modality):
    x, y = grid(96)
    left, right, top = (np.hypot(x - a, y - b) < 0.12 for a, b in ((-0.3, 0), (0.3, 0), (0, -0.3)))
    image = np.zeros((96, 96, 3), np.uint8)
    image[left], image[right], image[top] = 80, 200, 140
    seen = 0
    for seed in range(150):
        _, masks = augment(image, np.stack([left, right, top]), keyed_rng(seed), modality=modality)
        if masks.any(axis=(1, 2)).all():
            (_, x0), (_, x1), (y2, _) = (np.mean(np.nonzero(mask), axis=1) for mask in masks)
            y0, y1 = (np.mean(np.nonzero(mask)[0]) for mask in masks[:2])
            assert x0 < x1
            assert y2 < (y0 + y1) / 2
            seen += 1
    assert seen > 100


def handedness(masks):
    """The sign of the triangle a, b, c: a flip changes it, a rotation does not."""
    a, b, c = (np.mean(np.nonzero(mask), axis=1) for mask in masks)
    return np.sign((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0])


def test_slides_are_flipped_and_turned_unless_a_name_says_left_or_right():
    x, y = grid(96)
    masks = np.stack([np.hypot(x - a, y - b) < 0.12 for a, b in ((-0.3, 0), (0.3, 0), (0, -0.3))])
    image = np.repeat((masks.any(axis=0) * np.uint8(200))[..., None], 3, axis=2)
    hands, turned = set(), 0
    for seed in range(40):
        _, moved = augment(image, masks, keyed_rng(seed), modality="microscopy", names=["a", "b", "c"])
        if moved.any(axis=(1, 2)).all():
            hands.add(handedness(moved))
            a, b = (np.mean(np.nonzero(mask), axis=1) for mask in moved[:2])
            turned += abs(a - b)[0] > abs(a - b)[1]
        _, moved = augment(
            image, masks, keyed_rng(seed), modality="microscopy", names=["left cell", "b", "c"]
        )
        if moved.any(axis=(1, 2)).all():
            assert handedness(moved) == handedness(masks)
    assert hands == {-1, 1}
    assert turned > 5


def test_bending_never_folds_the_image():
    for seed in range(300):
        move = draw_move(keyed_rng(seed), (64, 64), flips=False)
        if move.bend is not None:
            assert np.diff(move.bend[0], axis=1).min() > -0.5  # x still grows to the right
            assert np.diff(move.bend[1], axis=0).min() > -0.5


def test_brighter_stays_brighter():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 4, axis=0)
    for seed in range(60):
        rng = keyed_rng("ramp", seed)
        for pixels, colour in ((ramp, False), (np.repeat(ramp, 3, axis=2), True)):
            changed = change_intensity(pixels, rng, colour).astype(float).mean(axis=0)  # (256, C)
            thirds = np.array([changed[:85].mean(0), changed[85:170].mean(0), changed[170:].mean(0)])
            assert (np.diff(thirds, axis=0) > 0).all()


def test_grey_images_stay_grey_and_colour_channels_change_apart():
    image, masks = scene(3)
    colour = np.stack([image[..., 0], image[..., 0] // 2, image[..., 0] // 3], axis=2)
    for seed in range(10):
        grey, _ = augment(image, masks, keyed_rng(seed), modality="dermoscopy")
        assert (grey == grey[..., :1]).all()
    red, green = (change_intensity(colour, keyed_rng("tint", c), True).mean((0, 1)) for c in "ab")
    assert abs(red[0] / red[2] - green[0] / green[2]) > 0.01


def test_a_head_loses_its_skull_only_when_the_brain_is_named():
    image, masks = scene(4)  # the wider mask stands for the head, the narrower for the brain
    stripped, cut = strip_skull(image, masks, ["head", "brain"])
    assert not stripped[~masks[1]].any()
    np.testing.assert_array_equal(stripped[masks[1]], image[masks[1]])
    np.testing.assert_array_equal(cut, np.stack([masks[1], masks[1]]))
    for names in (["head", "gray matter"], ()):
        assert strip_skull(image, masks, names)[0] is image
    bare = sum(
        augment(image, masks, keyed_rng(s), modality="MR", names=["head", "brain"])[1][0].sum()
        == augment(image, masks, keyed_rng(s), modality="MR", names=["head", "brain"])[1][1].sum()
        for s in range(60)
    )
    assert 4 <= bare <= 24  # one in five


def test_wrong_input_is_refused():
    image, masks = scene(5, 32)
    rng = keyed_rng(0)
    for bad in (
        {"modality": "xray"},
        {"image": image[..., 0]},
        {"image": image / 255},
        {"masks": masks[0]},
        {"masks": masks[:, :-1]},
        {"masks": masks.astype(np.uint8)},
        {"names": ["body"]},
    ):
        given = {"image": image, "masks": masks, "modality": "CT", **bad}
        with pytest.raises(InputError, match=next(iter(bad))):
            augment(given.pop("image"), given.pop("masks"), rng, **given)


def test_noise_has_the_promised_size():
    field = fractal(keyed_rng("noise"), 128, 16)
    assert abs(field.mean()) < 0.3
    assert 0.5 < field.std() < 1.5
