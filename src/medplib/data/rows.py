"""Rows of a large JSON or CSV file, found again by where they begin: 8 bytes of memory per row, no dict.

A file is parsed once, piece by piece, to find and check its rows; later a row is read from its place. The
file must not change in between: its size and time are kept, and a changed file is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from medplib.data.json_text import parse_json, scan_json
from medplib.errors import InputError


class Rows(Protocol):
    """Rows that are read when asked for. Picklable; `digest` names their content, `nbytes` their memory."""

    digest: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""


@dataclass(eq=False)
class TextRows:
    """Rows of a text file at `starts` (N + 1 byte positions); `parse` makes a row of its bytes."""

    path: str
    starts: np.ndarray
    parse: Callable[[bytes], Any]
    digest: str
    stamp: tuple[int, int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Any:
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        return self.parse(_open(self.path, self.stamp).read(end - start, start))

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory: 8 per row."""
        return self.starts.nbytes


class MemoryRows(Sequence):
    """Rows held in memory, each packed as JSON text: for small lists and for what was found by walking."""

    def __init__(self, rows: Iterable[Any]) -> None:
        text, starts = bytearray(), array("Q", [0])
        for row in rows:
            text += json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
            starts.append(len(text))
        self._text, self._starts = bytes(text), np.array(starts, np.uint64)
        self.digest = hashlib.sha256(self._text).hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._text[int(self._starts[index]) : int(self._starts[index + 1])])

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory: the text, and 8 per row."""
        return len(self._text) + self._starts.nbytes


Look = Callable[[int, Any], bool]  # (row number, row) -> whether to keep it


class Descriptor:
    """An open file, closed with its object: read by place, so it needs no lock and survives a fork."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)

    def read(self, length: int, place: int) -> bytes:
        """`length` bytes from `place`, fewer at the end of the file."""
        return os.pread(self.number, length, place)


@lru_cache(maxsize=32)
def _open(path: str, stamp: tuple[int, int]) -> Descriptor:
    if _stamp(path) != stamp:
        raise InputError(f"{path!r} has changed since its rows were found. Read the data set again.")
    return Descriptor(path)


def _stamp(path: str) -> tuple[int, int]:
    """(bytes, time of change). Raises InputError if there is no such file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path!r} cannot be opened: {error.strerror}. Check the path.") from error
    return status.st_size, status.st_mtime_ns


def file_digest(path: str | os.PathLike) -> str:
    """sha256 of a file, as text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(
    path: str, starts: array, kept: array, stamp: tuple[int, int], parse: Any
) -> tuple[TextRows, Any]:
    """The rows, and the numbers of those kept (None: all)."""
    rows = TextRows(path, np.array(starts, np.uint64), parse, file_digest(path), stamp)
    return rows, None if len(kept) == len(rows) else np.array(kept, np.int64)


# ------------------------------------------------------------------------------------------ CSV


@dataclass(frozen=True)
class ParseCsv:
    """Bytes of one row -> {column: text}, or [text] without columns.

    header: whether the first row of a file names the columns.
    """

    columns: tuple[str, ...] = ()
    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    header: bool = True

    def __call__(self, data: bytes) -> Any:
        lines = io.StringIO(data.decode("utf-8-sig"), newline="\n")  # cut at \n alone, as files are
        return self.of(next((row for row in self.reader(lines) if row), []))

    def reader(self, lines: Iterable[str]) -> Any:
        """Python's reader with these settings."""
        return csv.reader(lines, delimiter=self.delimiter, quoting=self.quoting)

    def of(self, fields: list[str]) -> Any:
        """The fields by the name of their column; missing ones are "", more than the columns are left out."""
        if not self.columns:
            return fields
        return dict(zip(self.columns, [*fields, *[""] * len(self.columns)], strict=False))


def text_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(byte where it ends, text) of every line of a UTF-8 file, without its mark.

    Raises InputError, with the position, for bytes that are no UTF-8.
    """
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8" if start else "utf-8-sig")
            except UnicodeDecodeError as error:
                place = start + error.start
                raise InputError(
                    f"{os.fspath(path)!r} is not UTF-8 text: byte {place} is {line[error.start]:#04x}. "
                    "Save it as UTF-8."
                ) from error
            start += len(line)
            yield start, text


def csv_header(path: str | os.PathLike, parse: ParseCsv | None = None) -> ParseCsv:
    """`parse` with the columns that the first row of a file names. Raises InputError for an empty file."""
    parse = parse or ParseCsv()
    for _, fields in _csv_fields(path, parse):
        return replace(parse, columns=tuple(name.strip() for name in fields))
    raise InputError(f"{os.fspath(path)!r} is empty; its first line should name the columns.")


def scan_csv(path: str | os.PathLike, parse: ParseCsv | None = None) -> Iterator[tuple[int, Any]]:
    """(byte position, row) of every row of a CSV file. Without columns in `parse` the first row names them.

    Raises InputError for a file that is no such table.
    """
    parse = parse or ParseCsv()
    rows = _csv_fields(path, parse)
    if parse.header:
        parse = parse if parse.columns else csv_header(path, parse)
        next(rows, None)
    yield from ((start, parse.of(fields)) for start, fields in rows)


def _csv_fields(path: str | os.PathLike, parse: ParseCsv) -> Iterator[tuple[int, list[str]]]:
    """(byte position, fields) of every row that has some."""
    start = position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for end, line in text_lines(path):
            position = end
            yield line

    try:
        for fields in parse.reader(lines()):
            if fields:
                yield start, fields
            start = position
    except csv.Error as error:
        raise InputError(
            f"{os.fspath(path)!r} is no CSV table near byte {start}: {error}. Save it again as CSV in UTF-8."
        ) from error


def index_csv(path: str | os.PathLike, look: Look, parse: ParseCsv | None = None) -> tuple[TextRows, Any]:
    """The rows of a CSV file, and the numbers of those that `look(number, row)` keeps (None: all).

    Without columns in `parse` the first row names them. Raises InputError for a file that is no such table.
    """
    path, parse = os.fspath(path), parse or ParseCsv()
    stamp = _stamp(path)
    if parse.header and not parse.columns:
        parse = csv_header(path, parse)
    starts, kept = array("Q"), array("Q")
    for start, row in scan_csv(path, parse):
        starts.append(start)
        if look(len(starts) - 1, row):
            kept.append(len(starts) - 1)
    starts.append(stamp[0])
    return _finish(path, starts, kept, stamp, parse)


# ------------------------------------------------------------------------------------------ JSON


def text_rows(path: str | os.PathLike, starts: array) -> TextRows:
    """The JSON values that begin at these bytes of a file, in their order."""
    path = os.fspath(path)
    stamp = _stamp(path)
    return _finish(path, starts + array("Q", [stamp[0]]), starts, stamp, parse_json)[0]


def index_json(path: str | os.PathLike, look: Look) -> tuple[TextRows, Any]:
    """The rows of a JSON list, of an object, or of lines of JSON, and the numbers of those that
    `look(number, row)` keeps (None: all).

    A row of an object is the pair (key, value).
    """
    path = os.fspath(path)
    stamp = _stamp(path)
    starts, kept = array("Q"), array("Q")
    for key, at, value in scan_json(path):
        starts.append(at)
        if look(len(starts) - 1, value if key is None else (key, value)):
            kept.append(len(starts) - 1)
    starts.append(stamp[0])
    return _finish(path, starts, kept, stamp, parse_json)
