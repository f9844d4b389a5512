"""Losses for masks and for the predicted mask quality, each computed per mask in float32 and then averaged.

M masks of (h, w) pixels. Logits are before the sigmoid; targets are 0 or 1 (or between, for soft masks).

Every loss reduces in the same way: `sum(weights * per_mask) / count`. `count` is `num_masks` when given (the
number over all processes, say), else the sum of `weights`, else M. No mask at all gives 0, still attached to
the graph. `pixel_weights` (M, h, w) weigh pixels within each mask; 0 leaves a pixel out.

    loss = 0.5 * dice_loss(logits, targets) + 2.0 * mask_bce_loss(logits, targets)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medplib.errors import InputError

Count = float | Tensor | None


def dice_loss(
    logits: Tensor,
    targets: Tensor,
    num_masks: Count = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """1 - (2 I + eps) / (S + eps) per mask, I = sum(p t), S = sum(p) + sum(t): (M, h, w) twice -> ()."""
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets, pixels = _flat(logits, targets, pixel_weights)
        probability = _weigh(logits.sigmoid(), pixels)
        overlap = 2 * (probability * targets).sum(-1)
        total = probability.sum(-1) + _weigh(targets, pixels).sum(-1)
        return _reduce(1 - (overlap + eps) / (total + eps), num_masks, weights)


def mask_bce_loss(
    logits: Tensor,
    targets: Tensor,
    num_masks: Count = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy, mean over the pixels of each mask: (M, h, w) twice -> ()."""
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets, pixels = _flat(logits, targets, pixel_weights)
        per_pixel = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return _reduce(_mean(per_pixel, pixels), num_masks, weights)


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    num_masks: Count = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Tensor:
    """Focal loss, mean over the pixels of each mask: (M, h, w) twice -> ().

    Foreground pixels weigh `alpha`, background 1 - alpha. As published, the probability is moved by 1e-12
    before the logarithm, which bounds the loss of a saturated wrong pixel near 27.6 times its weight.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets, pixels = _flat(logits, targets, pixel_weights)
        p = logits.sigmoid()
        foreground = -alpha * targets * (1 - p) ** gamma * torch.log(p + 1e-12)
        background = -(1 - alpha) * (1 - targets) * p**gamma * torch.log(1 - p + 1e-12)
        return _reduce(_mean(foreground + background, pixels), num_masks, weights)


def iou_loss(
    logits: Tensor,
    targets: Tensor,
    predicted_iou: Tensor,
    num_masks: Count = None,
    weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    pooled: bool = False,
    eps: float = 1e-7,
) -> Tensor:
    """(soft IoU - predicted IoU)^2 per mask: (M, h, w) twice and (M,) -> (). Both sides receive gradients.

    `pooled` compares every prediction with one IoU over all M masks together, as the published training code
    does when it is given several masks; with one mask the two are equal.
    """
    if predicted_iou.shape != logits.shape[:1]:
        raise InputError(
            f"predicted_iou must be ({logits.shape[0]},), one per mask, got {tuple(predicted_iou.shape)}."
        )
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets, pixels = _flat(logits, targets, pixel_weights)
        probability, area = _weigh(logits.sigmoid(), pixels), _weigh(targets, pixels)
        overlap = (probability * targets).sum(-1)  # (M,)
        total = probability.sum(-1) + area.sum(-1)
        if pooled:
            overlap, total = overlap.sum(0, keepdim=True), total.sum(0, keepdim=True)  # (1,)
        iou = (overlap + eps) / (total - overlap + eps)
        return _reduce((iou - predicted_iou.float()) ** 2, num_masks, weights)


def all_mask_losses(
    logits: Tensor,
    targets: Tensor,
    predicted_iou: Tensor,
    *,
    num_masks: Count = None,
    pixel_weights: Tensor | None = None,
    weights: Any = None,
    pooled_iou: bool = False,
) -> dict[str, Tensor]:
    """The four losses by name: logits (M, h, w), targets and pixel_weights (M, H, W), predicted_iou (M,).

    Logits of another size than the targets are first resized to them, bilinearly. `weights` has the numbers
    `dice`, `bce`, `focal` and `iou` (a `LossConfig`, say); a loss whose weight is 0 is left out. The values
    are not multiplied by the weights.
    """
    if logits.ndim == 3 and targets.ndim == 3 and logits.shape[1:] != targets.shape[1:] and len(logits):
        size = tuple(targets.shape[-2:])
        logits = F.interpolate(logits.float()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    elif not len(logits):
        logits = logits.sum() + logits.new_zeros(targets.shape)
    shared = {"num_masks": num_masks, "pixel_weights": pixel_weights}
    makers = {
        "dice": lambda: dice_loss(logits, targets, **shared),
        "bce": lambda: mask_bce_loss(logits, targets, **shared),
        "focal": lambda: focal_loss(logits, targets, **shared),
        "iou": lambda: iou_loss(logits, targets, predicted_iou, pooled=pooled_iou, **shared),
    }
    return {name: make() for name, make in makers.items() if weights is None or getattr(weights, name)}


def _flat(
    logits: Tensor, targets: Tensor, pixel_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(M, h, w) each -> (M, h*w) in float32, or InputError."""
    if logits.ndim != 3 or logits.shape != targets.shape:
        raise InputError(
            f"logits and targets must be (M, h, w), got {tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    if pixel_weights is None:
        return logits.float().flatten(1), targets.float().flatten(1), None
    if pixel_weights.shape != logits.shape:
        raise InputError(
            f"pixel_weights must be {tuple(logits.shape)} like the targets, got {tuple(pixel_weights.shape)}."
        )
    return logits.float().flatten(1), targets.float().flatten(1), pixel_weights.float().flatten(1)


def _weigh(values: Tensor, pixels: Tensor | None) -> Tensor:
    return values if pixels is None else values * pixels


def _mean(per_pixel: Tensor, pixels: Tensor | None) -> Tensor:
    """(M, h*w) -> (M,): mean over the pixels, weighted where weights are given; 0 where all weights are 0."""
    if pixels is None:
        return per_pixel.mean(-1)
    return (per_pixel * pixels).sum(-1) / pixels.sum(-1).clamp(min=1e-8)


def _reduce(per_mask: Tensor, num_masks: Count, weights: Tensor | None) -> Tensor:
    """(M,) -> (): weighted sum over the count described at the top of this file."""
    if weights is not None:
        if weights.shape != per_mask.shape:
            raise InputError(
                f"weights must be {tuple(per_mask.shape)}, one per mask, got {tuple(weights.shape)}."
            )
        weights = weights.to(per_mask)
        per_mask = per_mask * weights
    if num_masks is not None:
        count = num_masks + 1e-8
    elif weights is not None:
        count = weights.sum().clamp(min=1e-8)
    else:
        count = max(per_mask.numel(), 1)
    return per_mask.sum() / count
