"""PMC-VQA (versions 1 and 2) and OmniMedVQA: questions with four choices.

The choices stand below the question, each with its letter; the answer is the text of the right one.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from medplib.data.names import modality_of
from medplib.data.readers.common import Unusable, find_files, of_split, plain, text_of, with_choices
from medplib.data.readers.vqa import Vqa, read_vqa
from medplib.data.recordset import RecordSet
from medplib.errors import InputError

ACCESS = {"open": "Open-access", "restricted": "Restricted-access"}


def read_pmc_vqa(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    version: int | None = None,
    clean: bool = False,
    images: str | os.PathLike | None = None,
) -> RecordSet:
    """PMC-VQA from its folder or one of its CSV files.

    version  1 (train.csv, test.csv) or 2 (train_2.csv, test_2.csv); needed where both are
    clean    of version 1 take test_clean.csv as the test split instead of test.csv
    images   the folder or zip of the figures; by default images/, figures/ or images_2/ beside the table
    """
    if version not in (None, 1, 2):
        raise InputError(f"version must be 1 or 2, got {version!r}.")
    files = find_files(path, ("train*.csv", "test*.csv"), "PMC-VQA")
    if not Path(path).is_file():
        files = [file for file in files if file.stem != ("test" if clean else "test_clean")]
        versions = {2 if file.stem.endswith("_2") else 1 for file in files}
        if version is None and len(versions) > 1:
            raise InputError(f"{os.fspath(path)!r} holds PMC-VQA versions 1 and 2; choose with version=1.")
        files = [file for file in files if version in (None, 2 if file.stem.endswith("_2") else 1)]
    folders = ("images", "figures", "images_2", "images/images", "figures/figures")
    return read_vqa("pmc_vqa", of_split(files, split, "PMC-VQA"), parse_pmc, images, folders)


def read_omnimedvqa(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    access: str | None = None,
    images: str | os.PathLike | None = None,
) -> RecordSet:
    """OmniMedVQA, a benchmark: its one split is "test".

    access  "open" or "restricted"; None takes what is there
    images  the folder or zip that holds Images/, if it is not beside QA_information/
    """
    if access is not None and access not in ACCESS:
        raise InputError(f"access must be one of {', '.join(ACCESS)} or None, got {access!r}.")
    if split not in (None, "test"):
        raise InputError(f"OmniMedVQA has no split {split!r}. Known: test.")
    folder = ACCESS.get(access, "*") if access else "*"
    patterns = [f"QA_information/{folder}/*.json", f"{folder}/*.json", *(() if access else ("*.json",))]
    files = find_files(path, patterns, "OmniMedVQA")
    return read_vqa("omnimedvqa", [(file, "test") for file in files], parse_omni, images, ())


def parse_pmc(row: dict[str, str]) -> Vqa:
    """A row of either version's table, its column names in any spelling. Raises Unusable."""
    row = {_plain(str(name)): value for name, value in row.items()}
    choices = tuple(text_of(row, f"choice{letter}") for letter in "abcd")
    if all(map(_lettered, choices, "abcd")):  # else a letter is part of a name, as in "C. difficile"
        choices = tuple(map(_without_letter, choices, "abcd"))
    image = text_of(row, "figurepath")
    if not image:
        raise Unusable("no image named")
    answer, label = text_of(row, "answer", "anwser"), text_of(row, "answerlabel").upper()
    return _choice(text_of(row, "question"), choices, label, answer, image, None, {"figure": image})


def parse_omni(row: Any) -> Vqa:
    """A row of OmniMedVQA's lists. Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable("no question")
    choices = tuple(text_of(row, f"option_{letter}") for letter in "ABCD")
    image, words = text_of(row, "image_path"), text_of(row, "modality_type")
    if not image:
        raise Unusable("no image named")
    extra = {key: row[key] for key in ("dataset", "question_id", "question_type") if key in row}
    extra["modality"] = words
    answer = text_of(row, "gt_answer")
    return _choice(text_of(row, "question"), choices, "", answer, image, modality_of(words), extra)


def _choice(
    question: str,
    choices: tuple[str, ...],
    label: str,
    answer: str,
    image: str,
    modality: str | None,
    extra: dict[str, Any],
) -> Vqa:
    """The question with its choices. The right one is that of the letter `label`, else the one that `answer`
    spells, with or without its letter, else that of the letter which the answer is."""
    named = {chr(65 + i): choice for i, choice in enumerate(choices) if choice}
    label = _letter(label)
    if label not in named:
        spelt = {choice.lower(): letter for letter, choice in reversed(named.items())}
        said = [answer.lower(), *(_without_letter(answer, letter).lower() for letter in named)]
        label = next((spelt[text] for text in said if text in spelt), _letter(answer))
    if not question:
        raise Unusable("empty question")
    if label not in named or len(named) < 2:
        raise Unusable("the answer is none of the choices", f"{image}: {answer!r}")
    offered = tuple(named.values())
    plain(question, named[label])
    return Vqa(
        ((with_choices(question, offered), named[label]),),
        image,
        modality,
        "choice",
        choices=offered,
        extra={**extra, "question": question, "answer_label": label},
    )


@lru_cache(maxsize=64)
def _plain(column: str) -> str:
    """ "Choice A", "ChoiceA", "choice_a" -> "choicea"."""
    return re.sub(r"[^a-z]", "", column.lower())


def _letter(text: str) -> str:
    """ "a." -> "A"."""
    return text.strip().rstrip(".:").upper()


def _lettered(choice: str, letter: str) -> bool:
    """Whether a choice begins with its letter, or is empty."""
    return not choice or _without_letter(choice, letter) != choice


def _without_letter(choice: str, letter: str) -> str:
    """ " A: text" -> "text"."""
    return re.sub(rf"^\s*{re.escape(letter)}\s*[:.)]\s*", "", choice, flags=re.IGNORECASE).strip()
