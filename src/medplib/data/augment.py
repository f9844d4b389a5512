"""Random changes to a labelled image: image and masks move together, and left stays left where it has a name.

Letters: H height, W width, M masks, C channels (1 for grey images, else 3), N = H*W output pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from medplib.data.samples import MODALITIES
from medplib.errors import InputError

# What lies outside the picture: black where the scanner's field ends, more tissue where it was cut out.
OUTSIDE = {"histopathology": "mirror", "microscopy": "mirror", "endoscopy": "edge", "dermoscopy": "edge"}
# A slide has no top and no left: flips and quarter turns are allowed.
UNORIENTED = ("histopathology", "microscopy")
COLOUR = ("endoscopy", "dermoscopy", "fundus", "histopathology")

MAX_ROTATION = math.radians(15)
SCALE = (0.8, 1.25)
MAX_SHIFT = 0.08  # of the side
CROP_CHANCE, CROP_ZOOM = 0.25, 1.7
ELASTIC_CHANCE, ELASTIC_SIZE, ELASTIC_GRID = 0.5, 0.015, 5  # displacement (standard deviation) in sides
SKULL_STRIP_CHANCE = 0.2
TONE = (0.3, 0.25, 0.12)  # largest change of log gamma, log contrast, brightness
BLUR_CHANCE, NOISE_CHANCE = 0.2, 0.3


@dataclass(frozen=True)
class Move:
    """Where each output pixel comes from: source = matrix @ (output - centre) + centre + offset + bend.

    matrix (2, 2) and offset (2,) in (x, y) pixels; bend (2, H, W) in pixels or None.
    """

    matrix: np.ndarray
    offset: np.ndarray
    bend: np.ndarray | None = None


def augment(
    image: np.ndarray,
    masks: np.ndarray,
    rng: np.random.Generator,
    *,
    modality: str,
    names: Sequence[str] | None = None,
    table: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A random variant of a labelled image: moved, bent, cropped, and with another intensity.

    image uint8 (H, W, 3), masks bool (M, H, W) -> the same shapes and types, newly made. The same state
    of `rng` gives the same variant. `names` (M), when given, lets an MR image with a "brain" mask lose its
    skull sometimes, and keeps images whose structures are called left or right from being flipped. A mask
    may come back empty or cut, so an object count, or which object is the largest, may no longer be true.
    `table` is the chance that a CT image gets another patient table (see `add_table`).

    Raises InputError for an unknown modality, or shapes or types that do not fit.
    """
    _check(image, masks, modality, names)
    grey = bool((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all())
    pixels = image[..., :1] if grey else image
    if modality == "MR" and rng.random() < SKULL_STRIP_CHANCE:
        pixels, masks = strip_skull(pixels, masks, names or ())
    move = draw_move(rng, image.shape[:2], flips=may_flip(modality, names))
    pixels, masks = resample(pixels, masks, move, outside=OUTSIDE.get(modality, "black"))
    if modality == "CT" and rng.random() < table:
        pixels = add_table(pixels, masks.any(axis=0), rng)
    pixels = change_intensity(pixels, rng, colour=modality in COLOUR)
    return (np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels), masks


def draw_move(rng: np.random.Generator, size: tuple[int, int], flips: bool) -> Move:
    """A random Move for an image of size (H, W): rotation, scale, shear, shift, sometimes crop and bend."""
    height, width = size
    angle, zoom = rng.uniform(-MAX_ROTATION, MAX_ROTATION), math.exp(rng.uniform(*np.log(SCALE)))
    stretch, shear = math.exp(rng.uniform(-0.08, 0.08)), rng.uniform(-0.08, 0.08)
    offset = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * (width, height)
    if rng.random() < CROP_CHANCE:  # a crop is a larger zoom about a point anywhere inside
        crop = rng.uniform(1, CROP_ZOOM)
        zoom *= crop
        offset = offset + rng.uniform(-0.5, 0.5, 2) * (1 - 1 / crop) * (width, height)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ [[stretch, shear], [0, 1 / stretch]] / zoom
    if flips:
        turns = rng.integers(4) if height == width else 2 * rng.integers(2)
        turn = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), int(turns))
        matrix = matrix @ turn @ np.diag([rng.choice([-1, 1]), 1])
    bend = None
    if rng.random() < ELASTIC_CHANCE:
        spread = rng.uniform(0.3, 1) * ELASTIC_SIZE * max(size)
        knots = rng.standard_normal((2, ELASTIC_GRID, ELASTIC_GRID)).clip(-2, 2) * spread
        rows, columns = _spline(height, ELASTIC_GRID), _spline(width, ELASTIC_GRID)
        bend = rows @ knots.astype(np.float32) @ columns.T  # (2, H, W)
    return Move(matrix, offset, bend)


