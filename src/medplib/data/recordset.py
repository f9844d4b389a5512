"""RecordSet: a sequence of Records that are made when asked for; in memory is where they begin, no more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from medplib.data.files import Held
from medplib.data.record import Record
from medplib.data.report import ReadReport
from medplib.data.rows import Rows
from medplib.errors import InputError


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one file and what makes a Record of each: `make(row, number)`. Both can be pickled."""

    rows: Rows
    make: Callable[[Any, int], Record]


class RecordSet(Sequence[Record]):
    """Records of one or several files, read lazily.

        records = read("slake", "Slake1.0", split="train")
        len(records); records[0]; records[-5:]; records.subset([4, 2]); records + others

    Slices and subsets share the files' index and add 8 bytes per record. A set can be pickled (for loader
    workers), which takes the index along and no pixels.

    report       what was repaired, dropped or unknown when the set was read
    nbytes       bytes of the index in memory
    """

    def __init__(
        self, parts: Iterable[Part], numbers: np.ndarray | None = None, report: ReadReport | None = None
    ) -> None:
        self.parts = tuple(parts)
        self.report = report or ReadReport()
        self._ends = np.cumsum([len(part.rows) for part in self.parts], dtype=np.int64)
        self._numbers = None if numbers is None else np.asarray(numbers, np.int64)
        rows = int(self._ends[-1]) if self.parts else 0
        if self._numbers is not None and self._numbers.size:
            low, high = int(self._numbers.min()), int(self._numbers.max())
            if low < 0 or high >= rows:
                raise InputError(f"Record numbers must be 0 to {rows - 1}, got {low} to {high}.")

    def __len__(self) -> int:
        if self._numbers is not None:
            return len(self._numbers)
        return int(self._ends[-1]) if self.parts else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> RecordSet: ...
    def __getitem__(self, index: int | slice) -> Record | RecordSet:
        if isinstance(index, slice):
            return self.subset(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = int(index) % len(self)
        number = index if self._numbers is None else int(self._numbers[index])
        which = int(np.searchsorted(self._ends, number, side="right"))
        part = self.parts[which]
        number -= int(self._ends[which - 1]) if which else 0
        return part.make(part.rows[number], number)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Sequence[int] | np.ndarray) -> RecordSet:
        """The records with these numbers (0 to len - 1), in this order. Raises InputError for others."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise InputError(
                f"Record numbers must be 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}."
            )
        return RecordSet(self.parts, wanted if self._numbers is None else self._numbers[wanted], self.report)

    def filter(self, keep: Callable[[Record], bool]) -> RecordSet:
        """The records that `keep(record)` is true for. Makes each of them once."""
        return self.subset([i for i, record in enumerate(self) if keep(record)])

    def __add__(self, other: RecordSet) -> RecordSet:
        return concat([self, other])

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        own = 0 if self._numbers is None else self._numbers.nbytes
        return own + sum(part.rows.nbytes for part in self.parts)

    def fingerprint(self) -> str:
        """sha256 over the annotation files' content, how they are read, and the numbers chosen of them.

        The same on another machine with the data elsewhere. The pixels are not part of it.
        """
        digest = hashlib.sha256()
        for part in self.parts:
            settings = getattr(part.make, "settings", type(part.make).__qualname__)
            digest.update(f"{len(part.rows)} {part.rows.digest} {settings}\n".encode())
        digest.update(b"all" if self._numbers is None else self._numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"RecordSet({len(self)} records, {self.nbytes} bytes of index)"


def concat(sets: Sequence[RecordSet]) -> RecordSet:
    """One set after the other; parts that several share are kept once in memory."""
    if all(one._numbers is None for one in sets):
        numbers = None
    else:
        offset, pieces = 0, []
        for one in sets:
            own = np.arange(len(one)) if one._numbers is None else one._numbers
            pieces.append(own + offset)
            offset += int(one._ends[-1]) if one.parts else 0
        numbers = np.concatenate(pieces)
    report = ReadReport()
    for one in dict.fromkeys(id(one.report) for one in sets):
        report = report.merged(next(s.report for s in sets if id(s.report) == one))
    return RecordSet((part for one in sets for part in one.parts), numbers, report)


def fingerprint(records: Sequence[Record]) -> str:
    """The records' own fingerprint, or a hash of their number and of up to 1000 of them (files by name)."""
    own = getattr(records, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    digest = hashlib.sha256(str(len(records)).encode())
    for i in np.unique(np.linspace(0, len(records) - 1, min(len(records), 1000)).astype(int)):
        record = records[int(i)]
        pixels = (record.images, record.regions, record.masks)
        digest.update(repr((record.turns, record.source, *map(_told, pixels))).encode())
    return digest.hexdigest()


def _told(pixels: Sequence[Any]) -> list[str]:
    """Files and regions in words; arrays, of which a repr shows the edges only, by a hash."""
    return [
        hashlib.sha256(np.ascontiguousarray(item.array)).hexdigest() if isinstance(item, Held) else repr(item)
        for item in pixels
    ]
