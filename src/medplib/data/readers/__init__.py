"""read: any data set of the field, by name, as a RecordSet. `READERS.names()` lists them."""

from __future__ import annotations

import os
from typing import Any

from medplib.data.options import check_options
from medplib.data.recordset import RecordSet, concat
from medplib.errors import InputError
from medplib.registry import READERS

__all__ = ["READERS", "RecordSet", "concat", "read"]


def read(name: str, path: str | os.PathLike | Any, split: str | None = None, **options: Any) -> RecordSet:
    """The records of a data set on disk; nothing is fetched and no picture is opened.

        read("slake", "data/Slake1.0", split="train", lang="en")

    name     one of `READERS.names()`
    path     the data set's folder, one of its files, or for "huggingface" also a loaded data set
    split    "train", "val" or "test" where the set has them; None reads all
    options  the reader's own, such as `images=` for pictures that lie elsewhere

    Raises InputError for a path, split or option that cannot be used or has a wrong type, UnknownNameError
    for the name.
    """
    reader = READERS.get(name.strip().lower().replace("-", "_") if isinstance(name, str) else name)
    check_options(reader, options, f"The reader {name!r}")
    if isinstance(path, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(path))
        if not os.path.exists(path):
            raise InputError(f"There is no {path!r} to read {name!r} from. Check the path.")
    return reader(path, split, **options)
