"""What a user of the demo has open: a picture, the places pointed at, the conversation. Knows no web page.

H, W = height and width of the picture. Points and boxes are (x, y) in its pixels. Everything lies in memory
or in a folder that goes with the session; an upload is deleted as soon as it is read.
"""

from __future__ import annotations

import functools
import itertools
import re
import secrets
import shutil
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medplib.errors import InputError, is_number

if TYPE_CHECKING:
    import numpy as np

    from medplib.results import Answer

KINDS = ("point", "box (two clicks)")
MAX_VOXELS = 1 << 28  # of a volume, here; twice 512 x 512 x 512
SESSIONS = "sessions"  # the folder of their folders, beside the uploads
_KEPT = 4  # files of a kind: a browser may still be fetching the one before


class Session:
    """One conversation about one picture.

    session = Session(model, folder)
    session.open(upload)                      # the file is read and deleted
    session.click(80, 130, "point")
    session.ask("What is in <region>?").text
    session.ask("And in the picture as a whole?")

    Every method raises InputError, or what `load_image`, `load_volume` and `ask` raise, and then leaves the
    session as it was. Messages call the upload "upload", whatever its name was.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.picture: np.ndarray | None = None  # uint8 (H, W, 3)
        self.slices, self.slice = 1, 0  # how many there are, which of them is the picture
        self.places: list[Any] = []  # the Points and Boxes of the next question
        self.corner: tuple[float, float] | None = None  # of a box whose other corner is not there yet
        self.answer: Answer | None = None
        self.turns: list[tuple[str, str]] = []  # as they are read: without control tokens
        self._read: Callable[[int], np.ndarray] | None = None
        self._count = itertools.count(1)

    def open(self, upload: Path, name: str = "") -> None:
        """A picture, a DICOM file or a NIfTI volume takes the place of what was open. name: for its suffix.

        The file is deleted, also if it cannot be read.
        """
        ending = re.search(r"(\.nii)?\.[a-z0-9]{1,8}$", (name or upload.name).lower())
        path = self.folder / f"upload{ending[0] if ending else ''}"
        try:
            upload.replace(path)
            read, slices, first = _reader(path)
            picture = read(first)
        finally:
            upload.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._read, self.slices = read, slices
        self._show(picture, first)

    def turn_to(self, index: Any) -> None:
        """Another slice of the volume or frame of the file, from 0. It begins a new conversation."""
        if self._read is None:
            raise InputError("Open an image first.")
        if not is_number(index) or index != int(index) or not 0 <= index < self.slices:
            raise InputError(f"Slices are numbered from 0 to {self.slices - 1}, got {index!r}.")
        if index != self.slice:
            self._show(self._read(int(index)), int(index))

    def click(self, x: Any, y: Any, kind: Any) -> None:
        """A click on the picture: a point, or with kind "box (two clicks)" one corner of a box."""
        from medplib.prompts.types import Box, Point

        size = self._open_picture().shape[:2]
        if kind not in KINDS:
            raise InputError(f"A click sets one of: {', '.join(KINDS)}; got {kind!r}.")
        place = Point(x, y)
        place.check(size)
        if kind == "point":
            self.places.append(place)
            self.corner = None
        elif self.corner is None:
            self.corner = (x, y)
        else:
            (x0, x1), (y0, y1) = sorted((self.corner[0], x)), sorted((self.corner[1], y))
            box = Box(x0, y0, min(x1 + 1, size[1]), min(y1 + 1, size[0]))  # the second pixel belongs to it
            box.check(size)
            self.places.append(box)
            self.corner = None

    def forget_places(self) -> None:
        """The places of the next question; those of questions asked stay theirs."""
        self.places, self.corner = [], None

    def ask(self, question: Any) -> Answer:
        """The answer to a question that goes on from the answers before it, with the places clicked since."""
        picture = self._open_picture()
        if not isinstance(question, str) or not question.strip():
            raise InputError("The question is empty. Write one, for example: Segment the right lung.")
        before = picture if self.answer is None else self.answer
        answer = self.model.ask(before, question.strip(), self.places)
        self.answer = answer
        self.turns.append((question.strip(), answer.text))
        self.forget_places()
        return answer

    def begin_again(self) -> None:
        """A new conversation about the same picture."""
        self.answer, self.turns = None, []
        self.forget_places()
        for path in self.folder.iterdir():
            path.unlink()

    def findings(self) -> list[list[Any]]:
        """[label, score, area in pixels] of each finding of the last answer."""
        found = [] if self.answer is None else self.answer.findings
        return [[finding.label, round(finding.score, 3), finding.area] for finding in found]

    def save_picture(self) -> Path:
        """A PNG of the picture with all places on it, of the same size."""
        from medplib.io.overlay import draw_overlay
        from medplib.prompts.types import Point

        pending = [] if self.corner is None else [Point(*self.corner)]
        asked = () if self.answer is None else self.answer.prompts
        drawn = draw_overlay(self._open_picture(), [], [], [*asked, *self.places, *pending])
        path = self._new("picture", ".png")
        drawn.save(path, compress_level=1)
        return path

    def save_overlay(self) -> Path:
        """A PNG of the last answer. Raises InputError if there is none."""
        path = self._new("overlay", ".png")
        self._last().overlay().save(path, compress_level=1)
        return path

    def save_files(self) -> Path:
        """A zip of the files that `Answer.save` writes. Raises InputError if there is no answer."""
        answer = self._last()
        path = self._new("answer", ".zip")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, zipfile.ZipFile(path, "w") as packed:
            for file in answer.save(folder):
                packed.write(file, file.name, zipfile.ZIP_DEFLATED)
        return path

    def close(self) -> None:
        """Everything is dropped, in memory and on disk."""
        self.picture = self.answer = self._read = None
        self.turns, self.places = [], []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _show(self, picture: np.ndarray, index: int) -> None:
        self.picture, self.slice = picture, index
        self.begin_again()

    def _open_picture(self) -> np.ndarray:
        if self.picture is None:
            raise InputError("Open an image first.")
        return self.picture

    def _last(self) -> Answer:
        if self.answer is None:
            raise InputError("Ask a question first.")
        return self.answer

    def _new(self, kind: str, suffix: str) -> Path:
        """A path for a new file; of those before it, the last few stay."""
        number = next(self._count)
        before = sorted(self.folder.glob(f"{kind}-*{suffix}"))
        for old in before[: max(0, len(before) + 1 - _KEPT)]:
            old.unlink()
        return self.folder / f"{kind}-{number:06d}{suffix}"


def _reader(path: Path) -> tuple[Callable[[int], np.ndarray], int, int]:
    """What reads a slice into a picture (without the file), how many slices, and which is shown first."""
    from medplib.io.images import from_file, is_dicom, load_image

    if path.name.endswith((".nii", ".nii.gz")):
        volume = _volume(path)
        slices = volume.numbers("axial")
        return functools.partial(volume.picture, "axial"), len(slices), len(slices) // 2
    if not is_dicom(path):
        picture = load_image(path)
        return lambda _: picture, 1, 0
    from medplib.io.dicom import guarded, outline, read_dicom

    frames = from_file(path, lambda file, name: guarded(file, name, lambda: outline(file, name))).frames
    if frames == 1:
        picture = read_dicom(path)
        return lambda _: picture, 1, 0
    return functools.partial(read_dicom, path.read_bytes()), frames, 0


def _volume(path: Path) -> Any:
    """The volume of a NIfTI file, in memory and nowhere else. Raises InputError for one that is too large."""
    import dataclasses
    import math

    import numpy as np

    from medplib.io.volume import forget_volumes, load_volume

    shape = _shape(path)
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(
            f"The volume {path.name!r} has {' x '.join(map(str, shape))} voxels; at most {MAX_VOXELS} in all "
            "are read here. Cut out a part."
        )
    try:
        volume = load_volume(path)
        return dataclasses.replace(
            volume, values=np.array(volume.values)
        )  # which may be mapped from the file
    finally:
        forget_volumes()


def _shape(path: Path) -> tuple[int, ...]:
    """As the header says; () for what `load_volume` refuses, in better words."""
    try:
        import nibabel

        return tuple(nibabel.load(path).shape)
    except Exception:  # nibabel answers damaged files with errors of many types
        return ()


class Sessions:
    """The sessions of all browsers, by the keys that these choose; one of them computes at a time.

    root: a folder; in its folder `sessions` each has a folder of an unguessable name. The one used longest
    ago is closed where there would be more than `most`.
    """

    def __init__(self, model: Any, root: Path, most: int = 8) -> None:
        self.model, self.root, self.most = model, root, most
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def using(self, key: str) -> Iterator[Session]:
        """The session of this key, new if need be, for this thread alone."""
        with self._lock:
            if key not in self._open:
                folder = self.root / SESSIONS / secrets.token_urlsafe(16)
                folder.mkdir(parents=True)
                self._open[key] = Session(self.model, folder)
            self._open.move_to_end(key)
            while len(self._open) > self.most:
                self._open.popitem(last=False)[1].close()
            yield self._open[key]

    def close(self, key: str) -> None:
        """End a session and delete what it left; nothing happens if there is none."""
        with self._lock:
            if key in self._open:
                self._open.pop(key).close()


def sweep(root: Path, age: float) -> int:
    """Delete the uploads that nobody opened for `age` seconds; returns how many bytes the others have."""
    left = 0
    for path in sorted(root.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_relative_to(root / SESSIONS):
            continue
        try:
            status, folder = path.stat(), path.is_dir()
            if time.time() - status.st_mtime <= age:
                left += 0 if folder else status.st_size
            elif folder:
                path.rmdir()
            else:
                path.unlink()
        except OSError:  # it has just been opened and is gone, or is a folder that holds something newer
            continue
    return left
