"""A frame of a DICOM file as a picture: what is read, checked and decoded. Needs pydicom (`medical`).

H, W = Rows and Columns. Of the header only the attributes in `_TAGS` are read, and no text in it reaches a
message, a warning or a log: errors of pydicom are named by their type alone.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from medplib.errors import InputError, is_number
from medplib.io.dicom_display import grey, turned
from medplib.io.images import check_finite, check_size, from_file, rescale, to_rgb

T = TypeVar("T")
_MAX_INFLATED = 1 << 28  # bytes of a deflated file
_PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_BITS = {"FloatPixelData": (32,), "DoubleFloatPixelData": (64,), "PixelData": (1, 8, 16, 32)}
_KINDS = {  # photometric interpretations by samples per pixel
    1: ("MONOCHROME2", "MONOCHROME1", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
_MODALITIES = frozenset(
    """
    CR CT DX ES GM IO IVUS KO MG MR NM OCT OP OPT OT PR PT PX REG RF RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SM
    SR TG US XA XC
""".split()  # noqa: SIM905
)  # the usual ones of PS3.3 C.7.3.1.1.1; no other is repeated
_NATIVE = tuple(
    f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2")
)  # syntaxes without compression
_SIZE = ("rows", "columns", "samples_per_pixel", "bits_allocated", "number_of_frames")
_GROUPS = (
    *("PlaneOrientationSequence", "PlanePositionSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence"),
)
_TAGS = """
    SOPClassUID Modality NumberOfFrames Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated
    BitsStored PixelRepresentation PlanarConfiguration PixelPaddingValue PixelPaddingRangeLimit RescaleSlope
    RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence
    ImageOrientationPatient ImagePositionPatient PixelSpacing SeriesInstanceUID
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    ExtendedOffsetTable ExtendedOffsetTableLengths RedPaletteColorLookupTableDescriptor
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData
""".split()  # noqa: SIM905
_HEADLESS = (
    "has no DICOM header ('DICM' at byte 128) and cannot be read as an image without one. Export it again; "
    "if it is another kind of picture, give it that kind's suffix."
)
_PYDICOM = threading.RLock()  # warnings, levels and settings belong to the whole process


def read_dicom(
    source: Any, frame: int | None = None, window: tuple[float, float] | None = None
) -> np.ndarray:
    """One frame of a DICOM file, a path or its bytes -> uint8 (H, W, 3), a new array.

    frame    from 0; by default the first, with a warning if there are several. No other is decoded.
    window   (centre, width) in the file's units, Hounsfield units in CT: black at centre - width / 2, white
             at centre + width / 2. By default the file's VOI LUT or first window. Without one, unsigned 8
             bits are kept and other values stretched as by `load_image`, padding left out. Colours have none.

    The picture is as stored, with one exception: an axial CT or MR slice whose ImageOrientationPatient says
    that it is stored mirrored or upside down is turned, so that the patient's right is on the left of the
    picture and anterior is on top. Points, boxes and masks are then in pixels of the turned picture.

    Raises InputError for what is no image or cannot be read, ImportError without pydicom.

        read_dicom("scan.dcm", frame=3, window=(40, 400))
    """
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise InputError(f"A DICOM file must be a path or bytes, got {type(source).__name__}.")
    if frame is not None and (isinstance(frame, bool) or not isinstance(frame, int)):
        raise InputError(f"frame must be a whole number from 0, got {frame!r}.")
    if window is not None and not (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(map(is_number, window))
        and window[1] > 0
    ):
        raise InputError(f"window must be (centre, width) with a width above 0, got {window!r}.")
    return from_file(source, functools.partial(decode, frame=frame, window=window))


@dataclass(frozen=True, slots=True)
class DicomFrame:
    """A frame as a picture of a `Record`: read when it is asked for, as `read_dicom` reads it."""

    path: str
    frame: int | None = None
    window: tuple[float, float] | None = None

    def __str__(self) -> str:
        return self.path if self.frame is None else f"{self.path}[{self.frame}]"

    def load(self) -> np.ndarray:
        """uint8 (H, W, 3). Raises InputError, naming the file."""
        return read_dicom(self.path, self.frame, self.window)


def decode(
    file: BinaryIO, name: str, frame: int | None = None, window: tuple[float, float] | None = None
) -> np.ndarray:
    """What `read_dicom` does, of an open file that messages call `name`."""
    picture, notes = guarded(file, name, lambda: _decode(file, name, frame, window))
    for note in notes:
        warnings.warn(f"{name} {note}", stacklevel=5)
    return picture


def guarded(file: BinaryIO, name: str, work: Callable[[], T]) -> T:
    """What `work` gives of the file; whatever it raises becomes an InputError that quotes nothing of it.

    pydicom is silenced meanwhile. Raises ImportError without it.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name} is DICOM, which needs pydicom: pip install 'medplib[medical]'.") from error
    try:
        with silent():
            return work()
    except InputError:
        raise
    except Exception as error:  # pydicom and the decoders answer damaged files with errors of many types
        reason = type(error).__name__  # and with texts that may hold values of the header
    file.seek(128)
    damage = f"is a damaged DICOM file ({reason}). Export or copy it again."
    raise InputError(f"{name} {damage if file.read(4) == b'DICM' else _HEADLESS}")


