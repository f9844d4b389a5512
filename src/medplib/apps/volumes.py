"""Volumes and frames on the command line: which files are some, and which slices are meant."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medplib.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from medplib.io.volume import Volume


Axis = Annotated[str, typer.Option(help="How a volume is cut: axial, coronal or sagittal.")]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH", help="The values of a NIfTI volume or DICOM file shown as black and white."
    ),
]
Series = Annotated[
    str | None,
    typer.Option(
        metavar="WHICH",
        help="One of the DICOM series in a folder: its number, its UID or the last digits of that.",
    ),
]
Slice = Annotated[
    int | None,
    typer.Option(
        "--slice", metavar="N", help="The slice of a NIfTI volume or the frame of a DICOM file, from 0."
    ),
]


def is_volume(file: str) -> bool:
    """Whether this is the name of a NIfTI file, or a folder, which then holds a DICOM series."""
    return file.lower().endswith((".nii", ".nii.gz")) or os.path.isdir(file)


def picture_of(
    file: str,
    axis: str,
    index: int | None,
    window: tuple[float, float] | None,
    series: int | str | None = None,
    load: Callable[..., Volume] | None = None,
) -> np.ndarray:
    """An image file, a slice of a volume or a frame of a DICOM file as a picture, uint8 (h, w, 3).

    window: the lowest and the highest value shown. series: which one of a folder. load: stands for
    `load_volume` where several pictures are taken from one volume. Raises InputError, also where no slice is
    named.
    """
    if is_volume(file):
        from medplib.io.volume import load_volume

        opened = (load or load_volume)(file, series=series)
        if index is None:
            raise InputError(
                f"{file!r} is a volume: name a slice with --slice N (in a job 'slice'), from 0 to "
                f"{opened.numbers(axis)[-1]} ({axis}); or draw in all of them with `medplib segment`."
            )
        shown = opened if window is None else dataclasses.replace(opened, window=window)
        return shown.picture(axis, index)
    if series is not None:
        raise InputError(
            f"--series (in a job 'series') is for the folder of a DICOM series, not for {file!r}."
        )
    from medplib.io.images import is_dicom, load_image

    if index is None and window is None:
        return load_image(file)
    if not is_dicom(file):
        raise InputError(
            f"--slice and --window (in a job 'slice', 'window') are for volumes and DICOM, not for {file!r}."
        )
    from medplib.io.dicom import read_dicom

    low, high = window or (0, 0)
    return read_dicom(file, index, window and ((low + high) / 2, high - low))


def check_source(source: Volume | str) -> None:
    """Raise what a DICOM segmentation of this volume, or of this file, will be refused for."""
    from medplib.io.dicom_seg import SourceFrame, read_headers
    from medplib.io.images import is_dicom

    if not isinstance(source, str):
        read_headers(source.frames, repr(source.name))
    else:
        read_headers([SourceFrame.of(source)] if is_dicom(source) else [], repr(source))


def parse_slices(text: str | None) -> range | None:
    """ "10:40" -> 10 to 40. Raises InputError for anything else."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (first.strip().isdigit() and (last.strip().isdigit() or not colon)):
        raise InputError(f"--slices needs FIRST:LAST, such as 10:40, got {text!r}.")
    return range(int(first), int(last or first) + 1)


@contextlib.contextmanager
def progress_of(count: int) -> Iterator[Callable[[int, int], Any] | None]:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=count, desc="slices", disable=not sys.stderr.isatty()) as bar:
        yield lambda done, _: bar.update(done - bar.n)
