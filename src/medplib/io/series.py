"""DICOM series: the slices of one scan, in a folder or as the frames of one file, as a Volume. Needs pydicom.

S slices of H rows and W columns. Of the headers geometry, window and pixels are used, and nothing is quoted.
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medplib.errors import InputError
from medplib.io.dicom import OpenDicom, Outline, guarded, outline
from medplib.io.dicom_display import header_window, in_units
from medplib.io.dicom_seg import SourceFrame
from medplib.io.images import from_file, is_dicom
from medplib.io.volume import MAX_VOXELS, Volume, volume_of

_DIGITS = 4  # the least that a list shows of a UID
_LISTED = 20  # series in a list
TOLERANCE = 0.01  # of the distance between slices, and of the directions of rows and columns


@dataclass(frozen=True, eq=False)
class _Slice:
    """values float32 (H, W); place (3,) mm of the first pixel; axes (2, 3): along a row, along a column;
    spacing (2,): mm between rows, between columns; source: the frame it is."""

    values: np.ndarray
    place: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    window: tuple[float, float] | None
    source: SourceFrame


def load_series(
    path: str | os.PathLike,
    window: tuple[float, float] | None = None,
    series: int | str | None = None,
) -> Volume:
    """The DICOM files of a folder, or the frames of one file -> Volume.

    Slices are ordered by where they lie. Values are in the files' units, Hounsfield units in CT. window: the
    lowest and highest value shown, by default the window of the first slice. series: which of several, see
    `choose`. Files that are no DICOM, and a DICOMDIR, are passed over. Raises InputError for several series
    of which none is chosen, slices of different size or direction, gaps, and images without a place in the
    patient.
    """
    name = f"The series {os.fspath(path)!r}"
    slices = _read_all(choose(path, series), name)
    slices = _ordered(slices, name)
    first = slices[0]
    step = (slices[-1].place - first.place) / (len(slices) - 1)
    affine = np.eye(4)  # columns, rows, slices -> mm towards the patient's left, back and head
    affine[:3, :] = np.stack(
        [first.axes[0] * first.spacing[1], first.axes[1] * first.spacing[0], step, first.place], 1
    )
    values = np.stack([s.values.T for s in slices], axis=-1)  # (W, H, S)
    volume = volume_of(
        values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, os.fspath(path), window or first.window
    )
    return replace(volume, frames=tuple(s.source for s in slices))


def choose(path: str | os.PathLike, series: int | str | None = None) -> list[Path]:
    """The files of one series in a folder, or the one file, by their headers alone.

    series: its number from 1, in the order of the first file of each by name; or its SeriesInstanceUID, or
    the last digits of that, as text ("3" is a number where there are three). Raises InputError, with a list
    of what is there, for several series of which none is chosen and for a choice that is not one of them.
    """
    folder = Path(path).expanduser()
    files = [folder]
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "DICOMDIR" and is_dicom(p))
    if not files:
        raise InputError(f"{os.fspath(path)!r} holds no DICOM files. Give the folder with the slices.")
    found: dict[str, list[tuple[Path, Outline]]] = {}
    for file in files:
        said = from_file(file, _outline)
        found.setdefault(said.series, []).append((file, said))
    if series is None and len(found) == 1:
        return files
    number = _number(list(found), series)
    if number is None:
        wanted = "" if series is None else f"has no one series {series!r}; it "
        raise InputError(
            f"{os.fspath(path)!r} {wanted}holds {len(found)} series: {_list(found)}. Choose by series=NUMBER "
            "(--series NUMBER), by the UID, or by its last digits."
        )
    return [file for file, _ in list(found.values())[number]]


def _outline(file: BinaryIO, name: str) -> Outline:
    return guarded(file, name, lambda: outline(file, name))


def _number(uids: list[str], series: int | str | None) -> int | None:
    """Which of these, from 0, is meant; None where that is not one of them."""
    if isinstance(series, bool) or not isinstance(series, int | str):
        return None
    text = str(series)
    if re.fullmatch(r"[1-9]\d{0,8}", text) and int(text) <= len(uids):
        return int(text) - 1
    if isinstance(series, int) or not re.fullmatch(r"[\d.]+", text):
        return None
    same = [i for i, uid in enumerate(uids) if uid == text] or [
        i for i, uid in enumerate(uids) if uid.endswith(text)
    ]
    return same[0] if len(same) == 1 else None


def _list(found: dict[str, list[tuple[Path, Outline]]]) -> str:
    """What is there in words: number, modality, slices, size and the end of the UID; no other text."""
    length = next(n for n in range(_DIGITS, 66) if n > 64 or len({uid[-n:] for uid in found}) == len(found))
    words = []
    for number, (uid, files) in enumerate(found.items(), 1):
        outlines = [said for _, said in files]
        sizes = {said.size for said in outlines if said.size}
        count = sum(said.frames for said in outlines if said.size)
        what = f"{count} {'slice' if count == 1 else 'slices'}" if sizes else "no images"
        if sizes:
            what += " of {1} x {0} pixels".format(*min(sizes)) if len(sizes) == 1 else " of several sizes"
        end = f", UID ending in {uid[-length:]}" if re.fullmatch(r"[\d.]+", uid) else ""
        words.append(f"{number} ({outlines[0].modality}, {what}{end})")
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more


def _read_all(files: list[Path], name: str) -> list[_Slice]:
    """Every frame of these files."""
    found: list[_Slice] = []
    for file in files:
        room = MAX_VOXELS - sum(s.values.size for s in found)
        read = functools.partial(_read, source=SourceFrame.of(file), room=room)
        slices = from_file(file, read)
        if slices is None:
            raise InputError(f"{name} has more than {MAX_VOXELS} voxels. Give a part of it.")
        found += slices
    return found


def _read(file: BinaryIO, name: str, source: SourceFrame, room: int) -> list[_Slice] | None:
    """The frames of a file; None where they have more voxels than there is room for."""

    def decode() -> list[_Slice] | None:
        opened = OpenDicom(file, name)
        if opened.frames * math.prod(opened.size) > room:
            return None
        return [_slice(*opened.frame(i), name, replace(source, frame=i)) for i in range(opened.frames)]

    return guarded(file, name, decode)


def _slice(array: np.ndarray, header: Any, name: str, source: SourceFrame) -> _Slice:
    if array.ndim != 2 or header.PhotometricInterpretation != "MONOCHROME2":
        raise InputError(f"{name} is no slice of grey values; it cannot be part of a volume.")
    places = [header.get(key) for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")]
    place, axes, spacing = (np.array(value if value else [], float) for value in places)
    if (place.size, axes.size, spacing.size) != (3, 6, 2) or not np.isfinite([*place, *axes, *spacing]).all():
        raise InputError(f"{name} does not say where in the patient it lies. Ask about it as one picture.")
    axes = axes.reshape(2, 3)
    unit = np.abs(axes @ axes.T - np.eye(2)).max() < TOLERANCE
    if not unit or not (spacing > 0).all():
        raise InputError(f"{name} has directions or spacings that cannot be. Export it again.")
    return _Slice(
        in_units(array, header),
        place,
        axes,
        spacing,
        _window(header),
        source,
    )


def _window(header: Any) -> tuple[float, float] | None:
    """(lowest, highest) value of the header's linear window."""
    try:
        found = header_window(header)
    except ValueError:
        return None
    if found is None or found[2] == "SIGMOID":
        return None
    return found[0] - found[1] / 2, found[0] + found[1] / 2