def resample(image: np.ndarray, masks: np.ndarray, move: Move, outside: str) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, C) bilinearly and masks (M, H, W) by nearest neighbour, both at the same source positions.

    outside: what is beyond the border, "black", "edge" or "mirror"; masks follow (nothing, edge, mirror).
    """
    height, width, channels = image.shape
    x, y = source_positions(move, height, width)
    if outside == "black":  # a black frame of one pixel, on which everything beyond the border lands
        image = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        masks = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
        x, y = x + 1, y + 1
    rows, columns = image.shape[:2]
    if outside == "mirror":
        x, y = _reflect(x, columns), _reflect(y, rows)
    np.clip(x, 0, columns - 1, out=x)
    np.clip(y, 0, rows - 1, out=y)

    nearest = (y + 0.5).astype(np.int32) * columns + (x + 0.5).astype(np.int32)  # (H, W)
    # One look-up moves eight masks: bits is (ceil(M/8), rows*columns).
    bits = np.packbits(masks.reshape(len(masks), rows * columns), axis=0)
    moved_masks = np.unpackbits(np.take(bits, nearest, axis=1), axis=0, count=len(masks)).view(bool)

    left, top = np.minimum(x.astype(np.int32), columns - 2), np.minimum(y.astype(np.int32), rows - 2)
    x, y = x - left.astype(np.float32), y - top.astype(np.float32)  # now the fractions, in [0, 1]
    corner = top * columns + left
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32).reshape(channels, -1)
    moved = np.empty((height, width, channels), np.uint8)
    for channel, plane in enumerate(planes):
        upper = plane.take(corner)
        upper += (plane.take(corner + 1) - upper) * x
        lower = plane.take(corner + columns)
        lower += (plane.take(corner + (columns + 1)) - lower) * x
        upper += (lower - upper) * y
        moved[..., channel] = upper + 0.5
    return moved, moved_masks


def change_intensity(image: np.ndarray, rng: np.random.Generator, colour: bool) -> np.ndarray:
    """Another brightness, contrast and gamma (each channel its own where `colour`); sometimes blur or noise.

    uint8 (H, W, C) -> (H, W, C). Bright stays brighter than dark: no inversion.
    """
    channels = image.shape[2]
    table = _tone_table(rng, channels, 0.06 if colour and channels == 3 else 0.0)
    changed = np.empty_like(image)
    for channel in range(channels):
        changed[..., channel] = table[channel].take(image[..., channel])
    if rng.random() < BLUR_CHANCE:
        changed = _blur(changed, rng.uniform(0.4, 1.4))
    if rng.random() < NOISE_CHANCE:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
        changed = (changed + noise + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return changed


def _tone_table(rng: np.random.Generator, channels: int, spread: float) -> np.ndarray:
    """What each of the 256 levels becomes, uint8 (channels, 256), rising; channels differ by `spread`."""
    common = rng.uniform(-1, 1, (3, 1, 1)) * np.array(TONE)[:, None, None]  # gamma, contrast, brightness
    gamma, contrast, brightness = common + rng.uniform(
        -spread, spread, (3, channels, 1)
    )  # (channels, 1) each
    levels = np.linspace(0, 1, 256)[None] ** np.exp(gamma)  # (channels, 256)
    if rng.random() < 0.5:  # half of the time black stays black, as behind a patient
        levels = levels * np.exp(contrast)
    else:
        levels = (levels - 0.5) * np.exp(contrast) + 0.5 + brightness
    return (levels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def strip_skull(image: np.ndarray, masks: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, C) and masks (M, H, W) with everything outside the mask named "brain" black and unmarked.

    Without such a mask, or with an empty one, both come back as they were.
    """
    if "brain" not in names or not masks[list(names).index("brain")].any():
        return image, masks
    brain = masks[list(names).index("brain")]
    return image * brain[..., None], masks & brain


