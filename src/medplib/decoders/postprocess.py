"""From mask logits to what a reader wants: masks on the original image, scores, areas and boxes.

M masks, (h, w) the decoder's mask, (H, W) the original image.
"""

from __future__ import annotations

import numpy as np
import torch
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


def mask_area(mask: Tensor | np.ndarray) -> int:
    """Number of foreground pixels of a mask (H, W)."""
    return int((_array(mask)).sum())


def mask_box(mask: Tensor | np.ndarray) -> tuple[int, int, int, int] | None:
    """Tight box (x0, y0, x1, y1) of a mask (H, W); x1 and y1 lie just outside it. None for an empty mask."""
    mask = _array(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def remove_small_parts(mask: Tensor | np.ndarray, min_area: int) -> np.ndarray:
    """A copy of a mask (H, W), bool, without its connected parts of fewer than `min_area` pixels.

    Pixels that share a side are connected. Works on runs: the stretches of foreground within each row.
    """
    mask = _array(mask)
    edges = np.diff(
        np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1
    )  # 1 where a run starts, -1 after it
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    roots = _connect(rows, starts, stops)
    area = np.bincount(roots, weights=stops - starts, minlength=len(rows))
    kept = np.zeros_like(mask)
    for run in np.flatnonzero(area[roots] >= min_area):
        kept[rows[run], starts[run] : stops[run]] = True
    return kept


def _connect(rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """For each run, sorted by row and start, the index of the run that stands for its connected part."""
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0  # the first run of the row before that may still touch the current run
    for run in range(len(rows)):
        while above < run and (
            rows[above] < rows[run] - 1 or (rows[above] == rows[run] - 1 and stops[above] <= starts[run])
        ):
            above += 1
        other = above
        while other < run and rows[other] == rows[run] - 1 and starts[other] < stops[run]:
            parent[root(other)] = root(run)
            other += 1
    return np.array([root(run) for run in range(len(rows))], dtype=np.int64)


def _array(mask: Tensor | np.ndarray) -> np.ndarray:
    """bool (H, W) in memory, or InputError."""
    array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if array.ndim != 2:
        raise InputError(f"A mask must be (H, W), got shape {array.shape}.")
    return array != 0
