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
from medplib.data.json_text import scan_json
from medplib.data.names import check_modality, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.common import Listing, Store, build, find_files, image_store, of_split
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import TextRows, text_rows
from medplib.errors import InputError
from medplib.io import rle

MAX_DRAWN = rle.MAX_PIXELS // 16  # pixels of an image whose polygons are drawn


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

    Memory: 8 bytes per image, 16 per annotation, 16 per record.
    """
    modality = check_modality(modality)
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
    if height * width > MAX_DRAWN:
        raise InputError(f"Polygons are drawn in images of at most {MAX_DRAWN} pixels, got {size}.")
    whole = np.zeros(size, bool)
    for polygon in polygons:
        points = _points(polygon)
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


def _points(polygon: Any) -> np.ndarray:
    """(x0, y0, x1, y1, ...) -> (P, 2). Raises InputError for fewer than 3 pairs and numbers not finite."""
    if len(polygon) < 6 or len(polygon) % 2:
        raise InputError(f"A polygon needs at least 3 pairs of numbers, got {len(polygon)} numbers.")
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise InputError("A polygon holds a number that is not finite.")
    return points


def _frozen(segmentation: Any) -> tuple:
    """The outline of a Shape. Raises InputError for what is neither polygons nor an encoding."""
    try:
        if isinstance(segmentation, Mapping):
            counts = segmentation["counts"]
            return ("rle", tuple(segmentation["size"]), tuple(counts) if isinstance(counts, list) else counts)
        return ("polygons", tuple(tuple(float(number) for number in polygon) for polygon in segmentation))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{segmentation!r:.80} is neither polygons nor a run-length encoding.") from error


def _own_size(outline: tuple) -> tuple[int, int]:
    """(H, W) of a run-length encoding, (0, 0) for polygons. Raises InputError for a damaged outline."""
    if outline[0] == "rle":
        return rle.runs_of({"size": outline[1], "counts": outline[2]})[0]
    for polygon in outline[1]:
        _points(polygon)
    return 0, 0


@dataclass
class _Found:
    """What one pass over the file collects: where images and annotations begin, and which belong together.

    Sizes are packed as height << 32 | width; that of an annotation is 0 for polygons.
    """

    starts: array = field(default_factory=lambda: array("Q"))
    image_ids: array = field(default_factory=lambda: array("q"))
    image_rows: array = field(default_factory=lambda: array("Q"))
    image_sizes: array = field(default_factory=lambda: array("Q"))
    note_rows: array = field(default_factory=lambda: array("Q"))
    note_images: array = field(default_factory=lambda: array("q"))
    note_categories: array = field(default_factory=lambda: array("q"))
    note_sizes: array = field(default_factory=lambda: array("Q"))


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
        if key != "annotations" and _whole(row.get("id")) is None:
            raise InputError(f"{str(file)!r}: ids must be whole numbers, got {row.get('id')!r} at byte {at}.")
        if key == "categories":
            _category(row, categories, report)
            continue
        found.starts.append(at)
        if key == "annotations":
            _note(row, found, crowds, report)
        else:
            _image(row, found, listing, report)
    return _group(file, store, found, categories, report), categories


def _images(file: Path) -> Iterator[str]:
    """The names of the images, to find the folder they are in."""
    for key, _, row in scan_json(file, inside=("images", "annotations")):
        if key == "images" and isinstance(row, dict):
            yield str(row.get("file_name", ""))


def _category(row: dict[str, Any], categories: dict[int, str], report: ReadReport) -> None:
    """Keep the name of a category, or say why not."""
    number, name = _whole(row["id"]), row.get("name")
    name = spoken(name) if isinstance(name, str) else ""
    if not name:
        report.add("dropped", "category without a name", f"category {number}")
    elif number in categories:
        report.add("dropped", "category id used twice", f"category {number}, {name}")
    else:
        categories[number] = name


def _image(row: dict[str, Any], found: _Found, listing: Listing, report: ReadReport) -> None:
    """Keep an image, or say why not."""
    name, height, width = row.get("file_name"), _whole(row.get("height")), _whole(row.get("width"))
    sized = all(side is not None and 0 < side < 1 << 31 for side in (height, width))
    if not isinstance(name, str) or not name or not sized:
        report.add("dropped", "image without a name or size", str(row)[:80])
    elif not listing.has(name):
        report.add("dropped", "image missing", name)
    else:
        found.image_ids.append(_whole(row["id"]))
        found.image_rows.append(len(found.starts) - 1)
        found.image_sizes.append(height << 32 | width)


def _note(row: dict[str, Any], found: _Found, crowds: bool, report: ReadReport) -> None:
    """Keep an annotation, or say why not."""
    image, category = _whole(row.get("image_id")), _whole(row.get("category_id"))
    if row.get("iscrowd") and not crowds:
        report.add("dropped", "crowd", f"annotation {row.get('id')}")
    elif not row.get("segmentation") or None in (image, category):
        report.add("dropped", "annotation without a segmentation or image", f"annotation {row.get('id')}")
    else:
        try:
            height, width = _own_size(_frozen(row["segmentation"]))
        except InputError as error:
            report.add("dropped", "damaged segmentation", f"annotation {row.get('id')}: {error}")
            return
        found.note_rows.append(len(found.starts) - 1)
        found.note_images.append(image)
        found.note_categories.append(category)
        found.note_sizes.append(height << 32 | width)


def _whole(value: Any) -> int | None:
    """A whole number of less than 63 bits, also one written as 40.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and abs(value) < 1 << 62 else None


