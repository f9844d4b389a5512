"""Phantoms: drawn images with exact masks, for modalities that have no free real ones in the mini set.

They look roughly like the modality and teach a tiny model its name and layout. They are no evidence about
real images: every sample carries its tier, and no mean pools tiers. S is the side of the square image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from medplib.data.samples import ImageSample, Structure, keyed_rng
from medplib.data.simulate import simulate_pet
from medplib.data.textures import (
    Blob,
    blur,
    curves,
    fractal,
    grid,
    look_up,
    noise,
    paint,
    soft,
    to_bytes,
    wander,
)
from medplib.errors import InputError, UnknownNameError

__all__ = ["PHANTOMS", "dermoscopy", "endoscopy", "fundus", "make_phantom", "simulate_pet", "ultrasound"]

SMALLEST = 12  # pixels: a structure that shows less of itself is not listed


def make_phantom(kind: str, seed: int, size: int = 256, split: str = "train") -> ImageSample:
    """The phantom of this kind, seed and split: always the same one, and never the same in two splits.

    >>> make_phantom("dermoscopy", 7).names
    ('skin lesion',)
    """
    if kind not in PHANTOMS:
        raise UnknownNameError.among(f"No phantom named {kind!r}.", str(kind), PHANTOMS)
    if size < 32:
        raise InputError(f"size must be at least 32 pixels, got {size}.")
    return replace(PHANTOMS[kind](keyed_rng(kind, split, seed), size), case=f"{split}{seed}", split=split)


def dermoscopy(rng: np.random.Generator, size: int = 256) -> ImageSample:
    """A pigmented "skin lesion" on skin of any tone, with hairs, sometimes the black rim of the lens."""
    x, y = grid(size)
    tones = np.array([[236, 200, 184], [226, 178, 158], [205, 150, 118], [158, 108, 82]], np.float32)
    tone = _between(rng, tones) + rng.normal(0, 7, 3).astype(np.float32)
    skin = tone * (1 + 0.05 * fractal(rng, size, 3) + 0.03 * noise(rng, (size, size), size // 3))[..., None]
    skin = paint(skin, tone * [1, 0.72, 0.72], (0.16 * fractal(rng, size, 4)).clip(0, 0.4))

    blob = Blob.draw(rng, (0.22, 0.62), 0.3, aspect=1.7, irregular=rng.uniform(0.04, 0.2))
    distance = blob.distance(x, y) + rng.uniform(0.005, 0.035) * fractal(rng, size, 12, 2)
    browns = np.array([[150, 98, 68], [118, 70, 48], [82, 52, 44], [52, 38, 40], [160, 84, 76]], np.float32)
    browns = browns * (0.55 + 0.45 * tone.mean() / 200)
    pigment = np.broadcast_to(_between(rng, browns), (size, size, 3))
    for _ in range(rng.integers(1, 4)):
        pigment = paint(pigment, _between(rng, browns), soft(-fractal(rng, size, 4) + rng.uniform(0, 1), 0.3))
    if rng.random() < 0.6:  # pigment network: dark lines between pale holes
        lines = np.exp(-((noise(rng, (size, size), int(rng.integers(20, 36))) / 0.3) ** 2))
        pigment = pigment * (1 + rng.uniform(0.1, 0.3) * (0.5 - lines))[..., None]
    image = paint(skin, pigment, rng.uniform(0.65, 0.97) * soft(distance, rng.uniform(0.012, 0.05)))

    hairs = [
        (
            wander(rng, rng.uniform(-1.1, 1.1, 2), rng.uniform(0, 6.3), rng.uniform(0.5, 1.8), 0.6),
            rng.uniform(0.5, 1.3),
        )
        for _ in range(rng.integers(0, 16))
    ]
    image = paint(
        image, rng.uniform(20, 70) * np.array([1, 0.8, 0.7]), rng.uniform(0.5, 0.9) * curves(size, hairs)
    )
    radius = np.hypot(x, y)
    image = image * (1 - rng.uniform(0, 0.2) * radius**2)[..., None]
    seen = np.ones((size, size), bool)
    if rng.random() < 0.3:
        rim = rng.uniform(1.0, 1.25)
        seen, image = radius < rim, image * soft(radius - rim, 0.01)[..., None]
    return _synthetic("dermoscopy", image, {"skin lesion": (distance < 0) & seen})


def endoscopy(rng: np.random.Generator, size: int = 256) -> ImageSample:
    """A tunnel of folded mucosa with a "polyp", an "instrument", or both."""
    x, y = grid(size)
    lumen = rng.uniform(-0.5, 0.5, 2)
    depth = np.hypot(x - lumen[0], (y - lumen[1]) * rng.uniform(0.8, 1.25)) + 0.06 * noise(
        rng, (size, size), 4
    )
    depth = depth.clip(0.02)
    fold = (rng.uniform(1.3, 2.4) * np.log(depth) + 0.35 * noise(rng, (size, size), 3) + rng.random()) % 1
    light = (0.15 + rng.uniform(0.75, 1.1) * depth**0.6).clip(0, 1.15) - 0.12 * depth**2
    light = (
        light
        * (1 - rng.uniform(0.1, 0.45) * blur(np.exp(-rng.uniform(2.5, 6) * fold), 1.5))
        * (1 + 0.06 * fractal(rng, size, 5))
    )
    mucosa = _between(
        rng, np.array([[225, 120, 100], [210, 95, 75], [235, 150, 120], [190, 80, 80]], np.float32)
    )
    image = np.broadcast_to(mucosa * np.float32(1.15), (size, size, 3))
    vessels = [
        (
            wander(rng, rng.uniform(-1, 1, 2), rng.uniform(0, 6.3), rng.uniform(0.3, 0.9), 1.2),
            rng.uniform(0.5, 1.2),
        )
        for _ in range(rng.integers(5, 30))
    ]
    image = paint(image, mucosa * [0.75, 0.4, 0.42], 0.5 * curves(size, vessels))
    image = image * (light[..., None] ** np.array([0.8, 1.15, 1.2], np.float32))

    masks = {}
    choice = rng.random()
    if choice < 0.75:
        image, masks["polyp"] = _add_polyp(rng, image, mucosa, lumen)
    shine = (
        noise(rng, (size, size), 26) + 0.5 * noise(rng, (size, size), 9) + 0.8 * (light - 0.7)
    ) > rng.uniform(2.9, 3.8)
    image = paint(image, np.full(3, 250), blur(shine.astype(np.float32), 0.8))
    if choice > 0.55:
        image, masks["instrument"] = _add_instrument(rng, image)
        if "polyp" in masks:
            masks["polyp"] = masks["polyp"] & ~masks["instrument"]
    rim = np.maximum(np.maximum(abs(x), abs(y)), (abs(x) + abs(y)) * rng.uniform(0.68, 0.8))
    rim = rng.choice([np.hypot(x, y) - rng.uniform(0.95, 1.2), rim - 0.97, x - 2])  # round, octagonal, none
    seen = rim < 0
    image = image * soft(rim, 0.008)[..., None] + rng.normal(0, 2.5, (size, size, 1))
    return _synthetic("endoscopy", image, {name: mask & seen for name, mask in masks.items()})


def _add_polyp(
    rng: np.random.Generator, image: np.ndarray, mucosa: np.ndarray, lumen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A dome with its own shading, texture, shadow and glints; returns the image and the mask (S, S)."""
    size = len(image)
    x, y = grid(size)
    blob = Blob.draw(rng, (0.13, 0.42), 0.55, aspect=1.5, irregular=0.06)
    inside, _ = blob.polar(x, y)
    inside = inside + 0.02 * noise(rng, (size, size), 10)
    mask = inside < 1
    away = np.array(blob.centre) - lumen
    away = away / (
        np.hypot(*away) + 1e-6
    )  # the lamp sits at the viewer: the far side of a dome is its lumen side
    side = ((x - blob.centre[0]) * away[0] + (y - blob.centre[1]) * away[1]) / blob.radius
    height = np.sqrt((1 - inside**2).clip(0))
    shade = 0.5 + 0.4 * height + 0.18 * side
    tint = _between(rng, np.array([[1.1, 0.85, 0.85], [1.1, 1.05, 0.95], [1.0, 0.65, 0.65]], np.float32))
    texture = 1 + rng.uniform(0.02, 0.09) * noise(rng, (size, size), int(rng.integers(18, 40)))
    dome = mucosa * tint * (1.1 * shade * texture)[..., None]
    shadow = rng.uniform(0.3, 0.6) * soft((inside - 1.12) * blob.radius + 0.1 * side * blob.radius, 0.03)
    image = paint(image * (1 - shadow)[..., None], dome, soft((inside - 1) * blob.radius, 0.007))
    spot = rng.normal(0, 0.25, 2) + 0.2 * away
    glint = np.hypot(x - blob.centre[0] - spot[0] * blob.radius, y - blob.centre[1] - spot[1] * blob.radius)
    glint = glint + 0.03 * noise(rng, (size, size), 14)
    return paint(image, np.full(3, 252), soft(glint - rng.uniform(0.02, 0.06), 0.008) * mask), mask


