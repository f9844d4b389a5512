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
from medplib.data.record import Record, fit_mask
from medplib.data.report import ACTIONS, EXAMPLES, ReadReport
from medplib.errors import InputError
from medplib.prompts.types import Box, Point

KINDS = {  # kind: (level, what it means)
    "missing": ("error", "rows whose picture or mask is not there"),
    "unreadable": ("error", "pictures or masks that cannot be read"),
    "empty mask": ("error", "masks and regions without a pixel; deny them in words (folder: empty=absent)"),
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
    "long text": ("warning", "questions that training may refuse: its max_length cannot cut them"),
    "dropped": ("warning", "rows that gave no record"),
    "repaired": ("warning", "rows that were repaired"),
    "unknown": ("warning", "labels, modalities or names that were not understood and left out"),
}
LONG = 1500  # characters; a token has three or four, and an image takes 576 of the 1024 to 2048 tokens
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
    census = _Census(records)
    for number in progress(range(len(records))):
        try:
            record = records[number]
        except InputError as error:
            census.add("unreadable", str(error))
            continue
        census.look(number, record)
    census.leaks()
    census.alike(distance)
    census.reading(read_report if read_report is not None else getattr(records, "report", None))
    problems = [census.problems[kind] for kind in KINDS if kind in census.problems]
    for problem in problems:
        problem.level = "warning" if problem.kind in allow else problem.level
    counts = {name: dict(counter.most_common()) for name, counter in census.counts.items()}
    return CheckReport(len(records), len(census.pictures.known), counts, problems, census.spread(samples))


