"""Slices of NIfTI volumes as pictures and masks, lying as a radiologist sees them. Needs nibabel (`medical`).

H, W height and width of the slice. A volume is turned to RAS; slices show the patient's right on the left of
the picture (axial, coronal) and the top of the picture is anterior (axial) or superior (coronal, sagittal).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from medplib.errors import InputError
from medplib.io.images import load_image

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


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


def volume(path: str) -> np.ndarray:
    """The values of a NIfTI file, (x, y, z) in RAS; the last two volumes of each process are kept.

    Raises InputError for a file that cannot be read or is not three-dimensional.
    """
    try:
        return _volume(path, os.stat(path).st_mtime_ns, os.getpid())
    except OSError as error:
        raise InputError(f"The volume {path!r} cannot be read: {error}. Check that it is there.") from error


def upright(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    """(x, y, z) in RAS -> the slice (H, W) as it is looked at."""
    if not 0 <= index < values.shape[axis]:
        raise InputError(f"There is no slice {index}; the volume has {values.shape[axis]} on that axis.")
    plane = np.take(values, index, axis)
    return np.ascontiguousarray(plane[::-1, ::-1].T)


@lru_cache(maxsize=2)
def _volume(path: str, modified: int, process: int) -> np.ndarray:
    del modified, process
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"Reading {path!r} needs nibabel: pip install 'medplib[medical]'.") from error
    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel answers damaged files with errors of many types
        raise InputError(f"The volume {path!r} cannot be read as NIfTI: {error}. Save it again.") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise InputError(f"The volume {path!r} has shape {values.shape}; three dimensions are needed.")
    return values
