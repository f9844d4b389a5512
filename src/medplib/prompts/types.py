"""What a user points with: Point, Box and Mask, in pixels of the original image. Needs numpy and Pillow only.

Letters: H, W = height and width of the original image. Points and boxes are (x, y), sizes (height, width).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from medplib.errors import InputError, check_size, check_whole
from medplib.io.masks import foreground


@dataclass(frozen=True)
class Point:
    """A place in the image: (x, y), 0 <= x < W and 0 <= y < H. Label 1 is foreground, 0 background."""

    x: float
    y: float
    label: int = 1

    def check(self, size: tuple[int, int]) -> None:
        """Raise InputError unless the point lies in an image of size (H, W)."""
        check_size(size=size)
        height, width = size
        _check_numbers(self, x=self.x, y=self.y)
        if not isinstance(self.label, (int, float, np.generic)) or self.label not in (0, 1):
            raise InputError(
                f"A point's label must be 1 (foreground) or 0 (background), got {self.label!r} in {self}"
            )
        if not (0 <= self.x < width and 0 <= self.y < height):
            raise InputError(
                f"{self} lies outside the image; an image of (height, width) ({height}, {width}) "
                f"needs 0 <= x < {width} and 0 <= y < {height}"
            )

    def to_mask(self, size: tuple[int, int], point_size: int = 41) -> np.ndarray:
        """bool (H, W): a square of `point_size` pixels around the point, cut at the image's edges.

        An even `point_size` puts the extra row and column before the point.
        """
        self.check(size)
        check_whole(point_size=point_size)
        top, left = (math.floor(at) - point_size // 2 for at in (self.y, self.x))
        mask = np.zeros(size, dtype=bool)
        mask[max(0, top) : top + point_size, max(0, left) : left + point_size] = True
        return mask


@dataclass(frozen=True)
class Box:
    """A rectangle from (x0, y0) to (x1, y1); x1 and y1 lie just outside it, as in array slices."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def around(cls, mask: np.ndarray) -> Box:
        """The smallest box that holds the foreground of a mask (H, W), which must have some."""
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype.kind not in "buif":
            raise InputError(f"A mask must be an array (height, width), got {mask.dtype} {mask.shape}.")
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise InputError("A mask without foreground has no box around it.")
        return cls(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))

    def check(self, size: tuple[int, int]) -> None:
        """Raise InputError unless the box has an area and lies in an image of size (H, W)."""
        check_size(size=size)
        height, width = size
        _check_numbers(self, x0=self.x0, y0=self.y0, x1=self.x1, y1=self.y1)
        if self.x1 <= self.x0 or self.y1 <= self.y0:
            raise InputError(f"{self} has no area; give x0 < x1 and y0 < y1 (corners, not width and height)")
        if self.x0 < 0 or self.y0 < 0 or self.x1 > width or self.y1 > height:
            raise InputError(
                f"{self} reaches outside the image; an image of (height, width) ({height}, {width}) "
                f"needs 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
            )

    def to_mask(self, size: tuple[int, int], point_size: int = 41) -> np.ndarray:
        """bool (H, W): every pixel the box touches. `point_size` is for points and ignored here."""
        self.check(size)
        mask = np.zeros(size, dtype=bool)
        mask[math.floor(self.y0) : math.ceil(self.y1), math.floor(self.x0) : math.ceil(self.x1)] = True
        return mask


@dataclass(frozen=True, eq=False)
class Mask:
    """A free form: an array (H, W), a Pillow image, or the path of an image file.

    Foreground is everything that is not 0. A mask holds 0 and one other value (True, 1, 255, ...); a map with
    several labels is refused, because it is not clear which of them is meant.
    """

    mask: Any

    def check(self, size: tuple[int, int]) -> None:
        """Raise InputError unless this is a readable mask of size (H, W) with some foreground."""
        self.to_mask(size)

    def to_mask(self, size: tuple[int, int], point_size: int = 41) -> np.ndarray:
        """bool (H, W), a new array. `point_size` is for points and ignored here."""
        check_size(size=size)
        array, name = _read_mask(self.mask)
        if array.shape != tuple(size):
            raise InputError(
                f"{name} has (height, width) {array.shape}, the image has {tuple(size)}; "
                "draw the mask on the original image"
            )
        return _binary(array, name)


