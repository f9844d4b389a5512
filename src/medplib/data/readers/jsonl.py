"""Our own lossless format, as `medplib data convert --to jsonl` writes it: one record per line.

On disk: records.jsonl beside images/ and masks/. A line holds a Record's fields; images, masks and regions
are file names, a region may also be {"box": [x0, y0, x1, y1]} or {"point": [x, y, label]}.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from medplib.data.files import ImageFile, MaskFile
from medplib.data.readers.common import (
    SPLITS,
    Listing,
    Skip,
    Store,
    Unusable,
    build,
    find_files,
    index,
    no_split,
    open_store,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.errors import InputError
from medplib.prompts.types import Box, Point

PLAIN = ("source", "row", "modality", "answer_type", "case", "split", "extra")
LISTS = ("labels", "choices")


def read_jsonl(
    path: str | os.PathLike, split: str | None = None, *, images: str | os.PathLike | None = None
) -> RecordSet:
    """records.jsonl from its folder or by its name.

    images  the folder or zip that file names start from; by default the file's own folder
    """
    only = SPLITS.get(split, split) if split is not None else None
    report, parts, skipped = ReadReport(), [], set()
    for file in find_files(path, ("*.jsonl",), "records"):
        store = open_store(images) if images is not None else Store(str(file.parent.resolve()))
        make, listing = JsonlRow(store, only), Listing(store, report)
        rows, kept = index(file, lambda row, m=make, there=listing: _check(row, m, there, skipped), report)
        parts.append((rows, kept, make))
    if skipped and not report and all(kept is not None and not len(kept) for _, kept, _ in parts):
        raise no_split(repr(os.fspath(path)), split, skipped)
    return build("the records", parts, report, "Give images=FOLDER if images/ and masks/ lie elsewhere.")


@dataclass(frozen=True)
class JsonlRow:
    """Makes the Record of a line. Raises Unusable, or Skip for another split than `only`."""

    store: Store
    only: str | None = None

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"jsonl {self.only}"

    def __call__(self, row: Any, number: int) -> Record:
        if not isinstance(row, dict):
            raise Unusable("not a record")
        if self.only is not None and row.get("split") != self.only:
            raise Skip(row.get("split"))
        try:
            return Record(
                turns=tuple(tuple(turn) for turn in row["turns"]),
                images=tuple(ImageFile(self.store.file(name)) for name in row.get("images", ())),
                regions=tuple(self._region(region) for region in row.get("regions", ())),
                masks=tuple(MaskFile(self.store.file(name)) for name in row.get("masks", ())),
                **{name: row[name] for name in PLAIN if row.get(name) is not None},
                **{name: tuple(row[name]) for name in LISTS if row.get(name)},
            )
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise Unusable("not a record", f"{type(error).__name__}: {error}") from error

    def _region(self, region: Any) -> Box | Point | MaskFile:
        if isinstance(region, str):
            return MaskFile(self.store.file(region))
        return Box(*region["box"]) if "box" in region else Point(*region["point"])


def _check(row: Any, make: JsonlRow, listing: Listing, skipped: set[str | None]) -> None:
    """Raise as `make` does, or for a file that is not there; note the splits that were not asked for."""
    try:
        make(row, 0)
    except Skip as other:
        skipped.add(other.args[0])
        raise
    names = (*row.get("images", ()), *row.get("masks", ()), *row.get("regions", ()))
    for name in names:
        if isinstance(name, str) and not listing.has(name):
            raise Unusable("file missing", name)
