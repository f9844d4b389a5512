"""ImageCLEF VQA-Med 2019 and 2021: lines `imageID|question|answer` beside a folder of jpg files.

The 2019 test lines name a category too: `imageID|category|question|answer`.
"""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from medplib.data.readers.common import IMAGE_SUFFIXES, Unusable, closed, find_files, of_split, plain
from medplib.data.readers.vqa import Vqa, read_vqa
from medplib.data.recordset import RecordSet, concat
from medplib.data.rows import ParseCsv
from medplib.errors import InputError

LINES = ParseCsv(delimiter="|", quoting=csv.QUOTE_NONE)


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
    files = [file for file in found if year in (None, _year(file, Path(path))) and _is_table(file)]
    whole = [file for file in files if "ByCategory" not in str(file)]  # the same lines again, by category
    if not files:
        raise InputError(
            f"{os.fspath(path)!r} holds no text file of lines `imageID|question|answer`"
            f"{f' for {year}' if year else ''}. Check the path."
        )
    sets = []
    for file, name in of_split(whole or files, split, "ImageCLEF VQA-Med"):
        folder, suffix = (images, ".jpg") if images is not None else _pictures(file)
        sets.append(read_vqa("imageclef", [(file, name)], ParseLine(suffix), folder, (), LINES))
    return concat(sets)


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
        image, category, question, answer = fields[0], fields[1:at], fields[at], "|".join(fields[at + 1 :])
        plain(question, answer)
        name = image if image.lower().endswith(IMAGE_SUFFIXES) else image + self.suffix
        extra = {"category": category[0]} if category else {}
        return Vqa(((question, answer),), name, None, closed(answer), case=image, extra=extra)


def _year(file: Path, root: Path) -> int | None:
    """The year in the names below the given folder, else in its own."""
    names = "" if file == root else file.relative_to(root).as_posix()
    found = re.search(r"2019|2021", names) or re.search(r"2019|2021", root.name)
    return int(found[0]) if found else None


def _is_table(file: Path) -> bool:
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
