"""Answer and Finding: text, masks with labels and scores, the picture, and the files of one answer.

Letters: H, W = height and width of an original image, S findings (one per `<SEG>` in the text).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import html
import io
import json
import math
import os
import platform
import re
import unicodedata
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from medplib.errors import InputError
from medplib.io import rle
from medplib.io.folder import write_together
from medplib.io.overlay import COLOURS, FILL, draw_overlay

NOTICE = "Research use only. Not a medical device."

_DESCRIP = slice(148, 228)  # of a NIfTI header
_OUR_NAMES = re.compile(
    r"answer\.json|overlay(_\d+)?\.png|mask_\d+_[a-z0-9_]+\.(png|nii\.gz)|segmentation\.dcm"
)
SOFTWARE = "medplib"  # written into our files, so that they are known as ours later


@dataclasses.dataclass(eq=False)
class Finding:
    """One structure the model points at.

    label: its name; mask: bool (H, W) in pixels of the original image; score: the mean
    probability of the mask's pixels, 0 to 1, not calibrated; image: index of the image it was found in.
    """

    label: str
    mask: np.ndarray
    score: float
    image: int = 0

    def __post_init__(self) -> None:
        self.mask = np.asarray(self.mask)
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_ or self.mask.size == 0:
            raise InputError(
                f"The mask of {self.label!r} must be bool (height, width), "
                f"got {self.mask.dtype} {self.mask.shape}; compare with a threshold first."
            )
        if not isinstance(self.label, str):
            raise InputError(f"A finding's label must be a text, got {self.label!r}.")
        for name, kind in (("score", float), ("image", int)):
            try:
                setattr(self, name, kind(getattr(self, name)))
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f"A finding's {name} must be a number, got {getattr(self, name)!r}."
                ) from None

    @property
    def area(self) -> int:
        """Number of pixels in the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) around the mask, x1 and y1 just outside it; None if the mask is empty."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        if rows.size == 0:
            return None
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the mask as COCO RLE."""
        return {
            "label": self.label,
            "score": self.score if math.isfinite(self.score) else None,
            "box": list(self.box) if self.box else None,
            "area": self.area,
            "image": self.image,
            "rle": rle.encode(self.mask),
        }

    def __repr__(self) -> str:
        return f"Finding({self.label!r}, score={self.score:.3f}, area={self.area}, box={self.box})"


@dataclasses.dataclass(eq=False, repr=False)
class Answer:
    """What the model said and showed.

    images: uint8 (H, W, 3) each, the originals; prompts: the Points, Boxes and Masks of the question and of
    those before it; prompt_images: index of the image that each lies on, by default the first;
    model: {"name": ..., "weights_sha256": ...}; seed: of the random numbers, if any; history: (question,
    answer) turns up to this one, with the control tokens that the model wrote, as the next question of the
    conversation needs them.

        answer = model.ask("chest_ct.png", "Segment the right lung.")
        answer.text, answer.findings[0].box, answer.masks     # masks: bool (S, H, W)
        answer.save("out/")
    """

    text: str
    findings: list[Finding]
    images: list[np.ndarray]
    question: str = ""
    prompts: tuple = ()
    model: dict = dataclasses.field(default_factory=dict)
    seed: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    prompt_images: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"An answer's text must be a text, got {self.text!r:.80}.")
        for name in ("findings", "images"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise InputError(f"An answer's {name} come in a list, got {_form(values)}.")
            setattr(self, name, list(values))
        self.prompts = tuple(self.prompts or ())
        self.prompt_images = tuple(self.prompt_images) or (0,) * len(self.prompts)
        if len(self.prompt_images) != len(self.prompts):
            raise InputError(f"prompt_images must name an image for each prompt, got {self.prompt_images!r}.")
        for image in self.images:
            if not (
                isinstance(image, np.ndarray)
                and image.dtype == np.uint8
                and image.shape[2:] == (3,)
                and image.size
            ):
                raise InputError(
                    f"An answer's images must be uint8 (H, W, 3), got {_form(image)}; use load_image."
                )
        for finding in self.findings:
            if not isinstance(finding, Finding):
                raise InputError(f"An answer's findings must be Findings, got {finding!r:.80}.")
            size = self._image(finding.image).shape[:2]
            if finding.mask.shape != size:
                raise InputError(
                    f"The mask of {finding.label!r} is {finding.mask.shape}, "
                    f"its image is {size} (height, width); bring it back to the original image first."
                )

    @property
    def masks(self) -> np.ndarray | list[np.ndarray]:
        """bool (S, H, W); a list of (H, W) if the findings lie in images of different sizes."""
        masks = [finding.mask for finding in self.findings]
        if not masks:
            return np.zeros((0, *(self.images[0].shape[:2] if self.images else (0, 0))), bool)
        return np.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks

    def overlay(
        self,
        image: int = 0,
        *,
        colors: Sequence[tuple[int, int, int]] = COLOURS,
        fill: float = FILL,
        legend: bool = True,
    ) -> Image.Image:
        """The image with its findings drawn on it, the prompts in white, and the labels in a strip below.

            answer.overlay(colors=[(255, 0, 0)], fill=0.2, legend=False).save("figure.png")   # H x W

        colors: of the findings, in turn; fill: from 0, contours alone, to 1. The top left H x W pixels are
        the image's own. Raises InputError if there is no such image, and for such colors or such a fill.
        """
        picture = self._image(image)
        here = [finding for finding in self.findings if finding.image == image]
        prompts = [p for p, on in zip(self.prompts, self.prompt_images, strict=True) if on == image]
        labels = [f.label for f in here] if legend else []
        return draw_overlay(picture, [f.mask for f in here], labels, prompts, colors=colors, fill=fill)

    def to_dict(self) -> dict[str, Any]:
        """What `answer.json` holds: plain values only."""
        return {
            "text": self.text,
            "question": self.question,
            "findings": [finding.to_dict() for finding in self.findings],
            "prompts": list(map(self._describe_prompt, self.prompts, self.prompt_images)),
            "images": [{"size": [int(side) for side in image.shape[:2]]} for image in self.images],
            "model": {"name": None, "weights_sha256": None, **self.model},
            "versions": versions(),
            "seed": self.seed,
            "history": [list(turn) for turn in self.history],
            "notice": NOTICE,
        }

    def save(self, folder: str | os.PathLike, *, dicom_seg: str | os.PathLike | None = None) -> list[Path]:
        """Write the overlays, one PNG per mask (0 and 255) and answer.json; returns the paths.

        dicom_seg: the DICOM file that the first image is the first frame of; segmentation.dcm is then written
        too, unless nothing was drawn in it. See `save_dicom_seg`: it alone repeats who the patient is.

        The folder is made if need be. All files appear together or, after an error, none: files of an earlier
        answer are replaced only when the new ones are complete, and files of others stay. Raises InputError
        if a foreign file has one of the names, MedPLIBError if the folder cannot be written.
        """
        files: dict[str, bytes] = {}
        if dicom_seg is not None and any(f.area for f in self.findings if f.image == 0):
            files["segmentation.dcm"] = self._dicom_seg(dicom_seg)
        for i in range(len(self.images)):
            files["overlay.png" if i == 0 else f"overlay_{i}.png"] = png(self.overlay(i))
        record = self.to_dict()
        for i, finding in enumerate(self.findings):
            name = f"mask_{i}_{file_label(finding.label)}.png"
            files[name] = png(Image.fromarray(finding.mask.astype(np.uint8) * np.uint8(255)))
            record["findings"][i]["file"] = name
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        files["answer.json"] = (text + "\n").encode("utf-8", "backslashreplace")  # lone surrogates as \udcXX
        return write_together(folder, files, is_ours)

    def save_dicom_seg(
        self, path: str | os.PathLike, source: str | os.PathLike, frame: int = 0, image: int = 0
    ) -> Path:
        """Write the findings of an image as a DICOM Segmentation object, a segment for each.

            model.segment("scan.dcm", "the right lung").save_dicom_seg("seg.dcm", "scan.dcm")

        source, frame: the DICOM file that the image was read from, and which of its frames, from 0. By design
        of the standard (PS3.3 A.51) the patient's identity, the study and the scanner are repeated from it.
        Nothing else that medplib writes does so. Raises InputError if source is no such file or nothing was
        drawn, MedPLIBError if the folder cannot be written, ImportError without highdicom
        (`medplib[dicom-seg]`); there is no file then.
        """
        from medplib.io.dicom_seg import write

        return write(path, self._dicom_seg(source, frame, image))

    def _dicom_seg(self, source: str | os.PathLike, frame: int = 0, image: int = 0) -> bytes:
        from medplib.io.dicom_seg import of_picture

        self._image(image)
        here = [finding for finding in self.findings if finding.image == image]
        return of_picture(source, frame, [f.mask for f in here], [f.label for f in here], self.model)

    def _image(self, index: int) -> np.ndarray:
        if not isinstance(index, Integral) or not 0 <= index < len(self.images):
            raise InputError(
                f"There is no image {index!r}; this answer has {len(self.images)}, counted from 0."
            )
        return self.images[index]

    def _describe_prompt(self, prompt: Any, image: int) -> dict[str, Any]:
        """A prompt as plain values, with its image unless that is the first; whatever is not made of numbers
        is written as the mask it stands for."""
        kind: dict[str, Any] = {"type": type(prompt).__name__.lower()}
        if image:
            kind["image"] = int(image)
        values = {f.name: getattr(prompt, f.name) for f in dataclasses.fields(prompt)}
        if all(isinstance(value, (int, float, np.number)) for value in values.values()):
            return kind | {k: getattr(v, "item", lambda v=v: v)() for k, v in values.items()}
        return kind | {"rle": rle.encode(prompt.to_mask(self._image(image).shape[:2]))}

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        found = ", ".join(f"{f.label} {f.score:.2f} ({f.area} px)" for f in self.findings[:4])
        more = f", and {len(self.findings) - 4} more" if len(self.findings) > 4 else ""
        return f"Answer({text!r}; {found}{more})" if found else f"Answer({text!r}; no findings)"

    def _repr_png_(self) -> bytes | None:
        return png(self.overlay(0)) if self.images else None

    def _repr_html_(self) -> str:
        pictures = "".join(
            f'<img alt="image {i} with findings" src="data:image/png;base64,'
            f'{base64.b64encode(png(self.overlay(i))).decode("ascii")}" style="max-width: 100%">'
            for i in range(len(self.images))
        )
        question = f"<b>{html.escape(self.question)}</b><br>" if self.question else ""
        caption = f"{question}{html.escape(self.text)}<br><small>{html.escape(NOTICE)}</small>"
        return f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"


def file_label(label: str) -> str:
    """A label as a piece of a file name: lower-case ASCII letters, digits and single underscores."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:40].rstrip("_") or "finding"


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of medplib, Python and what computes; None for a package that is not installed. No imports."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("medplib", "torch", "transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _form(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file that says where it comes from."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", SOFTWARE)
    notes.add_text("Comment", NOTICE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def is_ours(path: Path) -> bool:
    """Whether an earlier `save` wrote this file: by its name and by what it says about itself."""
    if not _OUR_NAMES.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
            return isinstance(record, dict) and record.get("notice") == NOTICE
        if path.suffix == ".dcm":
            from medplib.io import dicom_seg

            return dicom_seg.is_ours(path)
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read(_DESCRIP.stop)[_DESCRIP].startswith(SOFTWARE.encode())
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError, RecursionError):
        return False
