"""build_mecovqa: labelled images -> a data set of conversations in MeCoVQA's own format.

Everything random is keyed by (seed, type, image file, number): a rerun gives the same bytes, and images added
later leave the questions about the others as they are, but for what may be called absent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from medplib.data.builder.absence import AbsencePolicy
from medplib.data.builder.complex import complex_pairs
from medplib.data.builder.facts import ImageFacts, image_facts, spacing_of
from medplib.data.builder.folder import MARK, MeCoVQAFolder
from medplib.data.builder.grounding import grounding_pairs
from medplib.data.builder.pairs import TYPES, Context, Pair
from medplib.data.builder.region import region_pairs
from medplib.data.builder.split import case_key, split_of, split_table
from medplib.data.builder.statistics import Statistics
from medplib.data.builder.writers import AnswerWriter, TemplateWriter, check_answer
from medplib.data.record import Record
from medplib.data.samples import MODALITIES, ImageSample, keyed_rng
from medplib.errors import InputError

SHOWN = 12  # records of each type on the contact sheet


@dataclass(frozen=True)
class BuildSettings:
    """What to build, checked when it is made.

    types           of "grounding", "region", "complex"
    per_image       conversations per image and type, fewer where an image has no more to ask about
    negatives       share of questions about absent structures, where one is surely absent (see absence.py)
    negatives_from  "dataset" or the stricter "case"
    unsure          {data set: names never called absent}
    test_share      share of the cases that go to test (see split.py)
    case_pattern    regular expression: the patient in a case's name
    max_turns       longest complex conversation
    several         "turns": several structures are several turns, as published; "answer": one answer with
                    several <SEG>
    refs            names of drawn structures stand between <ref> and </ref>
    radiological    data sets with the patient's right on the left of the image; "all" for every one
    spacing         {image file, data set--case or data set: [row, column] in mm}: areas are then in mm² too
    point_size      side of the square that stands for a point

    Raises InputError for values that cannot be used.
    """

    seed: int = 0
    types: tuple[str, ...] = TYPES
    per_image: int = 2
    negatives: float = 0.3
    negatives_from: str = "dataset"
    unsure: Mapping[str, Sequence[str]] = field(default_factory=dict)
    test_share: float = 0.2
    case_pattern: str | None = None
    max_turns: int = 3
    several: str = "turns"
    refs: bool = True
    radiological: tuple[str, ...] = ()
    spacing: Mapping[str, Sequence[float]] = field(default_factory=dict)
    point_size: int = 41

    def __post_init__(self) -> None:
        unknown = [name for name in self.types if name not in TYPES]
        if unknown or not self.types or len(set(self.types)) != len(self.types):
            raise InputError(
                f"types must be some of {', '.join(TYPES)}, got {', '.join(self.types) or 'none'}."
            )
        for name in ("per_image", "max_turns", "point_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("negatives", "test_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.several not in ("turns", "answer"):
            raise InputError(f"several must be 'turns' or 'answer', got {self.several!r}.")
        for key, names in self.unsure.items():
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise InputError(f"unsure must list names for {key!r}, as ['bone'], got {names!r}.")
        for key, value in self.spacing.items():
            if len(value) != 2 or not all(isinstance(v, int | float) and v > 0 for v in value):
                raise InputError(f"The spacing of {key!r} must be [row, column] in mm, got {value!r}.")


@dataclass(frozen=True)
class BuildReport:
    """What came of it. split: see `split_table`; skipped: why images or masks were left out; fallbacks: why a
    writer's answers were replaced by their drafts."""

    out: Path
    statistics: Statistics
    split: dict[str, dict[str, dict[str, int]]]
    skipped: dict[str, int]
    fallbacks: dict[str, int]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """As it stands in statistics.json."""
        return {
            **self.statistics.to_dict(),
            "images": self.images,
            "split by case": self.split,
            "skipped": dict(sorted(self.skipped.items())),
            "answers replaced by their draft": dict(sorted(self.fallbacks.items())),
        }


