"""SLAKE: questions in English and Chinese on CT, MRI and X-ray; its masks as grounding records if wanted.

On disk: train.json, validation.json, test.json; imgs/<image>/source.jpg, mask.png; mask.txt with a number
and a name in each line.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medplib.data.files import ImageFile, MaskFile, read_labels
from medplib.data.names import modality_of, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.common import (
    Skip,
    Store,
    Unusable,
    build,
    find_files,
    of_split,
    question_and_answer,
    slashed,
    text_of,
)
from medplib.data.readers.vqa import Vqa, read_vqa
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import MemoryRows
from medplib.errors import InputError

LANGUAGES = ("en", "zh")


def read_slake(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    lang: str | None = None,
    masks: bool = False,
    images: str | os.PathLike | None = None,
) -> RecordSet:
    """SLAKE from its folder or one of its JSON files.

    lang    "en", "zh" or None for both
    masks   add one grounding record per structure of each image's mask.png, named by mask.txt
    images  the folder imgs/, if it lies elsewhere
    """
    if lang is not None and lang not in LANGUAGES:
        raise InputError(f"lang must be one of {', '.join(LANGUAGES)} or None, got {lang!r}.")
    names = ("train.json", "validation.json", "test.json")
    files = of_split(find_files(path, names, "SLAKE"), split, "SLAKE")
    records = read_vqa("slake", files, ParseSlake(lang), images, ("imgs", "images"))
    return records + _grounding(records, Path(path)) if masks else records


@dataclass(frozen=True)
class ParseSlake:
    """A row of the JSON list -> Vqa. Raises Unusable, or Skip for another language."""

    lang: str | None = None

    def __call__(self, row: Any) -> Vqa:
        if not isinstance(row, dict):
            raise Unusable("no question")
        lang = text_of(row, "q_lang").lower() or None
        if self.lang is not None and lang != self.lang:
            raise Skip
        image = text_of(row, "img_name")
        if not image:
            raise Unusable("no image named")
        words = text_of(row, "modality")
        answer_type = text_of(row, "answer_type").lower()
        return Vqa(
            (question_and_answer(row, "question", "answer"),),
            image,
            modality_of(words),
            answer_type if answer_type in ("open", "closed") else None,
            case=slashed(image).split("/")[0],
            extra={
                "lang": lang,
                "modality": words,
                **{key: row[key] for key in ("qid", "location", "content_type", "triple") if key in row},
            },
        )


def _grounding(records: RecordSet, path: Path) -> RecordSet:
    """A record for each structure in the masks of these records' images."""
    table = next((p for p in (path / "mask.txt", path.parent / "mask.txt") if p.is_file()), None)
    if table is None:
        raise InputError(f"masks=True needs SLAKE's mask.txt, which is not in {str(path)!r}.")
    names, report, rows, seen = _mask_names(table), ReadReport(), [], set()
    for part in records.parts:
        store, split = part.make.store, part.make.split
        for number in range(len(part.rows)):
            try:
                said = ParseSlake()(part.rows[number])
            except Unusable:
                continue
            folder = slashed(said.image).rpartition("/")[0]
            file = store.file(f"{folder}/mask.png")
            if folder in seen or not file.exists():
                continue
            seen.add(folder)
            try:
                values = np.unique(read_labels(file))
            except InputError:
                report.add("dropped", "mask unreadable", str(file))
                continue
            for value in values[values > 0].tolist():
                if value in names:
                    rows.append([said.image, value, names[value], said.modality, split, str(store)])
                else:
                    report.add("unknown", "mask value without a name", f"{file} {value}")
    stores = {row[5] for row in rows}
    for row in rows:
        del row[5]
    if len(stores) > 1:
        raise InputError(f"masks=True needs one folder of images, found {', '.join(sorted(stores))}.")
    if not rows:
        raise InputError(f"masks=True found no mask.png with a structure of mask.txt. {report}")
    return build("slake", [(MemoryRows(rows), None, SlakeMask(Store(*stores)))], report)


@dataclass(frozen=True)
class SlakeMask:
    """Makes the grounding Record of a structure."""

    store: Store
    settings = "slake masks"

    def __call__(self, row: Any, number: int) -> Record:
        image, value, name, modality, split = row
        folder = slashed(image).rpartition("/")[0]
        return Record(
            turns=((f"Segment the {name}.", present_answer([name])),),
            images=(ImageFile(self.store.file(image)),),
            masks=(MaskFile(self.store.file(f"{folder}/mask.png"), value),),
            source="slake",
            row=number,
            modality=modality,
            case=slashed(image).split("/")[0],
            split=split,
            labels=(name,),
        )


def _mask_names(table: Path) -> dict[int, str]:
    """{number: name} of mask.txt: a number and a name in each line, in either order. Raises InputError."""
    names = {}
    for line in table.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.strip():
            continue
        found = re.fullmatch(r"\s*(?:(\d+)[\s:=,]+(\S.*?)|(\S.*?)[\s:=,]+(\d+))\s*", line)
        if not found:
            raise InputError(f"{str(table)!r}: a line should hold a number and a name, got {line!r}.")
        names[int(found[1] or found[4])] = spoken(found[2] or found[3])
    return names