class _Pictures:
    """What is known of each picture: 50 bytes in arrays, and its place in a dict."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}  # 64 bits of a picture's place -> its number in the arrays
        self.heights, self.widths = array("I"), array("I")  # 0: unreadable
        self.hashes, self.contents = array("Q"), array("Q")
        self.blank = array("B")
        self.cases = array("I")  # 0: unknown
        self.splits = array("Q")  # a bit per split
        self.records, self.places = array("Q"), array("H")  # where it was met first

    def usable(self) -> np.ndarray:
        """The numbers of those that can be compared."""
        return np.flatnonzero((np.array(self.heights) > 0) & (np.array(self.blank) == 0))


class _Census:
    """What is known of the records looked at so far: no pixels and no records."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.problems: dict[str, Problem] = {}
        names = ("split", "task", "source", "modality", "answer type", "class", "token")
        self.counts: dict[str, Counter] = {name: Counter() for name in names}
        self.groups: dict[tuple, array] = {}  # (source, task, modality) -> record numbers
        self.pictures = _Pictures()
        self.splits: list[str] = []
        self.cases: dict[tuple[str, str], int] = {}  # (source, case) -> its number, from 1
        self.case_splits = array("Q", [0])  # of a case's number
        self.masks_seen: set[int] = set()

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
        self._words(record)
        split, case = self._split_and_case(record)
        size = (0, 0)
        for place, image in enumerate(record.images):
            picture = self._picture(image, case, (number, place))
            self.pictures.splits[picture] |= split
            size = self.pictures.heights[picture], self.pictures.widths[picture]
        if size[0]:
            for pixels in (*record.masks, *record.regions):
                self._mask(pixels, size, record)

    def _split_and_case(self, record: Record) -> tuple[int, int]:
        """The split's bit, 0 for none, and the case's number, 0 for none."""
        split = case = 0
        if record.split:
            if record.split not in self.splits:
                self.splits.append(record.split)
            split = 1 << min(self.splits.index(record.split), 63)
        if record.case:
            case = self.cases.setdefault((record.source, record.case), len(self.case_splits))
            if case == len(self.case_splits):
                self.case_splits.append(0)
            self.case_splits[case] |= split
        return split, case

    def _words(self, record: Record) -> None:
        where = f"{record.source} {record.row}"
        asked, said = record.turns[0]  # later turns are left out where a text is too long
        if (length := len(asked) + (len(said) if SEG in said else 0)) > LONG:
            self.add("long text", f"{where}: {length} characters, {asked[:80]!r}")
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

    def _picture(self, image: Any, case: int, place: tuple[int, int]) -> int:
        """The number of a picture, which is read when it is met first."""
        all_of, key = self.pictures, identity(image)
        if key in all_of.known:
            return all_of.known[key]
        number = all_of.known[key] = len(all_of.hashes)
        pixels = np.zeros((0, 0, 3), np.uint8)
        try:
            pixels = image.load()
        except InputError as error:
            self.add("unreadable", str(error))
        blank = bool(not pixels.size or pixels.min() == pixels.max())
        if blank and pixels.size:
            self.add("blank picture", str(image))
        all_of.heights.append(pixels.shape[0])
        all_of.widths.append(pixels.shape[1])
        all_of.blank.append(blank)
        all_of.hashes.append(0 if blank else difference_hash(pixels))
        all_of.contents.append(digest64(str(pixels.shape).encode() + pixels.tobytes()))
        all_of.cases.append(case)
        all_of.splits.append(0)
        all_of.records.append(place[0])
        all_of.places.append(min(place[1], 0xFFFF))
        return number

    def _mask(self, pixels: Any, size: tuple[int, int], record: Record) -> None:
        where = f"{record.source} {record.row}: {pixels}"
        if isinstance(pixels, Box | Point):
            try:
                pixels.check(size)
            except InputError as error:
                self.add("region outside", f"{record.source} {record.row}: {error}")
            return
        key = digest64(f"{identity(pixels)} {size}".encode())
        if key in self.masks_seen:
            return
        self.masks_seen.add(key)
        try:
            mask = pixels.load()
        except InputError as error:
            self.add("unreadable", str(error))
            return
        if not fit_mask(mask, size).any():
            self.add("empty mask", where)
        if mask.shape != size:
            height, width = mask.shape
            fits = (
                abs(height * size[1] / size[0] - width) <= 1 or abs(width * size[0] / size[1] - height) <= 1
            )
            sizes = f"{width} x {height}, its picture {size[1]} x {size[0]}"
            self.add("mask size" if fits else "mask shape", f"{where} is {sizes}")

    def leaks(self) -> None:
        """Cases and files in more than one split."""
        for (_, case), number in self.cases.items():
            if self.case_splits[number].bit_count() > 1:
                self.add("case in splits", f"{case} in {self._split_names(self.case_splits[number])}")
        for number, splits in enumerate(self.pictures.splits):
            if splits.bit_count() > 1:
                self.add("picture in splits", f"{self._name(number)} in {self._split_names(splits)}")

    def alike(self, distance: int) -> None:
        """Equal and similar pictures."""
        all_of, usable = self.pictures, self.pictures.usable()
        contents, hashes = np.array(all_of.contents, np.uint64), np.array(all_of.hashes, np.uint64)
        cases, splits = np.array(all_of.cases), all_of.splits
        for found, leak, values, bits in (
            ("duplicate", "picture in splits", contents, 0),
            ("near duplicate", "alike in splits", hashes, distance),
        ):
            pairs = usable[close_pairs(values[usable], bits)]
            if found == "near duplicate":
                a, b = pairs[:, 0], pairs[:, 1]
                pairs = pairs[(contents[a] != contents[b]) & ((cases[a] != cases[b]) | (cases[a] == 0))]
            for a, b in pairs.tolist():
                both = splits[a] | splits[b]
                told = len(self.problems[found].examples) < EXAMPLES if found in self.problems else True
                leaks = both.bit_count() > 1 and splits[a].bit_count() == splits[b].bit_count() == 1
                names = f"{self._name(a)} and {self._name(b)}" if told or leaks else ""
                self.add(found, names)
                if leaks:
                    self.add(leak, f"{names} in {self._split_names(both)}")

    def _name(self, number: int) -> str:
        """The picture as its record names it."""
        record = self.records[self.pictures.records[number]]
        return str(record.images[self.pictures.places[number]])

    def _split_names(self, bits: int) -> str:
        return ", ".join(sorted(name for i, name in enumerate(self.splits) if bits >> i & 1))

    def reading(self, report: ReadReport | None) -> None:
        """What the reader met before there were records."""
        if report is None:
            return
        for action in ACTIONS:
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
