"""nnU-Net's raw data sets (versions 1 and 2): a grounding record per slice and structure.

On disk: dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, and likewise imagesTs/, labelsTs/.
Version 2 also has sets of pictures (file_ending ".png", ".bmp" or ".tif"), a slice each.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medplib.data.files import File, ImageFile, MaskFile, UnionMask, read_labels
from medplib.data.names import modality_of, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.common import IMAGE_SUFFIXES, SPLITS, build
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.volumes import SliceImage, SliceMask
from medplib.errors import InputError
from medplib.io.volume import AXES, volume

_FOLDERS = {"train": "Tr", "test": "Ts"}
Structure = tuple[str, tuple[int, ...]]  # its name and its labels


def read_nnunet(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    axis: str = "axial",
    channel: int = 0,
    window: tuple[float, float] | None = None,
    min_pixels: int = 12,
) -> RecordSet:
    """A raw nnU-Net data set from its folder.

    split       "train" (labelsTr) or "test" (labelsTs, if there)
    axis        "axial", "coronal" or "sagittal": how volumes are cut
    channel     which of the case's images, as in dataset.json
    window      stored values shown as black and white, such as (-160, 240) HU; None: 0.5 to 99.5 percentiles
    min_pixels  a label with fewer pixels in a slice gives no record

    A region of version 2 ({"whole": [1, 2]}) is a structure too: the union of its labels. Pixels of the label
    "ignore" count as background, which is reported.
    Each label volume is read once to find its slices. Reading records at random unpacks a volume each time;
    for training write them out first with `medplib data convert`. Memory: 8 bytes per record.
    """
    if axis not in AXES:
        raise InputError(f"axis must be one of {', '.join(AXES)}, got {axis!r}.")
    if window is not None and not (len(window) == 2 and window[0] < window[1]):
        raise InputError(f"window must be two values, the lower first, got {window!r}.")
    if split is not None and SPLITS.get(split) not in _FOLDERS:
        raise InputError(f"nnU-Net has no split {split!r}. Known: train, test.")
    window = None if window is None else tuple(window)
    root = Path(path).resolve()
    about = _read_json(root / "dataset.json")
    named, modality = _labels(about, root), _modality(about, channel)
    structures = _structures(named, root)
    known = {label for _, labels in named for label in labels}
    ignored = {label for name, labels in named if name.lower() == "ignore" for label in labels}
    ending = about.get("file_ending") or ".nii.gz"
    cut = 2 if _flat(ending) else AXES[axis]
    report, parts = ReadReport(), []
    for name, suffix in _FOLDERS.items():
        folder = root / f"labels{suffix}"
        if not folder.is_dir() or (split is not None and SPLITS[split] != name):
            continue
        images = root / f"images{suffix}"
        cases = _cases(folder, images, ending, channel, report)
        items = _scan(folder, cases, ending, cut, structures, known, ignored, min_pixels, report)
        make = SliceRow(
            str(images), str(folder), ending, channel, cut, window, structures, modality, root.name, name
        )
        parts.append((SliceRows(cases, items, root.name), None, make))
    if not parts:
        raise InputError(f"{str(root)!r} holds no labels for split {split!r}: no labelsTr/ or labelsTs/.")
    return build("nnU-Net", parts, report, "Check labelsTr/, imagesTr/ and the labels in dataset.json.")


class SliceRows:
    """(case, slice, structure) of every record, 8 bytes each: case << 32 | slice << 16 | structure."""

    def __init__(self, cases: Sequence[str], items: np.ndarray, name: str) -> None:
        import hashlib

        self.cases, self.items = tuple(cases), items
        self.digest = hashlib.sha256(json.dumps([name, self.cases]).encode() + items.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        item = int(self.items[index])
        return self.cases[item >> 32], item >> 16 & 0xFFFF, item & 0xFFFF

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        return self.items.nbytes + sum(len(case) for case in self.cases)


@dataclass(frozen=True)
class SliceRow:
    """Makes the grounding Record of (case, slice, number in `structures`)."""

    images: str
    labels: str
    ending: str
    channel: int
    axis: int
    window: tuple[float, float] | None
    structures: tuple[Structure, ...]
    modality: str | None
    source: str
    split: str

    @property
    def settings(self) -> str:
        """What belongs to the fingerprint."""
        return f"nnunet {self.channel} {self.axis} {self.window} {self.structures} {self.split}"

    def __call__(self, row: tuple[str, int, int], number: int) -> Record:
        case, index, structure = row
        name, labels = self.structures[structure]
        image = os.path.join(self.images, f"{case}_{self.channel:04d}{self.ending}")
        mask = os.path.join(self.labels, case + self.ending)
        flat = _flat(self.ending)
        parts = tuple(MaskFile(File(mask), label) for label in labels)
        return Record(
            turns=((f"Segment the {name}.", present_answer([name])),),
            images=(ImageFile(File(image)) if flat else SliceImage(image, self.axis, index, self.window),),
            masks=(UnionMask(parts) if flat else SliceMask(mask, self.axis, index, labels),),
            source=self.source,
            row=number,
            modality=self.modality,
            case=case,
            split=self.split,
            labels=(name,),
            extra={} if flat else {"slice": index},
        )


def _cases(folder: Path, images: Path, ending: str, channel: int, report: ReadReport) -> list[str]:
    found = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(ending) or name.startswith("."):
            continue
        case = name[: -len(ending)]
        if (images / f"{case}_{channel:04d}{ending}").is_file():
            found.append(case)
        else:
            report.add("dropped", "image missing", f"{images.name}/{case}_{channel:04d}{ending}")
    return found


def _flat(ending: str) -> bool:
    """Whether the files are pictures."""
    return ending.lower() in IMAGE_SUFFIXES


def _values(path: str, flat: bool) -> np.ndarray:
    """The labels of a volume, or of a picture as (H, W, 1). Raises InputError."""
    if not flat:
        return volume(path)
    labels = read_labels(File(path))
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise InputError(f"{path!r} holds {image.n_frames} pictures; a case of pictures has one.")
    return labels[..., None]


def _scan(
    folder: Path,
    cases: Sequence[str],
    ending: str,
    axis: int,
    structures: Sequence[Structure],
    known: Collection[int],
    ignored: Collection[int],
    min_pixels: int,
    report: ReadReport,
) -> np.ndarray:
    """uint64 (N,): the slices that show a structure, by case, slice and structure."""
    items = array("Q")
    for number, case in enumerate(cases):
        try:
            values = _values(str(folder / (case + ending)), _flat(ending))
        except InputError as error:
            report.add("dropped", "labels unreadable", str(error))
            continue
        there = set(np.unique(values).tolist()) - {0}
        for label in sorted(there - set(known)):
            report.add("unknown", f"label {label}", f"{folder.name}/{case}{ending}")
        if not there.isdisjoint(ignored):
            report.add(
                "unknown", "pixels to be ignored, taken as background", f"{folder.name}/{case}{ending}"
            )
        for place, (name, labels) in enumerate(structures):
            if there.isdisjoint(labels):
                continue
            counts = np.isin(values, labels).sum(axis=tuple(i for i in range(3) if i != axis))
            small = int(((counts > 0) & (counts < min_pixels)).sum())
            if small:
                report.add("dropped", f"fewer than {min_pixels} pixels", f"{case} {name}", small)
            items.extend(number << 32 | int(i) << 16 | place for i in np.flatnonzero(counts >= min_pixels))
    return np.sort(np.frombuffer(items, np.uint64))


def _labels(about: dict[str, Any], root: Path) -> list[Structure]:
    """All that version 1 ({"1": "liver"}) or 2 ({"liver": 1, "whole": [1, 2]}) names. Raises InputError."""
    named = []
    for key, value in about.get("labels", {}).items():
        name, labels = (value, key) if isinstance(value, str) else (key, value)
        try:
            labels = labels if isinstance(labels, list) else [labels]
            named.append((spoken(name), tuple(int(label) for label in labels)))
        except (TypeError, ValueError):
            raise InputError(f"dataset.json in {str(root)!r}: {key!r}: {value!r} is no label.") from None
    return named


def _structures(named: Sequence[Structure], root: Path) -> tuple[Structure, ...]:
    """Those that can be asked for, by their labels. Raises InputError if there is none."""
    found = [(name, labels) for name, labels in named if name.lower() not in ("background", "ignore")]
    found = sorted((item for item in found if any(item[1])), key=lambda item: item[1])
    if not found:
        raise InputError(f"dataset.json in {str(root)!r} names no labels besides the background.")
    return tuple(found)


def _modality(about: dict[str, Any], channel: int) -> str | None:
    channels = about.get("channel_names") or about.get("modality") or {}
    return modality_of(str(channels.get(str(channel), "")))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {error.strerror}. Is it an nnU-Net folder?"
        ) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}.") from error
    kinds = {"labels": dict, "file_ending": str, "channel_names": dict, "modality": dict}
    for key, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(key, kind()), kind):
            raise InputError(f"{str(path)!r}: {key} must be {'a text' if kind is str else 'an object'}.")
    return about
