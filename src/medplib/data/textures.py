"""What procedural images are painted with: smooth noise, blur, irregular blobs, curves (numpy and Pillow).

Letters: S side of the square image. Positions are in half sides: x and y run from -1 (left, top) to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, float32 (S, S), read-only."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))
    return x, y


def noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int] | int) -> np.ndarray:
    """Smooth noise, float32 `shape`, mean about 0, standard deviation about 1: `cells` hills per side."""
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    coarse = rng.standard_normal((rows + 3, columns + 3), dtype=np.float32)
    box = (1, 1, columns + 2, rows + 2)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC, box)) * 1.3


def fractal(rng: np.random.Generator, size: int, cells: int, octaves: int = 3) -> np.ndarray:
    """Noise (S, S) with ever finer, ever weaker detail."""
    layers = [noise(rng, (size, size), min(cells * 2**i, size)) * 0.5**i for i in range(octaves)]
    return np.sum(layers, axis=0) / math.sqrt(sum(0.25**i for i in range(octaves)))


def blur(field: np.ndarray, sigma: float | tuple[float, float]) -> np.ndarray:
    """Gaussian blur of (rows, columns); sigma in pixels, or one per axis; the border is repeated."""
    down, across = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return _gaussian(field.shape[0], round(down, 2)) @ field @ _gaussian(field.shape[1], round(across, 2)).T


@lru_cache(maxsize=64)
def _gaussian(length: int, sigma: float) -> np.ndarray:
    """The blur of one axis as a matrix (length, length) whose rows sum to 1."""
    if sigma < 0.1:
        return np.eye(length, dtype=np.float32)
    reach = math.ceil(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((length, length), np.float64)
    source = np.clip(np.arange(length)[:, None] + np.arange(-reach, reach + 1)[None], 0, length - 1)
    np.add.at(matrix, (np.arange(length)[:, None], source), kernel / kernel.sum())
    return matrix.astype(np.float32)


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 well inside (distance < 0), 0 well outside, 0.5 on the border; `width` is how soft the border is."""
    return 1 / (1 + np.exp(np.clip(distance / np.float32(width), -30, 30)))


@dataclass(frozen=True)
class Blob:
    """A closed, star-shaped outline about `centre`: an ellipse with random waves on it."""

    centre: tuple[float, float]
    radius: float
    aspect: float
    angle: float
    waves: tuple[tuple[int, float, float], ...]  # how many around, height (of the radius), phase

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        radius: tuple[float, float],
        reach: float,
        aspect: float = 1.5,
        irregular: float = 0.1,
    ) -> Blob:
        """A random blob: radius in this range, centre within +-reach, long to short axis up to `aspect`."""
        waves = [
            (n, float(rng.normal(0, irregular / n**0.7)), float(rng.uniform(0, 6.3))) for n in range(2, 8)
        ]
        return cls(
            centre=tuple(rng.uniform(-reach, reach, 2).tolist()),
            radius=float(rng.uniform(*radius)),
            aspect=float(rng.uniform(1, aspect)),
            angle=float(rng.uniform(0, math.pi)),
            waves=tuple(waves),
        )

    def polar(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance from the centre in units of the outline (below 1 inside), and the angle."""
        cos, sin, stretch = math.cos(self.angle), math.sin(self.angle), math.sqrt(self.aspect)
        dx, dy = x - self.centre[0], y - self.centre[1]
        u, v = (cos * dx + sin * dy) / stretch, (cos * dy - sin * dx) * stretch
        theta = np.arctan2(v, u)
        outline = sum(height * np.cos(n * theta + phase) for n, height, phase in self.waves)
        return np.sqrt(u * u + v * v) / (self.radius * np.maximum(1 + outline, 0.4)), theta

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """About the signed distance from the outline, in half sides; negative inside."""
        return (self.polar(x, y)[0] - 1) * self.radius


def curves(size: int, lines: Iterable[tuple[np.ndarray, float]]) -> np.ndarray:
    """How much of each pixel lines cover, 0..1 float32 (S, S): ((n, 2) of x and y, width in pixels)."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for points, width in lines:
        dots = ((np.asarray(points) + 1) * size).ravel().tolist()
        pen.line(dots, fill=255, width=max(1, round(2 * width)), joint="curve" if width > 2 else None)
    return np.asarray(canvas.reduce(2), np.float32) / 255


def wander(
    rng: np.random.Generator, start: np.ndarray, heading: float, length: float, bend: float
) -> np.ndarray:
    """A curve (12, 2) that leaves `start` in this direction and bends at random; lengths in half sides."""
    turns = heading + rng.normal(0, bend) * np.linspace(0, 1, 12) + rng.normal(0, bend / 4, 12).cumsum()
    steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * (length / 12)
    return np.asarray(start) + steps.cumsum(axis=0)


def look_up(field: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Bilinear values of field (rows, columns) at fractional positions; outside the field, its border."""
    rows, columns = field.shape
    row, column = row.clip(0, rows - 1.001), column.clip(0, columns - 1.001)
    top, left = row.astype(np.intp), column.astype(np.intp)
    corner, down, right = top * columns + left, row - top, column - left
    flat = np.ascontiguousarray(field).reshape(-1)
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + columns] * (1 - right) + flat[corner + columns + 1] * right
    return upper * (1 - down) + lower * down


def paint(base: np.ndarray, colour: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """base (S, S, 3) moved towards colour (3,) or (S, S, 3) by amount (S, S) in 0..1."""
    return base + (np.asarray(colour, np.float32) - base) * amount[..., None]


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Float (S, S) or (S, S, 3) in 0..255 -> uint8 (S, S, 3)."""
    pixels = (image + 0.5).clip(0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
