"""Overlap of masks, in numpy."""

from __future__ import annotations

import numpy as np


def dice(prediction: np.ndarray, target: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool arrays of equal shape; 1.0 when both are empty."""
    total = int(prediction.sum()) + int(target.sum())
    return 1.0 if total == 0 else 2.0 * int(np.logical_and(prediction, target).sum()) / total


def iou(prediction: np.ndarray, target: np.ndarray) -> float:
    """|A and B| / |A or B| of two bool arrays of equal shape; 1.0 when both are empty."""
    union = int(np.logical_or(prediction, target).sum())
    return 1.0 if union == 0 else int(np.logical_and(prediction, target).sum()) / union