class OpenDicom:
    """A file whose header has been read and checked, once; its frames are decoded when asked for.

    For `guarded`, as what it does. frames: how many; size: (H, W).
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._header, self._options = _header(file, name)
        self._name, self._pixels = name, self._file.tell()
        self.frames: int = self._options["number_of_frames"]
        self.size: tuple[int, int] = self._options["rows"], self._options["columns"]

    def frame(self, number: int) -> tuple[np.ndarray, Any]:
        """(stored values (H, W) or colours (H, W, 3), header with what its groups say of this frame)."""
        if not 0 <= number < self.frames:
            raise InputError(f"{self._name} has no frame {number}; its frames are 0 to {self.frames - 1}.")
        self._file.seek(self._pixels)
        syntax = self._header.file_meta.TransferSyntaxUID
        array = _stored(self._file, syntax, self._options, number, self._name)
        if array.dtype.kind == "f":
            check_finite(array, self._name)
        return array, frame_header(self._header, number)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is said of a file in a list of series: nothing that tells whose it is."""

    series: str
    modality: str
    frames: int
    size: tuple[int, int] | None  # (height, width) of an image


def outline(file: BinaryIO, name: str) -> Outline:
    """The outline of a file by its header. For `guarded`. Raises InputError for what belongs to no series."""
    _, header, _ = _start(file, name)
    if not header.get("SeriesInstanceUID") and not header.get("Rows"):
        _check_kind(header, None, name)
    modality, sides = header.get("Modality"), (header.get("Rows"), header.get("Columns"))
    return Outline(
        str(header.get("SeriesInstanceUID")),
        modality if modality in _MODALITIES else "another modality",
        max(1, int(header.get("NumberOfFrames") or 1)),
        sides if all(isinstance(side, int) and side > 0 for side in sides) else None,
    )


def frame_header(header: Any, frame: int) -> Any:
    """A copy of the header, with what its functional groups say of all frames and of this one as its own."""
    from pydicom import Dataset

    own = Dataset()
    own.update(header)
    groups = [
        *(header.get("SharedFunctionalGroupsSequence") or [])[:1],
        *(header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1],
    ]
    for item in groups:
        for group in _GROUPS:
            for said in (item.get(group) or [])[:1]:
                own.update(said)
    return own


