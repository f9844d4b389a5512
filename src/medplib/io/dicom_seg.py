"""DICOM segmentations: masks in a file that viewers lay over the images they were drawn in.

N frames of H rows and W columns, S structures. Needs highdicom (`dicom-seg`). By design of the standard such
a file repeats who the patient is, the study and the scanner, as its images say it (PS3.3 A.51 and C.8.20).
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medplib.errors import InputError
from medplib.io.dicom import frame_header, guarded, silent
from medplib.io.dicom_display import turned
from medplib.io.folder import write_together
from medplib.io.images import from_file, is_dicom
from medplib.results import NOTICE, SOFTWARE, versions

FILE = "segmentation.dcm"  # in the folder of an answer
SERIES = 100  # the number of the series that a segmentation makes of its own
_CLASS = "2.25.253973625396355175849714472217156503945"  # of our files, made of a random UUID (PS3.5 B.2)
_WRITTEN_BY = re.compile(rb"\x02\x00\x13\x00SH..medplib", re.DOTALL)  # ImplementationVersionName (PS3.10 7.1)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_MEASURES = ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")
_TEXTS = ("PatientID", "PatientName", "AccessionNumber", "StudyID", "ReferringPhysicianName")
_FORMS = {  # of what highdicom refuses in other forms; it is left empty then, as the standard allows
    "PatientSex": re.compile("[MFO]"),
    "PatientBirthDate": re.compile(r"\d{8}"),
    "StudyDate": re.compile(r"\d{8}"),
    "StudyTime": re.compile(r"\d\d(\d\d(\d\d(\.\d{1,6})?)?)?"),
}


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """A frame of a DICOM file, from 0, that masks lie on; `stamp` tells whether the file has changed."""

    path: str
    frame: int
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: str | os.PathLike, frame: int = 0) -> SourceFrame:
        """The frame of a file as it is now."""
        full = os.path.abspath(Path(path).expanduser())
        return cls(full, frame, _stamp(full))


def encode(
    frames: Sequence[SourceFrame], masks: np.ndarray, labels: Sequence[str], model: dict[str, Any], name: str
) -> bytes:
    """A Segmentation object (BINARY): a segment for each structure drawn, a frame for each slice it is in.

    frames: N of one series, in any order. masks: bool (S, N, H, W), rows and columns as the files store them.
    labels: S names; one of CID 7192, also after "left" or "right", gets its code, any other that of tissue.
    model: as `MedPLIB.identity` says it. name: of the images in messages.

    The bytes hold what the images say of patient, study and equipment. Raises InputError if nothing is drawn
    and as `read_headers` does; ImportError without highdicom.
    """
    headers, places = read_headers(frames, name)
    drawn = [number for number, mask in enumerate(masks) if mask.any()]
    if not drawn:
        raise InputError(
            f"Nothing was drawn in {name}, and a DICOM segmentation holds at least one structure: none was "
            "written. Name another structure."
        )
    count = len(headers) if len(headers) > 1 else int(headers[0].get("NumberOfFrames") or 1)
    pixels = np.zeros((count, *masks.shape[2:], len(drawn)), np.uint8)  # (N, H, W, S)
    for segment, number in enumerate(drawn):
        pixels[places, ..., segment] = masks[number]
    with silent():
        try:
            return _encode(headers, pixels, [labels[number] for number in drawn], model)
        except Exception as error:  # of many types, and with texts that may hold values of the header
            reason = type(error).__name__
    raise InputError(
        f"{name} has a header of which no DICOM segmentation can be made ({reason}). Save without it."
    )


def read_headers(frames: Sequence[SourceFrame], name: str) -> tuple[list[Any], list[int]]:
    """(headers without pixels, ready for highdicom; where each frame is): of one file or of N with one each.

    Called before a model is asked, it shows what `encode` would refuse: raises InputError for what is no
    DICOM, has changed or lacks what the object must repeat, ImportError without highdicom. Nothing is quoted.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A DICOM segmentation needs highdicom: pip install 'medplib[dicom-seg]'."
        ) from error
    if not frames:
        raise InputError(
            f"{name} was not read from DICOM: there is no patient and no image that a DICOM segmentation "
            "could name. Give the DICOM files themselves, or save without it."
        )
    if any(_stamp(frame.path) != frame.stamp for frame in frames):
        raise InputError(f"{name} has changed since it was read. Draw in it again.")
    paths = list(dict.fromkeys(frame.path for frame in frames))
    if len(paths) not in (1, len(frames)):
        raise InputError(f"{name} has several files with several frames each. Give one of the files.")
    headers = []
    for path in paths:
        read = functools.partial(_header, frame=frames[0].frame, alone=len(paths) == 1)
        headers.append(
            from_file(path, lambda file, said, read=read: guarded(file, said, lambda: read(file, said)))
        )
        if "ImageOrientationPatient" in headers[0]:  # equal in all but for rounding
            headers[-1].ImageOrientationPatient = headers[0].ImageOrientationPatient
    return headers, [frame.frame for frame in frames] if len(paths) == 1 else list(range(len(paths)))


