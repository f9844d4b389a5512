"""COCO run-length encoding: a binary mask as a short text, the same text that pycocotools writes.

Letters: H, W = height and width of the mask, R runs. The mask is read column by column; runs are the lengths
of its stretches, beginning with zeros. Each run from the fourth on is written as its difference to the run
two before, in groups of 5 bits, lowest first: the sixth bit of a character says that another group follows,
48 is added to make it printable. Format: https://github.com/cocodataset/cocoapi, common/maskApi.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medplib.errors import InputError

MAX_PIXELS = 1 << 28  # a larger mask in a file is damaged or hostile


def encode(mask: np.ndarray) -> dict[str, Any]:
    """bool (H, W) -> {"size": [H, W], "counts": text}. Raises InputError unless the mask is bool and 2-D."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise InputError(f"A mask to encode must be bool (height, width), got {mask.dtype} {mask.shape}.")
    flat = mask.T.reshape(-1)  # column by column
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate(([0], [0] if flat[0] else [], edges, [flat.size])).astype(np.int64)
    return {"size": [int(side) for side in mask.shape], "counts": _to_text(np.diff(bounds))}


def decode(rle: dict[str, Any]) -> np.ndarray:
    """{"size": [H, W], "counts": text, bytes or list of runs} -> bool (H, W).

    Raises InputError for text that is no run-length encoding of a mask of that size.
    """
    (height, width), lengths = runs_of(rle)
    flat = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def runs_of(rle: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
    """{"size", "counts"} -> ((H, W), int64 (R,)), without drawing the mask. Raises InputError as `decode`."""
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"A mask must be {{'size': [H, W], 'counts': text}}, got {str(rle)[:80]!r}."
        ) from None
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise InputError(f"A mask's size must be between 1 and {MAX_PIXELS} pixels, got [{height}, {width}].")
    runs = _from_text(counts) if isinstance(counts, (str, bytes)) else _from_list(counts)
    if (runs < 0).any() or (runs > height * width).any() or int(runs.sum()) != height * width:
        raise InputError(
            f"The runs of a [{height}, {width}] mask must be >= 0 and add up to {height * width}, "
            f"got {int(runs.sum())}; the text is damaged or the size is another mask's."
        )
    return (height, width), runs


def _to_text(runs: np.ndarray) -> str:
    """int64 (R,) -> text."""
    values = runs.copy()
    values[3:] -= runs[1:-2]
    groups = np.ones(values.size, np.int64)  # characters that each value needs
    reach = 16
    while (more := (values < -reach) | (values >= reach)).any():
        groups[more] += 1
        reach *= 32
    step = np.arange(int(groups.max()))
    characters = (values[:, None] >> (5 * step)) & 31  # (R, G), arithmetic shift
    characters += np.where(step < groups[:, None] - 1, 32, 0) + 48
    return characters[step < groups[:, None]].astype(np.uint8).tobytes().decode("ascii")


def _from_text(text: str | bytes) -> np.ndarray:
    """text -> int64 (R,)."""
    try:
        codes = (
            np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8).astype(np.int64)
            - 48
        )
    except UnicodeEncodeError:
        codes = np.array([-1])
    if codes.size == 0 or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        raise InputError(f"{text[:40]!r} is not the text of a run-length encoded mask; it may be cut short.")
    runs: list[int] = []
    value = shift = 0
    for code in codes.tolist():
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise InputError(f"{text[:40]!r} is not the text of a run-length encoded mask.")
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            if not 0 <= runs[-1] <= MAX_PIXELS:
                raise InputError(f"{text[:40]!r} holds a run of {runs[-1]} pixels; the text is damaged.")
            value = shift = 0
    return np.array(runs, np.int64)


def _from_list(counts: Sequence[int]) -> np.ndarray:
    try:
        runs = np.array(counts)
    except (TypeError, ValueError, OverflowError):
        runs = np.array(None)
    if runs.ndim != 1 or runs.size == 0 or runs.dtype.kind not in "iu":
        raise InputError(f"A mask's counts must be text or a list of run lengths, got {str(counts)[:40]!r}.")
    return runs.astype(np.int64)
