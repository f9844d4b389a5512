"""ImageCLEF VQA-Med 2019 and 2021: lines `imageID|question|answer` beside a folder of jpg files.

The 2019 test lines name a category too: `imageID|category|question|answer#another`. The 2021 test set has its
questions in one file, `...Questions.txt`, and `imageID|answer|another` in `...ReferenceAnswers.txt`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from medplib.data.readers.common import (
    IMAGE_SUFFIXES,
    Unusable,
    closed,
    find_files,
    of_split,
    open_store,
    plain,
)
from medplib.data.readers.vqa import Vqa, read_vqa, vqa_set
from medplib.data.recordset import RecordSet, concat
from medplib.data.rows import MemoryRows, ParseCsv, text_lines
from medplib.errors import InputError

LINES = ParseCsv(delimiter="|", quoting=csv.QUOTE_NONE, header=False)
_ASKS = re.compile(
    r"\?$|^((in|on|with) )?(what|which|where|who|when|how|why)\b"
    r"|^(is|are|was|were|does|do|did|can|has|have)\b",
    re.IGNORECASE,
)


def read_imageclef(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    year: int | None = None,
    images: str | os.PathLike | None = None,
) -> RecordSet:
    """VQA-Med's text files below a folder, or one of them.

    year    2019 or 2021: takes the files that have it in their path; None takes all
    images  the folder of the pictures; by default the one near the text file that holds its first image
    """
    if year not in (None, 2019, 2021):
        raise InputError(f"year must be 2019 or 2021, got {year!r}.")
    found = find_files(path, ("**/*.txt",), "ImageCLEF VQA-Med")
    found = [file for file in found if year in (None, _year(file, Path(path)))]
    files = sorted({_answers(file) or file for file in found if _is_table(file)})
    whole = [file for file in files if "ByCategory" not in str(file)]  # the same lines again, by category
    if not files:
        raise InputError(
            f"{os.fspath(path)!r} holds no text file of lines `imageID|question|answer`"
            f"{f' for {year}' if year else ''}. Check the path."
        )
    chosen = of_split(whole or files, split, "ImageCLEF VQA-Med")
    alone = [file for file, _ in chosen if not _has_questions(file)]
    if len(alone) == len(chosen):
        raise InputError(
            f"No line of {str(alone[0])!r} holds a question between its image and its answer. Lines should "
            "be `imageID|question|answer`; reference answers need their questions beside them, in a file of "
            "the same name that ends in Questions.txt."
        )
    records = concat([_read(file, name, images) for file, name in chosen if file not in alone])
    for file in alone:
        records.report.add("dropped", "answers without questions", file.name)
    for kind, file in _left_out(found, files):
        records.report.add("dropped", kind, file.name)
    return records


def _read(file: Path, split: str | None, images: str | os.PathLike | None) -> RecordSet:
    """The records of a table, or of reference answers with their questions beside them."""
    folder, suffix = (images, ".jpg") if images is not None else _pictures(file)
    questions = _questions(file)
    if questions is not None:
        rows = JoinedRows(questions, file)
        return vqa_set("imageclef", [(rows, split)], ParseLine(suffix), (), store=open_store(folder))
    return read_vqa("imageclef", [(file, split)], ParseLine(suffix), folder, (), LINES)


class JoinedRows(MemoryRows):
    """[image, question, `answer|another`] of lines `image|question` and lines `image|answer|another`.

    The lines of an image belong together in their order; what has no partner stands beside "".
    """

    def __init__(self, questions: Path, answers: Path) -> None:
        texts: dict[str, tuple[list[str], list[str]]] = {}
        for column, file in enumerate((questions, answers)):
            for image, *rest in _fields(file):
                texts.setdefault(image, ([], []))[column].append("|".join(rest))
        pairs = ((image, *pair) for image, both in texts.items() for pair in zip_longest(*both, fillvalue=""))
        super().__init__(pairs)
        self.name = answers.name

    def light(self, columns: Sequence[str]) -> Iterator[list[str]]:
        """All rows, in order; they have no columns to choose."""
        return iter(self)


@dataclass(frozen=True)
class ParseLine:
    """The fields of a line -> Vqa; `suffix` is that of the pictures. Raises Unusable."""

    suffix: str = ".jpg"

    def __call__(self, fields: list[str]) -> Vqa:
        fields = [field.strip() for field in fields]
        if len(fields) < 3 or not all(fields):
            raise Unusable("not imageID|question|answer", "|".join(fields)[:80])
        last = len(fields) - 2
        at = next((i for i in range(1, last) if fields[i].endswith("?")), last)
        image, category, question = fields[0], fields[1:at], fields[at]
        answers = re.split(r"[|#]" if category else r"[|]", "|".join(fields[at + 1 :]))
        answer, *others = [text.strip() for text in answers if text.strip()] or [""]
        if not answer:
            raise Unusable("empty answer", "|".join(fields)[:80])
        plain(question, answer)
        name = image if image.lower().endswith(IMAGE_SUFFIXES) else image + self.suffix
        extra = {"category": category[0]} if category else {}
        extra |= {"other_answers": others} if others else {}
        return Vqa(((question, answer),), name, None, closed(answer), case=image, extra=extra)


def _year(file: Path, root: Path) -> int | None:
    """The year in the names below the given folder, else in its own."""
    names = "" if file == root else file.relative_to(root).as_posix()
    found = re.search(r"2019|2021", names) or re.search(r"2019|2021", root.name)
    return int(found[0]) if found else None


def _plain(file: Path) -> str:
    """ "Task1-VQA-2021-TestSet-Questions.txt" -> "task1vqa2021testsetquestions"."""
    return re.sub(r"[^a-z0-9]", "", file.stem.lower())


def _left_out(found: Sequence[Path], files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(why, file) of the files of questions whose answers are nowhere."""
    names = [_plain(file) for file in files]
    for file in found:
        name = _plain(file)
        if "vqg" in name:
            yield "questions to be generated (VQG)", file
        elif name.endswith("questions") and not _answers(file) and not any(n.startswith(name) for n in names):
            yield "questions without answers", file


