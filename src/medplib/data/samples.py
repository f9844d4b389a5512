"""ImageSample: one labelled image of any source: modality, tier, named masks, loaded when asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medplib.errors import InputError, UnknownNameError
from medplib.io.images import load_image
from medplib.io.masks import foreground

MODALITIES = (
    "CT",
    "MR",
    "PET",
    "X-ray",
    "ultrasound",
    "endoscopy",
    "dermoscopy",
    "fundus",
    "histopathology",
    "microscopy",
)
TIERS = ("real", "simulated", "synthetic")


@dataclass(frozen=True, eq=False)
class Structure:
    """A named mask. `mask` is bool (H, W), the path of an image whose pixels >= 1 are foreground, or anything
    whose `load()` gives the array.

    `provenance` says who drew it: expert, atlas, derived, manual, or exact (known from making the image).
    """

    name: str
    mask: np.ndarray | Path | Any
    provenance: str


@dataclass(frozen=True, eq=False)
class ImageSample:
    """One image with what is known about it. `image` is uint8 (H, W, 3), the path of an image file, or
    anything whose `load()` gives the array.

    tier       "real", "simulated" (computed from a real image) or "synthetic" (drawn); never pooled in a mean
    count      how many objects of the counted kind the image shows, None where nobody counted
    laterality "left" or "right" where the whole image shows one side of the patient (an eye), else None
    """

    image: np.ndarray | Path | Any
    modality: str
    dataset: str
    case: str
    split: str
    tier: str
    structures: tuple[Structure, ...] = ()
    count: int | None = None
    laterality: str | None = None

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise InputError(f"modality must be one of {', '.join(MODALITIES)}, got {self.modality!r}.")
        if self.tier not in TIERS:
            raise InputError(f"tier must be one of {', '.join(TIERS)}, got {self.tier!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The structures' names, in order."""
        return tuple(structure.name for structure in self.structures)

    def load_image(self) -> np.ndarray:
        """uint8 (H, W, 3), a file as `medplib.io.load_image` reads it; grey images come back with three equal
        channels. Raises InputError."""
        if isinstance(self.image, Path):
            return load_image(self.image)
        return self.image if isinstance(self.image, np.ndarray) else self.image.load()

    def load_mask(self, which: int | str) -> np.ndarray:
        """bool (H, W) of a structure, by its number or its name.

        Raises UnknownNameError for a structure that the image does not have.
        """
        mask = self._structure(which).mask
        if isinstance(mask, Path):
            return _read_mask(mask)
        return mask if isinstance(mask, np.ndarray) else mask.load()

    def load_masks(self) -> np.ndarray:
        """bool (M, H, W) of all structures, in order; (0, H, W) without structures.

        Raises InputError when a mask has not the image's size.
        """
        height, width = self.load_image().shape[:2]
        masks = np.zeros((len(self.structures), height, width), bool)
        for i, structure in enumerate(self.structures):
            mask = self.load_mask(i)
            if mask.shape != (height, width):
                raise InputError(
                    f"The mask of '{structure.name}' is {mask.shape[0]} x {mask.shape[1]} pixels, its image "
                    f"{height} x {width} ({self.dataset}, {self.case}); masks must have their image's size."
                )
            masks[i] = mask
        return masks

    def _structure(self, which: int | str) -> Structure:
        if isinstance(which, str):
            if which not in self.names:
                raise UnknownNameError.among(f"No structure named {which!r} here.", which, self.names)
            return self.structures[self.names.index(which)]
        if not -len(self.structures) <= which < len(self.structures):
            raise UnknownNameError(f"No structure number {which}: this image has {len(self.structures)}.")
        return self.structures[which]


def keyed_rng(*keys: int | str) -> np.random.Generator:
    """A random generator that depends on nothing but the keys, such as ("train", seed, epoch, index).

    The same keys give the same numbers in every process, whatever was drawn before.
    """
    digest = hashlib.sha256("\0".join(f"{type(key).__name__}:{key}" for key in keys).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _read_mask(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"There is no image file {path}.")
    with Image.open(path) as image:
        return foreground(image)
