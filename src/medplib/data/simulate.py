"""PET simulated from a real, labelled CT slice: tier "simulated", with the masks of the CT."""

from __future__ import annotations

import numpy as np

from medplib.data.samples import ImageSample, Structure
from medplib.data.textures import blur, noise, to_bytes
from medplib.errors import InputError


def simulate_pet(ct_sample: ImageSample, rng: np.random.Generator) -> ImageSample:
    """A PET slice from a labelled chest CT slice: uptake by tissue, blurred, then counted (Poisson).

    Structures: the CT's "body", and its "lung tumor" where there is one (which is hot). The masks keep their
    provenance. Other organs are in the picture without a mask.

    Raises InputError when the sample is no CT slice with a body mask.
    """
    if ct_sample.modality != "CT" or "body" not in ct_sample.names:
        raise InputError(
            f"PET is simulated from a CT sample with a 'body' mask, got {ct_sample.modality} with "
            f"{', '.join(ct_sample.names) or 'no masks'}."
        )
    body = ct_sample.load_mask("body")
    grey = ct_sample.load_image()[..., 0].astype(np.float32) / 255
    height, width = body.shape
    unevenness = 1 + 0.18 * noise(rng, body.shape, 5) + 0.1 * noise(rng, body.shape, 12)
    uptake = (
        (0.25 + 1.1 * grey) * unevenness.clip(0.3) * rng.uniform(0.7, 1.3) * body
    )  # air, lung, fat, muscle
    levels = {"bone": 0.9, "right lung": 0.35, "left lung": 0.35, "lung tumor": 5.0}
    for name, level in levels.items():
        if name in ct_sample.names:
            mask = ct_sample.load_mask(name)
            uptake = np.where(mask, level * rng.uniform(0.8, 1.3) * unevenness.clip(0.3), uptake)
    sigma = rng.uniform(2.5, 5) * max(height, width) / 256
    counts = rng.uniform(15, 60)  # per pixel of soft tissue: fewer, more noise
    measured = rng.poisson(blur(uptake, sigma).clip(0) * counts).astype(np.float32) / counts
    measured = blur(measured, rng.uniform(0.8, 1.6))
    shown = (measured / (rng.uniform(1.3, 2.6) * np.quantile(measured[body], 0.9))).clip(0, 1) * 255
    if rng.random() < 0.15:  # many stations show uptake as black on white
        shown = 255 - shown
    keep = [s for s in ct_sample.structures if s.name in ("body", "lung tumor")]
    keep.sort(key=lambda structure: structure.name)
    return ImageSample(
        image=to_bytes(shown),
        modality="PET",
        dataset="SimulatedPET",
        case=ct_sample.case,
        split=ct_sample.split,
        tier="simulated",
        structures=tuple(Structure(s.name, ct_sample.load_mask(s.name), s.provenance) for s in keep),
    )
