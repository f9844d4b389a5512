"""Letterbox and image preparation: where a pixel of the image lands in the square, and how it comes back."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from medplib.errors import InputError
from medplib.geometry import Letterbox, official_crop
from medplib.preprocess import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD, prepare_clip, prepare_sam

SIZES = [
    ((37, 61), 336),
    ((300, 200), 336),
    ((64, 64), 64),
    ((90, 400), 256),
    ((1, 1000), 64),
    ((51, 50), 17),
]


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_the_longest_side_fills_the_square_and_the_rest_is_centred(original, size):
    box = Letterbox(original, size)
    scale = size / max(original)
    assert box.resized_size == tuple(max(1, int(side * scale + 0.5)) for side in original)
    for offset, side in zip(box.offset, box.resized_size, strict=True):
        assert 0 <= (size - side - offset) - offset <= 1  # the odd pixel is after the image
    assert max(box.resized_size) == size


@pytest.mark.parametrize(
    ("original", "size"), [((0, 5), 8), ((5,), 8), ((5, 5), 0), ((5.5, 5), 8), ((4, 4), 2.5)]
)
def test_impossible_sizes_are_refused(original, size):
    with pytest.raises(InputError, match="pixel"):
        Letterbox(original, size)


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_points_return_to_where_they_came_from(original, size):
    box = Letterbox(original, size)
    points = np.random.default_rng(0).random((7, 2)) * original[::-1]
    np.testing.assert_allclose(box.inverse_points(box.points(points)), points, atol=1e-9)


def test_points_and_boxes_scale_with_their_own_axis():
    box = Letterbox((300, 200), 336)  # 336 x 224, 56 columns of padding on the left
    np.testing.assert_allclose(box.points([[0, 0], [200, 300]]), [[56, 0], [280, 336]])
    np.testing.assert_allclose(box.boxes([[0, 0, 200, 300]]), [[56, 0, 280, 336]])
    np.testing.assert_allclose(box.boxes([50, 30, 100, 60]), [112, 33.6, 168, 67.2])


def test_a_point_on_a_landmark_lands_on_the_resized_landmark():
    picture = np.zeros((60, 120, 3), dtype=np.uint8)
    picture[20:30, 90:100] = 255
    box = Letterbox((60, 120), 64)
    square = np.zeros((64, 64), dtype=float)
    square[box.window] = box.image(picture)[..., 0]
    rows, columns = np.nonzero(square > 127)
    (x, y), *_ = box.points([[95.0, 25.0]])
    assert abs(columns.mean() + 0.5 - x) < 0.6
    assert abs(rows.mean() + 0.5 - y) < 0.6


def test_images_that_are_not_rgb_bytes_of_the_right_size_are_refused():
    box = Letterbox((8, 6), 16)
    for wrong in (np.zeros((8, 6, 3)), np.zeros((8, 6), np.uint8), np.zeros((6, 8, 3), np.uint8)):
        with pytest.raises(InputError, match=r"\(8, 6|\(6, 8"):
            box.image(wrong)
    with pytest.raises(InputError, match="8, 6"):
        box.mask(np.ones((6, 8), dtype=bool))


def test_a_full_mask_fills_the_window_and_nothing_else():
    box = Letterbox((30, 50), 33)
    expected = np.zeros((33, 33), dtype=bool)
    expected[box.window] = True
    np.testing.assert_array_equal(box.mask(np.ones((30, 50), dtype=bool)), expected)
    assert not box.mask(np.zeros((30, 50), dtype=bool)).any()


def test_a_single_pixel_survives_a_strong_reduction():
    for row, column in [(0, 0), (1999, 1499), (1234, 321)]:
        mask = np.zeros((2000, 1500), dtype=bool)
        mask[row, column] = True
        box = Letterbox(mask.shape, 64)
        (at,) = np.argwhere(box.mask(mask))
        x, y = box.points([[column + 0.5, row + 0.5]])[0]
        assert abs(at[0] + 0.5 - y) <= 1
        assert abs(at[1] + 0.5 - x) <= 1


def test_a_foreground_of_255_keeps_pixels_that_are_covered_less_than_half():
    mask = np.zeros((100, 100), dtype=bool)
    mask[21:60, 33:70] = True
    box = Letterbox((100, 100), 37)
    half, touched = box.mask(mask), box.mask(mask, foreground=255)
    assert touched.sum() > half.sum()
    assert (touched | half == touched).all()


@pytest.mark.parametrize("original", [(40, 40), (33, 20), (20, 33), (50, 9)])
@pytest.mark.parametrize("low", [16, 64])
def test_unletterbox_undoes_the_letterbox(original, low):
    box = Letterbox(original, 64)
    rows, columns = np.mgrid[: original[0], : original[1]]
    mask = ((rows - original[0] / 2) / original[0]) ** 2 + (
        (columns - original[1] / 2) / original[1]
    ) ** 2 < 0.1
    square = torch.from_numpy(box.mask(mask)).float()[None, None]
    logits = torch.nn.functional.interpolate(square, size=(low, low), mode="area") - 0.5
    back = box.unletterbox(logits) > 0
    assert back.shape == (1, 1, *original)
    union = (back[0, 0].numpy() | mask).sum()
    assert (back[0, 0].numpy() & mask).sum() / union > (0.85 if low == 64 else 0.6)


@pytest.mark.parametrize("original", [(31, 47), (47, 31), (32, 32)])
def test_unletterbox_equals_the_slow_way_mask_by_mask(original):
    box = Letterbox(original, 32)
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = box.unletterbox(logits)
    (top, left), (height, width) = box.offset, box.resized_size
    for i in range(2):
        for j in range(3):
            square = torch.nn.functional.interpolate(logits[i, j][None, None], size=(32, 32), mode="bilinear")
            inside = square[:, :, top : top + height, left : left + width]
            slow = torch.nn.functional.interpolate(inside, size=original, mode="bilinear")[0, 0]
            torch.testing.assert_close(ours[i, j], slow)


def test_unletterbox_takes_any_number_of_leading_dimensions_and_any_precision():
    box = Letterbox((10, 14), 16)
    for shape in [(8, 8), (3, 8, 8), (0, 8, 8), (2, 0, 8, 8)]:
        for geometry in ("correct", "official"):
            out = box.unletterbox(torch.zeros(shape, dtype=torch.bfloat16), geometry)
            assert out.shape == (*shape[:-2], 10, 14)
            assert out.dtype == torch.float32


def test_the_two_geometries_agree_on_square_images_at_full_resolution_only():
    logits = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    square, wide = Letterbox((40, 40), 64), Letterbox((20, 40), 64)
    for box in (square, wide):
        torch.testing.assert_close(box.unletterbox(logits, "official"), box.unletterbox(logits))
    low = logits[..., ::4, ::4]
    assert not torch.allclose(wide.unletterbox(low, "official"), wide.unletterbox(low), atol=0.1)


def test_the_official_crop_counts_its_negative_start_from_the_far_edge():
    logits = torch.arange(64.0).expand(1, 1, 64, 64)  # each pixel holds its column
    out = official_crop(logits, (256, 155), (64, 46))
    assert out[0, 0, 0].tolist() == list(range(18, 64))
    with pytest.raises(InputError, match="correct, official"):
        Letterbox((8, 8), 8).unletterbox(logits, "offical")


@pytest.mark.parametrize("original", [(20, 31), (31, 20), (16, 16)])
def test_prepared_images_equal_the_slow_way(original):
    picture = np.random.default_rng(1).integers(0, 256, (*original, 3), dtype=np.uint8)
    box = Letterbox(original, 32)
    small = np.array(Image.fromarray(picture).resize(box.resized_size[::-1], Image.Resampling.BILINEAR))
    clip, sam = prepare_clip(picture, 32), prepare_sam(picture, 32)
    assert clip.shape == sam.shape == (3, 32, 32)
    assert clip.dtype == sam.dtype == torch.float32
    (top, left), (height, width) = box.offset, box.resized_size
    for c in range(3):
        slow_clip = np.full((32, 32), int(CLIP_MEAN[c] * 255), dtype=float)
        slow_clip[top : top + height, left : left + width] = small[..., c]
        slow_sam = np.zeros((32, 32))
        slow_sam[top : top + height, left : left + width] = (small[..., c] - SAM_MEAN[c]) / SAM_STD[c]
        np.testing.assert_allclose(clip[c], (slow_clip / 255 - CLIP_MEAN[c]) / CLIP_STD[c], atol=1e-5)
        np.testing.assert_allclose(sam[c], slow_sam, atol=1e-5)


def test_letterbox_and_prompts_work_without_torch():
    code = "import sys, medplib.geometry, medplib.prompts.types; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("original_size", "size", "message"),
    [
        (3, 4, "original_size must be .* got 3"),
        (None, 4, "original_size must be .* got None"),
        ("ab", 4, "original_size must be .* got 'ab'"),
        ((math.nan, 4), 4, "original_size must be .* got"),
        ((None, 4), 4, "original_size must be .* got"),
        ((3, 4), None, "size must be a whole number of pixels >= 1, got None"),
        ((3, 4), math.inf, "size must be a whole number of pixels >= 1, got inf"),
    ],
)
def test_sizes_of_another_kind_are_named(original_size, size, message):
    with pytest.raises(InputError, match=message):
        Letterbox(original_size, size)


def test_points_and_boxes_that_are_no_numbers_are_named():
    box = Letterbox((30, 20), 16)
    for use in (lambda: box.points([1, 2, 3]), lambda: box.points("a"), lambda: box.inverse_points(None)):
        with pytest.raises(InputError, match=r"points must be numbers \(\.\.\., 2\), got"):
            use()
    with pytest.raises(InputError, match=r"boxes must be numbers \(\.\.\., 4\), got \[1, 2, 3\]"):
        box.boxes([1, 2, 3])
