"""Hugging Face data sets that are on this disk or loaded already, with columns named by a mapping."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medplib.data.features import class_names, stand_ins, with_names
from medplib.data.names import check_modality
from medplib.data.parquet import ParquetRows
from medplib.data.readers.columns import PIXELS, ColumnsRow, check_columns
from medplib.data.readers.common import SPLITS, Store, Unusable, build, find_files, keep, of_split
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.errors import InputError


def read_huggingface(
    path: Any,
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    modality: str | None = None,
    source: str = "huggingface",
) -> RecordSet:
    """A folder of Parquet files, one written by `save_to_disk`, a `datasets.Dataset` or a `DatasetDict`.

    columns   {name: column}, names as in `medplib.data.readers.columns`; by default equal
    modality  of all images
    source    what the records call their data set

    Nothing is fetched: download a data set first, as with `hf download --repo-type dataset NAME`.
    """
    modality = check_modality(modality)
    report, parts = ReadReport(), []
    for rows, name in _tables(path, split):
        chosen = check_columns(columns, rows.columns, f"The data set {rows.name!r}")
        make = ColumnsRow(source, chosen, _folder(path), name, None, modality)
        heavy = [column for key, column in chosen.items() if key in PIXELS and rows.heavy(column)]
        light = [column for column in chosen.values() if column not in heavy]
        pictures = (rows.stand_ins(column) for column in heavy)  # they stay unread
        both = zip(rows.light(light), *pictures, strict=True)
        whole = ({**row, **dict(zip(heavy, held, strict=True))} for row, *held in both)
        kept = keep(whole, partial(_check, make=make, report=report), rows.name, report)
        parts.append((rows, kept, make))
    return build(source, parts, report, "Name the columns by columns={...}.")


def _check(row: Mapping[str, Any], make: ColumnsRow, report: ReadReport) -> None:
    """Raise Unusable unless a row makes a record whose pictures are there."""
    record = make.check(row, report)
    for pixels in (*record.images, *record.regions, *record.masks):
        file = getattr(pixels, "file", None)
        if file is not None and not file.exists():
            raise Unusable("file missing", str(file))


class DatasetRows:
    """The rows of a `datasets.Dataset`, its pictures as bytes; it maps its own files into memory."""

    nbytes = 0

    def __init__(self, dataset: Any, name: str) -> None:
        import datasets

        for column, kind in dataset.features.items():
            if isinstance(kind, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(kind, "feature", None), datasets.Image):
                dataset = dataset.cast_column(column, type(kind)(datasets.Image(decode=False)))
        self.dataset, self.name = dataset, name
        self.columns = tuple(dataset.column_names)
        self.classes = class_names(dataset.features.to_dict())
        self.digest = str(dataset._fingerprint)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return with_names(self.dataset[index], self.classes)

    def heavy(self, column: str) -> bool:
        """Whether the column holds one picture per row."""
        import datasets

        kind = self.dataset.features[column]
        return isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary")

    def light(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows with these columns alone, in order."""
        there = [name for name in columns if name in self.columns]
        if not there:
            return iter({} for _ in range(len(self)))
        return (with_names(row, self.classes) for row in self.dataset.select_columns(there))

    def stand_ins(self, column: str) -> Iterator[dict[str, Any] | None]:
        """For each picture of a heavy column, in order, what `medplib.data.features.stand_ins` says."""
        for table in self.dataset.select_columns([column]).with_format("arrow").iter(256):
            for pictures in table.column(0).chunks:
                yield from stand_ins(pictures)


def _tables(path: Any, split: str | None) -> list[tuple[Any, str | None]]:
    """(rows, split) of what was given. Raises InputError."""
    if not isinstance(path, (str, os.PathLike)):
        return _loaded(path, split)
    folder = Path(path)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        import datasets

        return _loaded(datasets.load_from_disk(os.fspath(path)), split)
    files = find_files(path, ("*.parquet", "data/*.parquet", "*/*.parquet"), "a Hugging Face data set")
    return [(ParquetRows(file), name) for file, name in of_split(files, split, "The data set")]


def _loaded(data: Any, split: str | None) -> list[tuple[DatasetRows, str | None]]:
    if isinstance(data, Mapping):
        named = {SPLITS.get(str(name), str(name)): part for name, part in data.items()}
        wanted = SPLITS.get(split, split) if split is not None else None
        if wanted is not None and wanted not in named:
            raise InputError(f"The data set has no split {split!r}. Known: {', '.join(named)}.")
        return [(DatasetRows(part, name), name) for name, part in named.items() if wanted in (None, name)]
    if not hasattr(data, "column_names") or not hasattr(data, "__getitem__"):
        raise InputError(
            f"A Hugging Face data set is a folder, a Dataset or a DatasetDict, got {type(data).__name__}."
        )
    if split is not None:
        raise InputError(
            f"A single Dataset has no split {split!r}; give the DatasetDict, or leave split out."
        )
    return [(DatasetRows(data, str(data.split or "data")), str(data.split) if data.split else None)]


def _folder(path: Any) -> Store | None:
    """Where pictures named by path start."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    path = Path(path).resolve()
    return Store(str(path if path.is_dir() else path.parent))
