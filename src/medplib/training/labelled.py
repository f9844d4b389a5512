"""Labelled images for training: drawn by weight, augmented and asked about, keyed by (seed, step, slot).

The draw of every slot depends on nothing but its key, so any number of workers and any resume sees the same
images and questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from medplib.data.augment import augment
from medplib.data.phantoms import PHANTOMS, make_phantom
from medplib.data.questions import MIN_PIXELS
from medplib.data.removal import take_out
from medplib.data.samples import ImageSample
from medplib.data.simulate import simulate_pet
from medplib.errors import InputError

SIMULATED = ("phantoms", "pet")
SHARES = {
    "ChestCT": 0.30, "MNI152": 0.20, "BrainT1c": 0.12, "FluoNuclei": 0.12, "ColonIHC": 0.06, "HistoHE": 0.07,
    "RetinaCC0": 0.06, "phantoms": 0.06, "pet": 0.02,
}  # fmt: skip
"""The share of each data set in what medplib-tiny is trained on."""


def vocabulary_of(samples: Sequence[ImageSample]) -> dict[str, set[str]]:
    """{structure: the data sets that show it} of these images and of all phantoms."""
    phantoms = [make_phantom(kind, seed) for kind in sorted(PHANTOMS) for seed in range(16)]
    found: dict[str, set[str]] = {}
    for s in [*samples, *phantoms]:
        for name in s.names:
            found.setdefault(name, set()).add(s.dataset)
    return found


@dataclass(frozen=True)
class Labelled:
    """One augmented image (H, W, 3) uint8, masks (M, H, W) bool and names, each large enough to ask about."""

    image: np.ndarray
    masks: np.ndarray
    names: tuple[str, ...]
    modality: str
    dataset: str
    tier: str


class LabelledImages(Dataset):
    """A map from step to a list of `batch_size` Labelled images (through `make`, to what the trainer takes).

    weights: {data set: share}; "phantoms" is the share of procedural images, "pet" that of PET simulated from
    the chest CT images. table, removal, unchanged: chances of `augment`'s patient table, of `take_out`, and
    of an image that is not augmented.
    Raises InputError for a data set without images.
    """

    def __init__(
        self,
        samples: Sequence[ImageSample],
        weights: dict[str, float],
        *,
        steps: int,
        batch_size: int,
        seed: int,
        make: Callable[[list[Labelled], np.random.Generator], object] | None = None,
        table: float = 0.0,
        removal: float = 0.0,
        unchanged: float = 0.0,
    ) -> None:
        self.by_dataset: dict[str, list[tuple]] = {}
        for s in samples:
            masks = [s.load_mask(i) for i in range(len(s.structures))]
            names = tuple(x.name for x in s.structures)
            self.by_dataset.setdefault(s.dataset, []).append((s, s.load_image(), masks, names))
        unknown = sorted(set(weights) - set(self.by_dataset) - set(SIMULATED))
        if unknown:
            raise InputError(
                f"No images of {', '.join(unknown)}. Known: {', '.join(sorted(self.by_dataset))}."
            )
        self.names, shares = list(weights), np.array(list(weights.values()), dtype=float)
        self.shares = shares / shares.sum()
        self.steps, self.batch_size, self.seed, self.make = steps, batch_size, seed, make
        self.table, self.removal, self.unchanged = table, removal, unchanged

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        rng = np.random.default_rng((self.seed, step))
        drawn = [self.draw(np.random.default_rng((self.seed, step, slot))) for slot in range(self.batch_size)]
        return self.make(drawn, rng) if self.make else drawn

    def draw(self, rng: np.random.Generator) -> Labelled:
        """One augmented image. Images with rare structures are drawn more often within their data set."""
        dataset = self.names[rng.choice(len(self.names), p=self.shares)]
        if dataset in SIMULATED:
            if dataset == "phantoms":
                s = make_phantom(sorted(PHANTOMS)[rng.integers(len(PHANTOMS))], int(rng.integers(1 << 31)))
            else:
                rows = self.by_dataset["ChestCT"]
                s = simulate_pet(rows[rng.integers(len(rows))][0], rng)
            image, masks = s.load_image(), [s.load_mask(i) for i in range(len(s.structures))]
            names = tuple(x.name for x in s.structures)
        else:
            rows = self.by_dataset[dataset]
            s, image, masks, names = rows[rng.choice(len(rows), p=self._row_shares(dataset))]
        stack = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
        if rng.random() < self.removal:
            image, stack, names = take_out(image, stack, names, rng)
        if not self.unchanged or rng.random() >= self.unchanged:
            image, stack = augment(image, stack, rng, modality=s.modality, names=names, table=self.table)
        keep = [i for i in range(len(names)) if stack[i].sum() >= MIN_PIXELS]
        return Labelled(image, stack[keep], tuple(names[i] for i in keep), s.modality, s.dataset, s.tier)

    def _row_shares(self, dataset: str) -> np.ndarray:
        cache = self.__dict__.setdefault("_shares", {})
        if dataset not in cache:
            rows = self.by_dataset[dataset]
            count = {n: sum(n in r[3] for r in rows) for r in rows for n in r[3]}
            weight = np.array([max([len(rows) / count[n] for n in r[3]], default=1.0) for r in rows])
            weight = np.minimum(weight, 4.0)
            cache[dataset] = weight / weight.sum()
        return cache[dataset]
