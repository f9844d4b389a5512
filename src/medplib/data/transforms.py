"""Augmentation: a training sample moved as a whole (image, masks, boxes, points), decided by a key.

The mechanism is `augment.py`'s Move, the same that trained the tiny model. torchvision's v2 transforms were
the other candidate; they draw from PyTorch's global generator alone, their elastic transform moves boxes and
points by an approximate inverse only, and they know one border for all modalities. The tests hold our points,
boxes and masks against v2's. Letters: H height, W width of one image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medplib.data.augment import (
    COLOUR,
    OUTSIDE,
    Move,
    change_intensity,
    draw_move,
    may_flip,
    resample,
    source_positions,
)
from medplib.data.samples import MODALITIES, keyed_rng
from medplib.errors import InputError
from medplib.io.images import load_image
from medplib.prompts.types import Box, Mask, Point

if TYPE_CHECKING:
    from medplib.processing import Sample

# Words that a rotation, shift or zoom of the image can make untrue: places, sizes, numbers of things.
PLACED = re.compile(
    r"%|\b(upper|lower|top|bottom|corner|cent(?:er|re|ral)|middle|quadrants?|thirds?|half|percent|mm2?|cm2?"
    r"|pixels?|above|below|largest|smallest|how many|number of|count|separate)\b|²",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Augmentation:
    """Random variants of a `medplib.processing.Sample`; the key (seed, epoch, index) alone decides which.

    No generator is shared or touched, so any number of workers, any order and any resume give the same
    samples. Each image of a sample moves for itself, with the prompts and masks that lie on it.

    - An image is mirrored or turned by quarters only where it has no sides by itself (histopathology and
      microscopy, see `augment.UNORIENTED`) and no question, answer or label says left or right. Words are
      never swapped: in a mirrored patient the heart would lie on the wrong side.
    - Texts that state a place, a size or a number (PLACED) leave the geometry alone; only intensity changes.
    - A draw is rejected when a point leaves the image, or when less than `keep` of a mask or box stays
      inside; an image at which nothing points keeps at least `keep_image` of itself. After `tries` rejected
      draws the geometry stays as it is. What stays is cut at the border. Empty masks stay empty.

    chance: share of the samples that are changed at all. Raises InputError for values out of range.
    """

    chance: float = 1.0
    keep: float = 0.5
    keep_image: float = 0.75
    tries: int = 20
    geometry: bool = True
    intensity: bool = True

    def __post_init__(self) -> None:
        for name in ("chance", "keep", "keep_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}.")
        if self.tries < 0:
            raise InputError(f"tries must be 0 or more, got {self.tries!r}.")

    def __call__(
        self,
        sample: Sample,
        *,
        seed: int,
        epoch: int,
        index: int,
        modality: str | None = None,
        labels: Sequence[str] = (),
    ) -> Sample:
        """The sample's variant: images uint8 (H, W, 3), masks bool (H, W), prompts inside their images.

        modality: one of MODALITIES; None is taken for an oriented image with black around it. labels: names
        of what is shown, where the texts do not say them. Raises InputError for an unknown modality, an image
        that cannot be read, or prompts and masks that do not fit theirs.
        """
        if modality is not None and modality not in MODALITIES:
            raise InputError(f"modality must be one of {', '.join(MODALITIES)} or None, got {modality!r}.")
        if keyed_rng("augment?", seed, epoch, index).random() >= self.chance:
            return sample
        texts = [text for turn in sample.turns for text in turn if text] + list(labels)
        moving = self.geometry and not any(PLACED.search(text) for text in texts)
        flips = may_flip(modality, texts)
        images, prompts, masks = list(sample.images), list(sample.prompts), list(sample.masks)
        on_prompt = [0] * len(prompts) if sample.prompt_images is None else sample.prompt_images
        on_mask = [len(images) - 1] * len(masks) if sample.seg_images is None else sample.seg_images
        for number, image in enumerate(images):
            key = ("augment", seed, epoch, index, number)
            here = [i for i, at in enumerate(on_prompt[: len(prompts)]) if at == number]
            drawn = [i for i, at in enumerate(on_mask[: len(masks)]) if at == number]
            pixels = load_image(image)
            targets = _Targets.read([prompts[i] for i in here], [masks[i] for i in drawn], pixels.shape[:2])
            if moving:
                pixels, targets = self._move(pixels, targets, key, modality, flips)
            if self.intensity:
                pixels = _recolour(pixels, keyed_rng(*key, "intensity"), modality)
            images[number] = pixels
            for i, prompt in zip(here, targets.prompts, strict=True):
                prompts[i] = prompt
            for i, mask in zip(drawn, targets.masks, strict=True):
                masks[i] = mask
        return replace(sample, images=images, prompts=prompts, masks=masks)

    def _move(
        self, image: np.ndarray, targets: _Targets, key: tuple, modality: str | None, flips: bool
    ) -> tuple[np.ndarray, _Targets]:
        """The first of `tries` drawn moves that loses nothing, applied; or all as it was."""
        size = image.shape[:2]
        for attempt in range(self.tries):
            move = draw_move(keyed_rng(*key, attempt), size, flips)
            x, y = source_positions(move, *size)
            if targets.stay(move, x, y, self.keep, self.keep_image):
                return targets.moved(image, move, x, y, OUTSIDE.get(modality or "", "black"))
        return image, targets


@dataclass(frozen=True)
class _Targets:
    """What lies on one image of size (H, W): prompts (each Mask a bool array), and masks bool (M, H, W)."""

    prompts: list[Point | Box | Mask]
    masks: np.ndarray

    @classmethod
    def read(cls, prompts: Sequence[Any], masks: Sequence[Any], size: tuple[int, int]) -> _Targets:
        for prompt in prompts:
            prompt.check(size)
        arrays = [np.asarray(mask) for mask in masks]
        for array in arrays:
            if array.shape != tuple(size):
                raise InputError(f"A mask has size {array.shape}, its image {tuple(size)}; make them equal.")
        stacked = np.stack([a != 0 for a in arrays]) if arrays else np.zeros((0, *size), bool)
        return cls([Mask(p.to_mask(size)) if isinstance(p, Mask) else p for p in prompts], stacked)

    def stay(self, move: Move, x: np.ndarray, y: np.ndarray, keep: float, keep_image: float) -> bool:
        """Whether points stay inside and enough of every mask and box does; x, y (H, W) as in `moved`."""
        height, width = x.shape
        inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
        scale = abs(float(np.linalg.det(move.matrix)))  # area in the source of one output pixel
        if not self.prompts and not self.masks.any():
            return inside.sum() * scale >= keep_image * inside.size
        columns = (x + 0.5).astype(np.int64).clip(0, width - 1)
        rows = (y + 0.5).astype(np.int64).clip(0, height - 1)

        def kept(area: float, visible: np.ndarray) -> bool:
            return bool(visible.any()) and visible.sum() * scale >= keep * area

        for prompt in self.prompts:
            if isinstance(prompt, Point):
                if _move_point(prompt, x, y) is None:
                    return False
            elif isinstance(prompt, Box):
                area = (prompt.x1 - prompt.x0) * (prompt.y1 - prompt.y0)
                if not kept(area, _in_box(prompt, x, y)):
                    return False
        regions = [*self.masks, *(p.mask for p in self.prompts if isinstance(p, Mask))]
        return all(kept(m.sum(), m[rows, columns] & inside) for m in regions if m.any())

    def moved(
        self, image: np.ndarray, move: Move, x: np.ndarray, y: np.ndarray, outside: str
    ) -> tuple[np.ndarray, _Targets]:
        """Image and targets after the move; x, y (H, W): where each output pixel comes from."""
        regions = [p.mask for p in self.prompts if isinstance(p, Mask)]
        stack = np.concatenate([self.masks, np.stack(regions)]) if regions else self.masks
        image, stack = resample(image, stack, move, outside)
        forms: Iterable[np.ndarray] = iter(stack[len(self.masks) :])
        prompts: list[Point | Box | Mask] = []
        for prompt in self.prompts:
            if isinstance(prompt, Point):
                prompts.append(_move_point(prompt, x, y) or prompt)  # `stay` has seen that it is inside
            elif isinstance(prompt, Box):
                prompts.append(_bounds(_in_box(prompt, x, y)))
            else:
                prompts.append(Mask(next(forms)))
        return image, _Targets(prompts, stack[: len(self.masks)])


def _move_point(point: Point, x: np.ndarray, y: np.ndarray) -> Point | None:
    """The centre of the output pixel that shows the point's pixel; None if the image no longer shows it."""
    distance = np.abs(x - np.floor(point.x)) + np.abs(y - np.floor(point.y))  # (H, W)
    row, column = np.unravel_index(int(distance.argmin()), distance.shape)
    if distance[row, column] > 1.5:  # a zoom out leaves up to 1.4 pixels between sources
        return None
    return Point(float(column) + 0.5, float(row) + 0.5, point.label)


def _in_box(box: Box, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """bool (H, W): output pixels whose source lies in the box; pixel i covers i to i + 1."""
    return (x + 0.5 >= box.x0) & (x + 0.5 < box.x1) & (y + 0.5 >= box.y0) & (y + 0.5 < box.y1)


def _bounds(region: np.ndarray) -> Box:
    ys, xs = np.nonzero(region)
    return Box(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))


def _recolour(image: np.ndarray, rng: np.random.Generator, modality: str | None) -> np.ndarray:
    grey = bool((image == image[..., :1]).all())
    colour = not grey and (modality is None or modality in COLOUR)
    changed = change_intensity(image[..., :1] if grey else image, rng, colour)
    return np.repeat(changed, 3, axis=2) if grey else changed
