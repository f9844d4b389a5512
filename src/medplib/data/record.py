"""Record: one conversation about images, of any data set: what is asked and answered, where its pixels are.

H, W height and width of the original image. Readers yield Records; nothing of an image is read before `load`
or `to_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from medplib.conversation import REGION, SEG
from medplib.data.samples import MODALITIES
from medplib.errors import InputError
from medplib.prompts.types import Box, Mask, Point

TASKS = ("vqa", "region", "grounding")
ANSWER_TYPES = ("open", "closed", "choice")


class Pixels(Protocol):
    """Anything that gives an array when asked: ImageFile and MaskFile (see files.py), or one of your own."""

    def load(self) -> np.ndarray:
        """An image uint8 (H, W, 3), or a mask bool (H, W)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data set, checked when it is made.

    turns        (question, answer) pairs; `<region>` in a question stands for the next of `regions`, `<SEG>`
                 in an answer for the next of `masks`, perhaps after its `<ref>name</ref>`. No paths, no
                 `<image>` and no other control tokens stand in them
    images       what is asked about, in order; may be empty (text alone)
    regions      Point, Box, or a mask given by its Pixels; on the last image
    masks        one mask per `<SEG>`; on the last image
    source       the data set, such as "mecovqa"; with `row`, its place in that data set
    modality     one of MODALITIES, None where the data set does not say
    answer_type  "open", "closed" (yes, no or another fixed word), "choice" (of `choices`); None if unknown
    case         the patient, volume or study: what splits must not cut; None if unknown
    labels       names of the structures that `masks` or `regions` show, where known
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Pixels, ...] = ()
    regions: tuple[Point | Box | Pixels, ...] = ()
    masks: tuple[Pixels, ...] = ()
    source: str = "unknown"
    row: int = 0
    modality: str | None = None
    answer_type: str | None = None
    case: str | None = None
    split: str | None = None
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"Row {self.row} of {self.source}"
        if not self.turns:
            raise InputError(f"{where} has no question.")
        for turn in self.turns:
            if len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise InputError(f"{where}: a turn must be a (question, answer) pair, got {turn!r:.80}.")
            if not turn[0].strip() or not turn[1].strip():
                raise InputError(f"{where} has an empty {'question' if not turn[0].strip() else 'answer'}.")
        for token, column, given, what in (
            (REGION, 0, self.regions, "region"),
            (SEG, 1, self.masks, "mask"),
        ):
            written = sum(turn[column].count(token) for turn in self.turns)
            if written != len(given):
                raise InputError(f"{where} writes {written} {token} but has {len(given)} {what}s.")
        if (self.regions or self.masks) and not self.images:
            raise InputError(f"{where} points at pixels but has no image.")
        if self.modality is not None and self.modality not in MODALITIES:
            raise InputError(
                f"{where}: modality must be one of {', '.join(MODALITIES)}, got {self.modality!r}."
            )
        if self.answer_type is not None and self.answer_type not in ANSWER_TYPES:
            raise InputError(
                f"{where}: answer_type must be one of {', '.join(ANSWER_TYPES)}, got {self.answer_type!r}."
            )

    @property
    def task(self) -> str:
        """ "grounding" with a mask to draw, "region" with a region asked about, else "vqa"."""
        return "grounding" if self.masks else "region" if self.regions else "vqa"

    def load_images(self) -> list[np.ndarray]:
        """uint8 (H, W, 3) each. Raises InputError, naming the file."""
        return [image.load() for image in self.images]

    def load_masks(self, size: tuple[int, int], which: slice = slice(None)) -> list[np.ndarray]:
        """bool (H, W) for each `<SEG>`, or for `which` of them; `size` (H, W) is the last image's.

        A mask of another size is resized by nearest neighbour, as the published training does; `medplib data
        check` lists them.
        """
        return [fit_mask(mask.load(), size) for mask in self.masks[which]]

    def load_regions(self, size: tuple[int, int], which: slice = slice(None)) -> list[Point | Box | Mask]:
        """The regions, or `which` of them, as prompts of the processor; `size` (H, W) is the last image's."""
        return [
            region if isinstance(region, Point | Box) else Mask(fit_mask(region.load(), size))
            for region in self.regions[which]
        ]

    def to_sample(self) -> Any:
        """With its pixels read: a `medplib.processing.Sample`. Raises InputError, naming the file."""
        from medplib.sample import Sample

        images = self.load_images()
        size = images[-1].shape[:2] if images else (0, 0)
        last = max(0, len(images) - 1)
        return Sample(
            images, list(self.turns), self.load_regions(size), [last] * len(self.regions),
            self.load_masks(size), [last] * len(self.masks),
        )  # fmt: skip


def fit_mask(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """bool (h, w) -> bool (H, W) by nearest neighbour (pixel centres); the same array where the size fits."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (given / wanted)).astype(np.int64).clip(0, given - 1)
        for wanted, given in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns[None]]
