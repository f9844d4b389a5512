"""COCO instance files: a grounding record per image and category, its instances as one mask.

The file: {"images": [...], "annotations": [...], "categories": [...]}; a segmentation is a list of polygons
or a run-length encoding, packed or not.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medplib.data.files import ImageFile
from medplib.data.names import modality_of, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.common import Listing, Store, build, find_files, image_store, of_split
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import TextRows, scan_json, text_rows
from medplib.errors import InputError
from medplib.io import rle


def read_coco(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    images: str | os.PathLike | None = None,
    modality: str | None = None,
    crowds: bool = False,
) -> RecordSet:
    """COCO's annotations from a file, or a folder with annotations/*.json.

    images    the folder or zip of the pictures; by default found near the file by its first picture
    modality  of all images
    crowds    take also annotations with iscrowd
    Memory: 8 bytes per image and per annotation, 8 per record.
    """
    modality = modality_of(modality)
    files = find_files(path, ("annotations/instances*.json", "annotations/*.json", "*.json"), "COCO")
    report, parts = ReadReport(), []
    for file, name in of_split(files, split, "COCO"):
        rows, categories = _index(file, images, crowds, report)
        parts.append((rows, None, CocoRow(rows.store, name, modality, categories)))
    return build("COCO", parts, report, "Give images=FOLDER if the pictures lie elsewhere.")


class CocoRows:
    """(image, [annotations]) of every record: bounds into annotations sorted by image and category."""

    def __init__(
        self, text: TextRows, store: Store, images: np.ndarray, notes: np.ndarray, bounds: np.ndarray
    ) -> None:
        self.text, self.store = text, store  # text row numbers below
        self.images, self.notes, self.bounds = images, notes, bounds
        self.digest = text.digest

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, list[Any]]:
        notes = self.notes[int(self.bounds[index]) : int(self.bounds[index + 1])]
        return self.text[int(self.images[index])], [self.text[int(note)] for note in notes]

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        return self.text.nbytes + self.images.nbytes + self.notes.nbytes + self.bounds.nbytes


@dataclass(frozen=True)
class CocoRow:
    """Makes the grounding Record of (image, its annotations of one category)."""

    store: Store
    split: str | None
    modality: str | None
    categories: dict[int, str]

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"coco {self.split} {self.modality}"

    def __call__(self, row: tuple[Any, list[Any]], number: int) -> Record:
        image, notes = row
        label = self.categories[notes[0]["category_id"]]
        shapes = tuple(Shape(_frozen(note["segmentation"])) for note in notes)
        return Record(
            turns=((f"Segment the {label}.", present_answer([label])),),
            images=(ImageFile(self.store.file(image["file_name"])),),
            masks=(ShapesMask(shapes, (int(image["height"]), int(image["width"])), image["file_name"]),),
            source="coco",
            row=number,
            modality=self.modality,
            case=str(image["patient_id"]) if image.get("patient_id") else None,
            split=self.split,
            labels=(label,),
            extra={"image_id": image["id"], "instances": len(notes)},
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """One instance: polygons ((x0, y0, x1, y1, ...), ...) or (size, counts) of a run-length encoding."""

    outline: tuple

    def draw(self, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W). Raises InputError for a damaged encoding or one of another size."""
        if self.outline[0] == "rle":
            mask = rle.decode({"size": self.outline[1], "counts": self.outline[2]})
            if mask.shape != size:
                raise InputError(f"A run-length encoding is of size {mask.shape}, its image of {size}.")
            return mask
        return polygons_mask(self.outline[1], size)


@dataclass(frozen=True, slots=True)
class ShapesMask:
    """All instances of a category as one mask."""

    shapes: tuple[Shape, ...]
    size: tuple[int, int]
    name: str

    def __str__(self) -> str:
        return f"{len(self.shapes)} annotations of {self.name}"

    def load(self) -> np.ndarray:
        """bool (H, W). Raises InputError, naming the image."""
        whole = np.zeros(self.size, bool)
        for shape in self.shapes:
            try:
                whole |= shape.draw(self.size)
            except InputError as error:
                raise InputError(f"{self}: {error}") from error
        return whole


