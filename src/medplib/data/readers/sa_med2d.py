"""SA-Med2D-20M, from its folder or straight from its zip: a grounding record per image and class.

On disk: images/, masks/, SAMed2D_v1.json ({image: [masks]}) and SAMed2D_v1_class_mapping_id.json
({data set: {class: number}}). SAM-Med2D's own lists, image2label_train.json and label2image_test.json, are
read too. The instances of a class are one mask.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medplib.data.archive import archive_at
from medplib.data.files import File, ImageFile, MaskFile, UnionMask
from medplib.data.names import CLASSES, SliceName, class_names, slice_name, spoken
from medplib.data.questions import present_answer
from medplib.data.readers.common import (
    Listing,
    Store,
    Unusable,
    build,
    find_files,
    open_store,
    split_of,
    with_suffix,
)
from medplib.data.record import Record
from medplib.data.recordset import RecordSet
from medplib.data.report import ReadReport
from medplib.data.rows import Rows, index_json
from medplib.errors import InputError

INDEX = "SAMed2D_v1.json"
LISTS = ("image2label_train.json", "image2label_test.json", "label2image_test.json")
KNOWN_BAD = ("Brain_PTM", "QUBIQ2020")  # some of their images are masks
_CLASS_BITS = 16


def read_sa_med2d(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    per: str = "class",
    exclude: str | Collection[str] = (),
    known_bad: bool = False,
    index: str | os.PathLike | None = None,
    classes: str | os.PathLike | None = None,
    verify: bool = True,
    cache: str | os.PathLike | None = None,
) -> RecordSet:
    """SA-Med2D-20M from its folder, its zip, or one of the lists above.

    split      only for SAM-Med2D's lists, by their names
    per        "class": one record per image and class; "image": one record per image, a turn per class
    exclude    the data sets left out, one or several, beside those known to be bad
    known_bad  read these too: Brain_PTM and QUBIQ2020, some of whose images are masks
    index      the JSON list, if it is not in the folder or zip
    classes    the JSON table of class numbers, likewise
    verify     look whether each file is there; a list of millions takes minutes less without
    cache      where a list that is packed inside the zip is unpacked to, once (default: ~/.cache/medplib)

    Memory: 8 bytes per image and per class in it, 8 per record for "image"; a zip adds 16 per file in it.
    """
    if per not in ("class", "image"):
        raise InputError(f"per must be 'class' or 'image', got {per!r}.")
    excluded = frozenset([exclude] if isinstance(exclude, str) else exclude)
    excluded |= frozenset() if known_bad else frozenset(KNOWN_BAD)
    given = Path(path)
    if given.suffix == ".json":
        index, store = given, _near(given)
    else:
        store = _rooted(open_store(given))
    files = [Path(index)] if index is not None else _lists(store, cache)
    chosen = [file for file in files if split is None or split_of(file) == split]
    if not chosen:
        raise InputError(
            f"SA-Med2D has no list of split {split!r} in {str(store)!r}; it has no splits itself."
        )
    table = File(os.fspath(classes)).read() if classes is not None else _read(store, CLASSES)
    names, report, parts = class_names(table), ReadReport(), []
    for file in chosen:
        scan = _Scan(names, excluded, Listing(store, report) if verify else None, report)
        rows, _ = index_json(file, scan)
        items = np.array(scan.items, np.uint64)
        bounds = None
        if per == "image":
            first = np.flatnonzero(np.diff(items >> np.uint64(_CLASS_BITS), prepend=np.uint64(2**48)))
            bounds = np.append(first, len(items)).astype(np.uint64)
        parts.append((ClassRows(rows, items, bounds), None, SaMed2dRow(store, split_of(file), names)))
    return build("SA-Med2D", parts, report, "Give the folder or zip that holds images/ and masks/.")


class ClassRows:
    """Rows of (image, masks) with the classes wanted of each: an item is image number << 16 | class.

    Row i is item i, or with `bounds` the items from bounds[i] to bounds[i + 1], which are of one image.
    """

    def __init__(self, rows: Rows, items: np.ndarray, bounds: np.ndarray | None = None) -> None:
        self.rows, self.items, self.bounds = rows, items, bounds
        self.digest = rows.digest

    def __len__(self) -> int:
        return len(self.items) if self.bounds is None else len(self.bounds) - 1

    def __getitem__(self, index: int) -> tuple[Any, list[int]]:
        start, end = (index, index + 1) if self.bounds is None else map(int, self.bounds[index : index + 2])
        items = self.items[start:end].tolist()
        return self.rows[items[0] >> _CLASS_BITS], [item & ((1 << _CLASS_BITS) - 1) for item in items]

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        own = self.items.nbytes + (0 if self.bounds is None else self.bounds.nbytes)
        return own + self.rows.nbytes


@dataclass(frozen=True)
class SaMed2dRow:
    """Makes the grounding Record of (row of the list, classes)."""

    store: Store
    split: str | None
    classes: dict[str, dict[int, str]]
    settings = "sa_med2d"

    def __call__(self, row: Any, number: int) -> Record:
        listed, wanted = row
        image, masks = pair(listed)
        name, grouped = slice_name(image), by_class(masks)
        labels = {c: spoken(self.classes[name.dataset][c]) for c in wanted}
        return Record(
            turns=tuple((f"Segment the {label}.", present_answer([label])) for label in labels.values()),
            images=(ImageFile(self.store.file(image)),),
            masks=tuple(self._mask(grouped[c]) for c in labels),
            source="sa_med2d",
            row=number,
            modality=name.modality,
            case=name.patient,
            split=self.split,
            labels=tuple(labels.values()),
            extra={"dataset": name.dataset, "prefix": name.prefix},
        )

    def _mask(self, names: Sequence[str]) -> MaskFile | UnionMask:
        masks = tuple(MaskFile(self.store.file(name)) for name in names)
        return masks[0] if len(masks) == 1 else UnionMask(masks)


def pair(row: Any) -> tuple[str, list[str]]:
    """(image, its masks) of a row of either list. Raises Unusable."""
    if not isinstance(row, Sequence) or len(row) != 2:
        raise Unusable("not an image with its masks")
    first, second = row
    image, masks = (second, [first]) if isinstance(second, str) else (first, second)
    if not isinstance(masks, list) or not all(isinstance(name, str) for name in (image, *masks)):
        raise Unusable("not an image with its masks", str(first)[:80])
    return with_suffix(_inside(image, "images")), [with_suffix(_inside(mask, "masks")) for mask in masks]


def by_class(masks: Sequence[str]) -> dict[int, list[str]]:
    """{class number: its masks}, by the numbers in their names; names of another kind are left out."""
    grouped: dict[int, list[str]] = {}
    for mask in masks:
        name = slice_name(mask)
        if name is not None and name.class_id is not None:
            grouped.setdefault(name.class_id, []).append(mask)
    return dict(sorted(grouped.items()))


class _Scan:
    """Looks at each row while the list is parsed: what is kept and reported, the classes of each image."""

    def __init__(
        self,
        classes: dict[str, dict[int, str]],
        exclude: frozenset[str],
        listing: Listing | None,
        report: ReadReport,
    ) -> None:
        self.classes, self.exclude, self.listing, self.report = classes, exclude, listing, report
        self.items = array("Q")

    def __call__(self, number: int, row: Any) -> bool:
        try:
            found = self._classes(row)
        except Unusable as error:
            self.report.add("dropped", error.kind, error.example or f"row {number}")
            return False
        self.items.extend((number << _CLASS_BITS) | c for c in found)
        return True

    def _classes(self, row: Any) -> list[int]:
        image, masks = pair(row)
        name = slice_name(image)
        if name is None:
            raise Unusable("not a name of SA-Med2D", image)
        if name.dataset in self.exclude:
            raise Unusable(f"data set {name.dataset} excluded", image)
        if self.listing is not None and not self.listing.has(image):
            raise Unusable("image missing", image)
        if name.modality is None:
            self.report.add("unknown", f"modality prefix {name.prefix!r}", image)
        found = [c for c, files in by_class(masks).items() if self._usable(name, c, files)]
        if not found:
            raise Unusable("image without a usable mask", image)
        return found

    def _usable(self, name: SliceName, number: int, files: Sequence[str]) -> bool:
        missing = [file for file in files if self.listing is not None and not self.listing.has(file)]
        if missing:
            self.report.add("dropped", "mask missing", missing[0])
        if number not in self.classes.get(name.dataset, {}) or number >> _CLASS_BITS:
            self.report.add("dropped", "class without a name", f"{name.dataset} {number}")
            return False
        return not missing


def _inside(name: str, folder: str) -> str:
    """The name from its last `folder`/ on: SAM-Med2D's lists put other folders before it."""
    _, slash, tail = name.replace("\\", "/").rpartition(f"{folder}/")
    return slash + tail if slash else f"{folder}/{name}"


