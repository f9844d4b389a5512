"""Reading a picture from a file, bytes, Pillow, numpy or torch into one form: uint8 RGB (H, W, 3).

Letters: H, W = height and width of the original image. More than 8 bits per sample, and floating-point
values, are windowed (stretched between two percentiles), never cut off at 255 as `convert("RGB")` would do.
DICOM goes to `dicom.py`.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from medplib.errors import InputError

MIN_SIDE = 8
MAX_ASPECT = 50
MAX_PIXELS = 64_000_000
WINDOW = (0.5, 99.5)  # percentiles shown as black and white

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # few decoders, for safety
_READABLE = "PNG, JPEG, TIFF, BMP, GIF, WebP, PNM and DICOM"
_DICOM = (".dcm", ".dicom", ".ima")  # read as DICOM even without its preamble
_VOLUMES = {
    "NIfTI": (".nii", ".nii.gz", ".hdr"),
    "MetaImage": (".mha", ".mhd"),
    "NRRD": (".nrrd", ".nhdr"),
}
_ORIENTATION = 0x0112  # EXIF tag
BAND = 1 << 20  # values stretched at a time, to keep the memory of large images small
_SAMPLE = 1 << 22  # values that percentiles are taken from


def load_image(source: Any) -> np.ndarray:
    """Any picture -> uint8 (H, W, 3), a new array.

    `source` is a path; the bytes of an image file; a Pillow image; an array (H, W) or (H, W, 1 | 3 | 4) of
    bool, integers or floats; or a tensor (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W).

    - uint8 is kept; bool becomes 0 and 255. Wider integers are stretched so that the 0.5 and 99.5 percentiles
      become 0 and 255, one window for all colours. 16-bit colour files are stretched from their upper 8 bits.
    - Floats within [0, 1] are multiplied by 255; other floats are stretched like wide integers.
    - Transparent pixels are laid on black, palettes resolved, the EXIF orientation applied.
    - A DICOM file is read as `medplib.io.read_dicom` says; that function also chooses frame and window.

    Raises InputError for anything that cannot be read as a picture of at least 8 x 8 pixels.
    """
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        return from_file(source, _from_stream)
    if isinstance(source, Image.Image):
        return _from_pillow(source, f"The Pillow image ({source.mode}, {source.width} x {source.height})")
    if isinstance(source, np.ndarray):
        return _from_array(source, f"The array {source.dtype} {source.shape}")
    if _is_tensor(source):
        return _from_tensor(source)
    raise InputError(
        f"An image must be a path, bytes, a Pillow image, a numpy array or a torch tensor, "
        f"got {type(source).__name__}."
    )


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether the file at this path is DICOM by its content, or by its name."""
    try:
        with open(path, "rb") as file:
            return _says_dicom(file)
    except OSError:
        return False


def _says_dicom(file: BinaryIO) -> bool:
    return file.read(132)[128:] == b"DICM" or str(getattr(file, "name", "")).lower().endswith(_DICOM)