Prompt = Point | Box | Mask


def _check_numbers(prompt: object, **values: float) -> None:
    for name, value in values.items():
        try:
            finite = math.isfinite(value)
        except (TypeError, OverflowError):
            raise InputError(f"{name} must be a number of pixels, got {value!r} in {prompt}") from None
        if not finite:
            raise InputError(f"{name} must be a finite number of pixels, got {value} in {prompt}")


def _read_mask(source: Any) -> tuple[np.ndarray, str]:
    """The mask as an array (H, W) of any dtype, and a name for it in error messages."""
    if isinstance(source, (str, os.PathLike)):
        name = f"The mask file {os.fspath(source)!r}"
        try:
            with Image.open(source) as image:
                return _image_array(image, name), name
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"{name} cannot be read as an image: {error}") from error
    if isinstance(source, Image.Image):
        return _image_array(source, "The mask image"), "The mask image"
    try:
        array = np.asarray(source)
    except Exception as error:  # whatever array-like object was given, it refused to become an array
        raise InputError(f"A mask must be an array, a Pillow image or a path, got {type(source)}") from error
    if array.ndim != 2:
        raise InputError(f"A mask must be an array of shape (height, width), got shape {array.shape}")
    return array, "The mask"


def _image_array(image: Image.Image, name: str) -> np.ndarray:
    """A one-channel Pillow image -> (H, W); a colour image is accepted when its channels agree.

    Of a palette bool: what is black in it, or fully transparent, is background, whatever its number.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{name} has {image.n_frames} frames; give the one that belongs to the image")
    array = np.asarray(image)
    if image.mode == "P":
        seen = foreground(image)
        numbers = np.unique(array[seen]).tolist()
        if len(numbers) > 1:
            shown = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
            raise InputError(
                f"{name} has {len(numbers)} palette numbers that are not black ({shown}); choose one, as in "
                f"`np.asarray(image) == {numbers[-1]}`"
            )
        return seen
    if array.ndim == 2:
        return array
    colours = array[..., : {"LA": 1}.get(image.mode, 3)]
    if image.mode not in ("LA", "RGB", "RGBA") or (colours != colours[..., :1]).any():
        raise InputError(f"{name} is a colour image (mode {image.mode}); save the mask with one channel")
    return np.where(foreground(image), colours[..., 0], 0)


def _binary(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W) of any dtype -> bool (H, W), refusing what is not clearly a mask."""
    if array.dtype.kind not in "buif":
        raise InputError(f"{name} has dtype {array.dtype}; use bool, or integers with 0 as background")
    values = np.unique(array)
    foreground = values[values != 0]  # NaN is not 0, so it is caught below
    if foreground.size == 0:
        raise InputError(f"{name} is empty: it has no pixel that is not 0")
    if array.dtype.kind == "f" and not np.array_equal(foreground, [1.0]):
        raise InputError(
            f"{name} has dtype {array.dtype} and values other than 0 and 1 "
            f"(from {values[0]} to {values[-1]}); cut it at a threshold first, as in `mask > 0.5`"
        )
    if foreground.size > 1:
        shown = ", ".join(str(value) for value in foreground[:6]) + (", ..." if foreground.size > 6 else "")
        raise InputError(
            f"{name} has {foreground.size} values besides 0 ({shown}); choose one, as in `labels == "
            f"{foreground[0]}`"
        )
    if foreground[0] < 0:
        raise InputError(f"{name} has the value {foreground[0]}; use 0 for background and 1 for foreground")
    return array != 0
