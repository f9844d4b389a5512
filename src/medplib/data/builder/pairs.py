"""Pair and Target: one question with its answer, and the pixels it points at, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medplib.data.builder.facts import ImageFacts, Thing

TYPES = ("grounding", "region", "complex")


@dataclass(frozen=True, eq=False)
class Target:
    """A mask of the output: bool (H, W), a name for its file that says what it is, the file it already is."""

    label: str
    mask: np.ndarray
    file: Path | None = None


@dataclass(frozen=True, eq=False)
class Pair:
    """One turn. `<SEG>` in the answer stands for the next of `masks`, `<region>` in the question for the next
    of `regions`; kind is finer than the type: "segment", "absent", "position", ..."""

    kind: str
    question: str
    answer: str
    names: tuple[str, ...] = ()
    masks: tuple[Target, ...] = ()
    regions: tuple[Target, ...] = ()
    closed: bool = False


@dataclass(frozen=True)
class Context:
    """What the makers of questions get: the image's facts, its absent names, a keyed generator, the wishes.

    several: "turns" gives each structure its own turn, as in the published data; "answer" one answer with
    several `<SEG>`. refs: names stand between <ref> and </ref> before their `<SEG>`.
    """

    facts: ImageFacts
    absent: Sequence[str]
    rng: np.random.Generator
    negatives: float = 0.3
    several: str = "turns"
    refs: bool = True
    point_size: int = 41
    asked: set[tuple] = field(default_factory=set)  # (kind, names) already in this image's questions

    def pick(self, options: Sequence):
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return bool(self.rng.random() < share)

    def new(self, kind: str, names: Sequence[str]) -> bool:
        """Whether this has not been asked about the image yet; it counts as asked from now on."""
        key = (kind, *names)
        if key in self.asked:
            return False
        self.asked.add(key)
        return True


def target(thing: Thing) -> Target:
    """The structure's mask: its own file where it has one instance, else the union of them."""
    file = thing.files[0] if len(thing.files) == 1 else None
    return Target(slug(thing.name) + ("" if len(thing.files) == 1 else "_union"), thing.mask, file)


def slug(name: str) -> str:
    """A name as part of a file name: letters, digits and single underscores."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(words) or "structure"
