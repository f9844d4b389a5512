"""Drawing findings and prompts on a picture: translucent fill, contour, and a legend below the picture.

Letters: H, W = height and width of the picture. The picture keeps its pixels at the top left, one to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medplib.errors import InputError, is_number

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
PROMPT_COLOUR = (255, 255, 255)
BACKGROUND_POINT_COLOUR = (255, 64, 64)
FILL = 0.35
_LEGEND_BACKGROUND = (24, 24, 24)
_MAX_LABEL = 48


def draw_overlay(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    labels: Sequence[str],
    prompts: Sequence[Any] = (),
    *,
    colors: Sequence[tuple[int, int, int]] = COLOURS,
    fill: float = FILL,
) -> Image.Image:
    """The picture with one colour per mask, the prompts in white, and the labels below.

    image: uint8 (H, W, 3); masks: bool (H, W) each; labels: one text per mask, none for no legend; prompts:
    Point, Box, Mask; colors: (red, green, blue), 0 to 255, taken in turn; fill: how much of the colour lies
    on the mask, 0 (its contour alone) to 1. The result is W wide (wider if a label needs it) and H plus the
    legend high. Raises InputError for colors or a fill that cannot be used.
    """
    if not is_number(fill) or not 0 <= fill <= 1:
        raise InputError(f"fill must be a number from 0 to 1, got {fill!r}.")
    if not isinstance(colors, list | tuple) or not colors or not all(map(_is_colour, colors)):
        raise InputError(f"colors must be (red, green, blue) each, 0 to 255, got {colors!r}.")
    height, width = image.shape[:2]
    canvas = image.astype(np.float32)
    thickness = max(1, round(min(height, width) / 256))
    colours = [tuple(colors[i % len(colors)]) for i in range(len(masks))]
    for i in sorted(
        range(len(masks)), key=lambda i: -np.count_nonzero(masks[i])
    ):  # the smallest wins a pixel
        canvas[masks[i]] = (1 - fill) * image[masks[i]] + fill * np.array(colours[i], np.float32)
    for mask, colour in zip(masks, colours, strict=True):  # contours last: no fill hides them
        canvas[contour(mask, thickness)] = colour
    for prompt in prompts:
        if not hasattr(prompt, "label"):
            canvas[contour(prompt.to_mask((height, width)), thickness)] = PROMPT_COLOUR
    picture = Image.fromarray((canvas + 0.5).astype(np.uint8))
    for prompt in prompts:
        if hasattr(prompt, "label"):
            _draw_point(picture, prompt, thickness)
    return with_legend(picture, labels, colours)


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(isinstance(part, Integral) and 0 <= part <= 255 for part in value)
    )


def contour(mask: np.ndarray, thickness: int = 1) -> np.ndarray:
    """bool (H, W) -> bool (H, W): the pixels of the mask within `thickness` steps of its outside."""
    inner = np.pad(mask, 1)  # the picture's edge counts as outside
    for _ in range(thickness):
        core = inner.copy()
        core[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = core
    return mask & ~inner[1:-1, 1:-1]


def _draw_point(picture: Image.Image, point: Any, thickness: int) -> None:
    """A ring with a cross: white for foreground, red for background."""
    draw = ImageDraw.Draw(picture)
    colour = PROMPT_COLOUR if point.label else BACKGROUND_POINT_COLOUR
    x, y, radius = float(point.x), float(point.y), 4.0 * thickness
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=thickness)
    draw.line((x - radius, y, x + radius, y), fill=colour, width=thickness)
    draw.line((x, y - radius, x, y + radius), fill=colour, width=thickness)


def with_legend(
    picture: Image.Image, labels: Sequence[str], colours: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """The picture with a line below it for each label, in front of it its colour."""
    if not labels:
        return picture
    size = min(32, max(12, picture.width // 32))
    font = ImageFont.load_default(size)
    line, margin = round(size * 1.5), size // 2
    texts = [_one_line(label, font) for label in labels]
    widest = max(round(font.getlength(text)) for text in texts)
    width = max(picture.width, widest + size + 3 * margin)
    sheet = Image.new("RGB", (width, picture.height + line * len(texts) + margin), _LEGEND_BACKGROUND)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for row, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        top = picture.height + margin // 2 + row * line
        swatch = top + (line - size) // 2
        draw.rectangle((margin, swatch, margin + size - 1, swatch + size - 1), fill=colour)
        draw.text((2 * margin + size, top + line // 2), text, fill=(255, 255, 255), font=font, anchor="lm")
    return sheet


def _one_line(label: str, font: Any) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    if len(text) > _MAX_LABEL:
        text = text[: _MAX_LABEL - 3] + "..."
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("ascii", "replace").decode()