def build_mecovqa(
    samples: Sequence[ImageSample],
    out: str | Path,
    settings: BuildSettings | None = None,
    *,
    writer: AnswerWriter | None = None,
    vocabulary: Mapping[str, Iterable[str]] | None = None,
    link: bool = True,
    overwrite: bool = False,
    sheet: bool = True,
) -> BuildReport:
    """Write the folder `out`: train/ and test/ with MeCoVQA-*.json, images/, masks/, statistics.json,
    build.json and sheet.png (a picture of some rows). It appears complete or not at all.

    samples: a SAMed2DFolder or any sequence of ImageSamples. writer: words the answers (TemplateWriter).
    vocabulary: {data set: classes} that may be called absent; by default the class mapping of a
    SAMed2DFolder, else the names that the samples carry. link, overwrite: see MeCoVQAFolder.

    Raises InputError for no samples, a folder in the way, or nothing to ask; images and masks that cannot be
    read are left out and counted.
    """
    settings = settings or BuildSettings()
    writer = writer or TemplateWriter()
    if not len(samples):
        raise InputError("There are no images to build from.")
    if vocabulary is None and hasattr(samples, "vocabulary"):
        vocabulary = samples.vocabulary()
    case = case_key(settings.case_pattern)
    folder = MeCoVQAFolder(out, settings.types, link=link, overwrite=overwrite)
    policy = AbsencePolicy(samples, vocabulary, settings.unsure, settings.negatives_from)
    names = set(MODALITIES).union(*policy.drawn.values())
    statistics, placed = Statistics(), []
    skipped: Counter[str] = Counter()
    if getattr(samples, "skipped", 0):
        skipped["image of a known bad data set"] = samples.skipped
    fallbacks: Counter[str] = Counter()
    shown, workers = _Shown(settings.seed), max(1, getattr(writer, "concurrency", 1))
    with folder, ThreadPoolExecutor(workers) as pool:
        for chunk in _chunks(_facts(samples, settings, skipped), 4 * workers):
            plans = []
            for number, facts in chunk:
                split = split_of(case(facts.sample), settings.seed, settings.test_share)
                plans.append((number, facts, split, plan_rows(facts, policy, settings, number)))
            words = iter(_worded(pool, writer, plans, names))
            for number, facts, split, rows in plans:
                if not rows:
                    skipped["image with nothing to ask about"] += 1
                    continue
                image = folder.add_image(facts.sample, number)
                placed.append((facts.sample, case(facts.sample), split))
                for task, pairs in rows:
                    answers, reasons = zip(*(next(words) for _ in pairs), strict=True)
                    fallbacks.update(why for why in reasons if why)
                    shown.add(task, folder.add_row(split, task, image, pairs, answers))
                    statistics.add(split, task, facts.sample.modality, pairs, answers)
        if not placed:
            raise InputError(
                "None of the images has anything to ask about; left out: "
                + ", ".join(f"{n} x {why}" for why, n in skipped.items())
            )
        report = BuildReport(
            folder.out, statistics, split_table(placed), dict(skipped), dict(fallbacks), len(placed)
        )
        folder.add_file("statistics.json", report.to_dict())
        folder.add_file(MARK, _mark(settings, writer))
        if sheet:
            shown.draw(folder.work / "sheet.png")
    return report


def plan_rows(
    facts: ImageFacts, policy: AbsencePolicy, settings: BuildSettings, number: int
) -> list[tuple[str, list[Pair]]]:
    """The conversations about one image: (type, turns with draft answers)."""
    sample = facts.sample
    absent = policy.absent(sample, [*facts.names, *facts.tiny])
    key = sample.image.name if isinstance(sample.image, Path) else f"{sample.dataset}/{sample.case}/{number}"
    rows = []
    for task in settings.types:
        asked: set[tuple] = set()
        for turn in range(settings.per_image):
            context = Context(
                facts,
                absent,
                keyed_rng("build", settings.seed, task, key, turn),
                settings.negatives,
                settings.several,
                settings.refs,
                settings.point_size,
                asked,
            )
            if task == "grounding":
                pairs = grounding_pairs(context)
            elif task == "region":
                pairs = region_pairs(context)
            else:
                pairs = complex_pairs(context, int(context.rng.integers(settings.max_turns)) + 1)
            if pairs:
                rows.append((task, pairs))
    return rows


def _facts(
    samples: Sequence[ImageSample], settings: BuildSettings, skipped: Counter[str]
) -> Iterator[tuple[int, ImageFacts]]:
    for number, sample in enumerate(samples):
        spacing = spacing_of(sample, settings.spacing)
        sided = sample.dataset in settings.radiological or "all" in settings.radiological
        try:
            yield number, image_facts(sample, spacing, sided, skipped)
        except (OSError, ValueError):
            skipped["image missing or unreadable"] += 1


def _chunks(facts: Iterator[tuple[int, ImageFacts]], size: int) -> Iterator[list[tuple[int, ImageFacts]]]:
    """Images whose answers are asked for together."""
    while chunk := list(islice(facts, size)):
        yield chunk


def _worded(
    pool: ThreadPoolExecutor, writer: AnswerWriter, plans: Sequence[tuple], names: Set[str]
) -> list[tuple[str, str | None]]:
    """For every turn of the plans, in order: the writer's answer, or the draft and why it was not taken.

    names: all that an answer could confuse. An error of the writer ends the work on those that wait.
    """

    def word(wish: tuple[dict[str, Any], Pair]) -> tuple[str, str | None]:
        summary, pair = wish
        facts = {**summary, "question type": pair.kind, "asked about": list(pair.names)}
        answer = writer.write(facts, pair.question, pair.answer)
        about = (*pair.names, summary["modality"])
        why = check_answer(answer, pair.question, pair.answer, about, names)
        return (pair.answer, why) if why else (answer.strip(), None)

    wishes = []
    for _, facts, _, rows in plans:
        summary = facts.summary()
        wishes += [(summary, pair) for _, pairs in rows for pair in pairs]
    try:
        return list(pool.map(word, wishes))
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _mark(settings: BuildSettings, writer: AnswerWriter) -> dict[str, Any]:
    """What the data set was made with; no times and no paths, so that equal builds are equal bytes."""
    from medplib import __version__

    known = {"writer": type(writer).__name__}
    if hasattr(writer, "model"):
        known["model"] = writer.model
    return {"medplib": __version__, "settings": asdict(settings), **known}


class _Shown:
    """An even choice of `SHOWN` records per type out of a stream, the same in every run."""

    def __init__(self, seed: int) -> None:
        self.rng = keyed_rng("sheet", seed)
        self.seen: Counter[str] = Counter()
        self.records: dict[str, list[Record]] = {}

    def add(self, task: str, record: Record) -> None:
        """Perhaps keep it."""
        kept = self.records.setdefault(task, [])
        self.seen[task] += 1
        place = int(self.rng.integers(self.seen[task]))
        if len(kept) < SHOWN:
            kept.append(record)
        elif place < SHOWN:
            kept[place] = record

    def draw(self, path: Path) -> None:
        """The picture."""
        from medplib.data.sheet import contact_sheet

        contact_sheet([r for records in self.records.values() for r in records], path, columns=6)
