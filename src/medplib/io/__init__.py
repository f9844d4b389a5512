"""Pictures in, masks out: `load_image` reads any picture, `rle` writes masks as text. Needs no torch."""

from medplib.io.images import load_image

__all__ = ["load_image"]
