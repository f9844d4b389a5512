"""The mini set: 282 small real biomedical images with named masks, for training and checking a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medplib.data.samples import ImageSample, Structure
from medplib.errors import InputError

INDEX = "mini.json"
SPLITS = ("train", "test")
_FIELDS = ("image", "modality", "dataset", "case", "split", "masks")


def default_mini_root() -> Path:
    """The folder of the mini set: $MEDPLIB_MINI, or examples/mini of the source checkout.

    Raises InputError, with what to do, when neither is there.
    """
    chosen = os.environ.get("MEDPLIB_MINI")
    if chosen:
        if not (Path(chosen) / INDEX).is_file():
            raise InputError(
                f"MEDPLIB_MINI names {chosen!r}, which holds no {INDEX}; name the folder that does."
            )
        return Path(chosen)
    for base in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (base / "examples" / "mini" / INDEX).is_file():
            return base / "examples" / "mini"
    raise InputError(
        "The mini set was not found: it is part of the source checkout (examples/mini), not of the installed "
        "package. Run from a checkout, or set MEDPLIB_MINI to the folder that holds mini.json."
    )


def load_mini(root: str | Path | None = None, split: str | None = None) -> list[ImageSample]:
    """The samples of the mini set, or of one split ("train" or "test"); pixels load when asked for.

    root: a folder in SA-Med2D-20M's layout (images/, masks/, SAMed2D_v1.json and its class mapping) with a
    mini.json that adds modality, case, split, names and provenance; None takes `default_mini_root()`.

    Raises InputError when files are missing (it names them) or the index files disagree.
    """
    root = default_mini_root() if root is None else Path(root)
    if split is not None and split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}.")
    rows = _read_json(root / INDEX)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{root / INDEX} must hold a list of images.")
    for number, row in enumerate(rows):
        absent = [key for key in _FIELDS if key not in row]
        if absent:
            raise InputError(f"Image {number} of {root / INDEX} has no {', '.join(absent)}.")
    _check_files(root, rows)
    _check_layout(root, rows)
    return [_sample(root, row) for row in rows if split in (None, row["split"])]


def _sample(root: Path, row: dict[str, Any]) -> ImageSample:
    return ImageSample(
        image=root / row["image"],
        modality=row["modality"],
        dataset=row["dataset"],
        case=row["case"],
        split=row["split"],
        tier="real",
        structures=tuple(Structure(m["name"], root / m["mask"], m["provenance"]) for m in row["masks"]),
        count=row.get("count"),
    )


def _check_files(root: Path, rows: list[dict[str, Any]]) -> None:
    """Every image and mask of the index is a file, or the error names the first ones that are not."""
    there = {f"{folder}/{name}" for folder in ("images", "masks") for name in _listing(root / folder)}
    wanted = [name for row in rows for name in (row["image"], *(m["mask"] for m in row["masks"]))]
    missing = [name for name in wanted if name not in there]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{len(missing)} of {len(wanted)} files of the mini set are missing in {root}: {named}."
        )


def _check_layout(root: Path, rows: list[dict[str, Any]]) -> None:
    """The masks of each image and their class numbers agree with SA-Med2D's own index files."""
    listed = _read_json(root / "SAMed2D_v1.json")
    classes = _read_json(root / "SAMed2D_v1_class_mapping_id.json")
    for row in rows:
        masks = [m["mask"] for m in row["masks"]]
        if sorted(listed.get(row["image"], [])) != sorted(masks):
            raise InputError(
                f"{INDEX} and SAMed2D_v1.json in {root} list different masks for {row['image']}."
            )
        for m in row["masks"]:
            number = int(Path(m["mask"]).stem.split("--")[-1].split("_")[0])
            if classes.get(row["dataset"], {}).get(m["name"]) != number:
                raise InputError(
                    f"{m['mask']} is '{m['name']}' in {INDEX}, but SAMed2D_v1_class_mapping_id.json gives "
                    f"{row['dataset']} another class {number}."
                )


def _listing(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"There is no {path.name} in {path.parent}; is this the folder of the mini set?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