def of_picture(
    path: str | os.PathLike,
    frame: int,
    masks: Sequence[np.ndarray],
    labels: Sequence[str],
    model: dict[str, Any],
) -> bytes:
    """`encode` for masks bool (H, W) on the picture that `medplib.io.read_dicom` shows of a frame.

    Raises InputError also for a file that is no DICOM or has another size.
    """
    name = repr(os.fspath(path))
    frames = [SourceFrame.of(path, frame)] if is_dicom(path) else []
    (header,), _ = read_headers(frames, name)
    size = header.Rows, header.Columns
    for mask in masks:
        if mask.shape != size:
            raise InputError(
                f"The mask is {mask.shape}, but {name} is {size} (height, width). Name the file that was "
                "asked about."
            )
    stored = np.array([turned(mask, header) for mask in masks], bool).reshape(-1, 1, *size)
    return encode(frames, stored, labels, model, name)


def write(path: str | os.PathLike, content: bytes) -> Path:
    """Write a segmentation, complete or not at all, also in place of an earlier one of ours.

    Raises InputError if another file is there, MedPLIBError if the folder cannot be written.
    """
    target = Path(path).expanduser()
    return write_together(
        target.parent, {target.name: content}, lambda p: p.name == target.name and is_ours(p)
    )[0]