def _partner(file: Path, ending: str, other: str) -> Path | None:
    """The file beside this one whose name has `other` in place of `ending`."""
    name = _plain(file)
    wanted = name.removesuffix(ending) + other
    beside = (twin for twin in sorted(file.parent.glob("*.txt")) if _plain(twin) == wanted)
    return next(beside, None) if name.endswith(ending) else None


def _answers(file: Path) -> Path | None:
    return _partner(file, "questions", "referenceanswers")


def _questions(file: Path) -> Path | None:
    return _partner(file, "referenceanswers", "questions")


def _has_questions(file: Path) -> bool:
    """Whether a table holds a question before an answer, or the file beside it does."""
    asked = (field for _, *fields in _fields(file) for field in fields[:-1])
    return _questions(file) is not None or any(map(_ASKS.search, asked))


def _fields(file: Path) -> Iterator[list[str]]:
    """The fields of every line that has some."""
    for _, line in text_lines(file):
        fields = [field.strip() for field in line.split("|")]
        if any(fields):
            yield fields


def _is_table(file: Path) -> bool:
    """Whether a text file holds questions and answers, as itself or with its partner."""
    if "vqg" in _plain(file):
        return False
    if _answers(file) or "referenceanswers" in _plain(file):
        return True
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    return first.count("|") >= 2


def _pictures(file: Path) -> tuple[Path, str]:
    """The folder near a text file that holds its first image, and the suffix of the pictures there."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        first = next(line for line in lines if line.strip()).split("|")[0].strip()
    for root in (file.parent, file.parent.parent):
        for folder in (root, *sorted(entry for entry in root.iterdir() if entry.is_dir())):
            for suffix in (".jpg", ".jpeg", ".png"):
                if (folder / (first + suffix)).is_file():
                    return folder, suffix
    return file.parent, ".jpg"
