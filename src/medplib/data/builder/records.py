"""RecordSamples: the images of any reader's records as ImageSamples, so that the builder asks about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from medplib.data.convert import label_names
from medplib.data.files import File, identity
from medplib.data.names import spoken
from medplib.data.record import Record
from medplib.data.samples import ImageSample, Structure
from medplib.errors import InputError


class RecordSamples(Sequence[ImageSample]):
    """The pictures of grounding records, each with all masks that have a name, made when asked for.

    Records of one picture come together. Where a record names no case its picture is one. Memory: 16 bytes
    per record. Raises InputError for a record without a modality, or if no mask has a name.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        keys, numbers, named = [], [], False
        for number, record in enumerate(records):
            if len(record.images) != 1:
                continue
            if record.modality is None:
                raise InputError(
                    f"Row {record.row} of {record.source} says no modality, which questions name; give it, "
                    "as in --option modality=CT."
                )
            keys.append(identity(record.images[0]))
            numbers.append(number)
            named = named or any(label_names(record)[0])
        if not named:
            raise InputError("No record has a mask with a name; there is nothing to ask about.")
        _, first, group = np.unique(np.array(keys, np.uint64), return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[group]  # by first appearance
        order = np.argsort(rank, kind="stable")
        self._numbers = np.array(numbers, np.int64)[order]
        self._starts = np.append(np.flatnonzero(np.diff(rank[order], prepend=-1)), len(order))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, at: int) -> ImageSample: ...
    @overload
    def __getitem__(self, at: slice) -> list[ImageSample]: ...
    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"image {at} of {len(self)}")
        at %= len(self)
        rows = [self.records[int(n)] for n in self._numbers[self._starts[at] : self._starts[at + 1]]]
        image, first = rows[0].images[0], rows[0]
        structures = {
            (name, identity(mask)): Structure(spoken(name), _source(mask), "data set")
            for record in rows
            for name, mask in zip(label_names(record)[0], record.masks, strict=True)
            if name
        }
        return ImageSample(
            _source(image), first.modality, first.source, first.case or _name(image), first.split or "",
            "real", tuple(structures.values()),
        )  # fmt: skip


def _name(image: Any) -> str:
    """Of the picture's file; of a picture in memory, what its bytes give."""
    file = getattr(image, "file", None)
    return Path(str(file)).stem if isinstance(file, File) else f"{identity(image):016x}"


def _source(pixels: Any) -> Any:
    """The path of a PNG file, which can be linked; else what loads it."""
    file = getattr(pixels, "file", None)
    plain = isinstance(file, File) and file.member is None and getattr(pixels, "value", None) is None
    return Path(file.path) if plain and file.path.lower().endswith(".png") else pixels
