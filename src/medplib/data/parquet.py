"""ParquetRows: rows of Parquet files, read by row group; nothing of them stays in memory but two groups."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medplib.errors import InputError


class ParquetRows:
    """The rows of one Parquet file as dicts. Random access reads a row group and keeps the last two.

    Memory is 8 bytes per row group. Raises InputError for a file that is not Parquet, ImportError without
    pyarrow (the extra `data`).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self.name = Path(self.path).name
        metadata = _file(self.path, os.getpid()).metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.columns = tuple(_file(self.path, os.getpid()).schema_arrow.names)
        self.digest = _footer_digest(self.path)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        return _group(self.path, group, os.getpid()).slice(index - start, 1).to_pylist()[0]

    def heavy(self, column: str) -> bool:
        """Whether the column holds one picture per row: bytes, or bytes beside a path."""
        import pyarrow.types

        kind = _file(self.path, os.getpid()).schema_arrow.field(column).type
        return any(
            getattr(pyarrow.types, f"is_{name}")(kind) for name in ("struct", "binary", "large_binary")
        )

    def light(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows with these columns alone, in order; none of the pictures is read."""
        there = [name for name in columns if name in self.columns]
        if not there:
            yield from ({} for _ in range(len(self)))
            return
        for batch in _file(self.path, os.getpid()).iter_batches(columns=there):
            yield from batch.to_pylist()

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        return self._ends.nbytes


@lru_cache(maxsize=8)
def _file(path: str, process: int) -> Any:
    del process  # a forked worker opens its own
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path!r} needs pyarrow: pip install 'medplib[data]'.") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path!r} is not a readable Parquet file: {error}. Fetch it again.") from error


@lru_cache(maxsize=2)
def _group(path: str, group: int, process: int) -> Any:
    return _file(path, process).read_row_group(group)


def _footer_digest(path: str) -> str:
    """sha256 of the file's size and its footer, where schema, sizes and statistics of all columns are."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()
