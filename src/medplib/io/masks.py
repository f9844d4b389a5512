"""foreground: a mask in an image, read by what is seen. Needs no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image


def foreground(image: Image.Image) -> np.ndarray:
    """bool (H, W): pixels of value 1 or more; of 128 or more in a JPEG or lossy WebP file that has such
    pixels, as their compression leaves small values around what is white. There the largest of red, green and
    blue counts.

    A palette counts by its colours, in which anything but black is foreground, never by its numbers; what is
    fully transparent is background.
    """
    lossy = _is_lossy(image)
    if image.mode.startswith(("I", "F")):
        return np.array(image) >= 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        pixels = np.array(image.convert("RGBA"))
        values = pixels[..., :3].max(axis=2) * (pixels[..., 3] > 0)
    elif image.mode == "P" or lossy:
        values = np.array(image.convert("RGB")).max(axis=2)
    else:
        values = np.array(image.convert("L"))
    return values >= (128 if lossy and values.max(initial=0) >= 128 else 1)


def _is_lossy(image: Image.Image) -> bool:
    """Whether its file's compression changes values. A WebP file is asked before its pixels are decoded."""
    if image.format == "WEBP" and image.fp is not None:
        image.fp.seek(0)
        return b"VP8L" not in image.fp.read(4096)  # the lossless kind of WebP
    return image.format in ("JPEG", "MPO")
