"""Samples as one picture: what a batch holds, and what the model answers, masks drawn and words below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medplib.io.overlay import draw_overlay

_SIDE, _FONT, _LINES, _GAP = 256, 12, 7, 6
_BACKGROUND, _TEXT = (24, 24, 24), (235, 235, 235)


@dataclass
class Tile:
    """An image uint8 (H, W, 3) or None, masks bool (H, W) and prompts drawn on it, and the words below."""

    image: np.ndarray | None
    words: str
    masks: Sequence[np.ndarray] = ()
    prompts: Sequence[object] = ()


def draw_tiles(tiles: Sequence[Tile], columns: int = 4) -> Image.Image:
    """All tiles, `columns` in a row, each image in a square of 256 pixels."""
    columns = min(columns, len(tiles))
    font, line = ImageFont.load_default(_FONT), round(_FONT * 1.3)
    width, height = _SIDE + _GAP, _SIDE + _LINES * line + _GAP
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        left, top = i % columns * width, i // columns * height
        if tile.image is not None:
            masks = [np.asarray(mask, dtype=bool) for mask in tile.masks]
            drawn = draw_overlay(tile.image, masks, [""] * len(masks), tile.prompts)
            drawn = drawn.crop((0, 0, tile.image.shape[1], tile.image.shape[0]))  # without the legend
            drawn.thumbnail((_SIDE, _SIDE))
            sheet.paste(drawn, (left, top))
        lines = [part for text in tile.words.splitlines() for part in textwrap.wrap(text, 40) or [""]]
        for number, text in enumerate(lines[:_LINES]):
            draw.text((left, top + _SIDE + number * line), text, fill=_TEXT, font=font)
    return sheet
