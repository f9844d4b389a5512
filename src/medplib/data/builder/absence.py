"""Which structures may be called absent: only those that the people who labelled the data set looked for.

A name is called absent from an image when

1. it is a class of the image's own data set, and some image of the source shows it (a class that is listed
   but never drawn was perhaps never looked for);
2. the image has no mask of it, not even a tiny, broken or empty one;
3. it is neither whole nor part of something labelled there, by its words: no "lung" beside a "left lung", no
   "left lung" beside a "lung" or "lungs", no "kidney" beside a "kidney tumor". A finding may be absent from
   an organ that is there: "kidney tumor" beside "kidney";
4. it is not listed as unsure for the data set (`unsure`, and `questions.UNLABELLED` for the mini set);
5. with scope "case", another image of the same case shows it: then it was looked for in this very patient.
   "dataset" (the default) asks for no more than 1 to 4; choose "case" for data sets that were put together
   from partly labelled sources.

Names of other data sets are never used: an abdomen labelled for its liver may well show a kidney.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from medplib.data.builder.words import SIDES, is_abnormal
from medplib.data.names import spoken
from medplib.data.questions import UNLABELLED
from medplib.data.samples import ImageSample
from medplib.errors import InputError

SCOPES = ("dataset", "case")


class AbsencePolicy:
    """Answers `absent(sample)` from the names of all samples; no pixels are read.

    vocabulary: {data set: names of its classes}, None for the names that its images carry. unsure: {data set:
    names never called absent}. Raises InputError for an unknown scope.
    """

    def __init__(
        self,
        samples: Iterable[ImageSample],
        vocabulary: Mapping[str, Iterable[str]] | None = None,
        unsure: Mapping[str, Iterable[str]] | None = None,
        scope: str = "dataset",
    ) -> None:
        if scope not in SCOPES:
            raise InputError(f"The scope of negatives must be one of {', '.join(SCOPES)}, got {scope!r}.")
        self.scope = scope
        self.drawn: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for sample in samples:
            names = {spoken(structure.name) for structure in sample.structures}
            self.drawn[self._key(sample)] |= names
        self.vocabulary = vocabulary and {k: {spoken(n) for n in v} for k, v in vocabulary.items()}
        self.unsure = {k: set(v) for k, v in UNLABELLED.items()}
        for dataset, names in (unsure or {}).items():
            self.unsure.setdefault(dataset, set()).update(spoken(name) for name in names)

    def absent(self, sample: ImageSample, seen: Sequence[str]) -> list[str]:
        """Names surely absent from the image, sorted; `seen` are names that it shows, however small."""
        names = set(self.drawn[self._key(sample)])
        if self.vocabulary:
            names &= self.vocabulary.get(sample.dataset, set())
        names -= self.unsure.get(sample.dataset, set())
        there = [*seen, *(spoken(structure.name) for structure in sample.structures)]
        return sorted(name for name in names if not any(_unsure_beside(name, o) for o in there))

    def _key(self, sample: ImageSample) -> tuple[str, ...]:
        return (sample.dataset,) if self.scope == "dataset" else (sample.dataset, sample.case)


def _unsure_beside(name: str, other: str) -> bool:
    """Whether an image that shows `other` may show `name` without a label (rule 3 above)."""
    words, others = ({word.rstrip("s") for word in text.lower().split()} for text in (name, other))
    if words <= others:
        return True
    return others <= words and not (is_abnormal(name) and not (words - others) & set(SIDES))
