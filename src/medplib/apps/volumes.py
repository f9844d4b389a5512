"""NIfTI volumes on the command line: which files are some, and which slices are meant."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from medplib.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from medplib.io.volume import Volume


def is_volume(file: str) -> bool:
    """Whether this is the name of a NIfTI file."""
    return file.lower().endswith((".nii", ".nii.gz"))


def open_volume(file: str, window: tuple[float, float] | None) -> Volume:
    """As `load_volume`; without nibabel an InputError, which is one line on the terminal."""
    from medplib.io.volume import load_volume

    try:
        return load_volume(file, window)
    except ImportError as error:
        raise InputError(str(error)) from error


def slice_of(file: str, axis: str, index: int | None, window: tuple[float, float] | None) -> np.ndarray:
    """A slice as a picture, uint8 (h, w, 3). Raises InputError, also where no slice is named."""
    opened = open_volume(file, window)
    if index is None:
        raise InputError(
            f"{file!r} is a volume: name a slice with --slice N, from 0 to {opened.numbers(axis)[-1]} "
            f"({axis}); or draw in all of them with `medplib segment`."
        )
    return opened.picture(axis, index)


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
