"""What the readers share: where files are, what a list of rows is made of, questions and answers as texts."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medplib.data.archive import archive_at, refuse_split
from medplib.data.files import File
from medplib.data.record import Record
from medplib.data.recordset import Part, RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import ParseCsv, Rows, index_csv, index_json
from medplib.errors import InputError

DICOM_SUFFIXES = (".dcm", ".dicom")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val"}
SPLITS |= {"validation": "val", "dev": "val", "test": "test", "testing": "test"}


BACKSLASHES = "path with backslashes"  # a kind of repair


class Skip(Exception):
    """A row that was not asked for: another split, another language."""


class Unusable(InputError):
    """A row that gives no record: `kind`, and an example of it."""

    def __init__(self, kind: str, example: str = "") -> None:
        super().__init__(f"{kind}: {example}" if example else kind)
        self.kind, self.example = kind, example


@dataclass(frozen=True)
class Store:
    """A folder, or a folder inside a zip archive, that files are named in."""

    path: str
    prefix: str | None = None  # of the members of a zip; None for a folder

    def file(self, name: str) -> File:
        """The file of that name; names are as in the data set, backslashes count as slashes."""
        name = slashed(name)
        if self.prefix is None:
            return File(os.path.join(self.path, name))
        return File(self.path, posixpath.normpath(self.prefix + name))

    def below(self, folder: str) -> Store:
        """The store at a folder in this one; itself for ""."""
        if self.prefix is None:
            return Store(os.path.join(self.path, folder) if folder else self.path)
        return Store(self.path, f"{self.prefix}{folder}/" if folder else self.prefix)

    def __str__(self) -> str:
        return self.path if not self.prefix else f"{self.path}!{self.prefix}"


def open_store(path: str | os.PathLike) -> Store:
    """The store at a folder or a zip file. Raises InputError if there is neither."""
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if os.path.isdir(path):
        return Store(path)
    refuse_split(path)
    if os.path.isfile(path) and path.lower().endswith(".zip"):
        archive_at(path)
        return Store(path, "")
    raise InputError(f"{path!r} is neither a folder nor a .zip file. Check the path.")


class Listing:
    """Which files of a store are there: folders are listed once, so that a row costs no look at the disk.

    Names with backslashes are reported as repaired.
    """

    def __init__(self, store: Store, report: ReadReport) -> None:
        self.store, self.report = store, report
        self._folders: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        """Whether a file of this name is there. Names that lead out of the store are not."""
        there = self._has(slashed(name))
        if there and "\\" in name:
            self.report.add("repaired", BACKSLASHES, name)
        return there

    def _has(self, name: str) -> bool:
        if "./" in name or "//" in name:
            name = posixpath.normpath(name)
        if name.startswith(("..", "/")) or "\0" in name:
            return False
        if self.store.prefix is not None:
            return self.store.prefix + name in archive_at(self.store.path)
        folder, _, base = name.rpartition("/")
        if folder not in self._folders:
            try:
                here = os.listdir(os.path.join(self.store.path, folder))
            except OSError:
                here = []
            self._folders[folder] = frozenset(here)
        return base in self._folders[folder]


# ------------------------------------------------------------------------------------------ rows


def build(
    source: str,
    parts: Iterable[tuple[Rows, np.ndarray | None, Callable[[Any, int], Record]]],
    report: ReadReport,
    remedy: str = "Check the path and the format.",
) -> RecordSet:
    """The RecordSet of (rows, numbers kept, maker). Raises InputError if nothing is left."""
    parts = list(parts)
    numbers, offset = [], 0
    for rows, kept, _ in parts:
        numbers.append((np.arange(len(rows)) if kept is None else kept) + offset)
        offset += len(rows)
    everything = all(kept is None for _, kept, _ in parts)
    records = RecordSet(
        (Part(rows, make) for rows, _, make in parts),
        None if everything else np.concatenate(numbers),
        report,
    )
    if not len(records):
        why = f" {report}".replace("\n", "; ") if report else ""
        raise InputError(f"No record of {source} could be read.{why} {remedy}")
    return records


def index(
    path: Path, check: Callable[[Any], None], report: ReadReport, parse: ParseCsv | None = None
) -> tuple[Rows, np.ndarray | None]:
    """The rows of a JSON or CSV file, and the numbers of those that `check` lets pass (None: all)."""

    def look(number: int, row: Any) -> bool:
        return _passes(check, row, number, path.name, report)

    if path.suffix.lower() in JSON_SUFFIXES:
        return index_json(path, look)
    return index_csv(path, look, parse)


def keep(
    rows: Iterable[Any], check: Callable[[Any], None], name: str, report: ReadReport
) -> np.ndarray | None:
    """The numbers of the rows that `check` lets pass, None for all; `name` is what the report calls them."""
    passed = np.fromiter((_passes(check, row, i, name, report) for i, row in enumerate(rows)), bool)
    return None if passed.all() else np.flatnonzero(passed)


def _passes(check: Callable[[Any], None], row: Any, number: int, name: str, report: ReadReport) -> bool:
    """Whether `check(row)` raises neither Skip nor Unusable, which is reported."""
    try:
        check(row)
    except Skip:
        return False
    except Unusable as error:
        report.add("dropped", error.kind, error.example or f"row {number} of {name}")
        return False
    return True


def find_files(path: str | os.PathLike, patterns: Sequence[str], what: str) -> list[Path]:
    """`path` itself if it is a file, else the files below it that match one of the patterns, sorted.

    Raises InputError, naming the patterns, if there are none.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    found = sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})
    if not found:
        problem = "does not exist" if not root.exists() else f"holds no {' or '.join(patterns)}"
        raise InputError(f"{str(root)!r} {problem}; {what} is read from there. Check the path.")
    return found