@contextmanager
def silent() -> Iterator[None]:
    """No warnings and logs of pydicom and highdicom, which may quote a header; no validation of values."""
    from pydicom.config import disable_value_validation

    logs = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    with _PYDICOM, warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        levels = [log.level for log in logs]
        try:
            for log in logs:
                log.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def _decode(
    file: BinaryIO, name: str, frame: int | None, window: tuple[float, float] | None
) -> tuple[np.ndarray, list[str]]:
    """The picture uint8 (H, W, 3), and what to warn of."""
    from pydicom.pixels import apply_color_lut

    opened = OpenDicom(file, name)
    array, header = opened.frame(frame or 0)
    notes = []
    if frame is None and opened.frames > 1:
        notes.append(f"has {opened.frames} frames; the first is read. medplib.io.read_dicom reads any.")
    if array.ndim == 3:
        array = rescale(array, 0, 2**header.BitsStored - 1)
    elif header.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, header)  # (H, W, 3)
        depth = min(header.RedPaletteColorLookupTableDescriptor[2], 8 * array.dtype.itemsize)
        array = rescale(array, 0, 2**depth - 1)
    else:
        array = grey(array, header, window, notes)
    return to_rgb(turned(array, header), None), notes


# ------------------------------------------------------------------------------------------ header


def _start(file: BinaryIO, name: str) -> tuple[BinaryIO, Any, Any]:
    """(the file, inflated if it is deflated, at the end of the header; the header; the transfer syntax)."""
    from pydicom import dcmread, uid
    from pydicom.filereader import read_dataset, read_preamble

    file.seek(0)
    read_preamble(file, force=True)
    meta = read_dataset(
        file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2, specific_tags=[0x00020010]
    )
    syntax = meta.get("TransferSyntaxUID")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _MAX_INFLATED)
        if len(inflated) == _MAX_INFLATED:
            raise InputError(f"{name} inflates to {_MAX_INFLATED >> 20} MB or more. Export it uncompressed.")
        file = io.BytesIO(inflated)  # explicit VR, little endian
    file.seek(0)
    return file, dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS), syntax


