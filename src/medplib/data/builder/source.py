"""SAMed2DFolder: a folder in SA-Med2D-20M's layout as a sequence of ImageSamples, made when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from medplib.data.names import CLASSES, SliceName, class_names, slice_name, spoken
from medplib.data.readers.sa_med2d import INDEX, KNOWN_BAD
from medplib.data.samples import ImageSample, Structure
from medplib.errors import InputError


class SAMed2DFolder(Sequence[ImageSample]):
    """The images listed in `SAMed2D_v1.json`, in its order, each with its masks as named structures.

    Several instances of a class are several structures of one name. A `union_` class loses that word, and is
    left out where the image has the class itself. Images of KNOWN_BAD sets are left out (`skipped` counts
    them). Raises InputError for a folder without the index files, an unknown modality prefix, or a class
    number that the mapping does not know; the pixels themselves are not looked at.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        listed = _index(_bytes(self.root / INDEX))
        self._names = class_names(_bytes(self.root / CLASSES))
        self._rows = [
            (image, masks) for image, masks in listed.items() if _named(image).dataset not in KNOWN_BAD
        ]
        self.skipped = len(listed) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> ImageSample: ...
    @overload
    def __getitem__(self, at: slice) -> list[ImageSample]: ...
    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        image, masks = self._rows[at]
        parts = _named(image)
        if parts.modality is None:
            raise InputError(f"{image!r} begins with no known modality, such as ct_00, mr_t1 or x_ray.")
        named = [(self._class(parts.dataset, mask), mask) for mask in masks]
        plain = {spoken(name) for name, _ in named if not name.startswith("union_")}
        structures = tuple(
            Structure(spoken(name), self.root / mask, "data set")
            for name, mask in named
            if not name.startswith("union_") or spoken(name) not in plain
        )
        return ImageSample(
            self.root / image, parts.modality, parts.dataset, parts.case, "", "real", structures
        )

    def vocabulary(self) -> dict[str, set[str]]:
        """{data set: names of its classes}, as in the class mapping."""
        return {dataset: set(map(spoken, table.values())) for dataset, table in self._names.items()}

    def _class(self, dataset: str, mask: str) -> str:
        parts = slice_name(mask)
        name = self._names.get(dataset, {}).get(parts.class_id) if parts else None
        if name is None:
            number = Path(mask).stem.split("--")[-1].split("_")[0]
            raise InputError(
                f"{mask!r} names class {number!r}, which {CLASSES} does not list for {dataset!r}."
            )
        return name


def _named(image: str) -> SliceName:
    """The parts of an image's name. Raises InputError for another kind of name."""
    parts = slice_name(image)
    if parts is None:
        raise InputError(
            f"{image!r} in {INDEX} is not named like 'ct_00--DataSet--case--z_0001.png' "
            "(modality, data set, case and slice between double dashes)."
        )
    return parts


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(
            f"There is no {path.name} in {str(path.parent)!r}. A folder in SA-Med2D-20M's layout holds "
            f"images/, masks/, {INDEX} and {CLASSES}; for another layout name its reader by --format."
        )
    return path.read_bytes()


def _index(data: bytes) -> dict[str, Any]:
    """{image: masks}. Raises InputError."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"{INDEX} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{INDEX} must hold a JSON object, got a {type(content).__name__}.")
    return content
