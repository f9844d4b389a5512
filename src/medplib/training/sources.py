"""Where a stage's records come from, and in which order: keyed by (seed, epoch, index), whatever ran before.

order = Order({"slake": 7000, "vqa_rad": 1800}, {"slake": 1.0, "vqa_rad": 1.0}, seed=42, per_epoch=4000)
order.epoch(0)     # 4000 (source, position) pairs, half of them from each
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medplib.conversation import REGION
from medplib.data.everyday import KINDS, EverydayMaker
from medplib.data.files import Held
from medplib.data.mini import INDEX, default_mini_root, load_mini
from medplib.data.options import check_options
from medplib.data.questions import Question, QuestionMaker
from medplib.data.readers import read
from medplib.data.record import Record
from medplib.data.samples import keyed_rng
from medplib.errors import InputError
from medplib.prompts.types import Mask
from medplib.training.recipe import Source

MINI_TASKS = {
    "vqa": {"modality": 0.35, "presence": 0.45, "list": 0.2},
    "region": {"region": 1.0},
    "grounding": {"grounding": 0.5, "absent": 0.35, "several": 0.15},
}


_FOLLOW_UPS = 0.4  # share of the later turns that are asked in fewer words, where they can be


class Drawn(Protocol):
    """A source that makes its records: other ones in every epoch."""

    def __len__(self) -> int: ...
    def draw(self, seed: int, epoch: int, index: int) -> list[Record]: ...


class MiniQuestions:
    """Questions about the mini set and phantoms, drawn anew in every epoch from (seed, epoch, index).

    One index is one augmented image and `per_image` questions about it, which share its pixels. The length
    is `per_epoch` (default: the number of images in the split).

    tasks      of MINI_TASKS, or {kind of question: share}
    turns      the most questions that follow one another in a conversation; how many do is drawn
    weights    {data set: share}
    table, removal  chances of a table in the picture and of a structure taken out of it
    unchanged  the chance that an image is not augmented
    everyday   questions in everyday words, and the kinds of `medplib.data.everyday` among the tasks

    Raises InputError for values that cannot be used.
    """

    def __init__(
        self,
        split: str | None = "train",
        *,
        tasks: Mapping[str, float] | Sequence[str] | str = ("vqa", "region", "grounding"),
        per_image: int = 1,
        turns: int = 1,
        per_epoch: int | None = None,
        weights: Mapping[str, float] | None = None,
        table: float = 0.5,
        removal: float = 0.0,
        unchanged: float = 0.0,
        everyday: bool = False,
    ) -> None:
        from medplib.training.conversations import QuestionDraws

        self.settings = {"split": split, "tasks": tasks, "per_image": per_image, "weights": weights,
                         "table": table, "removal": removal, "unchanged": unchanged,
                         "turns": turns}  # fmt: skip
        self.settings |= {"everyday": True} if everyday else {}
        _check_range({"per_image": per_image, "turns": turns, "per_epoch": per_epoch}, 1, None)
        _check_range({"table": table, "removal": removal, "unchanged": unchanged}, 0, 1)
        if weights is not None:
            _check_shares("weights", weights)
        mix = _task_shares(tasks, KINDS if everyday else ())
        shares = None if weights is None else tuple(sorted(weights.items()))
        self.images, vocabulary, count = _mini_images(split, shares, table, removal, unchanged)
        self.questions = QuestionDraws((EverydayMaker if everyday else QuestionMaker)(vocabulary), mix)
        self.per_image, self.turns, self.length, self.split = per_image, turns, per_epoch or count, split

    def __len__(self) -> int:
        return self.length

    def draw(self, seed: int, epoch: int, index: int) -> list[Record]:
        rng = keyed_rng("mini", seed, epoch, index)
        item = self.images.draw(rng)
        image = Held(item.image)
        drawn = [self.questions(item, rng) for _ in range(self.per_image)]
        records = []
        while drawn:
            count = 1 if self.turns == 1 else int(rng.integers(1, self.turns + 1))
            turns, drawn = drawn[:count], drawn[count:]
            for i in range(1, len(turns)):
                if rng.random() < _FOLLOW_UPS:
                    turns[i] = self.questions.maker.follow_up(rng, turns[i], turns[i - 1])
            records.append(self._record(turns, image, item.modality, index))
        return records

    def _record(self, turns: Sequence[Question], image: Held, modality: str, index: int) -> Record:
        return Record(
            tuple((_with_region(turn), turn.answer) for turn in turns),
            (image,),
            tuple(Held(p.mask) if isinstance(p, Mask) else p for turn in turns for p in turn.prompts),
            tuple(Held(mask) for turn in turns for mask in turn.masks),
            "mini",
            index,
            modality,
            split=self.split,
            labels=tuple(name for turn in turns for name in turn.names),
        )

    @property
    def fingerprint(self) -> str:
        """Changes with the mini set's index and these settings."""
        content = (default_mini_root() / INDEX).read_bytes() + json.dumps(
            self.settings, sort_keys=True
        ).encode()
        return hashlib.sha256(content).hexdigest()


def _with_region(turn: Question) -> str:
    """The question, with the place of its region if it lost it in lower case."""
    missing = turn.prompts and REGION not in turn.question
    return f"{turn.question} {REGION}" if missing else turn.question