def _add_instrument(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sheath that enters from the border, with or without jaws; returns the image and the mask (S, S)."""
    size = len(image)
    x, y = grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    heading = np.array([math.cos(angle), math.sin(angle)])
    tip = rng.uniform(-0.35, 0.35, 2)
    width = rng.uniform(0.05, 0.12)
    along = (x - tip[0]) * heading[0] + (y - tip[1]) * heading[1]  # 0 at the tip, growing towards the border
    across = (y - tip[1]) * heading[0] - (x - tip[0]) * heading[1] + rng.uniform(-0.12, 0.12) * along**2
    distance = np.hypot(across, np.minimum(along, 0)) - width * (1 - 0.12 * along.clip(0, 1))
    sheaths = np.array(
        [[190, 195, 200], [120, 125, 130], [70, 110, 170], [225, 225, 215], [60, 130, 110]], np.float32
    )
    metal, sheath = np.array([185, 188, 192], np.float32), sheaths[rng.integers(len(sheaths))]
    colour = np.where((along < rng.uniform(0.1, 0.3))[..., None], metal, sheath)
    if rng.random() < 0.4:  # rings along the sheath
        colour = colour * (1 - 0.35 * (np.sin(along * rng.uniform(30, 60)) > 0.3))[..., None]
    if rng.random() < 0.6:
        opening = rng.uniform(0.25, 0.6)
        for turn in (-opening, opening):
            u = -along * math.cos(turn) + across * math.sin(turn)
            v = across * math.cos(turn) + along * math.sin(turn)
            jaw = np.hypot(v, u - u.clip(0, rng.uniform(2.2, 3.2) * width)) - 0.4 * width
            distance = np.minimum(distance, jaw)
    round_shade = 0.35 + 0.75 * np.sqrt((1 - (across / width) ** 2).clip(0.05))
    glint = np.exp(-(((across / width + 0.35) / 0.15) ** 2))
    body = paint(colour * round_shade[..., None], np.full(3, 250), 0.5 * glint)
    image = image * (1 - 0.35 * soft(distance - 0.03, 0.03))[..., None]
    return paint(image, body, soft(distance, 0.006)), distance < 0


def ultrasound(rng: np.random.Generator, size: int = 256) -> ImageSample:
    """A sector or a linear scan with a "cyst" (black, bright behind) or a "solid mass" (grey, darker behind).

    Echoes are made along the beams: Rayleigh speckle (the size of a blurred complex normal field) times the
    tissue's strength, log compressed, then brought from (depth, beam) to the picture.
    """
    x, y = grid(size)
    depths, beams, length = size, 3 * size // 4, rng.uniform(1.7, 1.9)
    linear = rng.random() < 0.3
    start, half = (
        (100.0, rng.uniform(0.6, 0.95)) if linear else (rng.uniform(0.15, 0.8), rng.uniform(0.42, 0.72))
    )
    spread = half / start if linear else half  # half the angle between the outermost beams
    apex = -0.93 - start
    down, turn = np.linspace(0, length, depths)[:, None], np.linspace(-spread, spread, beams)[None]
    beam_x = ((start + down) * np.sin(turn)).astype(np.float32)  # (depths, beams)
    beam_y = (apex + (start + down) * np.cos(turn)).astype(np.float32)

    cyst = rng.random() < 0.5
    blob = Blob.draw(rng, (0.14, 0.36), 0.0, aspect=1.6, irregular=0.03 if cyst else rng.uniform(0.05, 0.14))
    blob = replace(blob, centre=(rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)))
    warp = 0.015 * (0.3 if cyst else 1.5)
    ripple = noise(rng, (size, size), 14)
    at = (beam_y + 1) * (size / 2) - 0.5, (beam_x + 1) * (size / 2) - 0.5
    distance = blob.distance(beam_x, beam_y) + warp * look_up(ripple, *at)

    tissue = np.exp(0.35 * noise(rng, (depths, beams), (9, 3)) + 0.3 * noise(rng, (depths, beams), (22, 9)))
    layers = noise(rng, (depths, beams), (int(rng.integers(8, 16)), 2)) + 0.3 * noise(
        rng, (depths, beams), (5, 8)
    )
    tissue = tissue * (
        1 + rng.uniform(0.5, 3) * np.exp(-((layers / 0.12) ** 2)) * (down < rng.uniform(0.2, 0.8))
    )
    inside = soft(distance, 0.012)
    behind = (inside.cumsum(axis=0) * (length / depths)) * (1 - inside)  # how much of it the beam has crossed
    if cyst:
        tissue = tissue * (1 - inside * rng.uniform(0.97, 0.999)) * np.exp(rng.uniform(1, 3) * behind)
        tissue = tissue + rng.uniform(0.3, 1.5) * np.exp(-((distance / 0.018) ** 2))
    else:
        strength = rng.choice([rng.uniform(0.15, 0.35), rng.uniform(2.5, 4)], p=[0.75, 0.25])
        grain = np.exp(0.3 * noise(rng, (depths, beams), (30, 24)))
        tissue = tissue * (1 - inside) + inside * grain * strength
        tissue = tissue * np.exp(-rng.uniform(0, 2.5) * behind)
    grain_size = rng.uniform(0.9, 1.5), rng.uniform(1.3, 2.6)
    waves = [blur(rng.standard_normal((depths, beams), dtype=np.float32), grain_size) for _ in range(2)]
    echo = np.hypot(*waves) / np.hypot(*waves).mean() * tissue
    echo = echo * np.exp(-rng.uniform(0.0, 0.7) * down**2) + rng.uniform(0.003, 0.01)
    decibels = 20 * np.log10(echo / np.quantile(echo[::4, ::4], 0.998))
    grey = ((1 + decibels / rng.uniform(32, 46)) * 255).clip(0, 255)

    row = (np.hypot(x, y - apex) - start) * ((depths - 1) / length)
    column = (np.arctan2(x, y - apex) + spread) * ((beams - 1) / (2 * spread))
    seen = (row >= 0) & (row <= depths - 1) & (column >= 0) & (column <= beams - 1)
    image = look_up(grey, row, column) * seen
    if rng.random() < 0.5:  # the grey scale at the side of the screen
        bar = (abs(x - rng.choice([-0.95, 0.95])) < 0.02) & (abs(y) < 0.4)
        image = np.where(bar & ~seen, (0.4 - y) * 318, image)
    mask = (blob.distance(x, y) + warp * ripple < 0) & seen
    return _synthetic("ultrasound", image, {"cyst" if cyst else "solid mass": mask})


def fundus(rng: np.random.Generator, size: int = 256) -> ImageSample:
    """The retina of a left or right eye: "optic disc", "fovea" and "retinal vessels", as far as in view.

    As the camera sees it: the disc of a right eye is right of its fovea. Lengths are in disc diameters.
    """
    laterality = "left" if rng.random() < 0.5 else "right"
    temporal = 1.0 if laterality == "left" else -1.0
    fovea_at = np.array([temporal * rng.uniform(2.3, 2.7), rng.uniform(0.1, 0.5)])
    half = rng.uniform(2.1, 4.3)  # half the picture's side
    centre = fovea_at * rng.uniform(0.1, 0.9) + rng.normal(0, 0.35, 2)
    x, y = grid(size)
    x, y = x * half + float(centre[0]), y * half + float(centre[1])

    base = _between(rng, np.array([[232, 104, 66], [205, 92, 42], [168, 74, 40], [226, 130, 84]], np.float32))
    light = 1 + 0.06 * fractal(rng, size, 3) + 0.12 * noise(rng, (size, size), 1)
    image = base * (light * (1.08 - 0.025 * (x**2 + y**2)).clip(0.5))[..., None]
    streaks = noise(rng, (size, size), int(rng.integers(10, 22)))
    image = paint(image, base * [0.9, 0.75, 0.7], rng.uniform(0, 0.15) * soft(abs(streaks) - 0.3, 0.2))
    to_fovea = np.hypot(x - fovea_at[0], y - fovea_at[1])
    dark = rng.uniform(0.2, 0.45) * np.exp(-((to_fovea / 0.75) ** 2)) + 0.22 * np.exp(
        -((to_fovea / 0.22) ** 2)
    )
    image = image * (1 - dark[..., None] * np.array([0.6, 1.0, 0.9]))

    tall, tilt = rng.uniform(0.95, 1.18), rng.normal(0, 0.15)
    to_disc = np.hypot(x + tilt * y, y / tall) + 0.012 * noise(rng, (size, size), 12)
    image = paint(image, base * [1.12, 1.15, 1.0], 0.35 * np.exp(-((to_disc / 0.9) ** 2)))
    image = paint(image, np.array([252, 205, 135]) + rng.normal(0, 10, 3), 0.92 * soft(to_disc - 0.5, 0.025))
    cup = np.hypot(x - 0.06 * temporal, y / tall) - 0.5 * rng.uniform(0.25, 0.65)
    image = paint(image, np.array([255, 240, 205]), 0.8 * soft(cup, 0.05))

    arteries, veins = (
        curves(size, _vessel_tree(rng, temporal, fovea_at, width, centre, half, size))
        for width in (0.075, 0.105)
    )
    image = paint(image, image * [0.86, 0.58, 0.55], arteries * rng.uniform(0.7, 1))
    image = paint(image, image * [0.68, 0.42, 0.45], veins * rng.uniform(0.75, 1))
    if rng.random() < 0.25:  # small bright or dark spots, which nobody is asked about
        spots = noise(rng, (size, size), 40) + noise(rng, (size, size), 5) > 3.2
        colour = [[250, 220, 130], [120, 20, 15]][rng.integers(2)]
        image = paint(image, np.array(colour), 0.8 * blur(spots.astype(np.float32), 0.7) * (to_disc > 0.7))
    rim = np.hypot(x - fovea_at[0] / 2, y - fovea_at[1] / 2) - rng.uniform(3.1, 3.9)
    seen = rim < 0
    image = image * soft(rim, 0.03)[..., None] + rng.normal(0, 2, (size, size, 1)) * seen[..., None]
    masks = {
        "optic disc": (to_disc < 0.5) & seen,
        "fovea": (to_fovea < 0.56) & seen,
        "retinal vessels": (np.maximum(arteries, veins) >= 0.5) & seen,
    }
    return replace(_synthetic("fundus", image, masks), laterality=laterality)


def _vessel_tree(
    rng: np.random.Generator,
    temporal: float,
    fovea_at: np.ndarray,
    width: float,
    centre: np.ndarray,
    half: float,
    size: int,
) -> list[tuple[np.ndarray, float]]:
    """Branching lines from the disc (at 0, 0) in picture positions: arcades around the fovea, nasal ones."""
    step = 0.15
    at = rng.normal(0, 0.06, (6, 2))
    sides = np.array([-1, 1, -1, 1, -1, 1.0])  # up, down
    outward = np.array([0.35, 0.35, -0.7, -0.7, -0.1, 0.1]) + rng.normal(0, 0.12, 6)
    heading = np.arctan2(sides, outward * temporal)
    turning = np.array([0.42, 0.42, 0, 0, 0.2, 0.2]) * -sides * temporal + rng.normal(0, 0.04, 6)
    broad = width * np.array([1, 1, 0.7, 0.7, 0.5, 0.5]) * rng.uniform(0.8, 1.15, 6)
    wobble = np.zeros(6)
    lines: list[tuple[np.ndarray, float]] = []
    for _ in range(38):
        wobble = 0.8 * wobble + rng.normal(0, 0.16, len(wobble))
        heading = heading + (turning + wobble) * step
        turning = turning * 0.985
        after = at + step * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        for a, b, w in zip(at, after, broad, strict=True):
            lines.append(((np.stack([a, b]) - centre) / half, w / half * size / 2))
        at, broad = after, broad * 0.973
        away = np.hypot(*(at - fovea_at).T) > 0.55  # no vessels cross the fovea
        keep = away & (broad > 0.012) & (np.hypot(*at.T) < 7.5)
        fork = keep & (rng.random(len(at)) < 0.1) & (np.hypot(*at.T) > 0.35) & (len(at) < 60)
        bend = rng.uniform(0.4, 0.9, int(fork.sum())) * rng.choice([-1, 1], int(fork.sum()))
        at = np.concatenate([at[keep], at[fork]])
        heading = np.concatenate([heading[keep], heading[fork] + bend])
        turning = np.concatenate([turning[keep], -0.3 * np.sign(bend) * rng.random(len(bend))])
        broad = np.concatenate([broad[keep], broad[fork] * rng.uniform(0.5, 0.8, len(bend))])
        wobble = np.concatenate([wobble[keep], wobble[fork]])
    return lines


PHANTOMS: dict[str, Callable[..., ImageSample]] = {
    "dermoscopy": dermoscopy,
    "endoscopy": endoscopy,
    "ultrasound": ultrasound,
    "fundus": fundus,
}


def _synthetic(modality: str, image: np.ndarray, masks: dict[str, np.ndarray]) -> ImageSample:
    return ImageSample(
        image=to_bytes(image),
        modality=modality,
        dataset=f"{modality.capitalize()}Phantom",
        case="phantom",
        split="train",
        tier="synthetic",
        structures=tuple(Structure(n, m, "exact") for n, m in masks.items() if m.sum() >= SMALLEST),
    )


def _between(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """A random mixture (3,) of two of the colours (n, 3)."""
    first, second = colours[rng.choice(len(colours), 2, replace=False)]
    return first + (second - first) * np.float32(rng.random())
