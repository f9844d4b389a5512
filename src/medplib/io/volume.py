"""Volumes: scans as arrays that lie the same way, slices as a radiologist sees them, masks back again.

x, y, z: voxels in RAS, numbered towards the patient's right, front and head; i, j, k: as the file has them.
H, W height and width of a slice; h, w of its picture, whose pixels are square. Needs nibabel (`medical`).
"""

from __future__ import annotations

import gzip
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medplib.errors import InputError, is_number
from medplib.io.images import check_size, is_dicom, rescale, shown_range

if TYPE_CHECKING:
    from medplib.io.dicom_seg import SourceFrame

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}

MAX_VOXELS = 1 << 30


@dataclass(frozen=True, eq=False)
class Volume:
    """values (x, y, z) in RAS; spacing: mm between voxels along x, y and z.

        Volume(array, (0.8, 0.8, 2.5), "my scan")       # an array of your own; of files: load_volume

    window: the stored values shown as black and white, by default the 0.5 and 99.5 percentiles of the whole.
    frames: of DICOM, where each slice along the last axis of the file's voxels was read from.
    """

    values: np.ndarray
    spacing: tuple[float, float, float]
    name: str
    window: tuple[float, float] | None = None
    frames: Sequence[SourceFrame] = field(default=(), repr=False)
    _file: Any = field(default=None, repr=False)  # affine (4, 4), orientation (3, 2) of the file

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.dtype.kind not in "buif":
            raise InputError(
                f"A volume is an array (x, y, z) of numbers, got {self.values.dtype} {self.values.shape}."
            )
        if len(self.spacing) != 3 or not all(is_number(mm) and mm > 0 for mm in self.spacing):
            raise InputError(f"spacing must be three lengths above 0 in mm, got {self.spacing}.")
        if self._file is None:
            own = np.diag([*self.spacing, 1.0]), np.array([[0, 1], [1, 1], [2, 1]])
            object.__setattr__(self, "_file", own)
        if self.window is not None and not _is_window(self.window):
            raise InputError(
                f"A window goes from a lower to a higher value, such as (-1000, 400), got {self.window!r}."
            )

    @cached_property
    def shown(self) -> tuple[float, float]:
        """The values shown as black and white, the same in all slices: the window, or what stands for it."""
        return shown_range(self.values) if self.window is None else self.window

    def numbers(self, axis: str, chosen: Iterable[int] | None = None) -> list[int]:
        """The numbers of these slices in order, of all for None. Raises InputError for what is not there."""
        if axis not in AXES:
            raise InputError(f"axis must be one of {', '.join(AXES)}, got {axis!r}.")
        if isinstance(chosen, str) or not isinstance(chosen, Iterable | None):
            raise InputError(f"slices are numbers, such as [40] or range(10, 41), got {chosen!r}.")
        count = self.values.shape[AXES[axis]]
        found = list(range(count) if chosen is None else chosen)
        wrong = [index for index in found if not (isinstance(index, Integral) and 0 <= index < count)]
        if wrong or not found:
            raise InputError(
                f"Slices are numbered from 0 to {count - 1} ({axis}); got {wrong[0] if wrong else 'none'}."
            )
        return sorted(set(found))

    def picture(self, axis: str, index: int) -> np.ndarray:
        """A slice as a picture, uint8 (h, w, 3). Raises InputError for a slice that is not there."""
        self.numbers(axis, [index])
        plane = upright(self.values, AXES[axis], index)
        plane = rescale(np.nan_to_num(plane), *self.shown)
        height, width = self._square(axis)
        check_size(height, width, f"Slice {index} of {self.name!r} with square pixels")
        if plane.shape != (height, width):
            plane = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        return np.repeat(plane[..., None], 3, axis=2)

    def lay(self, mask: np.ndarray, axis: str) -> np.ndarray:
        """A mask on the picture of a slice, bool (h, w) -> on the voxels of that slice of `values`."""
        number = AXES[axis]
        size = [n for i, n in enumerate(self.values.shape) if i != number][::-1]  # (H, W)
        if mask.shape != tuple(size):
            small = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
            mask = np.asarray(small)
        return mask.T[::-1, ::-1]

    def show(self, mask: np.ndarray, axis: str, index: int) -> np.ndarray:
        """A mask (x, y, z) in RAS on the picture of a slice, bool (h, w)."""
        plane = upright(mask, AXES[axis], index)
        height, width = self._square(axis)
        return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.NEAREST))

    def to_file(self, mask: np.ndarray) -> np.ndarray:
        """(x, y, z) in RAS -> (i, j, k), as the file stores its own values."""
        import nibabel.orientations as orientations

        _, stored = self._file
        back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), stored)
        return np.ascontiguousarray(orientations.apply_orientation(mask, back))

    def encode(self, mask: np.ndarray, note: str) -> bytes:
        """A mask (x, y, z) in RAS as the bytes of a .nii.gz that lies on the file voxel by voxel.

        Nothing of the file's header but its geometry is copied. note: at most 79 characters, in `descrip`.
        """
        import nibabel

        image = nibabel.Nifti1Image(self.to_file(mask).astype(np.uint8), self._file[0])
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = note.encode("ascii", "replace")[:79]
        return gzip.compress(image.to_bytes(), mtime=0)

    def _square(self, axis: str) -> tuple[int, int]:
        """(h, w) of a slice whose pixels all are as wide as the narrower side of its voxels."""
        number = AXES[axis]
        sides = [(n, mm) for i, (n, mm) in enumerate(zip(self.values.shape, self.spacing, strict=True))]
        (width, across), (height, down) = (side for i, side in enumerate(sides) if i != number)
        least = min(across, down)
        return max(1, round(height * down / least)), max(1, round(width * across / least))