def _rooted(store: Store) -> Store:
    """For a zip the folder in it that holds images/ (or the list)."""
    if store.prefix is None:
        return store
    for name in archive_at(store.path).names():
        for mark in (INDEX, "images/", "masks/"):
            head, found, _ = name.partition(mark)
            if found and (not head or head.endswith("/")):
                return Store(store.path, head)
    raise InputError(f"{store.path!r} holds neither {INDEX} nor images/. Is this SA-Med2D's archive?")


def _near(file: Path) -> Store:
    """The folder beside or above a list that holds images/."""
    for folder in (file.parent, file.parent.parent):
        if (folder / "images").is_dir():
            return Store(str(folder.resolve()))
    return Store(str(file.parent.resolve()))


def _lists(store: Store, cache: str | os.PathLike | None) -> list[Path]:
    """The JSON lists of a folder, or that of a zip unpacked."""
    if store.prefix is None:
        own = Path(store.path) / INDEX
        return [own] if own.is_file() else find_files(store.path, LISTS, f"{INDEX} or SAM-Med2D's list")
    name = store.prefix + INDEX
    member = archive_at(store.path).find(name)
    if member is None:
        raise InputError(f"{store.path!r} holds no {INDEX}; give it by index=FILE.")
    base = Path(cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser()
    folder = base if cache else base / "medplib"
    target = folder / f"sa_med2d-{member.crc:08x}-{member.size}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_size != member.size:
            archive_at(store.path).unpack_to(name, target)
    except OSError as error:
        raise InputError(
            f"The list in {store.path!r} cannot be unpacked to {str(folder)!r}: {error}. Give cache=FOLDER."
        ) from error
    return [target]


def _read(store: Store, name: str) -> bytes:
    file = store.file(name)
    if not file.exists():
        raise InputError(f"{str(store)!r} holds no {name}; give it by classes=FILE.")
    return file.read()
