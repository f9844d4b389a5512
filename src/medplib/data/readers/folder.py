"""A plain folder: images/ with masks/<class>/ of the same names, or a table with columns of your own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medplib.data.files import File, ImageFile, MaskFile
from medplib.data.json_text import scan_json
from medplib.data.names import check_modality, slice_name, spoken
from medplib.data.questions import absent_answer, present_answer
from medplib.data.readers.columns import COLUMNS, ColumnsRow, check_columns
from medplib.data.readers.common import (
    DICOM_SUFFIXES,
    IMAGE_SUFFIXES,
    JSON_SUFFIXES,
    SPLITS,
    Listing,
    Skip,
    Store,
    Unusable,
    build,
    index,
    no_split,
    open_store,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import MemoryRows, ParseCsv, csv_header, text_lines
from medplib.errors import InputError


def read_folder(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    images: str | os.PathLike | None = None,
    modality: str | None = None,
    source: str = "folder",
    empty: str = "drawn",
    label: str | None = None,
) -> RecordSet:
    """A folder with images/ and masks/<class>/, also below train/, val/ and test/; or a table: a CSV file
    (with commas, tabs or semicolons), a JSON list of objects, or JSON lines.

    columns   for a table: {name: column}, names as in `medplib.data.readers.columns`; by default equal
    images    for a table: the folder its paths start from, by default the table's
    modality  of all images
    source    what the records call their data set
    empty     of a folder, what a mask without a pixel says: "drawn" (nothing else is looked at), or "absent":
              the class is not in the image, and is denied in words. Every mask is then read once
    label     of a folder, what masks show that lie in masks/ itself and not in one of its folders
    """
    modality, path = check_modality(modality), Path(path)
    if empty not in ("drawn", "absent"):
        raise InputError(f"empty must be 'drawn' or 'absent', got {empty!r}.")
    if path.is_file():
        return _read_table(path, split, columns, images, modality, source)
    if columns is not None:
        raise InputError(f"columns are for a table (CSV or JSON), but {str(path)!r} is a folder.")
    report, parts = ReadReport(), []
    for root, name in _roots(path, split):
        rows = MemoryRows(_walk(root, report, empty == "absent", label))
        parts.append((rows, None, FolderRow(Store(str(root.resolve())), name, modality, source)))
    return build(source, parts, report, "A mask has the name of its image, in masks/<class>/.")


@dataclass(frozen=True)
class FolderRow:
    """Makes the Record of (image, mask, class, whether the class is there)."""

    store: Store
    split: str | None
    modality: str | None
    source: str

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"{self.source} {self.split} {self.modality}"

    def __call__(self, row: tuple[str, str, str, bool], number: int) -> Record:
        image, mask, label, there = row
        name = slice_name(image)
        return Record(
            turns=((f"Segment the {label}.", present_answer([label]) if there else absent_answer(label)),),
            images=(ImageFile(self.store.file(f"images/{image}")),),
            masks=(MaskFile(self.store.file(f"masks/{mask}")),) if there else (),
            source=self.source,
            row=number,
            modality=self.modality or (name.modality if name else None),
            case=name.patient if name else None,
            split=self.split,
            labels=(label,) if there else (),
            extra={} if there else {"kind": "grounding"},
        )


def _roots(path: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """The folders that hold images/, and their splits. Raises InputError if there are none."""
    if (path / "images").is_dir():
        found = [(path, None)]
    else:
        below = sorted(entry for entry in path.iterdir() if (entry / "images").is_dir())
        found = [(entry, SPLITS.get(entry.name.lower(), entry.name)) for entry in below]
    if not found:
        raise InputError(f"{str(path)!r} holds no folder images/, itself or in train/, val/ and test/.")
    chosen = [(root, name) for root, name in found if split in (None, name) or SPLITS.get(split) == name]
    if not chosen:
        raise no_split(repr(str(path)), split, (name for _, name in found))
    return chosen


def _walk(
    root: Path, report: ReadReport, look: bool, label: str | None
) -> Iterator[tuple[str, str, str, bool]]:
    """(image, mask below masks/, class, whether it is there) of all masks that belong to an image.

    look: read the masks; else every class is taken to be there. label: of masks in masks/ itself.
    """
    images = {}
    for name in _pictures(root / "images", (*IMAGE_SUFFIXES, *DICOM_SUFFIXES), report):
        if Path(name).stem in images:
            report.add("unknown", "two images of one name", name)
        images[Path(name).stem] = name
    used, masks = set(), root / "masks"
    folders = sorted(entry for entry in masks.iterdir() if entry.is_dir()) if masks.is_dir() else []
    named = [(folder, f"{folder.name}/", spoken(folder.name)) for folder in folders]
    if label is not None:
        named.append((masks, "", label))
    elif not folders and masks.is_dir() and any(_pictures(masks, IMAGE_SUFFIXES, ReadReport())):
        raise InputError(f"{str(masks)!r} has no folder per class; say what its masks show by label=NAME.")
    for folder, below, shown in named:
        for name in _pictures(folder, IMAGE_SUFFIXES, report):
            stem = Path(name).stem
            if stem not in images:
                report.add("dropped", "mask without an image", f"{below}{name}")
                continue
            used.add(stem)
            try:
                there = not look or bool(MaskFile(File(str(folder / name))).load().any())
            except InputError as error:
                report.add("dropped", "mask unreadable", str(error))
                continue
            yield images[stem], f"{below}{name}", shown, there
    for stem in images:
        if stem not in used:
            report.add("dropped", "image without a mask", images[stem])


def _pictures(folder: Path, suffixes: tuple[str, ...], report: ReadReport) -> Iterator[str]:
    """The names of the pictures in a folder; other files are reported, hidden ones passed over."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.is_dir():
            continue
        if entry.name.lower().endswith(suffixes):
            yield entry.name
        else:
            report.add("unknown", "file that is no picture by its name", f"{folder.name}/{entry.name}")


