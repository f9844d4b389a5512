"""Tests of `medplib.losses`: each loss equals a slow version, and the reductions do what they say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from medplib import losses
from medplib.errors import InputError


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator) * 2
    targets = (torch.rand(3, 4, 5, generator=generator) > 0.5).float()
    return logits, targets, torch.rand(3, generator=generator)


def _slow(name: str, logits, targets, predicted) -> float:
    """One mask, pixel by pixel, in Python numbers."""
    pairs = [
        (1 / (1 + math.exp(-x)), t)
        for x, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    overlap = sum(p * t for p, t in pairs)
    total = sum(p + t for p, t in pairs)
    if name == "dice":
        return 1 - 2 * overlap / total
    if name == "bce":
        return -sum(math.log(p if t else 1 - p) for p, t in pairs) / len(pairs)
    if name == "focal":
        return sum(
            -0.25 * (1 - p) ** 2 * math.log(p) if t else -0.75 * p**2 * math.log(1 - p) for p, t in pairs
        ) / len(pairs)
    return (overlap / (total - overlap) - float(predicted)) ** 2


def _loss(name: str, logits, targets, predicted, **kwargs):
    if name == "iou":
        return losses.iou_loss(logits, targets, predicted, **kwargs)
    return {"dice": losses.dice_loss, "bce": losses.mask_bce_loss, "focal": losses.focal_loss}[name](
        logits, targets, **kwargs
    )


NAMES = pytest.mark.parametrize("name", ["dice", "bce", "focal", "iou"])


@NAMES
def test_a_loss_is_the_mean_of_the_slow_version_over_masks(name, masks):
    expected = sum(_slow(name, *one) for one in zip(*masks, strict=True)) / 3
    assert _loss(name, *masks).item() == pytest.approx(expected, rel=1e-4)


@NAMES
def test_num_masks_replaces_the_count(name, masks):
    torch.testing.assert_close(_loss(name, *masks, num_masks=6), _loss(name, *masks) / 2)


@NAMES
def test_a_mask_of_weight_zero_is_as_if_it_were_not_there(name, masks):
    weighted = _loss(name, *masks, weights=torch.tensor([1.0, 0.0, 1.0]))
    without = [value[[0, 2]] for value in masks]
    torch.testing.assert_close(weighted, _loss(name, *without))


@NAMES
def test_a_pixel_of_weight_zero_is_as_if_it_were_cut_off(name, masks):
    logits, targets, predicted = masks
    pixels = torch.ones_like(targets)
    pixels[:, 3:] = 0
    cut = _loss(name, logits[:, :3], targets[:, :3], predicted)
    torch.testing.assert_close(_loss(name, logits, targets, predicted, pixel_weights=pixels), cut)


@NAMES
def test_no_mask_gives_zero_that_can_be_differentiated(name):
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    value = _loss(name, logits, torch.zeros(0, 4, 4), torch.zeros(0))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, 4, 4)


@NAMES
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_saturated_logits_give_finite_values_and_gradients(name, target, logit):
    logits = torch.full((1, 3, 3), logit, requires_grad=True)
    value = _loss(name, logits, torch.full((1, 3, 3), target), torch.zeros(1))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@NAMES
def test_half_precision_logits_are_computed_in_float32_even_under_autocast(name, masks):
    logits, targets, predicted = masks
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = _loss(name, half, targets.bfloat16(), predicted)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _loss(name, half.float(), targets, predicted))


def test_the_pooled_iou_is_that_of_all_masks_laid_side_by_side(masks):
    logits, targets, predicted = masks
    joined = [value.reshape(1, 12, 5) for value in (logits, targets)]
    expected = sum(losses.iou_loss(*joined, p[None]) for p in predicted) / 3
    torch.testing.assert_close(losses.iou_loss(logits, targets, predicted, pooled=True), expected)


def test_all_losses_resize_the_logits_to_the_targets_and_leave_out_what_weighs_nothing(masks):
    logits, _, predicted = masks
    targets = (torch.arange(3 * 8 * 10).reshape(3, 8, 10) % 3 == 0).float()
    weights = SimpleNamespace(dice=0.5, bce=2.0, focal=0.0, iou=0.0)
    found = losses.all_mask_losses(logits, targets, predicted, weights=weights)
    large = torch.nn.functional.interpolate(logits[:, None], (8, 10), mode="bilinear")[:, 0]
    assert list(found) == ["dice", "bce"]
    torch.testing.assert_close(found["dice"], losses.dice_loss(large, targets))
    assert list(losses.all_mask_losses(logits, targets, predicted)) == ["dice", "bce", "focal", "iou"]


def test_all_losses_of_no_mask_are_zero():
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    found = losses.all_mask_losses(logits, torch.zeros(0, 8, 8), torch.zeros(0))
    sum(found.values()).backward()
    assert all(value.item() == 0 for value in found.values())


def test_shapes_that_do_not_fit_are_named(masks):
    logits, targets, predicted = masks
    with pytest.raises(InputError, match=r"\(3, 4, 5\) and \(3, 4, 4\)"):
        losses.dice_loss(logits, targets[..., :4])
    with pytest.raises(InputError, match="predicted_iou"):
        losses.iou_loss(logits, targets, predicted[:2])
    with pytest.raises(InputError, match="one per mask"):
        losses.dice_loss(logits, targets, weights=torch.ones(2))
    with pytest.raises(InputError, match="pixel_weights"):
        losses.dice_loss(logits, targets, pixel_weights=torch.ones(3, 4, 4))
