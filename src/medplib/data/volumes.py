"""Slices of NIfTI volumes as pictures and masks, wherever a file could stand.

H, W height and width of the slice, which lies as `medplib.io.volume.upright` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medplib.errors import InputError
from medplib.io.images import load_image
from medplib.io.volume import upright, volume


@dataclass(frozen=True, slots=True)
class SliceImage:
    """A slice as a picture. `window` are the stored values shown as black and white; None: percentiles."""

    path: str
    axis: int
    index: int
    window: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.path}[{self.index}]"

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3). Raises InputError, naming the file."""
        values = upright(volume(self.path), self.axis, self.index).astype(np.float32)
        if self.window is not None:
            low, high = self.window
            values = ((values - low) / (high - low)).clip(0, 1)
        else:
            values = np.nan_to_num(values).round().astype(np.int32) if np.ptp(values) > 1 else values
        try:
            return load_image(values)
        except InputError as error:
            raise InputError(f"The slice {self}: {error}") from error


@dataclass(frozen=True, slots=True)
class SliceMask:
    """The pixels of a slice that have one of these labels."""

    path: str
    axis: int
    index: int
    labels: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path}[{self.index}] (label {', '.join(map(str, self.labels))})"

    def load(self) -> np.ndarray:
        """bool (H, W). Raises InputError, naming the file."""
        return np.isin(upright(volume(self.path), self.axis, self.index), self.labels)