def check_size(height: int, width: int, name: str) -> None:
    """Raise InputError unless an image of this size can be used."""
    size = f"{name} is {width} x {height} pixels (width x height)"
    if min(height, width) < MIN_SIDE:
        raise InputError(f"{size}; both sides must have at least {MIN_SIDE}.")
    if height * width > MAX_PIXELS:
        raise InputError(f"{size}; at most {MAX_PIXELS // 10**6} million are read. Make it smaller.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"{size}; one side may be at most {MAX_ASPECT} times the other. Cut out a part.")


# ------------------------------------------------------------------------------------------ files


def from_file(source: Any, read: Callable[[BinaryIO, str], Any]) -> Any:
    """What `read(file, name)` gives of the file at a path, or of bytes; `name` stands for it in messages.

    Raises InputError for a path or bytes that cannot be read, whatever is in them.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"The image of {len(source)} bytes"
        if not len(source):
            raise InputError(f"{name} is empty. Give the whole content of an image file.")
        return read(io.BytesIO(source), name)
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    name = f"The image file {text!r}"
    if text.startswith(("http://", "https://", "ftp://", "file://", "data:")):
        raise InputError(f"{name} is an address; nothing is fetched. Save the picture and give its path.")
    try:
        path = Path(text).expanduser()
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{name} does not exist. Check the path.") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be opened ({_reason(error)}). Check its rights.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(
            f"{name} is a folder. Give the path of one picture; of a folder with a DICOM series give what "
            "medplib.io.load_volume(path).picture('axial', 40) returns, or the folder to segment_volume."
        )
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not a file. Give the path of one picture.")
    for kind, suffixes in _VOLUMES.items():
        if path.name.lower().endswith(suffixes):
            raise _unreadable_kind(name, kind)
    if status.st_size == 0:
        raise InputError(f"{name} is empty (0 bytes). Save or copy it again.")
    try:
        with path.open("rb") as file:
            return read(file, name)
    except OSError as error:
        raise InputError(f"{name} cannot be opened ({_reason(error)}). Check its rights.") from error


def _from_stream(file: BinaryIO, name: str) -> np.ndarray:
    if _says_dicom(file):
        from medplib.io.dicom import decode

        return decode(file, name)
    file.seek(0)
    with _open(file, name) as image:
        check_size(image.height, image.width, name)  # before any pixel is decoded
        if image.format in ("TIFF", "GIF", "WEBP"):
            _warn_of_pages(image, name)
        return _from_pillow(image, name)


def _open(file: Any, name: str) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)  # reads the header only
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} has too many pixels; at most {MAX_PIXELS // 10**6} million are read. Make it smaller."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable picture. Readable: {_READABLE}.") from error
    except Exception as error:  # decoders answer damaged files with errors of many types
        raise _damaged(name, error) from error


def _unreadable_kind(name: str, kind: str) -> InputError:
    return InputError(
        f"{name} is a {kind} file, which is not read. Readable: {_READABLE}. "
        + (
            "Give what medplib.io.load_volume(path).picture('axial', 40) returns, or the file to "
            "segment_volume, which draws in every slice."
            if kind == "NIfTI"
            else "Save it as NIfTI (.nii.gz), or a slice of it as a 16-bit PNG."
        )
    )


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name} is damaged or cut short ({_reason(error)}). Save or copy it again.")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


# ------------------------------------------------------------------------------------------ Pillow


def _from_pillow(image: Image.Image, name: str) -> np.ndarray:
    check_size(image.height, image.width, name)  # before any pixel is decoded
    try:
        deep_colour = image.mode in ("RGB", "RGBA", "LA") and _file_bits(image) == 16
        inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0  # 0 is white
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        array, alpha = _samples(image)
    except Exception as error:  # decoders answer damaged files with errors of many types
        raise _damaged(name, error) from error
    if array.dtype != np.uint8 or deep_colour:
        check_finite(array, name)
        array = stretch(array)
    if inverted:
        array = 255 - array
    return to_rgb(array, alpha)


def _samples(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """The values (H, W) or (H, W, 3) as stored, and the opacity (H, W) if there is one; new arrays."""
    if image.mode.startswith(("I", "F")):
        return np.array(image), None
    size = (image.height, image.width)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        array, alpha = np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)
        for rows, part in _bands(image, "RGBA"):
            array[rows], alpha[rows] = part[..., :3], part[..., 3]
        return array, alpha
    mode = "L" if image.mode in ("1", "L") else "RGB"
    array = np.empty(size if mode == "L" else (*size, 3), np.uint8)
    for rows, part in _bands(image, mode):
        array[rows] = part
    return array, None


def _bands(image: Image.Image, mode: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, values of these rows in this mode): a large image is not copied as a whole."""
    step = max(1, BAND // image.width)
    for top in range(0, image.height, step):
        rows = slice(top, min(top + step, image.height))
        yield rows, np.asarray(image.crop((0, rows.start, image.width, rows.stop)).convert(mode))


def _file_bits(image: Image.Image) -> int:
    """16 if the file stores 16 bits per colour (Pillow hands out the upper 8 of them), otherwise 8."""
    tiles = getattr(image, "tile", None) or []
    arguments = tiles[0][3] if tiles else ()
    raw_mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
    return 16 if ";16" in str(raw_mode) else 8


def _warn_of_pages(image: Image.Image, name: str) -> None:
    try:
        image.seek(1)
    except EOFError:
        return
    except Exception as error:  # decoders answer damaged files with errors of many types
        raise _damaged(name, error) from error
    image.seek(0)
    warnings.warn(f"{name} has several pages; the first is read. Save the page you want.", stacklevel=5)


# ------------------------------------------------------------------------------------------ arrays


def _is_tensor(source: Any) -> bool:
    """Whether this is a torch tensor, found out without importing torch."""
    return any(c.__name__ == "Tensor" and c.__module__.split(".")[0] == "torch" for c in type(source).__mro__)


def _from_tensor(tensor: Any) -> np.ndarray:
    name = f"The tensor {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    try:
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()  # numpy has no bfloat16
        array = tensor.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(f"{name} cannot be read ({_reason(error)}). Give a dense tensor.") from error
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    return _from_array(array, name)


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "buif":
        raise InputError(f"{name} has no numbers that can be shown. Use bool, integers or floats.")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        hint = "array.transpose(1, 2, 0)" if array.shape[0] in (1, 3, 4) else "one slice, array[0]"
        raise InputError(f"{name} must have 1, 3 or 4 channels, which come last; give {hint}.")
    if array.ndim not in (2, 3):
        hint = "array[0]" if array.ndim > 3 else "a two-dimensional array"
        raise InputError(f"{name} must be (height, width) or (height, width, channels); give {hint}.")
    check_size(array.shape[0], array.shape[1], name)
    check_finite(array, name)
    alpha = None
    if array.ndim == 3 and array.shape[2] == 4:
        alpha = _opacity(array, name)
        array = array[..., :3]
    elif array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return to_rgb(_to_uint8(array), alpha)


def check_finite(array: np.ndarray, name: str) -> None:
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise InputError(f"{name} has {bad} values that are NaN or infinite; replace them by 0 first.")


def _opacity(array: np.ndarray, name: str) -> np.ndarray:
    """The fourth channel of (H, W, 4), in whose type 255, 65535 or 1.0 is opaque."""
    alpha = array[..., 3]
    if array.dtype in (np.uint8, np.uint16) or (
        array.dtype.kind == "f" and alpha.min() >= 0 and alpha.max() <= 1
    ):
        return alpha
    raise InputError(
        f"{name} has a fourth channel that is no opacity (uint8, uint16 or floats within [0, 1]); "
        "give array[..., :3]."
    )


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array.copy()
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "f" and array.min() >= -1e-3 and array.max() <= 1 + 1e-3:  # room for rounding
        return rescale(array, 0.0, 1.0)
    return stretch(array)


def stretch(array: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """uint8 with the percentiles of WINDOW at 0 and 255; minimum and maximum where the percentiles agree.

    `counted` are the values that percentiles are taken from, by default all of the array.
    """
    return rescale(array, *shown_range(array if counted is None else counted))


def shown_range(array: np.ndarray) -> tuple[float, float]:
    """The lowest and highest value that `stretch` shows; NaN counts as 0. A large array is sampled."""
    every = max(1, array.size // _SAMPLE)
    sample = array.reshape(-1)[::every] if array.flags.c_contiguous else array.flat[::every]
    low, high = np.percentile(np.nan_to_num(sample).astype(np.float64), WINDOW)
    if high <= low:
        whole = np.nan_to_num(array)
        low, high = whole.min(), whole.max()
    return float(low), float(high)


def rescale(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape: `low` becomes 0, `high` 255, linear between, rounded. All 0 if they agree."""
    out = np.zeros(array.shape, np.uint8)
    if not high > low:
        return out
    values, target = np.ascontiguousarray(array).reshape(-1), out.reshape(-1)  # a view of `out`
    for start in range(0, values.size, BAND):
        part = (values[start : start + BAND].astype(np.float64) - low) / (high - low)
        target[start : start + BAND] = (part.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return out


def to_rgb(array: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3), opacity (H, W) or None -> uint8 (H, W, 3), on black. May change `array`."""
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)  # (H, W, 3)
    if alpha is not None:
        opaque = 1.0 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max
        step = max(1, BAND // array.shape[1])
        for top in range(0, array.shape[0], step):
            weight = alpha[top : top + step, :, None].astype(np.float32) / opaque
            array[top : top + step] = (array[top : top + step] * weight + 0.5).astype(np.uint8)
    return np.ascontiguousarray(array)
