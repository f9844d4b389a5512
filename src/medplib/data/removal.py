"""Images with a structure taken out, so that a model meets the same kind of picture without it.

Letters: H height, W width, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

LUNGS = ("left lung", "right lung")


def take_out(
    image: np.ndarray, masks: np.ndarray, names: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """image uint8 (H, W, 3), masks bool (M, H, W), names (M) -> the same without one or two structures.

    A lung of a CT is filled with the body's own soft tissue, sometimes with a bubble of gas left in it, as in
    a slice through the abdomen. Any other structure that covers less than a quarter of the image is cropped
    away. What cannot be taken out leaves everything as it was.
    """
    lungs = [n for n in LUNGS if n in names]
    if lungs and "body" in names:
        gone = lungs if rng.random() < 0.3 else [lungs[rng.integers(len(lungs))]]
        return fill_lungs(image, masks, names, gone, rng)
    small = [i for i in range(len(names)) if 0 < masks[i].mean() < 0.25]
    if not small:
        return image, masks, list(names)
    out, cut = crop_away(image, masks, small[rng.integers(len(small))], rng)
    return out, cut, list(names)


def fill_lungs(
    image: np.ndarray, masks: np.ndarray, names: Sequence[str], gone: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Replace these lungs of a CT by soft tissue; a tumour in them goes too."""
    of = dict(zip(names, masks, strict=True))
    hole = np.any([of[n] for n in gone], axis=0)
    wide = np.asarray(Image.fromarray(hole).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    other = np.any([of[n] for n in (*LUNGS, "bone") if n in of], axis=0)
    tissue = image[of["body"] & ~other & ~wide]
    level = float(np.median(tissue)) if len(tissue) else 160.0
    texture = rng.normal(0, 1, (hole.shape[0] // 16 + 1, hole.shape[1] // 16 + 1)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(texture).resize(hole.shape[::-1], Image.Resampling.BICUBIC))
    fill = level + 5 * smooth + rng.normal(0, 3, hole.shape)
    if rng.random() < 0.5:
        fill = np.where(_bubble(hole, rng), image[..., 0], fill)
    wide &= ~other | hole
    out = np.where(wide[..., None], fill[..., None], image).clip(0, 255).astype(np.uint8)
    keep = [
        i for i, n in enumerate(names)
        if n not in gone and not (n == "lung tumor" and (masks[i] & wide).any())
    ]  # fmt: skip
    return out, masks[keep], [names[i] for i in keep]


def _bubble(hole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ellipse inside the hole (H, W), where the dark picture stays: gas in the stomach or bowel."""
    inside = np.asarray(Image.fromarray(hole).convert("L").filter(ImageFilter.MinFilter(13))) > 0
    if not inside.any():
        return np.zeros_like(hole)
    ys, xs = np.nonzero(inside)
    at = rng.integers(len(ys))
    rows, columns = np.mgrid[: hole.shape[0], : hole.shape[1]]
    ry, rx = rng.uniform(4, 22, 2) * hole.shape[0] / 256
    return inside & (((rows - ys[at]) / ry) ** 2 + ((columns - xs[at]) / rx) ** 2 < 1)


def crop_away(
    image: np.ndarray, masks: np.ndarray, index: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random window without structure `index`, at the image's own size; unchanged where none is found."""
    height, width = image.shape[:2]
    for _ in range(20):
        share = rng.uniform(0.45, 0.8)
        h, w = int(height * share), int(width * share)
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        if masks[index, top : top + h, left : left + w].any():
            continue
        box = (left, top, left + w, top + h)
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
        cut = [
            np.asarray(
                Image.fromarray(m).convert("L").resize((width, height), Image.Resampling.NEAREST, box=box)
            )
            for m in masks
        ]
        return np.asarray(picture), np.stack(cut) > 0
    return image, masks