def is_ours(path: Path) -> bool:
    """Whether we wrote this file, by what the file says of itself. Needs no pydicom."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(1024)
    return start[128:132] == b"DICM" and _WRITTEN_BY.search(start) is not None


def code_of(name: str) -> tuple[Any, Any, Any]:
    """(category, type, side or None) of a structure's name, in pydicom's codes (PS3.16 CID 7192)."""
    from pydicom.sr.codedict import codes

    first, _, rest = name.lower().partition(" ")
    side = {"left": codes.SCT.Left, "right": codes.SCT.Right}.get(first)
    keyword = (rest if side else name.lower()).title().replace(" ", "")
    found = codes.cid7192.concepts.get(keyword)
    if found is None:
        return codes.SCT.Tissue, codes.SCT.Tissue, None
    return codes.SCT.AnatomicalStructure, found, side


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0  # whoever reads the file says what is wrong
    return status.st_mtime_ns, status.st_size


def _header(file: BinaryIO, name: str, frame: int, alone: bool) -> Any:
    """A header without pixels, the places of its frames where highdicom looks for them; `frame` is the first.

    For `guarded`. alone: whether all frames are in this file.
    """
    from pydicom import Dataset, dcmread

    header = dcmread(file, stop_before_pixels=True, force=True)
    count = int(header.get("NumberOfFrames") or 1)
    if not 0 <= frame < count:
        raise InputError(f"{name} has no frame {frame}; its frames are 0 to {count - 1}.")
    known = count == 1 or len(header.get("PerFrameFunctionalGroupsSequence") or []) == count
    shown = [frame_header(header, number) for number in range(count if known else 0)]
    placed = known and all(one.get(key) for one in shown for key in _PLACE)
    if (count > 1 and not placed) or ("SharedFunctionalGroupsSequence" in header and not alone):
        raise InputError(
            f"{name} has frames without a place in the patient, or is one of several files with frames; a "
            "DICOM segmentation can name neither. Give a single file that says where its frames lie."
        )
    needed = (*_NEEDED, "FrameOfReferenceUID") if placed else _NEEDED
    lacking = [key for key in needed if not header.get(key)]
    if lacking:
        raise InputError(
            f"{name} lacks {', '.join(lacking)}, which a DICOM segmentation must repeat. Export it again."
        )
    for key in (*_PLACE, *_MEASURES):
        if key in shown[frame]:
            header[key] = shown[frame][key]
    if placed:
        header.setdefault("SliceThickness", None)
        shared = Dataset()
        shared.PlaneOrientationSequence = [_part(header, _PLACE[1:2])]
        shared.PixelMeasuresSequence = [_part(header, _MEASURES)]
        header.SharedFunctionalGroupsSequence = [shared]
        header.PerFrameFunctionalGroupsSequence = [Dataset() for _ in shown]
        for own, one in zip(header.PerFrameFunctionalGroupsSequence, shown, strict=True):
            own.PlanePositionSequence = [_part(one, _PLACE[:1])]
    for key in _TEXTS:
        header.setdefault(key, "")
    for key, form in _FORMS.items():
        if not form.fullmatch(str(header.get(key) or "")):
            setattr(header, key, "")
    return header


def _part(header: Any, keys: Sequence[str]) -> Any:
    from pydicom import Dataset

    part = Dataset()
    for key in keys:
        if header.get(key) not in (None, ""):
            part[key] = header[key]
    return part


def _encode(headers: list[Any], pixels: np.ndarray, labels: list[str], model: dict[str, Any]) -> bytes:
    """pixels: uint8 (N, H, W, S)."""
    import highdicom
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    version = versions()["medplib"] or "0"
    algorithm = highdicom.AlgorithmIdentificationSequence(
        f"{SOFTWARE} {version}", codes.cid7162.ArtificialIntelligence, version
    )
    descriptions = []
    for number, label in enumerate(labels, 1):
        category, kind, side = code_of(label)
        description = SegmentDescription(number, _long_string(label), category, kind, "AUTOMATIC", algorithm)
        if side is not None:
            kind_item = description.SegmentedPropertyTypeCodeSequence[0]
            kind_item.SegmentedPropertyTypeModifierCodeSequence = [
                highdicom.sr.CodedConcept.from_code(side)
            ]  # inside the item of the type, PS3.3 C.8.20.2
        descriptions.append(description)
    made = Segmentation(
        headers, pixels, "BINARY", descriptions,
        series_instance_uid=highdicom.UID(), series_number=SERIES, sop_instance_uid=highdicom.UID(),
        instance_number=1, manufacturer=SOFTWARE, manufacturer_model_name=SOFTWARE, software_versions=version,
        device_serial_number=model.get("weights_sha256") or "unknown", content_label="RESEARCH_ONLY",
        content_description=NOTICE, series_description=f"{SOFTWARE}: {NOTICE}",
        specific_character_set="ISO_IR 192",
    )  # fmt: skip
    made.file_meta.ImplementationClassUID = _CLASS
    made.file_meta.ImplementationVersionName = f"{SOFTWARE} {version}"[:16]
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _long_string(text: str) -> str:
    """A text as a value of type LO: no backslash, no control character, at most 64 bytes (PS3.5 6.2)."""
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    short = " ".join(plain.split()).encode("utf-8", "replace")[:64]  # the standard counts characters
    return short.decode("utf-8", "ignore").strip() or "structure"