def _read_table(
    path: Path,
    split: str | None,
    columns: Mapping[str, str] | None,
    images: str | os.PathLike | None,
    modality: str | None,
    source: str,
) -> RecordSet:
    store = Store(str(path.parent.resolve())) if images is None else open_store(images)
    parse, header = None, _json_columns(path)
    if header is None:
        parse = csv_header(path, ParseCsv(delimiter=_delimiter(path, columns)))
        header = parse.columns
    chosen = check_columns(columns, header, repr(str(path)))
    only = SPLITS.get(split, split) if split is not None else None
    make = ColumnsRow(source, chosen, store, None, only, modality)
    report, skipped = ReadReport(), Counter()
    listing = Listing(store, report)

    def check(row: Any) -> None:
        if not isinstance(row, Mapping):
            raise Unusable("not a row of named columns", repr(row)[:80])
        try:
            record = make.check(row, report)
        except Skip as other:
            skipped[other.args[0]] += 1
            raise
        for pixels in (*record.images, *record.regions, *record.masks):
            _find(getattr(pixels, "file", None), listing)

    rows, kept = index(path, check, report, parse)
    if len(rows) and skipped.total() == len(rows):
        raise no_split(repr(str(path)), split, skipped)
    return build(source, [(rows, kept, make)], report, "Paths start at the table's folder, or at images=.")


def _json_columns(path: Path) -> tuple[str, ...] | None:
    """All names in the rows of a JSON list or of JSON lines, in order; None for another kind of file."""
    if path.suffix.lower() not in JSON_SUFFIXES:
        return None
    rows = (row for key, _, row in scan_json(path) if key is None and isinstance(row, Mapping))
    names = tuple(dict.fromkeys(str(name) for row in rows for name in row))
    if not names:
        raise InputError(f'{str(path)!r} must hold a list of rows, such as [{{"image": "a.png", ...}}].')
    return names


def _delimiter(path: Path, columns: Mapping[str, str] | None) -> str:
    """What stands between the columns: the comma, tab or semicolon at which the first line falls into most of
    the names that are looked for; of equals the first that is there."""
    first = next((line for _, line in text_lines(path) if line.strip()), "")
    wanted = {name.lower() for name in (columns.values() if columns else COLUMNS)}

    def rank(sign: str) -> tuple[int, bool]:
        names = {
            name.strip().lower() for name in next(ParseCsv(delimiter=sign).reader(first.splitlines()), [])
        }
        return len(names & wanted), sign in first

    return max(",\t;", key=rank)


def _find(file: File | None, listing: Listing) -> None:
    """Raise Unusable unless a table's file is there: in the store, or anywhere by an absolute path."""
    root = listing.store.path
    if file is None:
        return
    if file.member is not None:
        there = file.exists()
    elif not (name := os.path.relpath(file.path, root)).startswith(".."):
        there = listing.has(name)
    elif file.path.startswith(root + os.sep):
        raise Unusable("file outside the folder that paths start from", str(file))
    else:
        there = file.exists()
    if not there:
        raise Unusable("file missing", str(file))