def polygons_mask(polygons: Any, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre lies in one of the polygons (x0, y0, x1, y1, ...), bool (H, W).

    The even-odd rule at pixel centres, on 4 x 4 times the grid; COCO's own code draws on 5 times the grid and
    differs from this by pixels on the outline.
    """
    height, width = size
    if height * width > rle.MAX_PIXELS // 16:
        raise InputError(
            f"Polygons are drawn in images of at most {rle.MAX_PIXELS // 16} pixels, got {size}."
        )
    whole = np.zeros(size, bool)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise InputError(f"A polygon needs at least 3 pairs of numbers, got {len(polygon)} numbers.")
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise InputError("A polygon holds a number that is not finite.")
        x0, y0 = np.floor(points.min(0)).clip(0, (width, height)).astype(int)
        x1, y1 = np.ceil(points.max(0) + 1).clip(0, (width, height)).astype(int)
        if x1 <= x0 or y1 <= y0:
            continue
        canvas = Image.new("1", (4 * int(x1 - x0), 4 * int(y1 - y0)))
        fine = [(4 * (x - x0) - 0.5, 4 * (y - y0) - 0.5) for x, y in points]
        ImageDraw.Draw(canvas).polygon(fine, fill=1)
        share = np.asarray(canvas).reshape(y1 - y0, 4, x1 - x0, 4).mean((1, 3))
        whole[y0:y1, x0:x1] |= share >= 0.5
    return whole


def _frozen(segmentation: Any) -> tuple:
    """The outline of a Shape. Raises InputError for what is neither polygons nor an encoding."""
    try:
        if isinstance(segmentation, Mapping):
            counts = segmentation["counts"]
            return ("rle", tuple(segmentation["size"]), tuple(counts) if isinstance(counts, list) else counts)
        return ("polygons", tuple(tuple(float(number) for number in polygon) for polygon in segmentation))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{segmentation!r:.80} is neither polygons nor a run-length encoding.") from error


@dataclass
class _Found:
    """What one pass over the file collects: where images and annotations begin, and which belong together."""

    starts: array = field(default_factory=lambda: array("Q"))
    image_ids: array = field(default_factory=lambda: array("q"))
    image_rows: array = field(default_factory=lambda: array("Q"))
    note_rows: array = field(default_factory=lambda: array("Q"))
    note_images: array = field(default_factory=lambda: array("q"))
    note_categories: array = field(default_factory=lambda: array("q"))


def _index(
    file: Path, folder: str | os.PathLike | None, crowds: bool, report: ReadReport
) -> tuple[CocoRows, dict[int, str]]:
    found, categories = _Found(), {}
    ending = file.stem.split("_")[-1]  # of instances_train2017.json
    near = ("images", f"images/{ending}", ending)
    store = image_store(file, _images(file), near, folder)
    listing = Listing(store, report)
    for key, at, row in scan_json(file, inside=("images", "annotations", "categories")):
        if key not in ("images", "annotations", "categories") or not isinstance(row, dict):
            continue
        if key != "annotations" and not _is_id(row.get("id")):
            raise InputError(f"{str(file)!r}: ids must be whole numbers, got {row.get('id')!r} at byte {at}.")
        if key == "categories":
            categories[row.get("id")] = spoken(str(row.get("name", "")))
            continue
        found.starts.append(at)
        if key == "annotations":
            _note(row, found, crowds, report)
            continue
        name = str(row.get("file_name", ""))
        if not name or not isinstance(row.get("height"), int) or not isinstance(row.get("width"), int):
            report.add("dropped", "image without a name or size", str(row)[:80])
        elif not listing.has(name):
            report.add("dropped", "image missing", name)
        else:
            found.image_ids.append(row["id"])
            found.image_rows.append(len(found.starts) - 1)
    return _group(file, store, found, categories, report), categories


def _images(file: Path) -> Iterator[str]:
    """The names of the images, to find the folder they are in."""
    for key, _, row in scan_json(file, inside=("images", "annotations")):
        if key == "images" and isinstance(row, dict):
            yield str(row.get("file_name", ""))


def _note(row: dict[str, Any], found: _Found, crowds: bool, report: ReadReport) -> None:
    """Keep an annotation, or say why not."""
    if row.get("iscrowd") and not crowds:
        report.add("dropped", "crowd", f"annotation {row.get('id')}")
    elif not row.get("segmentation") or not _is_id(row.get("image_id")) or not _is_id(row.get("category_id")):
        report.add("dropped", "annotation without a segmentation or image", f"annotation {row.get('id')}")
    else:
        try:
            _frozen(row["segmentation"])
        except InputError as error:
            report.add("dropped", "damaged segmentation", f"annotation {row.get('id')}: {error}")
            return
        found.note_rows.append(len(found.starts) - 1)
        found.note_images.append(row["image_id"])
        found.note_categories.append(row["category_id"])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 62


def _group(
    file: Path, store: Store, found: _Found, categories: dict[int, str], report: ReadReport
) -> CocoRows:
    """The annotations by image and category."""
    text = text_rows(file, found.starts)
    ids, rows = np.array(found.image_ids, np.int64), np.array(found.image_rows, np.uint64)
    order = np.argsort(ids, kind="stable")
    ids, rows = ids[order], rows[order]
    images, kinds = np.array(found.note_images, np.int64), np.array(found.note_categories, np.int64)
    notes = np.array(found.note_rows, np.uint64)
    with_image, named = np.isin(images, ids), np.isin(kinds, np.array(list(categories), np.int64))
    for kept, kind in ((with_image, "annotation without an image"), (named, "unknown category")):
        if not kept.all():
            at = int(np.flatnonzero(~kept)[0])
            example = f"image {images[at]}, category {kinds[at]}"
            report.add("dropped", kind, example, int((~kept).sum()))
    keep = np.flatnonzero(with_image & named)
    keep = keep[np.lexsort((kinds[keep], images[keep]))]
    images, kinds, notes = images[keep], kinds[keep], notes[keep]
    new = np.ones(len(keep), bool)
    new[1:] = (images[1:] != images[:-1]) | (kinds[1:] != kinds[:-1])
    first = np.flatnonzero(new)
    where = rows[np.searchsorted(ids, images[first])] if len(ids) else rows[:0]
    return CocoRows(text, store, where, notes, np.append(first, len(keep)).astype(np.uint64))
