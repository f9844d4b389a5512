"""The errors medplib raises for input it cannot use; each names the value and what would have worked."""

import math


class MedPLIBError(Exception):
    """Base of every error that medplib raises on purpose; the command line turns it into exit status 2."""


class InputError(MedPLIBError, ValueError):
    """An image, prompt, question or setting that cannot be used."""


class UnknownNameError(MedPLIBError, LookupError):
    """A name that is in no registry, folder or table; the message lists close matches."""


class CheckpointError(MedPLIBError, ValueError):
    """Weights that are missing, damaged, or do not fit the model."""


def is_number(value: object) -> bool:
    """Whether this is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
