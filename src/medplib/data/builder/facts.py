"""What the masks of an image say: size, place, number and relation of its structures, never guessed.

H, W height and width of the image. "Left" and "right" mean the viewer's, in the image, unless the patient's
side is named; that is done only where the caller says that a data set follows the radiological convention
(the patient's right on the left of the image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from medplib.data.builder.components import component_sizes
from medplib.data.builder.words import area, is_abnormal, percent, plural
from medplib.data.names import spoken
from medplib.data.questions import MIN_PIXELS
from medplib.data.samples import ImageSample
from medplib.prompts.types import Box

ROWS = ("upper", "middle", "lower")
INSIDE = 0.95  # of A in B: A lies inside B
APART = 0.08  # of the image's diagonal: centroids nearer than this are neither left nor above


@dataclass(frozen=True, eq=False)
class Thing:
    """A structure of an image: the union of its instances.

    name     as it is spoken of: several instances of a finding are "polyps"
    single   as the data set names it: "polyp"
    mask     bool (H, W)
    parts    its instances as the data set lists them, bool (H, W) each
    files    their mask files, where they are files
    spacing  (row, column) in mm, None where nobody knows
    """

    name: str
    single: str
    mask: np.ndarray
    parts: tuple[np.ndarray, ...]
    files: tuple[Path | None, ...]
    spacing: tuple[float, float] | None = None

    @property
    def abnormal(self) -> bool:
        """Whether its name means a finding."""
        return is_abnormal(self.name)

    @cached_property
    def pixels(self) -> int:
        """Its area in pixels."""
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Its share of the image."""
        return self.pixels / self.mask.size

    @cached_property
    def center(self) -> tuple[float, float]:
        """(row, column) of its centroid, as shares of height and width."""
        ys, xs = np.nonzero(self.mask)
        height, width = self.mask.shape
        return (float(ys.mean()) + 0.5) / height, (float(xs.mean()) + 0.5) / width

    @cached_property
    def box(self) -> Box:
        """Its bounding box."""
        return Box.around(self.mask)

    @property
    def size(self) -> str:
        """ "3.2% of the image", with the area in mm² or cm² where the spacing is known."""
        text = f"{percent(self.share)} of the image"
        if self.spacing is None:
            return text
        return f"{text} ({area(self.pixels * self.spacing[0] * self.spacing[1])})"

    @cached_property
    def areas(self) -> list[int]:
        """Pixels of its connected parts, largest first."""
        return component_sizes(self.mask)

    @property
    def whole(self) -> bool:
        """Whether its largest part is most of it, so that its centroid means something."""
        return self.areas[0] >= 0.7 * self.pixels

    @property
    def compact(self) -> bool:
        """Whether one place describes it: it is whole, and its box covers at most 60% of each side."""
        height, width = self.mask.shape
        extent = max((self.box.x1 - self.box.x0) / width, (self.box.y1 - self.box.y0) / height)
        return extent <= 0.6 and self.whole

    @property
    def countable(self) -> bool:
        """Whether its number means something: a finding, or instances that the data set lists."""
        return self.abnormal or len(self.parts) > 1

    @cached_property
    def count(self) -> int:
        """Instances, where the data set lists several; else connected parts of at least MIN_PIXELS."""
        if len(self.parts) > 1:
            return len(self.parts)
        return sum(size >= MIN_PIXELS for size in self.areas)


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """An image with its structures, large enough to ask about; `tiny`: seen, but too small or not whole."""

    sample: ImageSample
    things: tuple[Thing, ...]
    tiny: tuple[str, ...] = ()
    radiological: bool = False

    @property
    def names(self) -> list[str]:
        """The structures' names."""
        return [thing.name for thing in self.things]

    def summary(self) -> dict:
        """All of it as plain data for an AnswerWriter; nothing in it says whose image it is."""
        return {
            "modality": self.sample.modality,
            "structures": [
                {
                    "name": thing.name,
                    "size": thing.size,
                    "position": place(thing, self.radiological) if thing.compact else None,
                    "count": thing.count if thing.countable else None,
                    "finding": thing.abnormal,
                }
                for thing in self.things
            ],
        }


