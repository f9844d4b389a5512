"""Tables of one question per row: what such a reader takes of a row (Vqa), and the RecordSet of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medplib.data.files import Bytes, ImageFile
from medplib.data.json_text import scan_json
from medplib.data.readers.common import (
    JSON_SUFFIXES,
    Listing,
    Skip,
    Store,
    Unusable,
    build,
    image_store,
    index,
    keep,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import ParseCsv, Rows, scan_csv


@dataclass(frozen=True)
class Vqa:
    """One row's question and what is known about it. `image` is a name in the store, or an image's bytes."""

    turns: tuple[tuple[str, str], ...]
    image: str | Bytes | None = None
    modality: str | None = None
    answer_type: str | None = None
    case: str | None = None
    split: str | None = None
    choices: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


Parse = Callable[[Any], Vqa]  # of a row; raises Unusable, or Skip for a row that was not asked for


@dataclass(frozen=True)
class VqaRow:
    """Makes the Record of a row."""

    source: str
    split: str | None
    store: Store | None
    parse: Parse

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"{self.source} {self.split} {getattr(self.parse, '__qualname__', self.parse)}"

    def __call__(self, row: Any, number: int) -> Record:
        said = self.parse(row)
        image = self.store.file(said.image) if isinstance(said.image, str) else said.image
        return Record(
            turns=said.turns,
            images=() if image is None else (ImageFile(image),),
            source=self.source,
            row=number,
            modality=said.modality,
            answer_type=said.answer_type,
            case=said.case,
            split=said.split or self.split,
            choices=said.choices,
            extra=said.extra,
        )


def read_vqa(
    source: str,
    files: Sequence[tuple[Path, str | None]],
    parse: Parse,
    images: str | os.PathLike | None,
    folders: Sequence[str],
    table: ParseCsv | None = None,
) -> RecordSet:
    """The records of JSON or CSV files (path, split), whose pictures are in one of `folders` near them."""
    report, parts = ReadReport(), []
    for file, split in files:
        store = image_store(file, _images(file, parse, table), folders, images)
        listing = Listing(store, report)
        rows, kept = index(
            file, lambda row, listing=listing: _check(parse(row), listing, report), report, table
        )
        parts.append((rows, kept, VqaRow(source, split, store, parse)))
    return build(source, parts, report, "Give images=FOLDER if the pictures lie elsewhere.")


def vqa_set(
    source: str,
    tables: Sequence[tuple[Rows, str | None]],
    parse: Parse,
    look: Sequence[str],
    pictures: str | None = None,
    store: Store | None = None,
) -> RecordSet:
    """The records of tables that hold their pictures themselves, in a column, or name those of a store.

    The columns `look` decide what is kept, and whether the picture is there.
    """
    report, parts = ReadReport(), []
    listing = Listing(store, report) if store is not None else None

    def check(row: Any) -> None:
        _check(parse(row), listing, report)

    for rows, split in tables:
        kept = keep(_light(rows, look, pictures), check, rows.name, report)
        parts.append((rows, kept, VqaRow(source, split, store, parse)))
    return build(source, parts, report)


def _light(rows: Rows, look: Sequence[str], pictures: str | None) -> Iterator[dict[str, Any]]:
    """All rows with the columns `look`, and one byte in place of each picture that is there."""
    if pictures is None or pictures not in rows.columns:
        return rows.light(look)
    both = zip(rows.light(look), rows.stand_ins(pictures), strict=True)
    return ({**row, pictures: held} for row, held in both)


def _check(said: Vqa, listing: Listing | None, report: ReadReport) -> None:
    if listing is not None and isinstance(said.image, str) and not listing.has(said.image):
        raise Unusable("image missing", said.image)
    words = said.extra.get("modality")
    if words and said.modality is None:
        report.add("unknown", f"modality {words!r}", str(said.turns[0][0]))


def _images(file: Path, parse: Parse, table: ParseCsv | None) -> Iterator[str]:
    """The names of the images, to find the folder they are in."""
    if file.suffix.lower() in JSON_SUFFIXES:
        rows = (row for _, _, row in scan_json(file))
    else:
        rows = (row for _, row in scan_csv(file, table))
    for row in rows:
        try:
            image = parse(row).image
        except (Skip, Unusable):
            continue
        if isinstance(image, str):
            yield image
