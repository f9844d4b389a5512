"""Image preparation and the way back from the square, against the published implementation."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from medplib.geometry import Letterbox, official_crop
from medplib.preprocess import pad_clip, prepare_clip, prepare_sam

FOLDER = "preprocess"


@pytest.fixture(scope="module")
def cases(golden, golden_dir):
    """(facts, picture, recorded padded CLIP picture, recorded resized SAM picture) of every image."""
    found = []
    for index, facts in enumerate(golden(f"{FOLDER}/preprocess.json")["images"]):
        names = (facts["image"], f"clip_padded_u8_{index}.png", f"sam_resized_u8_{index}.png")
        pictures = [np.array(Image.open(golden_dir / FOLDER / name).convert("RGB")) for name in names]
        found.append((facts, *pictures))
    assert found
    return found


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def stride(full: int, sampled: int, usual: int) -> int:
    """The step that leaves `sampled` of `full` values: of several that do, the usual one."""
    steps = [step for step in range(1, full + 1) if len(range(0, full, step)) == sampled]
    return usual if usual in steps else steps[0]


def test_clip_pictures_have_the_recorded_pixels(cases, golden):
    level = golden(f"{FOLDER}/preprocess.json")["clip_pad_value"]
    for facts, picture, padded, _ in cases:
        size = facts["clip_shape"][-1]
        box = Letterbox(picture.shape[:2], size)
        assert list(box.resized_size) == facts["clip_resized"]
        assert list(box.offset) == facts["clip_pad_top_left"]
        ours = pad_clip(picture, size)
        outside = np.ones((size, size), dtype=bool)
        outside[box.window] = False
        assert (ours[outside] == level).all()
        np.testing.assert_array_equal(ours, padded)


def test_sam_pictures_have_the_recorded_pixels(cases):
    for facts, picture, _, resized in cases:
        box = Letterbox(picture.shape[:2], facts["sam_shape"][-1])
        assert list(box.resized_size) == facts["sam_resized"]
        assert list(box.offset) == facts["sam_pad_top_left"]
        np.testing.assert_array_equal(box.image(picture), resized)


@pytest.mark.parametrize(("kind", "prepare", "usual"), [("clip", prepare_clip, 13), ("sam", prepare_sam, 11)])
def test_normalised_tensors_match_the_recorded_ones(cases, golden, kind, prepare, usual):
    tensors = golden(f"{FOLDER}/preprocess.safetensors")
    for index, (facts, picture, *_) in enumerate(cases):
        ours = prepare(picture, facts[f"{kind}_shape"][-1])
        assert list(ours.shape) == facts[f"{kind}_shape"]
        recorded = tensors[f"{kind}.{index}.strided"]
        step = stride(ours.shape[-1], recorded.shape[-1], usual)
        torch.testing.assert_close(ours[:, ::step, ::step], recorded, rtol=1e-6, atol=1e-6)
        assert ours.double().sum().item() == pytest.approx(facts[f"{kind}_sum"], abs=0.5)
        assert ours.double().abs().sum().item() == pytest.approx(facts[f"{kind}_abs_sum"], abs=0.5)


@pytest.mark.parametrize(("kind", "prepare"), [("clip", prepare_clip), ("sam", prepare_sam)])
def test_normalised_tensors_are_equal_bit_for_bit(cases, kind, prepare):
    for facts, picture, *_ in cases:
        assert sha256(prepare(picture, facts[f"{kind}_shape"][-1])) == facts[f"{kind}_sha256"]


def test_the_official_crop_matches_for_every_recorded_size(golden):
    tensors = golden(f"{FOLDER}/preprocess.safetensors")
    for index, facts in enumerate(golden(f"{FOLDER}/preprocess.json")["post"]):
        low, out = tensors["post.low_res"], tensors[f"post.{index}.out"]
        torch.testing.assert_close(
            official_crop(low, facts["resize"], facts["original"]), out, rtol=1e-5, atol=1e-5
        )
        rows, columns = (slice(*facts[f"effective_{axis}"]) for axis in ("rows", "cols"))
        slow = torch.nn.functional.interpolate(
            low[..., rows, columns], size=facts["original"], mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(slow, out, rtol=1e-5, atol=1e-5)
        box = Letterbox(facts["original"], max(facts["resize"]))
        if list(box.resized_size) == facts["resize"]:
            torch.testing.assert_close(box.unletterbox(low, "official"), out, rtol=1e-5, atol=1e-5)
