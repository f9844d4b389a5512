"""ParquetRows: rows of Parquet files, read by row group; nothing of them stays in memory but two groups."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medplib.data.features import class_names, stand_ins, with_names
from medplib.errors import InputError


class ParquetRows:
    """The rows of one Parquet file as dicts. Random access reads a row group and keeps the last two.

    Memory is 8 bytes per row group. Raises InputError for a file that is not Parquet, ImportError without
    pyarrow (the extra `data`).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self.name = Path(self.path).name
        file = self._file()
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.columns = tuple(file.schema_arrow.names)
        with _damage(self.path):
            self.classes = class_names(_features(file.schema_arrow))
        self.digest = _footer_digest(self.path)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        with _damage(self.path):
            table = _group(self.path, os.stat(self.path).st_mtime_ns, os.getpid(), group)
            return with_names(table.slice(index - start, 1).to_pylist()[0], self.classes)

    def heavy(self, column: str) -> bool:
        """Whether the column holds one picture per row: bytes, or bytes beside a path."""
        import pyarrow.types

        kind = self._file().schema_arrow.field(column).type
        return any(
            getattr(pyarrow.types, f"is_{name}")(kind) for name in ("struct", "binary", "large_binary")
        )

    def light(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows with these columns alone, in order; none of the pictures is read."""
        there = [name for name in columns if name in self.columns]
        if not there:
            yield from ({} for _ in range(len(self)))
            return
        with _damage(self.path):
            for batch in self._file().iter_batches(columns=there):
                yield from (with_names(row, self.classes) for row in batch.to_pylist())

    def stand_ins(self, column: str) -> Iterator[dict[str, Any] | None]:
        """For each picture of a heavy column, in order, what `stand_ins` says.

        Pictures are read only in row groups where some are missing.
        """
        file = self._file()
        with _damage(self.path):
            for group in range(file.metadata.num_row_groups):
                if _complete(file.metadata.row_group(group), column):
                    yield from ({"bytes": b"\0"} for _ in range(file.metadata.row_group(group).num_rows))
                    continue
                for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
                    yield from stand_ins(batch.column(0))

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        return self._ends.nbytes

    def _file(self) -> Any:
        with _damage(self.path):
            return _open(self.path, os.stat(self.path).st_mtime_ns, os.getpid())


def _features(schema: Any) -> Any:
    """Hugging Face's features, which it keeps as JSON beside the schema; {} where there are none."""
    about = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        return json.loads(about)["info"]["features"]
    except (KeyError, TypeError):
        return {}


def _complete(group: Any, column: str) -> bool:
    """Whether the statistics of a row group say that no picture of this column is missing."""
    for number in range(group.num_columns):
        about = group.column(number)
        if about.path_in_schema in (column, f"{column}.bytes"):
            found = about.statistics
            return found is not None and found.has_null_count and found.null_count == 0
    return False


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    """What pyarrow raises for a damaged file (many types, all of these) as an InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path!r} is not a readable Parquet file: {error}. Fetch it again.") from error


@lru_cache(maxsize=8)
def _open(path: str, modified: int, process: int) -> Any:
    del modified, process  # a changed file is another one; a forked worker opens its own
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path!r} needs pyarrow: pip install 'medplib[data]'.") from error
    return pyarrow.parquet.ParquetFile(path)


@lru_cache(maxsize=2)
def _group(path: str, modified: int, process: int, group: int) -> Any:
    return _open(path, modified, process).read_row_group(group)


def _footer_digest(path: str) -> str:
    """sha256 of the file's size and its footer, where schema, sizes and statistics of all columns are."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()
