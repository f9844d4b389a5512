"""From mask logits to what a reader wants: masks on the original image, and their scores.

M masks, (h, w) the decoder's mask, (H, W) the original image.
"""

from __future__ import annotations

from torch import Tensor

from medplib.errors import InputError
from medplib.geometry import Geometry, Letterbox


def masks_from_logits(
    logits: Tensor, letterbox: Letterbox, threshold: float = 0.0, geometry: Geometry = "correct"
) -> Tensor:
    """logits (M, h, w) on the network's square -> bool (M, H, W) on the original image.

    `threshold` is a logit: 0.0 is a probability of one half. `geometry` is that of `Letterbox.unletterbox`.
    """
    if logits.ndim != 3:
        raise InputError(f"logits must be (M, h, w), got {tuple(logits.shape)}.")
    return letterbox.unletterbox(logits, geometry=geometry) > threshold  # (M, H, W)


def mask_score(logits: Tensor, threshold: float = 0.0) -> float:
    """Mean probability of the pixels above `threshold` (a logit), 0.0 without any: (h, w) -> number."""
    chosen = logits[logits > threshold]
    return chosen.float().sigmoid().mean().item() if chosen.numel() else 0.0