def _ordered(slices: list[_Slice], name: str) -> list[_Slice]:
    """By their place along the normal. Raises InputError unless they make one regular stack."""
    first = slices[0]
    if len(slices) < 2:
        raise InputError(f"{name} has one slice only. Ask about it as one picture.")
    for other in slices[1:]:
        if other.values.shape != first.values.shape or not np.allclose(
            other.spacing, first.spacing, rtol=TOLERANCE
        ):
            raise InputError(f"{name} holds slices of different sizes. Give those of one scan.")
        if np.abs(other.axes - first.axes).max() > TOLERANCE:
            raise InputError(f"{name} holds slices of different directions. Give those of one scan.")
    normal = np.cross(*first.axes)
    ordered = sorted(slices, key=lambda s: float(s.place @ normal))
    along = np.array([s.place @ normal for s in ordered])
    steps = np.diff(along)
    usual = float(np.median(steps))
    if usual <= 0 or steps.min() <= TOLERANCE * usual:
        raise InputError(f"{name} holds several slices of one place. Give those of one point in time.")
    if np.abs(steps - usual).max() > max(TOLERANCE * usual, 0.01):
        gap = int(np.abs(steps - usual).argmax())
        raise InputError(
            f"{name} is no regular stack: slices {gap} and {gap + 1} are {steps[gap]:.3f} mm apart, most are "
            f"{usual:.3f}. Add what is missing, or resample it."
        )
    return ordered
