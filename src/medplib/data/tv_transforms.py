"""Any transform of torchvision.transforms.v2 as a draw of Augmentation: what became of the picture, and where
each of its pixels came from. Letters: H height, W width before; h, w after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from medplib.errors import InputError, UnknownNameError

INSIDE = -7.0  # the map's third plane, which no fill of a picture equals
OUTSIDE = -10.0  # the place of an output pixel that shows nothing of the input
MAX_TURN = 45.0  # degrees: beyond them an upright picture is upright no more


def named_transforms(named: Mapping[str, Any]) -> v2.Transform:
    """{"RandomAffine": {"degrees": 10}, "ColorJitter": {"brightness": 0.2}} -> these, one after another.

    Raises UnknownNameError for a name that torchvision.transforms.v2 lacks, InputError for arguments that its
    transform refuses.
    """
    known = [n for n in dir(v2) if isinstance(k := getattr(v2, n), type) and issubclass(k, v2.Transform)]
    made = []
    for name, arguments in named.items():
        if name not in known:
            raise UnknownNameError.among(
                f"augment.transform: torchvision.transforms.v2 has no '{name}'.", name, known
            )
        if not isinstance(arguments or {}, Mapping):
            raise InputError(
                f"augment.transform.{name} must be a mapping of arguments, got {arguments!r:.80}."
            )
        try:
            made.append(getattr(v2, name)(**(arguments or {})))
        except (TypeError, ValueError) as error:
            raise InputError(f"augment.transform.{name} cannot be made: {error}") from error
    return v2.Compose(made)


@dataclass(frozen=True)
class Drawn:
    """image uint8 (h, w, 3); x, y float32 (h, w): where its pixels came from, OUTSIDE where from nowhere."""

    image: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @cached_property
    def matrix(self) -> np.ndarray:
        """(2, 2): how the place in the source changes with x and y of the output, on average."""
        inside = self.x != OUTSIDE
        across, down = inside[:, 1:] & inside[:, :-1], inside[1:] & inside[:-1]
        if not across.any() or not down.any():
            return np.zeros((2, 2))
        return np.array(
            [[np.diff(s, axis=1)[across].mean(), np.diff(s, axis=0)[down].mean()] for s in (self.x, self.y)]
        )

    def take(self, regions: np.ndarray) -> np.ndarray:
        """bool (N, H, W) -> (N, h, w), without what came from nowhere."""
        rows, columns = self.y.clip(0).astype(np.int64), self.x.clip(0).astype(np.int64)
        return regions[:, rows, columns] & (self.x != OUTSIDE)

    def moves(self, size: tuple[int, int]) -> bool:
        """Whether any pixel of an image of `size` (H, W) is elsewhere, or gone."""
        rows, columns = np.indices(size, sparse=True)
        still = self.x.shape == tuple(size) and (self.x == columns).all() and (self.y == rows).all()
        return not still

    def upright(self) -> bool:
        """Neither mirrored nor turned by more than MAX_TURN."""
        (a, b), (c, d) = self.matrix
        turn = np.degrees(np.arctan2(c - b, a + d))
        return a * d - b * c > 0 and abs(turn) <= MAX_TURN


def draw(transform: Callable, image: np.ndarray, rng: np.random.Generator) -> Drawn:
    """`transform` of image uint8 (H, W, 3), decided by `rng` alone; PyTorch's generators stay as they were.

    Raises InputError where the transform fails, or gives no picture of 1 or 3 channels in uint8 or in
    floating point from 0 to 1.
    """
    height, width = image.shape[:2]
    places = torch.empty(3, height, width)
    places[0], places[1], places[2] = torch.arange(width), torch.arange(height)[:, None], INSIDE
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(1 << 62)))  # the CPU's alone
        try:
            picture, places = transform(tv_tensors.Image(pixels), tv_tensors.Mask(places))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"augment.transform failed on an image of {height}x{width}: {error}") from error
    x, y, here = places.numpy()
    seen = here == INSIDE
    out = _pixels(picture)
    if out.shape[:2] != seen.shape:
        raise InputError(
            f"augment.transform made an image of {out.shape[:2]} and masks of {seen.shape}; they must agree."
        )
    return Drawn(out, np.where(seen, x, OUTSIDE), np.where(seen, y, OUTSIDE))


def _pixels(picture: torch.Tensor) -> np.ndarray:
    """(1 or 3, h, w) -> uint8 (h, w, 3)."""
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise InputError(f"augment.transform must give an image (1 or 3, h, w), got {tuple(picture.shape)}.")
    if picture.is_floating_point():
        low, high = picture.min().item(), picture.max().item()
        if low < -0.01 or high > 1.01:
            raise InputError(
                f"augment.transform must give an image from 0 to 1, got {low:.3g} to {high:.3g}; "
                "leave Normalize to the model's processor."
            )
        picture = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    if picture.dtype != torch.uint8:
        raise InputError(
            f"augment.transform must give uint8 or floating point, got {picture.dtype}; end with ToDtype."
        )
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