def load_volume(
    path: str | os.PathLike,
    window: tuple[float, float] | None = None,
    series: int | str | None = None,
) -> Volume:
    """A NIfTI file, or a DICOM series as `medplib.io.series` reads it -> Volume.

    The last two NIfTI files of each process are kept. window: the lowest and highest value shown. series: one
    of several DICOM series in a folder, by its number from 1, its SeriesInstanceUID or the last digits of
    that; without it such a folder is refused with a list. Warns of a NIfTI header that does not say how the
    patient lies. Raises InputError for what cannot be read or is not three-dimensional, ImportError without
    nibabel. Of values in memory `volume_of` makes a Volume.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"A volume is read from a NIfTI file or the folder of a DICOM series, got {type(path).__name__}. "
            "Give its path; values in memory become one by medplib.io.volume.volume_of(values, affine, name)."
        )
    if os.path.isdir(path) or is_dicom(path):
        from medplib.io.series import load_series

        return load_series(path, window, series)
    if series is not None:
        raise InputError(f"series is for folders of DICOM files, not for {os.fspath(path)!r}. Leave it out.")
    values, affine, orientation, placed = _read_at(path)
    if not placed:
        warnings.warn(
            f"The header of {os.fspath(path)!r} does not say how the patient lies (its sform and qform codes "
            "are 0): which side is left is a guess. Set an affine.",
            stacklevel=2,
        )
    return _volume(values, affine, orientation, os.fspath(path), window)


def forget_volumes() -> None:
    """Drop the NIfTI files that `load_volume` keeps in memory."""
    _read.cache_clear()


def volume_of(
    values: np.ndarray, affine: np.ndarray, name: str, window: tuple[float, float] | None = None
) -> Volume:
    """values (i, j, k) and their affine (4, 4), from voxel to mm in RAS -> Volume."""
    nibabel = _nibabel(name)
    image = nibabel.Nifti1Image(values, affine)
    canonical = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    return _volume(canonical, affine, nibabel.io_orientation(affine), name, window)


def _volume(values, affine, orientation, name: str, window) -> Volume:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))[np.argsort(orientation[:, 0])]
    return Volume(values, tuple(map(float, spacing)), name, window, _file=(affine, orientation))


def volume(path: str) -> np.ndarray:
    """The values of a NIfTI file, (x, y, z) in RAS. Raises as `load_volume` does."""
    return _read_at(path)[0]


def _nibabel(name: str) -> Any:
    """The package. Raises ImportError, naming the extra it comes with."""
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"Reading {name!r} needs nibabel: pip install 'medplib[medical]'.") from error
    return nibabel


def upright(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    """(x, y, z) in RAS -> the slice (H, W) as it is looked at.

    The patient's right is on the left of the picture (axial, coronal), the top of the picture is anterior
    (axial) or superior (coronal, sagittal).
    """
    if not 0 <= index < values.shape[axis]:
        raise InputError(
            f"There is no slice {index}; the volume has {values.shape[axis]} on that axis, counted from 0."
        )
    plane = np.moveaxis(values, axis, 0)[index]  # np.take would copy the whole
    return np.ascontiguousarray(plane[::-1, ::-1].T)


def _is_window(window: Any) -> bool:
    try:
        low, high = (float(value) for value in window if not isinstance(value, str))
    except (TypeError, ValueError):
        return False
    return -math.inf < low < high < math.inf


def _read_at(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    try:
        return _read(os.fspath(path), os.stat(path).st_mtime_ns, os.getpid())
    except OSError as error:
        raise InputError(f"The volume {path!r} cannot be read: {error}. Check that it is there.") from error


@lru_cache(maxsize=2)
def _read(path: str, modified: int, process: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Values (x, y, z) in RAS; of the file the affine (4, 4), the orientation (3, 2) of its axes, and whether
    its header says where they lie in the patient."""
    del modified, process
    nibabel = _nibabel(path)
    try:
        image: Any = nibabel.load(path)
        if math.prod(image.shape) > MAX_VOXELS:
            raise ValueError(f"it has {image.shape} voxels, more than {MAX_VOXELS} in all")
        orientation = nibabel.io_orientation(image.affine)
        if np.isnan(orientation).any():
            raise ValueError("its affine has a direction of length 0")
        values = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    except Exception as error:  # nibabel answers damaged files with errors of many types
        raise InputError(f"The volume {path!r} cannot be read as NIfTI: {error}. Save it again.") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or values.dtype.kind not in "buif":
        raise InputError(
            f"The volume {path!r} has shape {values.shape} of {values.dtype}; three dimensions of plain "
            "numbers are needed. Save the one volume that is meant."
        )
    placed = not isinstance(image, nibabel.Nifti1Pair) or any(
        int(image.header[code]) for code in ("sform_code", "qform_code")
    )
    return values, np.asarray(image.affine, float), orientation, placed
