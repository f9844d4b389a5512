"""Augmentation: a training sample moved as a whole (image, masks, boxes, points), decided by a key.

Where pixels go is drawn by `augment.py`'s Move, the same that trained the tiny model, which knows the border
of each modality, or by any transform of torchvision.transforms.v2 (`tv_transforms.py`). Either says of each
output pixel where it came from, and prompts and masks follow that. The tests hold both against v2's own
boxes, points and masks. Letters: H height, W width of one image; h, w of what a transform made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medplib.data.augment import (
    COLOUR,
    OUTSIDE,
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
    from medplib.sample import Sample

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

    chance: share of the samples that are changed at all. geometry, intensity: False switches off what moves
    pixels, or what changes them. transform: of torchvision.transforms.v2, in place of our own moves and
    intensities; it gets a tv_tensors.Image and draws from PyTorch's CPU generator, which is put back. A draw
    that mirrors, or turns by more than 45 degrees, is rejected where an image has sides, one that moves
    anything where the geometry must stay.

        Augmentation(transform=v2.Compose([v2.RandomRotation(10), v2.ColorJitter(0.2, 0.2)]))

    Raises InputError for values out of range.
    """

    _: KW_ONLY
    chance: float = 1.0
    keep: float = 0.5
    keep_image: float = 0.75
    tries: int = 20
    geometry: bool = True
    intensity: bool = True
    transform: Callable | None = None

    def __post_init__(self) -> None:
        for name in ("chance", "keep", "keep_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}.")
        if self.tries < 0:
            raise InputError(f"tries must be 0 or more, got {self.tries!r}.")
        if self.transform is not None and not self.intensity:
            raise InputError(
                "intensity=False says nothing about a transform; leave out what changes colours."
            )

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
            if self.transform is not None:
                pixels, targets = self._transform(pixels, targets, key, moving, flips)
            elif moving:
                pixels, targets = self._move(pixels, targets, key, modality, flips)
            if self.intensity and self.transform is None:
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
            if targets.stay(move.matrix, x, y, self.keep, self.keep_image):
                regions = targets.regions()
                image, regions = resample(image, regions, move, OUTSIDE.get(modality or "", "black"))
                return image, targets.moved(regions, x, y)
        return image, targets

    def _transform(
        self, image: np.ndarray, targets: _Targets, key: tuple, moving: bool, flips: bool
    ) -> tuple[np.ndarray, _Targets]:
        """The same of what `transform` makes."""
        from medplib.data.tv_transforms import draw

        for attempt in range(self.tries):
            drawn = draw(self.transform, image, keyed_rng(*key, attempt))
            if drawn.moves(image.shape[:2]) and not (moving and (flips or drawn.upright())):
                continue
            if targets.stay(drawn.matrix, drawn.x, drawn.y, self.keep, self.keep_image):
                regions = drawn.take(targets.regions())
                return drawn.image, targets.moved(regions, drawn.x, drawn.y)
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

    def regions(self) -> np.ndarray:
        """bool (masks + mask prompts, H, W): what moves as a mask does."""
        forms = [p.mask for p in self.prompts if isinstance(p, Mask)]
        return np.concatenate([self.masks, np.stack(forms)]) if forms else self.masks

    def stay(self, matrix: np.ndarray, x: np.ndarray, y: np.ndarray, keep: float, keep_image: float) -> bool:
        """Whether points stay inside and enough of every mask and box does.

        x, y (h, w): where each output pixel comes from. matrix (2, 2): how that changes from pixel to pixel.
        """
        height, width = self.masks.shape[1:]
        inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
        scale = abs(float(np.linalg.det(matrix)))  # area in the source of one output pixel
        if not self.prompts and not self.masks.any():
            return inside.sum() * scale >= keep_image * height * width
        columns = (x + 0.5).astype(np.int64).clip(0, width - 1)
        rows = (y + 0.5).astype(np.int64).clip(0, height - 1)

        spacing = float(np.abs(matrix).sum()) / 2  # no place in sight is further than this from a source

        def kept(area: float, visible: np.ndarray) -> bool:
            return bool(visible.any()) and visible.sum() * scale >= keep * area

        for prompt in self.prompts:
            if isinstance(prompt, Point):
                if not _shows(prompt, x, y, spacing):
                    return False
            elif isinstance(prompt, Box):
                area = (prompt.x1 - prompt.x0) * (prompt.y1 - prompt.y0)
                if not kept(area, _in_box(prompt, x, y)):
                    return False
        return all(kept(m.sum(), m[rows, columns] & inside) for m in self.regions() if m.any())

    def moved(self, regions: np.ndarray, x: np.ndarray, y: np.ndarray) -> _Targets:
        """After a move that made `regions` of regions(); x, y (h, w): where each output pixel comes from."""
        forms: Iterable[np.ndarray] = iter(regions[len(self.masks) :])
        prompts: list[Point | Box | Mask] = []
        for prompt in self.prompts:
            if isinstance(prompt, Point):
                prompts.append(_move_point(prompt, x, y))
            elif isinstance(prompt, Box):
                prompts.append(Box.around(_in_box(prompt, x, y)))
            else:
                prompts.append(Mask(next(forms)))
        return _Targets(prompts, regions[: len(self.masks)])


def _distance(point: Point, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(h, w): how far the source of each output pixel is from the point's pixel, along the axes."""
    return np.abs(x - np.floor(point.x)) + np.abs(y - np.floor(point.y))


def _shows(point: Point, x: np.ndarray, y: np.ndarray, spacing: float) -> bool:
    """Whether the point is still to be seen, with sources `spacing` apart."""
    return bool(_distance(point, x, y).min() <= max(1.5, spacing + 0.5))


def _move_point(point: Point, x: np.ndarray, y: np.ndarray) -> Point:
    """The centre of the output pixels that show the point's pixel best."""
    distance = _distance(point, x, y)
    rows, columns = np.nonzero(distance == distance.min())
    return Point(float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, point.label)


def _in_box(box: Box, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """bool (H, W): output pixels whose source lies in the box; pixel i covers i to i + 1."""
    return (x + 0.5 >= box.x0) & (x + 0.5 < box.x1) & (y + 0.5 >= box.y0) & (y + 0.5 < box.y1)


def _recolour(image: np.ndarray, rng: np.random.Generator, modality: str | None) -> np.ndarray:
    grey = bool((image == image[..., :1]).all())
    colour = not grey and (modality is None or modality in COLOUR)
    changed = change_intensity(image[..., :1] if grey else image, rng, colour)
    return np.repeat(changed, 3, axis=2) if grey else changed
