"""check_records: is a data set fit to train? Every picture and mask is read once, every text looked at.

What is found is an error (not fit) or a warning; KINDS says which and why.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medplib.conversation import CONTROL_TOKENS, IMAGE, REGION, SEG
from medplib.data.duplicates import close_pairs, difference_hash
from medplib.data.files import digest64, identity
from medplib.data.record import Record
from medplib.data.report import EXAMPLES, ReadReport
from medplib.errors import InputError
from medplib.prompts.types import Box, Point

KINDS = {  # kind: (level, what it means)
    "missing": ("error", "rows whose picture or mask is not there"),
    "unreadable": ("error", "pictures or masks that cannot be read"),
    "empty mask": ("error", "masks and regions without a pixel"),
    "mask shape": ("error", "masks of another aspect ratio than their picture"),
    "region outside": ("error", "boxes and points that do not lie in the picture"),
    "case in splits": ("error", "cases (patients, volumes) in more than one split"),
    "picture in splits": ("error", "pictures of equal content in more than one split"),
    "control token": ("error", "control tokens where none belongs, or <ref> without its end"),
    "mask size": ("warning", "masks of another size, fitted when read"),
    "duplicate": ("warning", "pictures of equal content under several names"),
    "near duplicate": ("warning", "pictures of different cases that look alike"),
    "alike in splits": ("warning", "near duplicates in more than one split"),
    "blank picture": ("warning", "pictures of one brightness"),
    "unknown tag": ("warning", "words in <> that are no control tokens"),
    "dropped": ("warning", "rows that gave no record"),
    "repaired": ("warning", "rows that were repaired"),
}
_TAG = re.compile(r"</?[A-Za-z_]\w*>")
_CONTROL = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, IMAGE, "</s>", "<s>"))) + r"|<gen_\d+>")


@dataclass
class Problem:
    """One kind of finding: how often, and its first examples."""

    kind: str
    level: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def meaning(self) -> str:
        """What the kind means."""
        return KINDS[self.kind][1]


@dataclass
class CheckReport:
    """What was found. `fit` is whether there is no error."""

    records: int
    images: int
    counts: dict[str, dict[str, int]]
    problems: list[Problem]
    samples: list[int]  # record numbers for a contact sheet, spread over sources, tasks and modalities

    @property
    def fit(self) -> bool:
        """Whether it can be trained on as it is."""
        return not any(problem.level == "error" for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "fit": self.fit,
            "records": self.records,
            "images": self.images,
            "counts": self.counts,
            "problems": [vars(problem) | {"meaning": problem.meaning} for problem in self.problems],
        }


def check_records(
    records: Sequence[Record],
    read_report: ReadReport | None = None,
    *,
    allow: Collection[str] = (),
    distance: int = 3,
    samples: int = 16,
    progress: Callable[[Any], Any] = iter,
) -> CheckReport:
    """Look at all of `records`, a RecordSet or any sequence of them.

    read_report  of the reader; by default `records.report`
    allow        kinds of errors that count as warnings
    distance     bits of 64 in which near duplicates may differ
    progress     wraps the iteration over the numbers, as `tqdm` does

    Slices of one case look alike and are no near duplicates; without cases every look-alike is one. Raises
    InputError for an unknown kind.
    """
    unknown = [kind for kind in allow if kind not in KINDS]
    if unknown:
        raise InputError(f"No kind of problem is called {unknown[0]!r}. Known: {', '.join(KINDS)}.")
    if not 0 <= distance <= 15:
        raise InputError(f"distance must be 0 to 15 bits, got {distance}.")
    census = _Census()
    for number in progress(range(len(records))):
        try:
            record = records[number]
        except InputError as error:
            census.add("unreadable", str(error))
            continue
        census.look(number, record)
    census.splits()
    census.alike(distance)
    census.reading(read_report if read_report is not None else getattr(records, "report", None))
    problems = [census.problems[kind] for kind in KINDS if kind in census.problems]
    for problem in problems:
        problem.level = "warning" if problem.kind in allow else problem.level
    counts = {name: dict(counter.most_common()) for name, counter in census.counts.items()}
    return CheckReport(len(records), len(census.known), counts, problems, census.spread(samples))


class _Census:
    """What is known of the records looked at so far: per picture some numbers, no pixels and no records."""

    def __init__(self) -> None:
        self.problems: dict[str, Problem] = {}
        names = ("split", "task", "source", "modality", "answer type", "class", "token")
        self.counts: dict[str, Counter] = {name: Counter() for name in names}
        self.groups: dict[tuple, array] = {}  # (source, task, modality) -> record numbers
        self.known: dict[int, int] = {}  # 64 bits of a picture's place -> its number below
        self.sizes: list[tuple[int, int] | None] = []
        self.hashes, self.contents = array("Q"), array("Q")
        self.names: list[str] = []
        self.blank: set[int] = set()
        self.cases: list[str | None] = []
        self.in_splits: list[set[str]] = []
        self.case_splits: dict[str, set[str]] = {}
        self.masks_seen: set[tuple[int, int]] = set()

    def add(self, kind: str, example: str, count: int = 1) -> None:
        problem = self.problems.setdefault(kind, Problem(kind, KINDS[kind][0]))
        problem.count += count
        if len(problem.examples) < EXAMPLES:
            problem.examples.append(example[:300])

    def look(self, number: int, record: Record) -> None:
        """Count a record, read its pixels."""
        for name, value in (
            ("split", record.split), ("task", record.task), ("source", record.source),
            ("modality", record.modality), ("answer type", record.answer_type),
        ):  # fmt: skip
            self.counts[name][value or "unknown"] += 1
        self.counts["class"].update(record.labels)
        key = (record.source, record.task, record.modality)
        self.groups.setdefault(key, array("Q")).append(number)
        if record.case and record.split:
            self.case_splits.setdefault(record.case, set()).add(record.split)
        self._words(record)
        place = None
        for image in record.images:
            place = self._picture(image, record)
        size = self.sizes[place] if place is not None else None
        if size is not None:
            for pixels in (*record.masks, *record.regions):
                self._mask(pixels, size, record)

    def _words(self, record: Record) -> None:
        where = f"{record.source} {record.row}"
        for question, answer in record.turns:
            for text, allowed in ((question, {REGION}), (answer, {SEG, "<ref>", "</ref>"})):
                for tag in {*_TAG.findall(text), *_CONTROL.findall(text)}:
                    self.counts["token"][tag] += text.count(tag)
                    if tag in allowed:
                        continue
                    kind = "control token" if _CONTROL.fullmatch(tag) else "unknown tag"
                    self.add(kind, f"{where}: {tag} in {text[:80]!r}")
            if answer.count("<ref>") != answer.count("</ref>"):
                self.add("control token", f"{where}: <ref> and </ref> in {answer[:80]!r}")

    def _picture(self, image: Any, record: Record) -> int:
        """The number of a picture, which is read when it is met first."""
        key = identity(image)
        number = self.known.get(key)
        if number is None:
            number = self.known[key] = len(self.sizes)
            self._read(image, number)
            self.names.append(str(image))
            self.cases.append(record.case)
            self.in_splits.append(set())
        if record.split:
            self.in_splits[number].add(record.split)
        return number

    def _read(self, image: Any, number: int) -> None:
        try:
            pixels = image.load()
        except InputError as error:
            self.add("unreadable", str(error))
            self.sizes.append(None)
            pixels = np.zeros((1, 1, 3), np.uint8)
        else:
            self.sizes.append(pixels.shape[:2])
        if pixels.min() == pixels.max():
            self.blank.add(number)
            if self.sizes[number] is not None:
                self.add("blank picture", str(image))
        self.hashes.append(difference_hash(pixels))
        self.contents.append(digest64(str(pixels.shape).encode() + pixels.tobytes()))

    def _mask(self, pixels: Any, size: tuple[int, int], record: Record) -> None:
        where = f"{record.source} {record.row}: {pixels}"
        if isinstance(pixels, Box | Point):
            try:
                pixels.check(size)
            except InputError as error:
                self.add("region outside", f"{record.source} {record.row}: {error}")
            return
        key = (identity(pixels), size[0] << 32 | size[1])
        if key in self.masks_seen:
            return
        self.masks_seen.add(key)
        try:
            mask = pixels.load()
        except InputError as error:
            self.add("unreadable", str(error))
            return
        if not mask.any():
            self.add("empty mask", where)
        if mask.shape != size:
            height, width = mask.shape
            fits = (
                abs(height * size[1] / size[0] - width) <= 1 or abs(width * size[0] / size[1] - height) <= 1
            )
            sizes = f"{width} x {height}, its picture {size[1]} x {size[0]}"
            self.add("mask size" if fits else "mask shape", f"{where} is {sizes}")

    def splits(self) -> None:
        """Cases and equal pictures in more than one split."""
        for case, splits in self.case_splits.items():
            if len(splits) > 1:
                self.add("case in splits", f"{case} in {', '.join(sorted(splits))}")

    def alike(self, distance: int) -> None:
        """Equal and similar pictures."""
        usable = np.array([i for i in range(len(self.sizes)) if self.sizes[i] and i not in self.blank], int)
        contents, hashes = np.array(self.contents, np.uint64), np.array(self.hashes, np.uint64)
        for number, splits in enumerate(self.in_splits):  # one file
            if len(splits) > 1:
                self.add("picture in splits", f"{self.names[number]} in {', '.join(sorted(splits))}")
        if not len(usable):
            return
        for pairs, kinds in (
            (close_pairs(contents[usable], 0), ("duplicate", "picture in splits")),
            (close_pairs(hashes[usable], distance), ("near duplicate", "alike in splits")),
        ):
            for a, b in usable[pairs].tolist():
                near = kinds[0] == "near duplicate"
                if near and (
                    contents[a] == contents[b] or (self.cases[a] and self.cases[a] == self.cases[b])
                ):
                    continue
                names = f"{self.names[a]} and {self.names[b]}"
                self.add(kinds[0], names)
                both = self.in_splits[a] | self.in_splits[b]
                if len(both) > 1 and len(self.in_splits[a]) == len(self.in_splits[b]) == 1:
                    self.add(kinds[1], f"{names} in {', '.join(sorted(both))}")

    def reading(self, report: ReadReport | None) -> None:
        """What the reader met before there were records."""
        if report is None:
            return
        for action in ("dropped", "repaired"):
            for kind, count in report.counts[action].items():
                example = f"{kind}: {report.examples[action, kind][0]}"
                lost = action == "dropped" and kind.endswith("missing")
                self.add("missing" if lost else action, example, count)

    def spread(self, count: int) -> list[int]:
        """Record numbers, in turn from each source, task and modality, evenly from each."""
        queues = []
        for numbers in self.groups.values():
            chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
            queues.append([int(numbers[i]) for i in chosen])
        turns = [queue[i] for i in range(count) for queue in queues if i < len(queue)]
        return turns[:count]