def _header(file: BinaryIO, name: str) -> tuple[BinaryIO, Any, dict[str, Any]]:
    """(the file, inflated if it is deflated, at the first byte of the pixels; its header; how to decode it).

    Everything that decides how much memory the pixels take has been checked.
    """
    from pydicom import uid
    from pydicom.pixels.utils import as_pixel_options

    file, header, syntax = _start(file, name)
    order = "<" if header.original_encoding[1] else ">"
    group, element, vr, length = struct.unpack(f"{order}HH4sL", file.read(12).ljust(12, b"\0"))
    keyword = _PIXELS.get(group << 16 | element)
    _check_kind(header, keyword, name)
    native = uid.ExplicitVRLittleEndian if order == "<" else uid.ExplicitVRBigEndian
    if vr[:2] not in (b"OB", b"OW", b"OF", b"OD", b"UN"):  # as lengths these would be odd, which none is
        native, (length,) = uid.ImplicitVRLittleEndian, struct.unpack(f"{order}L", vr)
        vr = b"OW"
        file.seek(-4, os.SEEK_CUR)
    if syntax in (None, "", *_NATIVE):
        header.file_meta.TransferSyntaxUID = native
    options = as_pixel_options(header, pixel_keyword=keyword, pixel_vr=vr[:2].decode())
    _check_pixels(options, name)
    if header.file_meta.TransferSyntaxUID == native:
        needed = -(-math.prod(options[key] for key in _SIZE) // 8)
        if options["photometric_interpretation"] == "YBR_FULL_422":
            needed = needed // 3 * 2
        place, end = file.tell(), file.seek(0, os.SEEK_END)
        file.seek(place)
        there = 0 if length == 0xFFFFFFFF else min(length, end - place)
        if needed > there:
            raise InputError(
                f"{name} is cut short: its pixels need {needed} bytes of {there}. Copy it again."
            )
    return file, header, options


def _check_kind(header: Any, keyword: str | None, name: str) -> None:
    """Raise InputError unless this is an image."""
    from pydicom.uid import UID

    uid = UID(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    kind = uid.name.removesuffix(" Storage") if uid.type == "SOP Class" else "unknown kind"
    if "Segmentation" in kind or header.get("Modality") == "SEG":
        raise InputError(f"{name} is a DICOM segmentation, not an image. Give the image that it belongs to.")
    if keyword is not None:
        return
    if kind == "Media Storage Directory":
        raise InputError(f"{name} is a DICOMDIR, a list of files. Give one of the images that it lists.")
    if kind == "unknown kind" and header.preamble is None:
        raise InputError(f"{name} {_HEADLESS}")
    raise InputError(f"{name} holds no pixels: it is DICOM of {kind}, or cut short. Give the image itself.")


def _check_pixels(options: dict[str, Any], name: str) -> None:
    """Raise InputError unless pixels of this form can be read."""
    if not all(isinstance(options.get(key), int) and options[key] > 0 for key in _SIZE):
        raise InputError(f"{name} lacks a usable {', '.join(_SIZE)}. Export it again.")
    check_size(options["rows"], options["columns"], name)
    samples, bits = options["samples_per_pixel"], options["bits_allocated"]
    kinds = _KINDS.get(samples, ())
    if bits not in _BITS[options["pixel_keyword"]] or options.get("photometric_interpretation") not in kinds:
        raise InputError(
            f"{name} has {samples} samples of {bits} bits per pixel in a form that is not read. Export it as "
            "MONOCHROME2 or RGB of 8 or 16 bits."
        )


# ------------------------------------------------------------------------------------------ pixels


def _stored(file: BinaryIO, syntax: Any, options: dict[str, Any], frame: int, name: str) -> np.ndarray:
    """One frame's stored values (H, W), or its colours RGB (H, W, 3)."""
    from pydicom.pixels import get_decoder

    needs, reason = [], "no decoder is installed"
    try:
        decoder = get_decoder(syntax)
        lacking = [line for line in decoder.missing_dependencies if line.startswith("pylibjpeg ")]
        needs = re.findall(r"pylibjpeg[a-z-]*(?=>)", "".join(lacking))
        if decoder.is_available:
            if syntax.is_encapsulated:
                _check_encoded(file, syntax, options, frame, name)
            return decoder.as_array(file, index=frame, **options)[0]
    except InputError:
        raise
    except Exception as error:  # see `decode`
        reason = type(error).__name__
    known = syntax.name if syntax.type == "Transfer Syntax" else "an unknown transfer syntax"
    remedy = "Export it uncompressed or copy it again."
    if needs:
        remedy = f"If it is not damaged: pip install {' '.join(needs)}."
    raise InputError(f"{name} cannot be decoded from {known} ({reason}). {remedy}")


def _check_encoded(file: BinaryIO, syntax: Any, options: dict[str, Any], frame: int, name: str) -> None:
    """Raise InputError where a frame would decode to much more than the header says, or to a part of it."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    frames, tables = options["number_of_frames"], options.get("extended_offsets")
    encoded = get_frame(file, frame, number_of_frames=frames, extended_offsets=tables)
    size = expected = (options["columns"], options["rows"])
    if syntax == RLELossless:
        raw = math.prod(expected) * options["samples_per_pixel"] * options["bits_allocated"] // 8
        if len(encoded) > 2 * raw + 1024:  # by the standard 129/128 of them and a header, at most
            size = None
    else:
        if b"\xff\xd9" not in encoded[-10:]:  # the end of every JPEG; some decoders do without
            raise InputError(f"{name} is cut short: an encoded frame has no end. Copy it again.")
        try:
            with Image.open(io.BytesIO(encoded), formats=("JPEG", "JPEG2000")) as picture:
                size = picture.size  # nothing is decoded yet
        except Image.UnidentifiedImageError:
            pass  # a kind that Pillow does not decode either
    if size != expected:
        raise InputError(f"{name} encodes a frame of another size than its header says. Export it again.")
