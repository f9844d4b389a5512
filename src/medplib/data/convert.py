"""convert: any records -> a folder in MeCoVQA's layout, or in our own lossless one.

MeCoVQA: <split>/MeCoVQA-{Complex,Region,Grounding}.json, images/, masks/, and the table of class numbers,
with names that SA-Med2D's readers understand. It holds one picture per row and regions as masks; `jsonl`
keeps several pictures, boxes, points and choices. Either appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medplib.conversation import IMAGE, REGION, SEG
from medplib.data.files import identity
from medplib.data.names import CLASSES, safe_part, slice_name
from medplib.data.record import Record, fit_mask
from medplib.data.report import ReadReport
from medplib.errors import InputError, MedPLIBError
from medplib.prompts.types import Box, Mask, Point

LAYOUTS = ("mecovqa", "jsonl")
_KINDS = {"vqa": "Complex", "region": "Region", "grounding": "Grounding"}
_PREFIXES = {"CT": "ct_00", "MR": "mr_00", "PET": "pet_00", "X-ray": "x_ray", "fundus": "fundus_photography"}


@dataclass
class Converted:
    """What was written; `report` says what was repaired and, under "dropped", left out."""

    records: int = 0
    images: int = 0
    masks: int = 0
    files: list[str] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)


def convert(
    records: Sequence[Record],
    out: str | os.PathLike,
    to: str = "mecovqa",
    progress: Callable[[Any], Any] = iter,
) -> Converted:
    """Write `records` into the new folder `out`. A record that cannot be read or written is left out.

    Raises InputError for an unknown layout, a folder that holds something already, or if no record could be
    written; MedPLIBError if the disk is full or may not be written. Then nothing is left behind.
    """
    if to not in LAYOUTS:
        raise InputError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}.")
    target = Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{os.fspath(out)!r} exists already and is not empty; choose a new folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".medplib-", dir=target.parent))
    except OSError as error:
        raise MedPLIBError(f"{str(target.parent)!r} cannot be written: {error.strerror}.") from error
    try:
        new = staging / "new"
        new.mkdir()
        done = _write(records, _Folder(new), to, progress)
        if target.exists():
            target.rmdir()
        new.rename(target)
    except OSError as error:
        raise MedPLIBError(
            f"{os.fspath(out)!r} could not be written ({error.strerror or error}); nothing was left there. "
            "Choose a folder that can be written and has free space."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return done


def _write(records: Sequence[Record], folder: _Folder, to: str, progress: Callable) -> Converted:
    row_of = folder.mecovqa if to == "mecovqa" else folder.jsonl
    for number in progress(range(len(records))):
        try:
            name, row = row_of(records[number])
        except InputError as error:
            folder.done.report.add("dropped", "not written", f"record {number}: {error}")
            continue
        folder.row(name, row, lines=to == "jsonl")
        folder.done.records += 1
    folder.close()
    if not folder.done.records:
        raise InputError(f"No record could be written. {folder.done.report}")
    return folder.done


class _Folder:
    """The folder as it grows: the names of pictures and masks already in it, its open lists."""

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, Converted()
        self._names: dict[int, tuple[str, tuple[int, int]]] = {}  # of a picture: name, (H, W)
        self._used: set[str] = set()
        self._masks: dict[tuple, str] = {}
        self._classes: dict[str, dict[str, int]] = {}
        self._lists: dict[str, Any] = {}
        for name in ("images", "masks"):
            (root / name).mkdir()

    def mecovqa(self, record: Record) -> tuple[str, dict[str, Any]]:
        """(file, row) of MeCoVQA. Raises InputError."""
        if len(record.images) != 1:
            raise InputError(f"MeCoVQA has one picture per row, this record {len(record.images)}; use jsonl.")
        image, size = self._picture(record.images[0], record)
        names = label_names(record)
        regions = [self._mask(r, image, size, n) for r, n in zip(record.regions, names[1], strict=True)]
        masks = [self._mask(m, image, size, n) for m, n in zip(record.masks, names[0], strict=True)]
        talk = []
        for number, (question, answer) in enumerate(record.turns):
            question = _fill(question, REGION, "<region>{}</region>", regions)
            answer = _fill(answer, SEG, f"{SEG}<mask>{{}}</mask>", masks)
            talk += [
                {"from": "human", "value": question if number else f"{IMAGE}\n{question}"},
                {"from": "gpt", "value": answer},
            ]
        row: dict[str, Any] = {"image": image, "conversations": talk}
        if record.answer_type:
            row["answer_type"] = record.answer_type.upper()
        if record.split is None:
            self.done.report.add("repaired", "no split: written to train/", f"{record.source} {record.row}")
        split = "zeroshot4grounding" if record.split == "zeroshot" else safe_part(record.split or "train")
        kind = str(record.extra.get("kind")).capitalize()  # a denial without a mask stays among Grounding
        kind = kind if kind in _KINDS.values() else _KINDS[record.task]
        return f"{split}/MeCoVQA-{kind}.json", row

    def jsonl(self, record: Record) -> tuple[str, dict[str, Any]]:
        """(file, row) of our own format. Raises InputError."""
        image, size = None, None
        images = []
        for pixels in record.images:
            image, size = self._picture(pixels, record)
            images.append(image)
        names, regions = label_names(record), []
        for region, label in zip(record.regions, names[1], strict=True):
            if isinstance(region, Box):
                regions.append({"box": [region.x0, region.y0, region.x1, region.y1]})
            elif isinstance(region, Point):
                regions.append({"point": [region.x, region.y, region.label]})
            else:
                regions.append(self._mask(region, image, size, label))
        masks = [self._mask(mask, image, size, n) for mask, n in zip(record.masks, names[0], strict=True)]
        row = {"images": images, "turns": record.turns, "regions": regions, "masks": masks}
        fields = ("source", "row", "modality", "answer_type", "case", "split", "labels", "choices", "extra")
        row |= {name: getattr(record, name) for name in fields if getattr(record, name) not in (None, (), {})}
        return "records.jsonl", row

    def row(self, name: str, row: dict[str, Any], lines: bool) -> None:
        """Add a row to a list; JSON is written as it comes, so that a million rows need no memory."""
        text = json.dumps(row, ensure_ascii=False, default=str)
        if name not in self._lists:
            (self.root / name).parent.mkdir(exist_ok=True)
            self._lists[name] = (self.root / name).open("w", encoding="utf-8")
            self.done.files.append(name)
            text = text if lines else f"[\n{text}"
        elif not lines:
            text = f",\n{text}"
        self._lists[name].write(text + ("\n" if lines else ""))

    def close(self) -> None:
        """End the lists; write the table of class numbers."""
        for name, file in self._lists.items():
            if name.endswith(".json"):
                file.write("\n]\n")
            file.close()
        if self._classes:
            (self.root / CLASSES).write_text(json.dumps(self._classes, indent=1, ensure_ascii=False))

    def _picture(self, pixels: Any, record: Record) -> tuple[str, tuple[int, int]]:
        key = identity(pixels)
        if key not in self._names:
            image = pixels.load()
            name = self._new_name(str(pixels), record)
            grey = (image == image[..., :1]).all()
            _save(image[..., 0] if grey else image, self.root / name)
            self._names[key] = name, image.shape[:2]
            self.done.images += 1
        return self._names[key]

    def _new_name(self, given: str, record: Record) -> str:
        """Its own name if that is of SA-Med2D's kind, else one that says modality, data set and case."""
        known = slice_name(given)
        if known is not None and known.class_id is None:
            stem = "--".join(safe_part(part) for part in known[:4])
        else:
            prefix = _PREFIXES.get(record.modality, f"{safe_part(record.modality or 'other')}_00")
            dataset, _, case = (record.case or "").rpartition("/")
            parts = (prefix, dataset or record.source, case or f"row{record.row}", f"{len(self._used):07d}")
            stem = "--".join(safe_part(part) for part in parts)
        if stem in self._used:
            stem += f"_{len(self._used)}"
        self._used.add(stem)
        return f"images/{stem}.png"

    def _mask(self, pixels: Any, image: str, size: tuple[int, int], label: str | None) -> str:
        key = (image, identity(pixels), label)
        if key in self._masks:
            return self._masks[key]
        if isinstance(pixels, Box | Point):
            mask = pixels.to_mask(size)
            self.done.report.add("repaired", f"{type(pixels).__name__.lower()} written as a mask", image)
        else:
            mask = Mask(pixels.mask).to_mask(size) if isinstance(pixels, Mask) else pixels.load()
        if mask.shape != size:
            self.done.report.add("repaired", "mask fitted to its picture", f"{pixels} of {mask.shape}")
            mask = fit_mask(mask, size)
        stem = Path(image).stem
        number = 0  # no name
        if label:
            classes = self._classes.setdefault(slice_name(image).dataset, {})
            number = classes.setdefault(label, len(classes) + 1)
        instance = 0
        while (name := f"masks/{stem}--{number:04d}_{instance:03d}.png") in self._used:
            instance += 1
        self._used.add(name)
        _save(mask.astype(np.uint8) * np.uint8(255), self.root / name)
        self._masks[key] = name
        self.done.masks += 1
        return name


def label_names(record: Record) -> tuple[list[str | None], list[str | None]]:
    """The names of the masks and of the regions, as far as they are known."""
    masks, regions, labels = len(record.masks), len(record.regions), list(record.labels)
    if len(labels) == masks + regions:
        return labels[:masks], labels[masks:]
    if masks and len(labels) == masks:
        return labels, [None] * regions
    if not masks and len(labels) == 1:
        return [], labels * regions
    return [None] * masks, [None] * regions


def _fill(text: str, token: str, form: str, names: list[str]) -> str:
    """Each `token` of the text with the next of `names`, which are used up."""
    parts = text.split(token)
    return parts[0] + "".join(form.format(names.pop(0)) + part for part in parts[1:])


def _save(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path, compress_level=3)