def split_of(path: str | os.PathLike) -> str | None:
    """ "train", "val", "test" or None, by the words in a file's name, else by its folder's name.

    A word may end in "set", as in "TestSet".
    """
    path = Path(path)
    words = (*re.split(r"[^a-z]+", path.stem.lower()), path.parent.name.lower())
    named = (SPLITS.get(word.removesuffix("set")) for word in words)
    return next((name for name in named if name), None)


def of_split(files: Sequence[Path], split: str | None, what: str) -> list[tuple[Path, str | None]]:
    """(file, its split) of the files of a split; all for None. Raises InputError if the split has none."""
    named = [(file, split_of(file)) for file in files]
    if split is None:
        return named
    wanted = SPLITS.get(split, split)
    chosen = [(file, name) for file, name in named if name == wanted]
    if not chosen:
        raise no_split(what, split, (name for _, name in named))
    return chosen


def no_split(what: str, split: str, known: Iterable[str | None]) -> InputError:
    """The error for a split that is not there; `known` are the names of those that are."""
    names = sorted({name for name in known if name})
    if not names:
        return InputError(f"{what} has no split {split!r}, and no other; without one (null) all is read.")
    return InputError(f"{what} has no split {split!r}. Known: {', '.join(names)}.")


def image_store(
    path: Path, names: Iterable[str], folders: Sequence[str], given: str | os.PathLike | None = None
) -> Store:
    """Where the images are: the one of `folders` that holds most of `names`, of which 20 are looked at.

    The folders are looked for in `given`, a folder or zip, else in the folder of the annotation file `path`
    and the two above it. Falls back to the first of these, whose rows are then reported as missing.
    """
    names = list(itertools.islice(names, 20))
    if given is not None:
        roots = [open_store(given)]
    else:
        above = (path.parent, path.parent.parent, path.parent.parent.parent)
        roots = [Store(str(folder.resolve())) for folder in above]
    places = [root.below(folder) for root in roots for folder in ("", *folders)]
    hits = [sum(place.file(name).exists() for name in names) for place in places]
    return places[hits.index(max(hits))]


# ------------------------------------------------------------------------------------------ texts


def slashed(name: str) -> str:
    """A path of Windows with the slashes of all other systems."""
    return name.replace("\\", "/")


def with_suffix(name: str) -> str:
    """An image's name with ".png" where it has no suffix of an image."""
    name = name.strip()
    return name if name.lower().endswith(IMAGE_SUFFIXES) else name + ".png"


def text_of(row: dict[str, Any], *names: str) -> str:
    """The first of these fields that is there, as stripped text; numbers become text. "" if none is."""
    for name in names:
        value = row.get(name)
        if value is not None and str(value).strip():
            return str(value).strip()
    return ""


def question_and_answer(row: dict[str, Any], question: str, answer: str) -> tuple[str, str]:
    """Both texts. Raises Unusable when one is empty or writes a token that stands for pixels."""
    asked, said = text_of(row, question), text_of(row, answer)
    if not asked or not said:
        raise Unusable(f"empty {'question' if not asked else 'answer'}")
    plain(asked, said)
    return asked, said


def plain(question: str, answer: str) -> None:
    """Raise Unusable if a text of a set without regions and masks writes their tokens."""
    for text, token in ((question, "<region>"), (answer, "<SEG>")):
        if token in text:
            raise Unusable(f"{token} in a text without pixels", text[:80])


def closed(answer: str) -> str:
    """ "closed" for yes and no, else "open"."""
    return "closed" if answer.strip().rstrip(".").lower() in ("yes", "no") else "open"


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its choices below, by letter."""
    return "\n".join([question, *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))])


def pair_up(messages: Any) -> list[tuple[str, str]]:
    """LLaVA's list of {"from": "human" | "gpt", "value": text} -> (question, answer) pairs, or Unusable."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise Unusable("no conversation")
    if len(messages) % 2:
        raise Unusable("a question without an answer")
    pairs = []
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        for message, roles in ((asked, ("human", "user")), (said, ("gpt", "assistant"))):
            if not isinstance(message, dict) or message.get("from") not in roles:
                raise Unusable("turns out of order")
            if not isinstance(message.get("value"), str):
                raise Unusable("empty question or answer")
        pairs.append((asked["value"], said["value"]))
    return pairs
