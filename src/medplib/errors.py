"""The errors medplib raises for input it cannot use; each names the value and what would have worked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral


class MedPLIBError(Exception):
    """Base of every error that medplib raises on purpose; the command line turns it into exit status 2."""


class InputError(MedPLIBError, ValueError):
    """An image, prompt, question or setting that cannot be used."""


class UnknownNameError(MedPLIBError, LookupError):
    """A name that is in no registry, folder or table; the message lists close matches."""

    @classmethod
    def among(cls, message: str, name: object, known: Iterable[object]) -> UnknownNameError:
        """The error that says `message`, the known name closest to `name`, and all that are known."""
        names = [str(k) for k in known]
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return cls(f"{message}{hint} Known: {', '.join(names) or 'none'}.")


class CheckpointError(MedPLIBError, ValueError):
    """Weights that are missing, damaged, or do not fit the model."""


def is_number(value: object) -> bool:
    """Whether this is a finite int or float, and no bool."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def check_whole(least: int = 1, **values: object) -> None:
    """Raise InputError for a value that is no whole number of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_size(**values: object) -> None:
    """Raise InputError for a value that is no (height, width) in whole numbers of at least 1."""
    for name, value in values.items():
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise InputError(f"{name} must be (height, width), got {value!r}.")
        check_whole(**{f"{name}[{i}]": side for i, side in enumerate(value)})
