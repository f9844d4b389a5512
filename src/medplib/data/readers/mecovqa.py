"""MeCoVQA: its complex, region and grounding conversations, defects repaired or dropped and reported.

On disk: train/ and test/ with MeCoVQA-Complex.json, -Region.json, -Grounding.json (test files also under
longer names), zeroshot4grounding/*.json, and images/ and masks/ beside them, in a folder or a zip.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medplib.conversation import IMAGE, REGION, SEG
from medplib.data.files import ImageFile, MaskFile
from medplib.data.json_text import scan_json
from medplib.data.names import CLASSES, class_names, slice_name, spoken
from medplib.data.readers.common import (
    Listing,
    Store,
    Unusable,
    build,
    find_files,
    image_store,
    index,
    pair_up,
    split_of,
    with_suffix,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.errors import InputError

KINDS = ("complex", "region", "grounding")
ZEROSHOT = "zeroshot4grounding"
_REGION = re.compile(r"((?:<region>\s*)+)([^<>]*?)((?:\s*</region>)+)")
_MASK = re.compile(r"((?:<SEG>\s*)*)((?:<mask>\s*)+)([^<>]*?)((?:\s*</mask>)+)")


class Conversation(NamedTuple):
    """A row taken apart: names of files in place of the files."""

    image: str
    turns: tuple[tuple[str, str], ...]
    regions: tuple[str, ...]
    masks: tuple[str, ...]
    repairs: tuple[str, ...]


def read_mecovqa(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    kind: str | None = None,
    images: str | os.PathLike | None = None,
) -> RecordSet:
    """MeCoVQA from its folder or one of its JSON files.

    split   "train", "test" or "zeroshot"; "val" in converted sets
    kind    "complex", "region" or "grounding"; None takes all that are there
    images  the folder or zip that holds images/ and masks/, if it is not the same folder
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)} or None, got {kind!r}.")
    patterns = [f"{folder}*.json" for folder in ("MeCoVQA", "*/MeCoVQA", "train/", "test/", f"{ZEROSHOT}/")]
    named = [(file, _split(file, Path(path))) for file in find_files(path, patterns, "MeCoVQA")]
    chosen = [(file, name) for file, name in named if split in (None, name) and kind in (None, _kind(file))]
    if not chosen:
        there = ", ".join(sorted({f"{name}/{_kind(file)}" for file, name in named}))
        raise InputError(
            f"No MeCoVQA file of split {split!r} and kind {kind!r} in {str(path)!r}. There: {there}."
        )
    report, parts = ReadReport(), []
    for file, name in chosen:
        store = image_store(file, _images(file), (), images)
        listing = Listing(store, report)
        rows, kept = index(file, lambda row, listing=listing: _check(row, listing, report), report)
        parts.append((rows, kept, MecovqaRow(store, name, _kind(file), _class_names(store))))
    return build("MeCoVQA", parts, report, "Give images=FOLDER if images/ and masks/ lie elsewhere.")


@dataclass(frozen=True)
class MecovqaRow:
    """Makes the Record of a row."""

    store: Store
    split: str | None
    kind: str | None
    classes: dict[str, dict[int, str]]

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"mecovqa {self.split} {self.kind}"

    def __call__(self, row: Any, number: int) -> Record:
        said = take_apart(row)
        name = slice_name(said.image)
        answer_type = str(row.get("answer_type") or "").strip().lower()
        return Record(
            turns=said.turns,
            images=(ImageFile(self.store.file(said.image)),),
            regions=tuple(MaskFile(self.store.file(mask)) for mask in said.regions),
            masks=tuple(MaskFile(self.store.file(mask)) for mask in said.masks),
            source="mecovqa",
            row=number,
            modality=name.modality if name else None,
            answer_type=answer_type if answer_type in ("open", "closed", "choice") else None,
            case=name.patient if name else None,
            split=self.split,
            labels=self._labels(said),
            extra={"kind": self.kind} if self.kind else {},
        )

    def _labels(self, said: Conversation) -> tuple[str, ...]:
        """Names of the masks' structures by their class numbers, or as the answer calls them."""
        names = [slice_name(mask) for mask in (*said.masks, *said.regions)]
        known = [self.classes.get(n.dataset, {}).get(n.class_id) if n else None for n in names]
        if known and all(known):
            return tuple(spoken(name) for name in known)
        return tuple(re.findall(r"<ref>\s*(.*?)\s*</ref>", " ".join(answer for _, answer in said.turns)))


def take_apart(row: Any) -> Conversation:
    """A row of the JSON list -> its texts and file names. Raises Unusable, with the defect."""
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"].strip():
        raise Unusable("no image named")
    repairs, regions, masks = [], [], []
    image = with_suffix(row["image"])
    if image != row["image"]:
        repairs.append("image path without .png")

    def region(found: re.Match) -> str:
        if found[1].count(REGION) > 1 or found[3].count("/region") > 1:
            repairs.append("double tag")
        regions.append(_file_name(found[2], repairs))
        return REGION

    def mask(found: re.Match) -> str:
        if found[1].count(SEG) > 1 or found[2].count("<mask>") > 1 or found[4].count("/mask") > 1:
            repairs.append("double tag")
        if not found[1]:
            repairs.append("mask without <SEG>")
        masks.append(_file_name(found[3], repairs))
        return SEG

    turns = []
    for question, answer in pair_up(row.get("conversations")):
        question = re.sub(rf"\s*{IMAGE}\s*", " ", question)
        turns.append((_REGION.sub(region, question).strip(), _MASK.sub(mask, answer).strip()))
        if not all(turns[-1]):
            raise Unusable("empty question or answer")
    if sum(question.count(REGION) for question, _ in turns) != len(regions):
        raise Unusable("a <region> without its mask")
    if sum(answer.count(SEG) for _, answer in turns) != len(masks):
        raise Unusable("a <SEG> without its mask")
    return Conversation(image, tuple(turns), tuple(regions), tuple(masks), tuple(repairs))


def _file_name(text: str, repairs: list[str]) -> str:
    if not text.strip():
        raise Unusable("a tag without a file")
    name = with_suffix(text)
    if name != text.strip():
        repairs.append("mask path without .png")
    return name


def _check(row: Any, listing: Listing, report: ReadReport) -> None:
    """Raise Unusable unless a row's files are there; note what had to be repaired."""
    said = take_apart(row)
    for kind, names in (("image", (said.image,)), ("mask", (*said.regions, *said.masks))):
        for name in names:
            if not listing.has(name):
                raise Unusable(f"{kind} missing", name)
    for kind in said.repairs:
        report.add("repaired", kind, row["image"])


def _kind(file: Path) -> str | None:
    if file.parent.name == ZEROSHOT:
        return "grounding"
    return next((kind for kind in KINDS if kind in file.name.lower()), None)


def _split(file: Path, root: Path) -> str | None:
    """ "zeroshot", what the names say, or the folder's name below the data set's."""
    if file.parent.name == ZEROSHOT:
        return "zeroshot"
    return split_of(file) or (None if root in (file, file.parent) else file.parent.name)


def _images(file: Path) -> Iterator[str]:
    """The names of the images, to find the folder they are in."""
    for _, _, row in scan_json(file):
        if isinstance(row, dict) and isinstance(row.get("image"), str):
            yield with_suffix(row["image"])


def _class_names(store: Store) -> dict[str, dict[int, str]]:
    """{data set: {class number: name}}, if SA-Med2D's table lies beside the images."""
    file = store.file(CLASSES)
    return class_names(file.read()) if file.exists() else {}
