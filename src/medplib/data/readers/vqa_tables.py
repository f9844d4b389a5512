"""VQA-RAD and PathVQA: Parquet files with the pictures inside, and VQA-RAD's original JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medplib.data.files import Bytes
from medplib.data.parquet import ParquetRows
from medplib.data.readers.common import (
    SPLITS,
    Skip,
    Unusable,
    closed,
    find_files,
    of_split,
    question_and_answer,
    text_of,
)
from medplib.data.readers.vqa import Vqa, read_vqa, vqa_set
from medplib.data.recordset import RecordSet
from medplib.errors import InputError

_PARQUET = ("*.parquet", "data/*.parquet", "*/*.parquet")


def read_vqa_rad(
    path: str | os.PathLike, split: str | None = None, *, images: str | os.PathLike | None = None
) -> RecordSet:
    """VQA-RAD: its Parquet files, or the original JSON with its folder of images.

    images  the folder of the JSON's pictures, if it is not "VQA_RAD Image Folder" beside it
    """
    files = find_files(path, [*_PARQUET, "*.json"], "VQA-RAD")
    lists = [file for file in files if file.suffix == ".json"]
    if len(lists) < len(files):
        return _read_parquet("vqa_rad", [file for file in files if file not in lists], split)
    wanted = None if split is None else SPLITS.get(split, split)
    if wanted not in (None, "train", "test"):
        raise InputError(f"VQA-RAD's JSON has no split {split!r}. Known: test, train.")
    parse = ParseRad(wanted)
    folders = ("VQA_RAD Image Folder", "images")
    return read_vqa("vqa_rad", [(file, None) for file in lists], parse, images, folders)


def read_path_vqa(path: str | os.PathLike, split: str | None = None) -> RecordSet:
    """PathVQA from its Parquet files: train, validation and test."""
    return _read_parquet("path_vqa", find_files(path, _PARQUET, "PathVQA"), split)


def _read_parquet(source: str, files: list[Path], split: str | None) -> RecordSet:
    tables = [(ParquetRows(file), name) for file, name in of_split(files, split, source)]
    parse = parse_pathology if source == "path_vqa" else parse_table
    return vqa_set(source, tables, parse, ("question", "answer"), "image")


def parse_table(row: dict[str, Any]) -> Vqa:
    """A Parquet row: question, answer, image as {"bytes", "path"}. Raises Unusable."""
    turn = question_and_answer(row, "question", "answer")
    image = row.get("image") or {}
    if not image.get("bytes"):
        raise Unusable("image missing")
    return Vqa((turn,), Bytes(image["bytes"], image.get("path") or "image"), answer_type=closed(turn[1]))


def parse_pathology(row: dict[str, Any]) -> Vqa:
    """`parse_table` of PathVQA, whose pictures are all of pathology. Raises Unusable."""
    said = parse_table(row)
    return Vqa(said.turns, said.image, "histopathology", said.answer_type)


@dataclass(frozen=True)
class ParseRad:
    """A row of VQA-RAD's own JSON -> Vqa; its split is in phrase_type. Raises Unusable, Skip."""

    split: str | None = None

    def __call__(self, row: Any) -> Vqa:
        if not isinstance(row, dict):
            raise Unusable("no question")
        phrase = text_of(row, "phrase_type")
        split = "test" if phrase.startswith("test") else "train"
        if self.split not in (None, split):
            raise Skip
        image = text_of(row, "image_name")
        if not image:
            raise Unusable("no image named")
        turn = question_and_answer(row, "question", "answer")
        answer_type = text_of(row, "answer_type").lower()
        extra = {
            key: row[key] for key in ("qid", "phrase_type", "question_type", "image_organ") if key in row
        }
        return Vqa(
            (turn,),
            image,
            answer_type=answer_type if answer_type in ("open", "closed") else closed(turn[1]),
            case=image,
            split=split,
            extra=extra,
        )
