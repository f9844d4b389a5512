"""MeCoVQAFolder: a data set in MeCoVQA's layout, written beside its place and moved there when complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from PIL import Image

from medplib.conversation import IMAGE, REGION, SEG
from medplib.data.builder.pairs import Pair, Target
from medplib.data.files import File, ImageFile, MaskFile
from medplib.data.names import safe_part, slice_name
from medplib.data.record import Record
from medplib.data.samples import ImageSample
from medplib.errors import InputError, MedPLIBError

MARK = "build.json"  # its presence says that a folder is ours to replace
NAMES = {"grounding": "MeCoVQA-Grounding", "region": "MeCoVQA-Region", "complex": "MeCoVQA-Complex"}


class MeCoVQAFolder:
    """Context manager. Inside it the data are in `work`; on a clean exit `work` becomes `out`, after an error
    nothing of it stays.

    link: files of the source are hard-linked where the disk allows it, else copied. overwrite: replace a
    folder that an earlier build wrote. Raises InputError when `out` is in the way, MedPLIBError when it
    cannot be written.
    """

    def __init__(
        self, out: str | os.PathLike, types: Sequence[str], *, link: bool = True, overwrite: bool = False
    ) -> None:
        self.out, self.types, self.link = Path(out).expanduser().resolve(), tuple(types), link
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{str(out)!r} is a file; give the path of a folder.")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not overwrite:
                raise InputError(f"{str(out)!r} is not empty; choose another folder, or overwrite it.")
            if not (self.out / MARK).is_file():
                raise InputError(
                    f"{str(out)!r} is not overwritten: it holds no {MARK}, so medplib did not build it."
                )
        self._lists: dict[tuple[str, str], _JsonList] = {}
        self._images: dict[int, str] = {}
        self._written: dict[str, str] = {}

    def __enter__(self) -> MeCoVQAFolder:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        except OSError as error:
            raise MedPLIBError(f"{str(self.out)!r} cannot be written: {error}.") from error
        self.work = self._staging / "new"  # with the rights of an ordinary folder
        for folder in ("train", "test", "images", "masks"):
            (self.work / folder).mkdir(parents=True)
        self._lists = {
            (split, task): _JsonList(self.work / split / f"{NAMES[task]}.json")
            for split in ("train", "test")
            for task in self.types
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for rows in self._lists.values():
                rows.close()
            if kind is None:
                if self.out.exists():
                    self.out.rename(self._staging / "old")
                try:
                    self.work.rename(self.out)
                except OSError:
                    if (self._staging / "old").exists():
                        (self._staging / "old").rename(self.out)
                    raise
        except OSError as failure:
            raise MedPLIBError(f"{str(self.out)!r} could not be written: {failure}.") from failure
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def add_image(self, sample: ImageSample, number: int) -> str:
        """The image's path in the data set, "images/x.png"; linked, copied or encoded.

        A name that is not of SA-Med2D's kind becomes one, which tells modality, data set and case.
        """
        file = sample.image if isinstance(sample.image, Path) else None
        if file is not None and slice_name(file.name) is not None:
            stem = file.stem
        else:
            prefix = f"{sample.modality.lower()}_00".replace("-ray_00", "_ray")
            stem = "--".join(map(safe_part, (prefix, sample.dataset, sample.case, f"{number:06d}")))
        path = f"images/{stem}.png"
        if file is not None and file.suffix.lower() == ".png":
            self._link(file, path)
        else:
            self._encode(sample.load_image(), path)
        return path

    def add_mask(self, image: str, target: Target) -> str:
        """The mask's path, "masks/x.png"; its own file where it has one, else 0 and 255."""
        if target.file is not None and target.file.suffix.lower() == ".png":
            known = slice_name(target.file.name) is not None
            path = f"masks/{target.file.name if known else f'{Path(image).stem}--{target.label}.png'}"
            self._link(target.file, path)
        else:
            path = f"masks/{Path(image).stem}--{target.label}.png"
            self._encode(target.mask.astype(np.uint8) * np.uint8(255), path)
        return path

    def add_row(
        self, split: str, task: str, image: str, pairs: Sequence[Pair], answers: Sequence[str]
    ) -> Record:
        """One conversation, its masks written too; returned as the checked Record that it is."""
        turns, regions, masks = [], [], []
        for i, (pair, answer) in enumerate(zip(pairs, answers, strict=True)):
            here = [self.add_mask(image, target) for target in pair.regions]
            drawn = [self.add_mask(image, target) for target in pair.masks]
            question = _tagged(pair.question, REGION, here, "region")
            turns.append({"from": "human", "value": question if i else f"{IMAGE}\n{question}"})
            turns.append({"from": "gpt", "value": _tagged(answer, SEG, drawn, "mask")})
            regions, masks = regions + here, masks + drawn
        row: dict[str, Any] = {"image": image, "conversations": turns}
        closed = "closed" if all(pair.closed for pair in pairs) else "open"
        if len(pairs) == 1:
            row["answer_type"] = closed
        record = Record(
            tuple((pair.question, answer) for pair, answer in zip(pairs, answers, strict=True)),
            (ImageFile(self._file(image)),),
            tuple(MaskFile(self._file(path)) for path in regions),
            tuple(MaskFile(self._file(path)) for path in masks),
            source=task,
            row=self._lists[split, task].rows,
            answer_type=closed,
            split=split,
        )
        self._lists[split, task].add(row)
        return record

    def _file(self, path: str) -> File:
        return File(str(self.work / path))

    def add_file(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file at the top of the folder."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self.work / name).write_text(text, encoding="utf-8")

    def _link(self, source: Path, path: str) -> None:
        if self._new(path, f"file {source}"):
            target = self.work / path
            try:
                if not self.link:
                    raise OSError
                os.link(source.resolve(), target)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source, target)

    def _encode(self, pixels: np.ndarray, path: str) -> None:
        if self._new(path, hashlib.sha256(pixels.tobytes()).hexdigest()):
            Image.fromarray(pixels).save(self.work / path)

    def _new(self, path: str, content: str) -> bool:
        """Whether a file is still to be written. Raises InputError when its name is taken by another one."""
        if self._written.setdefault(path, content) != content:
            raise InputError(
                f"Two different files of the source would both be {path!r}; give the files different names."
            )
        return not (self.work / path).exists()


def _tagged(text: str, token: str, paths: Sequence[str], tag: str) -> str:
    """Each token with its file: "<SEG><mask>masks/x.png</mask>", "<region>masks/x.png</region>"."""
    pieces = text.split(token)
    out = pieces[0]
    for path, piece in zip(paths, pieces[1:], strict=True):
        out += (f"<{tag}>" if token == REGION else f"{token}<{tag}>") + f"{path}</{tag}>" + piece
    return out


class _JsonList:
    """A JSON list written row by row, so that memory does not grow with it."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8", newline="\n")
        self._file.write("[")
        self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(("," if self.rows else "") + "\n" + json.dumps(row, ensure_ascii=False))
        self.rows += 1

    def close(self) -> None:
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()
