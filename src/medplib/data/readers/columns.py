"""Records from a table with columns of your own: what each column may hold, for CSV, JSON and Hugging Face
tables.

| column        | holds |
|---|---|
| image         | a file, or an image's bytes; several (a list, or `a.png;b.png`) are shown in this order |
| question, answer | texts; or `conversations`, a list of {"from", "value"} |
| mask          | one mask (or several) to draw: `<SEG>` is added to an answer that writes none |
| region        | one mask (or several) asked about: `<region>` is added to a question that writes none |
| box, point    | `x0 y0 x1 y1` or `x y` in pixels of the image, asked about like a region |
| label         | the name of what the mask or region shows; without a question it makes one |
| choices       | a list, or `a;b;c` |
| modality, answer_type, case, split | as in Record |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medplib.conversation import IMAGE, REGION, SEG
from medplib.data.files import Bytes, File, ImageFile, MaskFile
from medplib.data.names import modality_of
from medplib.data.questions import present_answer
from medplib.data.readers.common import BACKSLASHES, SPLITS, Skip, Store, Unusable, pair_up, text_of
from medplib.data.record import ANSWER_TYPES, Record
from medplib.data.report import ReadReport
from medplib.errors import InputError
from medplib.prompts.types import Box, Point

COLUMNS = ("image", "question", "answer", "conversations", "mask", "region", "box", "point", "label")
COLUMNS += ("choices", "modality", "answer_type", "case", "split")
PIXELS = ("image", "mask", "region")  # columns that hold files


@dataclass(frozen=True)
class ColumnsRow:
    """Makes the Record of a row. `columns` says which column of the table is which of COLUMNS."""

    source: str
    columns: Mapping[str, str]
    store: Store | None = None
    split: str | None = None  # of all rows
    only: str | None = None  # rows of other splits are skipped
    modality: str | None = None  # where the row does not say

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"{self.source} {sorted(self.columns.items())} {self.split} {self.only} {self.modality}"

    def __call__(self, row: Mapping[str, Any], number: int) -> Record:
        """Raises Unusable for a row that makes no record, Skip(its split) for one of another split."""
        row = {name: row.get(column) for name, column in self.columns.items()}
        split = text_of(row, "split").lower()
        split = SPLITS.get(split, split) or self.split
        if self.only is not None and split != self.only:
            raise Skip(split)
        images = _several(row.get("image"))
        if "image" in self.columns and not images:
            raise Unusable("image missing")
        words, answer_type = text_of(row, "modality"), text_of(row, "answer_type").lower()
        labels = tuple(_several(row.get("label")))
        regions = (*_shapes(row), *(MaskFile(self._file(item)) for item in _several(row.get("region"))))
        masks = tuple(MaskFile(self._file(item)) for item in _several(row.get("mask")))
        try:
            return Record(
                turns=_turns(row, labels, len(regions), len(masks)),
                images=tuple(ImageFile(self._file(item)) for item in images),
                regions=regions,
                masks=masks,
                source=self.source,
                row=number,
                modality=modality_of(words) or self.modality,
                answer_type=answer_type if answer_type in ANSWER_TYPES else None,
                case=text_of(row, "case") or None,
                split=split,
                labels=labels if masks or regions else (),
                choices=tuple(str(choice) for choice in _several(row.get("choices"))),
            )
        except Unusable:
            raise
        except InputError as error:
            raise Unusable("not a record", str(error)) from error

    def check(self, row: Mapping[str, Any], report: ReadReport) -> Record:
        """The row's Record, after a note of what was left out or repaired. Raises as the call does."""
        record = self(row, 0)
        about = record.turns[0][0]
        cells = {name: row.get(column) for name, column in self.columns.items()}
        words, answer_type = text_of(cells, "modality"), text_of(cells, "answer_type")
        if words and modality_of(words) is None:
            report.add("unknown", f"modality {words!r}", about)
        if answer_type and record.answer_type is None:
            report.add("unknown", f"answer_type {answer_type!r}", about)
        for item in (item for name in PIXELS for item in _several(cells.get(name))):
            if isinstance(item, str) and "\\" in item:
                report.add("repaired", BACKSLASHES, item)
        return record

    def _file(self, item: Any) -> File | Bytes:
        if isinstance(item, Mapping):  # as Hugging Face data sets store a picture
            if item.get("bytes"):
                return Bytes(item["bytes"], str(item.get("path") or "image"))
            item = item.get("path")
        if isinstance(item, bytes):
            return Bytes(item)
        if isinstance(item, str) and self.store is not None:
            return self.store.file(item.strip())
        raise Unusable("an image or mask that is no file", f"{type(item).__name__} {item!r:.60}")


