"""Letterbox: moves images, points, boxes and masks between the original image and the network's square.

Letters: H, W = the original image; h', w' = the image after resizing; size = side of the network's square.
Points and boxes are (x, y) in pixels of the original image, sizes are (height, width).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from medplib.errors import InputError

if TYPE_CHECKING:
    import torch

Geometry = Literal["correct", "official"]
GEOMETRIES = ("correct", "official")


@dataclass(frozen=True)
class Letterbox:
    """One image's place in a square: longest side scaled to `size`, the rest padded on both sides.

    The padding is centred; an odd remainder goes to the bottom or the right. A resized side is
    `int(side * size / longest + 0.5)`, and never less than one pixel.

        box = Letterbox((300, 200), 336)
        box.resized_size, box.offset            # (336, 224), (0, 56)
        box.points([[100.0, 150.0]])            # [[168.0, 168.0]]
    """

    original_size: tuple[int, int]
    size: int

    def __post_init__(self):
        sides = self.original_size
        if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(map(_is_side, sides)):
            raise InputError(f"original_size must be (height, width) in whole pixels >= 1, got {sides!r}")
        if not _is_side(self.size):
            raise InputError(f"size must be a whole number of pixels >= 1, got {self.size!r}")
        object.__setattr__(self, "original_size", (int(sides[0]), int(sides[1])))
        object.__setattr__(self, "size", int(self.size))

    @property
    def resized_size(self) -> tuple[int, int]:
        """(h', w'): the image inside the square."""
        scale = self.size * 1.0 / max(self.original_size)
        height, width = (max(1, int(side * scale + 0.5)) for side in self.original_size)
        return height, width

    @property
    def offset(self) -> tuple[int, int]:
        """(top, left): padding before the image."""
        height, width = self.resized_size
        return (self.size - height) // 2, (self.size - width) // 2

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the square that hold the image."""
        (top, left), (height, width) = self.offset, self.resized_size
        return slice(top, top + height), slice(left, left + width)

    def image(self, array: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (h', w', 3), bilinear with antialiasing (Pillow). No padding."""
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise InputError(f"An image must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
        self._check_size("image", array)
        return self._resize(array)

    def mask(self, mask: np.ndarray, foreground: int = 1) -> np.ndarray:
        """bool (H, W) -> bool (size, size): bilinear, centred.

        A pixel counts when at least half of it is covered (`foreground=1`), or when any visible part of it
        is (`foreground=255`: the published demo, whose masks come out one ring larger). Where that leaves
        nothing of a mask that was not empty, the pixels that contain it are kept.
        """
        mask = np.asarray(mask)
        if mask.ndim != 2:
            raise InputError(f"A mask must be (H, W), got shape {mask.shape}")
        self._check_size("mask", mask)
        mask = mask != 0
        resized = self._resize(mask.astype(np.uint8) * np.uint8(foreground)) != 0  # (h', w')
        if not resized.any() and mask.any():
            rows, columns = np.nonzero(mask)
            (height, width), (new_height, new_width) = self.original_size, self.resized_size
            resized[rows * new_height // height, columns * new_width // width] = True
        square = np.zeros((self.size, self.size), dtype=bool)
        square[self.window] = resized
        return square

    def points(self, xy) -> np.ndarray:
        """(..., 2) in the original image -> (..., 2) in the square."""
        return _numbers("points", xy, 2) * self._scale_xy() + self._offset_xy()

    def inverse_points(self, xy) -> np.ndarray:
        """(..., 2) in the square -> (..., 2) in the original image. Points in the padding land outside it."""
        return (_numbers("points", xy, 2) - self._offset_xy()) / self._scale_xy()

    def boxes(self, boxes) -> np.ndarray:
        """(..., 4) as x0, y0, x1, y1 in the original image -> (..., 4) in the square."""
        boxes = _numbers("boxes", boxes, 4)
        return self.points(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)

    def unletterbox(self, logits: torch.Tensor, geometry: Geometry = "correct") -> torch.Tensor:
        """Logits on the square (..., h, w) -> float32 logits on the original image (..., H, W).

        correct: resized to the square, padding cut off, resized to (H, W); bilinear, align_corners False.
        official: the published crop, see `official_crop`; the released weights were trained with it.
        """
        if geometry not in GEOMETRIES:
            raise InputError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
        if getattr(logits, "ndim", 0) < 2:
            raise InputError(f"logits must be a tensor (..., h, w), got {logits!r:.80}")
        if geometry == "official":
            return official_crop(logits, self.resized_size, self.original_size)
        square = _interpolate(logits, (self.size, self.size))  # (..., size, size)
        rows, columns = self.window
        return _interpolate(square[..., rows, columns], self.original_size)  # (..., H, W)

    def _resize(self, array: np.ndarray) -> np.ndarray:
        height, width = self.resized_size
        return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))

    def _check_size(self, what: str, array: np.ndarray) -> None:
        if array.shape[:2] != self.original_size:
            raise InputError(
                f"This Letterbox is for images of (height, width) {self.original_size}, "
                f"got {what} of {array.shape[:2]}"
            )

    def _scale_xy(self) -> np.ndarray:
        (height, width), (new_height, new_width) = self.original_size, self.resized_size
        return np.array([new_width / width, new_height / height])

    def _offset_xy(self) -> np.ndarray:
        top, left = self.offset
        return np.array([left, top], dtype=np.float64)


def _numbers(name: str, values: object, count: int) -> np.ndarray:
    """float64 (..., count), or InputError."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape[-1:] != (count,):
        raise InputError(f"{name} must be numbers (..., {count}), got {values!r:.80}")
    return array


def _is_side(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value >= 1 and value % 1 == 0


def official_crop(
    logits: torch.Tensor, resized_size: tuple[int, int], original_size: tuple[int, int]
) -> torch.Tensor:
    """The published way back from the square: (..., h, w) -> float32 (..., H, W).

    It cuts the low-resolution mask (side h, often size / 4) with offsets computed for `resized_size`, which
    counts pixels of the full square. The start is then negative and counts from the far edge: an image that
    is not square loses part of its mask on one side, and its padding stays. Kept because released weights
    were trained through it.
    """
    rows, columns = (
        slice((side - resized) // 2, (side - resized) // 2 + resized)
        for side, resized in zip(logits.shape[-2:], resized_size, strict=True)
    )
    return _interpolate(logits[..., rows, columns], tuple(original_size))


def _interpolate(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(..., h, w) -> float32 (..., *size), bilinear, align_corners False."""
    from torch.nn import functional

    images = images.float()
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if images.numel() == 0:
        return images.new_zeros((*images.shape[:-2], *size))
    flat = images.reshape(1, -1, *images.shape[-2:])
    out = functional.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False)
    return out.reshape(*images.shape[:-2], *size)
