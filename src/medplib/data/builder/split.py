"""Train or test: decided by the case through a keyed hash, never by the slice, and unmoved by new data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

from medplib.data.samples import ImageSample
from medplib.errors import InputError


def case_key(pattern: str | None = None) -> Callable[[ImageSample], str]:
    """What a split keeps together: data set and case.

    pattern: a regular expression whose first group is the patient within the case's name, for data sets that
    name several scans of a patient (r"(patient\\d+)_frame"); cases that it does not match stay as they are.
    Raises InputError for an expression that is wrong or has no group.
    """
    try:
        compiled = re.compile(pattern) if pattern else None
    except re.error as error:
        raise InputError(f"The case pattern {pattern!r} is no regular expression: {error}.") from error
    if compiled is not None and compiled.groups < 1:
        raise InputError(f"The case pattern {pattern!r} needs a group around the patient: '(...)'.")

    def key(sample: ImageSample) -> str:
        found = compiled.search(sample.case) if compiled else None
        return f"{sample.dataset}--{found[1] if found else sample.case}"

    return key


def split_of(case: str, seed: int, test_share: float) -> str:
    """ "train" or "test". The same case and seed give the same split whatever else is there, and a larger
    `test_share` only moves cases from train to test."""
    digest = hashlib.blake2b(case.encode(), key=str(seed).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") / 2**64 < test_share else "train"


def split_table(rows: Iterable[tuple[ImageSample, str, str]]) -> dict[str, dict[str, dict[str, int]]]:
    """(sample, case, split) -> {"modality, data set": {split: {"cases": n, "images": n}}}."""
    cases: dict[str, dict[str, set[str]]] = {}
    images: dict[str, dict[str, int]] = {}
    for sample, case, split in rows:
        stratum = f"{sample.modality}, {sample.dataset}"
        cases.setdefault(stratum, {}).setdefault(split, set()).add(case)
        counts = images.setdefault(stratum, {"train": 0, "test": 0})
        counts[split] += 1
    return {
        stratum: {
            split: {"cases": len(by_split.get(split, ())), "images": images[stratum][split]}
            for split in ("train", "test")
        }
        for stratum, by_split in sorted(cases.items())
    }