def _group(
    file: Path, store: Store, found: _Found, categories: dict[int, str], report: ReadReport
) -> CocoRows:
    """The annotations by image and category."""
    text = text_rows(file, found.starts)
    ids, first = np.unique(np.array(found.image_ids, np.int64), return_index=True)
    again = np.delete(np.array(found.image_ids, np.int64), first)
    if len(again):
        report.add("dropped", "image id used twice", f"image {again[0]}", len(again))
    rows = np.array(found.image_rows, np.uint64)[first]
    images, kinds = np.array(found.note_images, np.int64), np.array(found.note_categories, np.int64)
    keep = _usable(found, ids, np.array(found.image_sizes, np.uint64)[first], categories, report)
    keep = keep[np.lexsort((kinds[keep], images[keep]))]
    images, kinds, notes = images[keep], kinds[keep], np.array(found.note_rows, np.uint64)[keep]
    bare = np.setdiff1d(ids, images)
    if len(bare):
        report.add("dropped", "image without annotations", f"image {bare[0]}", len(bare))
    new = np.ones(len(keep), bool)
    new[1:] = (images[1:] != images[:-1]) | (kinds[1:] != kinds[:-1])
    starts = np.flatnonzero(new)
    where = rows[np.searchsorted(ids, images[starts])]
    return CocoRows(text, store, where, notes, np.append(starts, len(keep)).astype(np.uint64))


def _usable(
    found: _Found, ids: np.ndarray, sizes: np.ndarray, categories: dict[int, str], report: ReadReport
) -> np.ndarray:
    """Numbers of the annotations whose image (ids ascending, with sizes) and category are there and fit."""
    images, kinds = np.array(found.note_images, np.int64), np.array(found.note_categories, np.int64)
    own = np.array(found.note_sizes, np.uint64)
    known = np.isin(images, ids)
    size = np.zeros_like(own)
    size[known] = sizes[np.searchsorted(ids, images[known])]
    pixels = (size >> np.uint64(32)) * (size & np.uint64(0xFFFFFFFF))
    faults = {
        "annotation without an image": ~known,
        "unknown category": ~np.isin(kinds, np.array(list(categories), np.int64)),
        "run-length encoding of another size than its image": known & (own != 0) & (own != size),
        "image too large to draw polygons in": (own == 0) & (pixels > MAX_DRAWN),
    }
    for kind, bad in faults.items():
        at = np.flatnonzero(bad)
        if len(at):
            report.add("dropped", kind, f"image {images[at[0]]}, category {kinds[at[0]]}", len(at))
    return np.flatnonzero(~np.any(list(faults.values()), axis=0))
