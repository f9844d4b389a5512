"""check_fit: weights by name held against those that a part needs; both tensors, or slices not read yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from medplib.errors import CheckpointError


def check_fit(given: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str = "") -> None:
    """Raise CheckpointError, listing what is missing, unexpected or misshapen, unless both hold the same
    names in the same shapes.

    what: how the message begins, such as "The weights of 'sam.pth'". remedy: a sentence at its end.
    """
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "other shape": [
            f"{name} {tuple(shape_of(given[name]))} for {tuple(shape_of(wanted[name]))}"
            for name in sorted(wanted.keys() & given.keys())
            if shape_of(given[name]) != shape_of(wanted[name])
        ],
    }
    listed = [f"{problem} {shorten(names)}" for problem, names in problems.items() if names]
    if listed:
        raise CheckpointError(f"{what} do not fit: {'; '.join(listed)}. {remedy}".rstrip())


def shape_of(value: Any) -> list[int]:
    """The shape of a tensor or of a slice that was not read."""
    return list(value.get_shape() if hasattr(value, "get_shape") else value.shape)


def shorten(names: Iterable[str]) -> str:
    """The first names of a list, and how many there are."""
    names = list(names)
    return f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''} ({len(names)})"