def _turns(row: Mapping[str, Any], labels: tuple[str, ...], regions: int, masks: int) -> tuple:
    """(question, answer) pairs with a token for each region and mask."""
    if row.get("conversations"):
        pairs = pair_up(row["conversations"])
        turns = [(re.sub(rf"\s*{IMAGE}\s*", " ", asked).strip(), said.strip()) for asked, said in pairs]
    else:
        question, answer = text_of(row, "question"), text_of(row, "answer")
        if labels and masks and not question:
            question = f"Segment {' and '.join(f'the {label}' for label in labels)}."
        if labels and masks and not answer:
            answer = present_answer(labels) if len(labels) == masks else "Here it is."
        if labels and regions and not masks:
            question, answer = question or f"What is in {REGION}?", answer or f"This is the {labels[0]}."
        turns = [(question, answer)]
    for token, column, wanted in ((REGION, 0, regions), (SEG, 1, masks)):
        if wanted and not any(token in turn[column] for turn in turns):
            texts = list(turns[-1])
            texts[column] = f"{texts[column]} {' '.join([token] * wanted)}".strip()
            turns[-1] = tuple(texts)
    if not all(text for turn in turns for text in turn):
        raise Unusable("empty question or answer")
    return tuple(turns)


def _several(value: Any) -> list[Any]:
    """A cell as a list: `a;b` and lists have several items, "" and None none."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    if isinstance(value, (list, tuple)):
        return [item for item in value if item is not None]
    return [] if value is None else [value]


def _shapes(row: Mapping[str, Any]) -> list[Box | Point]:
    """The row's box and point. Raises Unusable for other than four or two numbers."""
    shapes = []
    for name, shape, count in (("box", Box, 4), ("point", Point, 2)):
        cell = row.get(name)
        if cell is None or cell == "":
            continue
        parts = re.split(r"[\s,;]+", cell.strip()) if isinstance(cell, str) else list(cell)
        try:
            numbers = [float(part) for part in parts]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count:
            raise Unusable(f"{name} without {count} numbers", repr(cell)[:80])
        shapes.append(shape(*numbers))
    return shapes


def check_columns(columns: Mapping[str, str] | None, there: tuple[str, ...], where: str) -> dict[str, str]:
    """{name: column} for a table with these columns. Raises InputError for names that are not there.

    Without `columns` those of these names; in capitals, too, where the others make no question.
    """
    if columns is None:
        chosen = {name: name for name in COLUMNS if name in there}
        if not ({"question", "answer"} <= chosen.keys() or {"conversations", "mask"} & chosen.keys()):
            named = {column.lower(): column for column in reversed(there)}
            chosen = {name: named[name] for name in COLUMNS if name in named} | chosen
    else:
        chosen = dict(columns)
        for name, column in chosen.items():
            if name not in COLUMNS:
                raise InputError(f"No column can be called {name!r}. Known: {', '.join(COLUMNS)}.")
            if column not in there:
                raise InputError(f"{where} has no column {column!r}. There: {', '.join(there)}.")
    if not {"question", "conversations", "mask", "region", "box", "point"} & set(chosen):
        raise InputError(
            f"{where} needs a column question, conversations, mask or region; it has {', '.join(there)}. "
            'Name them, as in columns={"question": "prompt", "answer": "reply"}.'
        )
    return chosen
