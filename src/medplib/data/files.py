"""Where pixels are, without reading them: a file in a folder or inside a zip archive, as image or as mask.

H, W height and width of the original image. Anything with `load()` can stand in for these.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medplib.data.archive import archive_at
from medplib.errors import InputError
from medplib.io.images import load_image
from medplib.io.masks import foreground


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
        return os.path.isfile(self.path) and self.member in archive_at(self.path)

    def read(self) -> bytes:
        """All of its bytes. Raises InputError, naming it, when it cannot be read."""
        try:
            if self.member is None:
                return Path(self.path).read_bytes()
            return archive_at(self.path).read(self.member)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise InputError(f"{str(self)!r} cannot be read: {reason}. Check that it is there.") from error


@dataclass(frozen=True, slots=True)
class Bytes:
    """The content of a file that a table holds itself; `name` is for messages."""

    data: bytes
    name: str = "bytes"

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Whether there are any."""
        return bool(self.data)

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture in a file."""

    file: File | Bytes

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
    """A mask in an image file: its foreground, or the pixels equal to `value` of a label map.

    Foreground is what is seen, as `medplib.io.masks` says; a label map in a palette holds numbers.
    """

    file: File | Bytes
    value: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.value is None else f"{self.file} (value {self.value})"

    def load(self) -> np.ndarray:
        """bool (H, W). Raises InputError, naming the file."""
        return _read(self.file, foreground) if self.value is None else read_labels(self.file) == self.value


@dataclass(frozen=True, slots=True)
class UnionMask:
    """Several masks as one: the instances of one class."""

    masks: tuple[MaskFile, ...]

    def __str__(self) -> str:
        return " + ".join(str(mask) for mask in self.masks)

    def load(self) -> np.ndarray:
        """bool (H, W). Raises InputError, naming the file, if one cannot be read or the sizes differ."""
        whole = self.masks[0].load().copy()
        for mask in self.masks[1:]:
            part = mask.load()
            if part.shape != whole.shape:
                raise InputError(f"The masks {self} have sizes {whole.shape} and {part.shape}.")
            whole |= part
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Pixels in memory: an image uint8 (H, W, 3) or a mask bool (H, W), wherever a file could stand."""

    array: np.ndarray

    def load(self) -> np.ndarray:
        """The array itself."""
        return self.array


def read_labels(file: File | Bytes) -> np.ndarray:
    """The numbers stored in an image of one channel, (H, W). Raises InputError, naming the file."""
    return _read(file, _numbers)


def _numbers(image: Image.Image) -> np.ndarray:
    mode = "I" if image.mode.startswith(("I", "F")) else "L"
    return np.array(image if image.mode in ("P", mode) else image.convert(mode))


def _read(file: File | Bytes, look: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    data = file.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return look(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"The mask {str(file)!r} cannot be read as an image: {error}.") from error


def identity(pixels: object) -> int:
    """64 bits that tell pictures and masks apart: of their place, or of the bytes they hold."""
    if isinstance(pixels, Held):  # a repr shows the edges of an array only
        return digest64(f"{pixels.array.dtype} {pixels.array.shape}".encode() + pixels.array.tobytes())
    parts = getattr(pixels, "masks", (pixels,))
    held = b"".join(getattr(getattr(part, "file", None), "data", b"") for part in parts)
    return digest64(held + str(getattr(pixels, "value", "")).encode() if held else repr(pixels).encode())


def digest64(data: bytes) -> int:
    """64 bits of a hash of some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
