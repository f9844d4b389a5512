"""Where pixels are, without reading them: a file in a folder or inside a zip archive, as image or as mask.

H, W height and width of the original image. Anything with `load()` can stand in for these two.
"""

from __future__ import annotations

import os
import threading
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from medplib.errors import InputError
from medplib.io.images import load_image


@dataclass(frozen=True, slots=True)
class File:
    """A file, or with `member` a file inside the zip archive `path`: two strings, nothing open."""

    path: str
    member: str | None = None

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}!{self.member}"

    @property
    def name(self) -> str:
        """The last part of the path, or of the member's."""
        return Path(self.member or self.path).name

    def exists(self) -> bool:
        """Whether the file, or the archive and its member, are there."""
        if self.member is None:
            return os.path.isfile(self.path)
        return os.path.isfile(self.path) and self.member in _archive(self.path, os.getpid()).NameToInfo

    def read(self) -> bytes:
        """All of its bytes. Raises InputError, naming it, when it cannot be read."""
        try:
            if self.member is None:
                return Path(self.path).read_bytes()
            with _lock:  # an archive has one position for all its readers
                return _archive(self.path, os.getpid()).read(self.member)
        except (OSError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{str(self)!r} cannot be read: {error}. Check that it is there.") from error


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture in a file."""

    file: File

    def __str__(self) -> str:
        return str(self.file)

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3), as `load_image` reads it. Raises InputError, naming the file."""
        try:
            return load_image(self.file.read())
        except InputError as error:
            raise InputError(f"The image {str(self.file)!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A mask in an image file: pixels >= 1 are foreground, or those equal to `value` of a label map."""

    file: File
    value: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.value is None else f"{self.file} (value {self.value})"

    def load(self) -> np.ndarray:
        """bool (H, W). Raises InputError, naming the file."""
        import io

        data = self.file.read()
        try:
            with Image.open(io.BytesIO(data)) as image:
                mode = "L" if image.mode in ("1", "L", "P") else "I"
                pixels = np.array(image if image.mode in ("P", mode) else image.convert(mode))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"The mask {str(self.file)!r} cannot be read as an image: {error}.") from error
        return pixels >= 1 if self.value is None else pixels == self.value


_lock = threading.RLock()


@lru_cache(maxsize=16)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """An open archive of this process (a forked worker opens its own)."""
    del process
    return zipfile.ZipFile(path)
