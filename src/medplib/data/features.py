"""What columns of Hugging Face's tables hold: names for numbers of classes, pictures that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medplib.errors import InputError


def class_names(features: Any) -> dict[str, list[str]]:
    """{column: names of its classes} for the columns that hold numbers of classes, or lists of them.

    features  as `datasets.Features.to_dict` gives them, and as they stand in a Parquet file
    """
    found = {}
    for column, kind in features.items() if isinstance(features, Mapping) else ():
        kind = kind[0] if isinstance(kind, list) and kind else kind
        if isinstance(kind, Mapping) and isinstance(kind.get("feature"), Mapping):
            kind = kind["feature"]
        if isinstance(kind, Mapping) and kind.get("_type") == "ClassLabel":
            found[column] = list(kind["names"])
    return found


def with_names(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row with names in place of the numbers of classes, None for -1. Raises InputError for others."""
    named = {column: _named(row[column], column, classes[column]) for column in classes if column in row}
    return {**row, **named}


def _named(value: Any, column: str, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, column, names) for item in value]
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(f"The column {column!r} holds {value!r}, but its classes are 0 to {len(names) - 1}.")
    return names[value]


def stand_ins(pictures: Any) -> Iterator[dict[str, Any] | None]:
    """For each picture of an Arrow array one byte in place of its own, its path if it has none, or None."""
    import pyarrow.compute
    import pyarrow.types

    paths = [None] * len(pictures)
    if pyarrow.types.is_struct(pictures.type):
        names = {pictures.type.field(i).name for i in range(pictures.type.num_fields)}
        if "path" in names:
            paths = pyarrow.compute.struct_field(pictures, "path").to_pylist()
        if "bytes" in names:
            pictures = pyarrow.compute.struct_field(pictures, "bytes")
    for there, path in zip(pictures.is_valid().to_pylist(), paths, strict=True):
        yield {"bytes": b"\0"} if there else {"path": path} if path else None
