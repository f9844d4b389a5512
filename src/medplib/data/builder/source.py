"""SAMed2DFolder: a folder in SA-Med2D-20M's layout as a sequence of ImageSamples, made when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from medplib.data.builder.words import clean_name
from medplib.data.samples import ImageSample, Structure
from medplib.errors import InputError

INDEX, CLASSES = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
# The part of the prefix before the first "_" -> modality. The last two are the mini set's own.
PREFIXES = {
    "ct": "CT",
    "mr": "MR",
    "pet": "PET",
    "x": "X-ray",
    "ultrasound": "ultrasound",
    "endoscopy": "endoscopy",
    "dermoscopy": "dermoscopy",
    "fundus": "fundus",
    "histopathology": "histopathology",
    "microscopy": "microscopy",
}
BAD_SETS = ("Brain_PTM", "QUBIQ2020")  # their published images are masks


class SAMed2DFolder(Sequence[ImageSample]):
    """The images listed in `SAMed2D_v1.json`, in its order, each with its masks as named structures.

    Several instances of a class are several structures of one name. A `union_` class loses that word, and is
    left out where the image has the class itself. Images of BAD_SETS are left out (`skipped` counts them).
    Raises InputError for a folder without the index files, an unknown modality prefix, or a class number
    that the mapping does not know; the pixels themselves are not looked at.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        listed = _read(self.root / INDEX)
        self.classes: dict[str, dict[str, int]] = _read(self.root / CLASSES)
        self._names = {
            dataset: {int(number): name for name, number in table.items()}
            for dataset, table in self.classes.items()
        }
        self._rows = [(image, masks) for image, masks in listed.items() if _parts(image)[1] not in BAD_SETS]
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
        prefix, dataset, case = _parts(image)
        modality = PREFIXES.get(prefix.split("_")[0])
        if modality is None:
            raise InputError(f"{image!r} begins with no known modality. Known: {', '.join(PREFIXES)}.")
        named = [(self._class(dataset, mask), mask) for mask in masks]
        plain = {clean_name(name) for name, _ in named if not name.startswith("union_")}
        structures = tuple(
            Structure(clean_name(name), self.root / mask, "data set")
            for name, mask in named
            if not name.startswith("union_") or clean_name(name) not in plain
        )
        return ImageSample(self.root / image, modality, dataset, case, "", "real", structures)

    def vocabulary(self) -> dict[str, set[str]]:
        """{data set: names of its classes}, as in the class mapping."""
        return {dataset: {clean_name(name) for name in table} for dataset, table in self.classes.items()}

    def _class(self, dataset: str, mask: str) -> str:
        number = Path(mask).stem.split("--")[-1].split("_")[0]
        name = self._names.get(dataset, {}).get(int(number)) if number.isdigit() else None
        if name is None:
            raise InputError(
                f"{mask!r} names class {number!r}, which {CLASSES} does not list for {dataset!r}."
            )
        return name


def _parts(image: str) -> tuple[str, str, str]:
    """Prefix, data set and case of `prefix--dataset--case--slice.png`; cases hold dots and single dashes."""
    parts = Path(image).stem.split("--")
    if len(parts) < 4:
        raise InputError(
            f"{image!r} in {INDEX} is not named like 'ct_00--DataSet--case--z_0001.png' "
            "(modality, data set, case and slice between double dashes)."
        )
    return parts[0], parts[1], "--".join(parts[2:-1])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"There is no {path.name} in {str(path.parent)!r}. A folder in SA-Med2D-20M's layout holds "
            f"images/, masks/, {INDEX} and {CLASSES}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content
