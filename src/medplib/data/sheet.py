"""contact_sheet: many records on one picture, with their masks and regions drawn and their words below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medplib.data.record import Record, fit_mask
from medplib.errors import InputError
from medplib.io.overlay import draw_overlay
from medplib.prompts.types import Box, Point

_LINES = 4  # of words below each picture
_BACKGROUND, _TEXT, _PROBLEM = (24, 24, 24), (235, 235, 235), (255, 120, 120)


def contact_sheet(
    records: Sequence[Record],
    path: str | os.PathLike | None = None,
    columns: int = 4,
    tile: int = 224,
) -> Image.Image:
    """A picture of `records`, `columns` in a row, each in a square of `tile` pixels with its words below.

    Shown is each record's last image, where its masks and regions lie: masks filled in colour, regions
    outlined in white. A record that cannot be read is shown as its error. With `path` the picture is also
    written there. Raises InputError for no records, a tile below 32 pixels, or a path that cannot be written.
    """
    if not len(records):
        raise InputError("A contact sheet needs at least one record, got none.")
    if columns < 1 or tile < 32:
        raise InputError(f"A contact sheet needs columns >= 1 and tile >= 32, got {columns} and {tile}.")
    columns = min(columns, len(records))
    size = max(10, tile // 20)
    font, gap, line = ImageFont.load_default(size), 4, round(size * 1.35)
    width, height = tile + gap, tile + gap + line * _LINES
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        left, top = gap + i % columns * width, gap + i // columns * height
        colour, words = _TEXT, _words(record)
        try:
            picture = _tile(record, tile)
        except InputError as error:
            colour, words, picture = _PROBLEM, f"{record.source} {record.row}: {error}", None
        if picture is not None:
            sheet.paste(picture, (left + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
        for number, text in enumerate(_wrap(words, font, tile)):
            draw.text((left, top + tile + number * line), text, fill=colour, font=font)
    if path is not None:
        try:
            sheet.save(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The contact sheet cannot be written to {os.fspath(path)!r}: {error}. Give a .png path in a "
                "folder that can be written."
            ) from error
    return sheet


def _words(record: Record) -> str:
    question, answer = record.turns[0]
    more = f" (+{len(record.turns) - 1} turns)" if len(record.turns) > 1 else ""
    return f"{record.source} {record.row}: {question} | {answer}{more}"


def _tile(record: Record, tile: int) -> Image.Image | None:
    """The last image, its longest side `tile` pixels, with what the record points at."""
    if not record.images:
        return None
    image = record.images[-1].load()
    height, width = image.shape[:2]
    scale = tile / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    masks = [fit_mask(mask, size) for mask in record.load_masks((height, width))]
    prompts: list[Any] = []
    for region in record.load_regions((height, width)):
        if isinstance(region, Point):
            prompts.append(Point(region.x * scale, region.y * scale, region.label))
        elif isinstance(region, Box):
            x0, y0, x1, y1 = (
                float(np.clip(side * scale, 0, size[i % 2 == 0]))
                for i, side in enumerate((region.x0, region.y0, region.x1, region.y1))
            )
            prompts.append(Box(x0, y0, max(x1, x0 + 1e-3), max(y1, y0 + 1e-3)))
        else:
            prompts.append(_Outline(fit_mask(region.mask, size)))
    return draw_overlay(small, masks, (), prompts)


class _Outline:
    """A region's mask as `draw_overlay` takes it; unlike Mask it may be empty at this size."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def to_mask(self, size: tuple[int, int]) -> np.ndarray:
        return self.mask


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most `_LINES` lines of `width` pixels; what does not fit ends in an ellipsis."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:400]
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("ascii", "replace").decode()
    lines = [""]
    for word in text.split(" "):
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        while font.getlength(word) > width:
            word = word[: max(1, len(word) * 3 // 4)]
        lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][: max(1, len(lines[_LINES - 1]) - 3)] + "..."]
    return lines
