"""The losses and their gradients equal the published implementation's on every recorded case."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from medplib import losses

CLOSE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recorded(golden_dir):
    folder = golden_dir / "losses"
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "losses.safetensors")


def _published(name, logits, targets, predicted_iou, num_masks):
    """The losses with the reduction of the published code: only the BCE is divided by `num_masks`."""
    if name == "dice":
        return losses.dice_loss(logits, targets)
    if name == "bce":
        return losses.mask_bce_loss(logits, targets, num_masks)
    if name == "focal":
        return losses.focal_loss(logits, targets)
    return losses.iou_loss(logits, targets, predicted_iou, pooled=True)


@pytest.mark.parametrize("name", ["dice", "bce", "focal", "iou"])
def test_a_loss_and_its_gradients_equal_the_published_ones(recorded, name):
    cases, tensors = recorded
    assert cases
    for case in cases:
        tag = case["tag"]
        logits = tensors[f"{tag}.pred"].clone().requires_grad_()
        predicted_iou = tensors[f"{tag}.pred_iou"].clone().requires_grad_()
        value = _published(name, logits, tensors[f"{tag}.target"], predicted_iou, case["num_masks"])
        value.backward()
        torch.testing.assert_close(value, tensors[f"{tag}.{name}"], msg=lambda m, t=tag: f"{t}: {m}", **CLOSE)
        torch.testing.assert_close(value.item(), case[name], **CLOSE)
        expected = tensors[f"{tag}.grad_{name}"]
        scale = max(expected.abs().max().item(), 1e-30)  # tiny gradients must agree in proportion too
        torch.testing.assert_close(
            logits.grad / scale, expected / scale, atol=1e-4, rtol=1e-4, msg=lambda m, t=tag: f"{t}: {m}"
        )
        if name == "iou":
            torch.testing.assert_close(predicted_iou.grad, tensors[f"{tag}.grad_iou_pred"], **CLOSE)