@lru_cache(maxsize=4)
def _mini_images(split: str | None, shares: tuple | None, table: float, removal: float, unchanged: float):
    """The images of a split, read once for all sources; {structure: its data sets}; how many there are."""
    from medplib.training.labelled import SHARES, LabelledImages, vocabulary_of

    samples = load_mini(split=split)
    weights = dict(shares) if shares else SHARES
    images = LabelledImages(
        samples, weights, steps=1, batch_size=1, seed=0, table=table, removal=removal, unchanged=unchanged
    )
    return images, vocabulary_of(samples), len(samples)


def _check_range(values: Mapping[str, float | None], low: float, high: float | None) -> None:
    for key, value in values.items():
        if value is not None and not low <= value <= (value if high is None else high):
            wanted = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InputError(f"options.{key} of the mini set must be {wanted}, got {value}.")


def _check_shares(key: str, shares: Mapping[str, float]) -> None:
    if not all(0 <= share < math.inf for share in shares.values()) or not sum(shares.values()) > 0:
        raise InputError(f"options.{key} of the mini set must be shares from 0, some above, got {shares}.")


def _task_shares(
    tasks: Mapping[str, float] | Sequence[str] | str, more: Collection[str] = ()
) -> dict[str, float]:
    if isinstance(tasks, str):
        tasks = [tasks]
    mixed = isinstance(tasks, Mapping)
    known = [kind for mix in MINI_TASKS.values() for kind in mix] + [*more] if mixed else list(MINI_TASKS)
    unknown = [t for t in tasks if t not in known]
    if unknown or not tasks:
        raise InputError(f"options.tasks of the mini set may hold {', '.join(known)}; got {list(tasks)}.")
    if mixed:
        _check_shares("tasks", tasks)
        return {str(k): float(v) for k, v in tasks.items()}
    return {kind: share / len(tasks) for t in tasks for kind, share in MINI_TASKS[t].items()}


def open_source(name: str, source: Source, table: str = "data") -> Sequence[Record] | Drawn:
    """The records of a source in this table of a recipe. Raises InputError, naming the source."""
    try:
        if source.reader == "mini":
            check_options(MiniQuestions, source.options, "The mini set")
            return MiniQuestions(split=source.split, **source.options)
        if source.path is None:
            raise InputError("path is missing; name the folder of the data set.")
        path = Path(source.path).expanduser()
        if not path.exists():
            raise InputError(f"there is no {source.path!r}; give --set {table}.{name}.path=FOLDER.")
        return read(source.reader, path, split=source.split, **source.options)
    except InputError as error:
        raise InputError(f"{table}.{name}: {error}") from error
    except TypeError as error:
        raise InputError(
            f"{table}.{name}: the options do not fit the reader '{source.reader}': {error}"
        ) from error


class Order:
    """Which record stands at which place of which epoch, over sources of the given lengths and weights.

    Each source is gone through in a shuffled order again and again; an epoch takes from it its share of
    `per_epoch` (default: all records together), so that a small source with a large weight repeats and a
    large one goes on in the next epoch where it stopped. Raises InputError for an empty source.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        weights: Mapping[str, float | None],
        *,
        seed: int,
        per_epoch: int | None = None,
        key: str = "",
    ) -> None:
        empty = [name for name, length in lengths.items() if length < 1]
        if empty or not lengths:
            raise InputError(
                f"The data source {', '.join(empty) or '(none)'} has no records; check its path and split."
            )
        self.names, self.lengths, self.seed, self.key = tuple(lengths), dict(lengths), seed, key
        self.per_epoch = per_epoch or sum(lengths.values())
        shares = np.array([weights.get(n) or lengths[n] for n in self.names], dtype=float)
        if any(weights.get(n) for n in self.names) and not all(weights.get(n) for n in self.names):
            without = [n for n in self.names if not weights.get(n)]
            raise InputError(f"Either all sources have a weight or none; {', '.join(without)} has none.")
        exact = shares / shares.sum() * self.per_epoch
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: self.per_epoch - counts.sum()]:
            counts[i] += 1  # largest remainder
        self.counts = dict(zip(self.names, counts.tolist(), strict=True))
        self._passes: dict[str, tuple[int, np.ndarray]] = {}

    def epoch(self, number: int) -> list[tuple[str, int]]:
        """The (source, position) pairs of an epoch, shuffled."""
        pairs = [
            (name, self._position(name, number * count + k))
            for name, count in self.counts.items()
            for k in range(count)
        ]
        mixed = keyed_rng("order", self.key, self.seed, number).permutation(len(pairs))
        return [pairs[i] for i in mixed]

    def _position(self, name: str, drawn: int) -> int:
        number, at = divmod(drawn, self.lengths[name])
        kept = self._passes.get(name)
        if kept is None or kept[0] != number:
            rng = keyed_rng("pass", self.key, self.seed, name, number)
            kept = self._passes[name] = (number, rng.permutation(self.lengths[name]))
        return int(kept[1][at])


def open_sources(
    sources: Mapping[str, Source], given: Mapping[str, Any] | None = None, table: str = "data"
) -> dict[str, Any]:
    """{name: records}, those `given` from Python in place of what this table of the recipe names."""
    given = given or {}
    return {
        name: given[name] if name in given else open_source(name, source, table)
        for name, source in sources.items()
    }
