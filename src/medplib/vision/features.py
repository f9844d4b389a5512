"""What every vision tower returns: one coarse feature grid and perhaps finer maps for the mask decoder.

B images, C channels, (h, w) the coarse grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """Features of a batch of images.

    `grid` is (B, C, h, w). `skips` are finer maps, finest LAST: (B, C0, 2h, 2w), (B, C1, 4h, 4w), ...
    """

    grid: Tensor
    skips: tuple[Tensor, ...] = ()
