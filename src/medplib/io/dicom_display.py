"""The stored values of a DICOM frame as grey: modality LUT, window or VOI LUT, padding, side. Needs pydicom.

H, W height and width. `header` is a pydicom Dataset, no text of which is written to messages. A header that
makes no sense raises ValueError, or what pydicom raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from medplib.errors import is_number
from medplib.io.images import BAND, rescale, stretch

_FUNCTIONS = {"LINEAR": 1.0, "LINEAR_EXACT": 1e-9, "SIGMOID": 1e-9}  # the least width


def grey(array: np.ndarray, header: Any, window: tuple[float, float] | None, notes: list[str]) -> np.ndarray:
    """Stored values (H, W) -> uint8 (H, W), 0 black. What to warn of is added to `notes`."""
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    show = _voi(header, window, notes)
    out = _as_stored(array, header) if show is None else _through(show, array, header)
    return 255 - out if inverted else out


def in_units(array: np.ndarray, header: Any) -> np.ndarray:
    """Stored values (H, W) -> float32 in the file's units, Hounsfield units in CT; padding at the lowest."""
    from pydicom.pixels import apply_modality_lut

    _slope(header)
    kept = _no_padding(array, header)
    stored = array if array.dtype.kind == "f" else array.astype(np.int64)
    values = apply_modality_lut(stored, header).astype(np.float32)
    values[~kept] = values[kept].min()
    return values


def header_window(header: Any) -> tuple[float, float, str] | None:
    """(centre, width, function) of the first window, None without one. Raises ValueError for a bad one."""
    given = [header.get(key) for key in ("WindowCenter", "WindowWidth")]
    if any(value is None or value == "" for value in given):
        return None
    centre, width = (float(np.ravel(value)[0]) for value in given)
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if not is_number(centre) or not is_number(width) or width < _FUNCTIONS.get(function, np.inf):
        raise ValueError("window")
    return centre, width, function


def turned(picture: np.ndarray, header: Any) -> np.ndarray:
    """An axial CT or MR slice with the patient's right on its left, anterior on top; others as they are."""
    cosines = header.get("ImageOrientationPatient")
    if header.get("Modality") not in ("CT", "MR") or not cosines:
        return picture
    along_row, along_column = np.array(cosines, float).reshape(
        2, 3
    )  # x to the patient's left, y to posterior
    if np.abs(along_row).argmax() != 0 or np.abs(along_column).argmax() != 1:
        return picture
    return picture[:: -1 if along_column[1] < 0 else 1, :: -1 if along_row[0] < 0 else 1]


def _as_stored(array: np.ndarray, header: Any) -> np.ndarray:
    """uint8 (H, W) without a window: unsigned 8 bits as they are, others stretched, padding left out."""
    from pydicom.pixels import apply_modality_lut

    slope = _slope(header)
    if array.dtype == np.uint8 and not header.get("ModalityLUTSequence"):
        out = rescale(array, 0, 2**header.BitsStored - 1)
    else:
        counted = array[_no_padding(array, header)]
        if header.get("ModalityLUTSequence"):
            array, counted = (apply_modality_lut(a.astype(np.int64), header) for a in (array, counted))
        out = stretch(array, counted)  # a slope does not change what this gives, but for its sign
    return 255 - out if slope < 0 else out


def _through(show: Callable[[np.ndarray], np.ndarray], array: np.ndarray, header: Any) -> np.ndarray:
    """uint8 (H, W): what `show` makes of the values in the file's units."""
    from pydicom.pixels import apply_modality_lut

    _slope(header)
    out = np.empty(array.shape, np.uint8)
    step = max(1, BAND // array.shape[1])  # rows at a time, to keep the memory of large images small
    for top in range(0, len(array), step):
        part = array[top : top + step]
        part = part if part.dtype.kind == "f" else part.astype(np.int64)
        out[top : top + step] = show(apply_modality_lut(part, header))
    return out


def _slope(header: Any) -> float:
    """What stored values are multiplied by; also makes the modality LUT ready for pydicom."""
    table = header.get("ModalityLUTSequence")
    if table:
        _describe(table[0])
    if table or "RescaleSlope" not in header or "RescaleIntercept" not in header:
        return 1.0
    slope = float(header.RescaleSlope)
    if not is_number(slope) or not slope or not is_number(float(header.RescaleIntercept)):
        raise ValueError("slope or intercept")
    return slope


def _voi(
    header: Any, window: tuple[float, float] | None, notes: list[str]
) -> Callable[..., np.ndarray] | None:
    """Values in the file's units -> uint8: the window given, else the VOI LUT, else the first window."""
    from pydicom import Dataset
    from pydicom.pixels import apply_voi, apply_windowing

    table = header.get("VOILUTSequence")
    if window is None and table:
        count, first, depth = _describe(table[0])

        def look_up(values: np.ndarray) -> np.ndarray:
            inside = np.rint(values).clip(first, first + count - 1).astype(np.int64)
            return rescale(apply_voi(inside, header), 0, 2**depth - 1)

        return look_up
    try:
        found = header_window(header) if window is None else (*window, "LINEAR_EXACT")
    except ValueError:
        notes.append("has a window that cannot be used; it is shown as if it had none.")
        found = None
    if found is None:
        return None
    scale = Dataset()  # windowed values fill the range of its bits
    scale.PhotometricInterpretation, scale.PixelRepresentation, scale.BitsStored = "MONOCHROME2", 0, 8
    scale.WindowCenter, scale.WindowWidth, scale.VOILUTFunction = found
    return lambda values: (apply_windowing(values, scale) + 0.5).astype(np.uint8)


def _describe(table: Any) -> tuple[int, int, int]:
    """Entries of a look-up table, the value that the first stands for, and the bits of an entry."""
    count, first, depth = table.LUTDescriptor
    if not 1 <= depth <= 16:
        raise ValueError("depth")
    table.LUTDescriptor = [count, first, 16]  # pydicom counts the entries in that many bits
    return count or 1 << 16, first, depth


def _no_padding(array: np.ndarray, header: Any) -> np.ndarray:
    """bool, of the form of the stored values: what is no padding; all of it if nothing else is left."""
    one = header.get("PixelPaddingValue")
    ends = (one, header.get("PixelPaddingRangeLimit", one))
    if not all(isinstance(end, int) for end in ends):
        return np.ones(array.shape, bool)
    kept = (array < min(ends)) | (array > max(ends))
    return kept if kept.any() else ~kept