def image_facts(
    sample: ImageSample,
    spacing: tuple[float, float] | None = None,
    radiological: bool = False,
    skipped: dict[str, int] | None = None,
) -> ImageFacts:
    """Read the masks of a sample.

    A mask that is missing, unreadable or not of the image's size is counted in `skipped`. Its structure is
    left out with all its instances, since neither its size nor their number is known, and counts as seen.
    Raises InputError when the image cannot be read.
    """
    height, width = sample.load_image().shape[:2]
    skipped = {} if skipped is None else skipped
    found: dict[str, list[tuple[np.ndarray, Path | None]]] = {}
    unknown: set[str] = set()
    for number, structure in enumerate(sample.structures):
        name = spoken(structure.name)
        try:
            mask = sample.load_mask(number)
        except (OSError, ValueError) as error:
            kind = "mask missing" if "no image file" in str(error) else "mask unreadable"
        else:
            kind = None if mask.shape == (height, width) else "mask of another size"
        if kind is not None:
            skipped[kind] = skipped.get(kind, 0) + 1
            unknown.add(name)
        elif mask.any():
            file = structure.mask if isinstance(structure.mask, Path) else None
            found.setdefault(name, []).append((mask, file))
    tiny = [name for name, rows in found.items() if np.any([m for m, _ in rows], axis=0).sum() < MIN_PIXELS]
    found = {name: rows for name, rows in found.items() if name not in unknown and name not in tiny}
    things = [
        Thing(
            (is_abnormal(name) and len(rows) > 1 and plural(name)) or name,
            name,
            np.logical_or.reduce([m for m, _ in rows]),
            *zip(*rows, strict=True),
            spacing,
        )
        for name, rows in found.items()
    ]
    return ImageFacts(sample, tuple(things), (*tiny, *sorted(unknown)), radiological)


def third(share: float) -> int:
    """0, 1 or 2: the third of a side that a place lies in."""
    return min(2, int(share * 3))


def place(thing: Thing, radiological: bool = False) -> str:
    """ "the upper left part of the image", by thirds at the centroid; perhaps with the patient's side."""
    row, column = (third(share) for share in thing.center)
    if (row, column) == (1, 1):
        return "the center of the image"
    words = {1: {0: "left", 2: "right"}}.get(row, {0: f"{ROWS[row]} left", 2: f"{ROWS[row]} right"})
    text = f"the {words.get(column, f'{ROWS[row]} middle')} part of the image"
    if radiological and column != 1:
        text += f", on the patient's {'right' if column == 0 else 'left'} side"
    return text


def relation(a: Thing, b: Thing) -> str | None:
    """How A lies to B: "inside" (INSIDE of it in B), or "above and to the left of" by the centroids.

    None where neither is clear. Directions are those of the image.
    """
    if (a.mask & b.mask).sum() >= INSIDE * a.pixels:
        return "inside" if a.pixels < 0.9 * b.pixels else None
    if (a.mask & b.mask).sum() > 0.2 * min(a.pixels, b.pixels) or not (a.whole and b.whole):
        return None
    height, width = a.mask.shape
    down, right = (a.center[0] - b.center[0]) * height, (a.center[1] - b.center[1]) * width
    least = APART * float(np.hypot(height, width))
    words = []
    if abs(down) >= least and abs(down) >= 0.4 * abs(right):
        words.append("below" if down > 0 else "above")
    if abs(right) >= least and abs(right) >= 0.4 * abs(down):
        words.append("to the right of" if right > 0 else "to the left of")
    return " and ".join(words) or None


def spacing_of(
    sample: ImageSample, table: Mapping[str, Sequence[float]] | None
) -> tuple[float, float] | None:
    """(row, column) in mm of an image from {image file, data set--case, or data set: [row, column]}."""
    keys = [f"{sample.dataset}--{sample.case}", sample.dataset]
    if isinstance(sample.image, Path):
        keys.insert(0, sample.image.name)
    for key in keys:
        if table and key in table:
            row, column = table[key]
            return float(row), float(column)
    return None
