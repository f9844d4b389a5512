"""A plain folder: images/ with masks/<class>/ of the same names, or a CSV table with columns of your own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medplib.data.files import File, ImageFile, MaskFile
from medplib.data.names import check_modality, slice_name, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.columns import ColumnsRow, check_columns
from medplib.data.readers.common import (
    IMAGE_SUFFIXES,
    SPLITS,
    Listing,
    Skip,
    Store,
    Unusable,
    build,
    index,
    open_store,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import MemoryRows, ParseCsv, text_lines
from medplib.errors import InputError


def read_folder(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    images: str | os.PathLike | None = None,
    modality: str | None = None,
    source: str = "folder",
) -> RecordSet:
    """A folder with images/ and masks/<class>/, also below train/, val/ and test/; or a CSV file.

    columns   for a CSV: {name: column}, names as in `medplib.data.readers.columns`; by default equal
    images    for a CSV: the folder its paths start from, by default the table's
    modality  of all images
    source    what the records call their data set
    """
    modality, path = check_modality(modality), Path(path)
    if path.is_file():
        return _read_table(path, split, columns, images, modality, source)
    if columns is not None:
        raise InputError(f"columns are for a CSV file, but {str(path)!r} is a folder.")
    report, parts = ReadReport(), []
    for root, name in _roots(path, split):
        rows = MemoryRows(_walk(root, report))
        parts.append((rows, None, FolderRow(Store(str(root.resolve())), name, modality, source)))
    return build(source, parts, report, "A mask has the name of its image, in masks/<class>/.")


@dataclass(frozen=True)
class FolderRow:
    """Makes the grounding Record of (image, mask, class)."""

    store: Store
    split: str | None
    modality: str | None
    source: str

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"{self.source} {self.split} {self.modality}"

    def __call__(self, row: tuple[str, str, str], number: int) -> Record:
        image, mask, label = row
        name = slice_name(image)
        return Record(
            turns=((f"Segment the {label}.", present_answer([label])),),
            images=(ImageFile(self.store.file(f"images/{image}")),),
            masks=(MaskFile(self.store.file(f"masks/{mask}")),),
            source=self.source,
            row=number,
            modality=self.modality or (name.modality if name else None),
            case=name.patient if name else None,
            split=self.split,
            labels=(label,),
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
        known = ", ".join(str(name) for _, name in found if name) or "none"
        raise InputError(f"{str(path)!r} has no split {split!r}. Known: {known}.")
    return chosen


def _walk(root: Path, report: ReadReport):
    """(image, class/mask, class) of all masks that belong to an image."""
    images = {}
    for name in sorted(os.listdir(root / "images")):
        if name.lower().endswith(IMAGE_SUFFIXES):
            if Path(name).stem in images:
                report.add("unknown", "two images of one name", name)
            images[Path(name).stem] = name
    used = set()
    masks = root / "masks"
    for folder in sorted(entry for entry in masks.iterdir() if entry.is_dir()) if masks.is_dir() else ():
        for name in sorted(os.listdir(folder)):
            stem = Path(name).stem
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            if stem not in images:
                report.add("dropped", "mask without an image", f"{folder.name}/{name}")
                continue
            used.add(stem)
            yield images[stem], f"{folder.name}/{name}", spoken(folder.name)
    for stem in images:
        if stem not in used:
            report.add("dropped", "image without a mask", images[stem])


def _read_table(
    path: Path,
    split: str | None,
    columns: Mapping[str, str] | None,
    images: str | os.PathLike | None,
    modality: str | None,
    source: str,
) -> RecordSet:
    store = Store(str(path.parent.resolve())) if images is None else open_store(images)
    lines = (line for _, line in text_lines(path))
    header = tuple(name.strip() for name in next(ParseCsv().reader(lines), []))
    chosen = check_columns(columns, header, repr(str(path)))
    only = SPLITS.get(split, split) if split is not None else None
    make = ColumnsRow(source, chosen, store, None, only, modality)
    report, skipped = ReadReport(), Counter()
    listing = Listing(store, report)

    def check(row: dict[str, str]) -> None:
        try:
            record = make.check(row, report)
        except Skip as other:
            skipped[other.args[0]] += 1
            raise
        for pixels in (*record.images, *record.regions, *record.masks):
            _find(getattr(pixels, "file", None), listing)

    rows, kept = index(path, check, report)
    if len(rows) and skipped.total() == len(rows):
        known = ", ".join(sorted(name for name in skipped if name)) or "none"
        raise InputError(f"{str(path)!r} has no split {split!r}. Known: {known}.")
    return build(source, [(rows, kept, make)], report, "Paths start at the table's folder, or at images=.")


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
