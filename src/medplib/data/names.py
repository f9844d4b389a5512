"""What names say: SA-Med2D's file names taken apart, and the words that data sets use for modalities."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from medplib.data.samples import MODALITIES
from medplib.errors import InputError

CLASSES = "SAMed2D_v1_class_mapping_id.json"

# first part of SA-Med2D's 34 prefixes (ct_00, mr_t1, x_ray, ...), and of the mini set's
_PREFIXES = {
    "ct": "CT",
    "mr": "MR",
    "pet": "PET",
    "x": "X-ray",
    "ultrasound": "ultrasound",
    "endoscopy": "endoscopy",
    "dermoscopy": "dermoscopy",
    "fundus": "fundus",
    "histopathology": "histopathology",
    "microscopy": "microscopy",
}
_WORDS = (  # the first that is found decides
    ("PET", r"\bpet\b|positron"),
    ("CT", r"\bcta?\b|computed tomography|ct[ _]scan"),
    ("MR", r"\bmr[ia]?\b|magnetic resonance|mag-netic|\bflair\b|\bt[12]\w?\b|\badc\b|\bdwi\b"),
    ("X-ray", r"x[- _]?ray|radiograph|mammogra|\bcr\b|\bdx\b"),
    ("ultrasound", r"ultra-?sound|sonogra|echocardio"),
    ("dermoscopy", r"derm(at)?oscop"),
    ("endoscopy", r"endoscop|(?<!\w)colonoscop|gastroscop"),
    ("fundus", r"fundus"),
    ("histopathology", r"histo|patholog|\bh&e\b"),
    ("microscopy", r"microscop"),
)


class SliceName(NamedTuple):
    """`{prefix}--{dataset}--{case}--{slice}.png`, and for a mask also its class and instance."""

    prefix: str
    dataset: str
    case: str
    slice: str
    class_id: int | None = None
    instance: int | None = None

    @property
    def modality(self) -> str | None:
        """One of MODALITIES, or None for an unknown prefix."""
        return _PREFIXES.get(self.prefix.split("_")[0].lower())

    @property
    def patient(self) -> str:
        """The case with its data set: what a split must not cut."""
        return f"{self.dataset}/{self.case}"


def slice_name(path: str) -> SliceName | None:
    """The parts of an image's or a mask's name in SA-Med2D's way; None for a name of another kind.

    Case names hold dots and single dashes; parts are separated by two dashes.
    """
    name = path.replace("\\", "/").rpartition("/")[2]
    if name.lower().endswith((".png", ".jpg", ".jpeg")):
        name = name.rpartition(".")[0]
    parts = name.split("--")
    if len(parts) == 5:
        number, _, instance = parts[4].partition("_")
        if number.isdecimal() and instance.isdecimal():
            return SliceName(*parts[:4], int(number), int(instance))
    return SliceName(*parts) if len(parts) == 4 and all(parts) else None


def safe_part(part: str) -> str:
    """A part of such a name: no separators, no `--`."""
    return re.sub(r"-{2,}", "-", re.sub(r"[^\w.-]+", "_", part)).strip("-") or "x"


def modality_of(words: str | None) -> str | None:
    """One of MODALITIES, by its name or in a data set's own words, as "CT(Computed Tomography)"; None if
    unknown."""
    if words in MODALITIES:
        return words
    text = (words or "").lower()
    return next((modality for modality, pattern in _WORDS if re.search(pattern, text)), None)


def check_modality(given: str | None) -> str | None:
    """`modality_of` what a user says of all images; None stays None. Raises InputError if unknown."""
    found = modality_of(given)
    if found is None and given is not None:
        raise InputError(f"modality must be one of {', '.join(MODALITIES)}, got {given!r}.")
    return found


def spoken(name: str) -> str:
    """A class name as one says it: "union_lung_tumor" -> "lung tumor"."""
    return re.sub(r"[\s_]+", " ", name.removeprefix("union_")).strip()


def class_names(data: bytes) -> dict[str, dict[int, str]]:
    """{data set: {class number: name}} of SAMed2D_v1_class_mapping_id.json. Raises InputError."""
    try:
        table = json.loads(data)
        return {
            dataset: {int(number): name for name, number in classes.items()}
            for dataset, classes in table.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{CLASSES} is no table {{data set: {{class: number}}}}: {error}.") from error
