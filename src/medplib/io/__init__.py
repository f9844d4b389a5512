"""Pictures in, masks out: `load_image` reads any picture, `rle` writes masks as text. Needs no torch."""

from medplib.io.dicom import read_dicom
from medplib.io.images import load_image
from medplib.io.volume import load_volume

__all__ = ["load_image", "load_volume", "read_dicom"]
