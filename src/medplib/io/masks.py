"""foreground: a mask in an image, read by what is seen. Needs no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image


def foreground(image: Image.Image) -> np.ndarray:
    """bool (H, W): pixels of value 1 or more; of 128 or more in a JPEG or WebP file that has such pixels, as
    their compression leaves small values around what is white.

    A palette counts by its colours, in which anything but black is foreground, never by its numbers; what is
    fully transparent is background.
    """
    if image.mode.startswith(("I", "F")):
        return np.array(image) >= 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        pixels = np.array(image.convert("RGBA"))
        return pixels[..., :3].any(axis=2) & (pixels[..., 3] > 0)
    if image.mode == "P":
        return np.array(image.convert("RGB")).any(axis=2)
    values = np.array(image.convert("L"))
    lossy = image.format in ("JPEG", "MPO", "WEBP") and values.max(initial=0) >= 128
    return values >= (128 if lossy else 1)