def add_table(image: np.ndarray, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the scanner's patient table outside `body` (H, W): bright curved lines, and other air below them.

    image (H, W, C) uint8 -> the same. Tables differ between scanners; a network that has seen one only takes
    the air below another for something inside the patient.
    """
    height, width = body.shape
    across = (np.arange(width) - width * rng.uniform(0.35, 0.65)) / width  # (W,)
    line = height * (
        rng.uniform(0.8, 1.0) - rng.uniform(-0.2, 1.4) * across**2
    )  # (W,) row of the table's top
    rows = np.arange(height)[:, None]
    out = image.astype(np.int16)
    below = (rows > line) & ~body
    out[below] += rng.integers(-6, 16)
    for _ in range(rng.integers(1, 4)):
        thick, bright = rng.uniform(0.6, 2.5), rng.integers(50, 235)
        dashes = (np.sin(np.arange(width) * rng.uniform(0.1, 0.6)) > -0.2) | (rng.random() < 0.7)  # (W,)
        out[(np.abs(rows - line) < thick) & dashes & ~body] = bright
        line = line + height * rng.uniform(0.02, 0.1)
    return out.clip(0, 255).astype(np.uint8)


def _check(image: np.ndarray, masks: np.ndarray, modality: str, names: Sequence[str] | None) -> None:
    if modality not in MODALITIES:
        raise InputError(f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 2:
        raise InputError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    if masks.ndim != 3 or masks.shape[1:] != image.shape[:2] or masks.dtype != bool:
        raise InputError(
            f"masks must be bool (M, {image.shape[0]}, {image.shape[1]}), got {masks.dtype} {masks.shape}."
        )
    if names is not None and len(names) != len(masks):
        raise InputError(
            f"names must name each of the {len(masks)} masks, got {len(names)}: {', '.join(names)}."
        )


def may_flip(modality: str | None, names: Sequence[str] | None) -> bool:
    """Whether an image may be mirrored: a slide, and none of `names` (labels, texts) says left or right."""
    sided = any(re.search(r"\b(left|right)\b", name, re.IGNORECASE) for name in names or ())
    return modality in UNORIENTED and not sided


def source_positions(move: Move, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and y (H, W), float32, that the output pixels come from; whole numbers are pixel centres."""
    (a, b), (c, d) = move.matrix
    columns, rows = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    x = (a * columns + (width - 1) / 2 + move.offset[0])[None, :] + (b * rows)[:, None]
    y = (c * columns + (height - 1) / 2 + move.offset[1])[None, :] + (d * rows)[:, None]
    x, y = x.astype(np.float32), y.astype(np.float32)
    if move.bend is not None:
        x += move.bend[0]
        y += move.bend[1]
    return x, y


def _reflect(position: np.ndarray, length: int) -> np.ndarray:
    """Positions folded back once at both ends of 0 .. length - 1."""
    return (length - 1) - np.abs((length - 1) - np.abs(position))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    return np.array(picture.filter(ImageFilter.GaussianBlur(sigma))).reshape(image.shape)


@lru_cache(maxsize=32)
def _spline(length: int, knots: int) -> np.ndarray:
    """Weights (length, knots) that turn a coarse row of values into a smooth curve: cubic B-spline."""
    position = np.linspace(0, knots - 1, length)[:, None]
    distance = np.abs(position - np.arange(-1, knots + 1)[None])  # one knot more at each end, folded in below
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    weights[:, 1] += weights[:, 0]
    weights[:, -2] += weights[:, -1]
    return weights[:, 1:-1].astype(np.float32)
