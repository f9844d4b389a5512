"""Pictures that are the same or nearly so: a 64-bit perceptual hash, and the pairs of close hashes.

H, W height and width; N pictures. The hash says for 8 x 8 places whether brightness falls to the right
("dHash", https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html).
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
MAX_BUCKET = 256  # hashes with an equal band that each is compared with


def difference_hash(image: np.ndarray) -> int:
    """uint8 (H, W, 3) -> 64 bits. Resizing, compression and brightness change few of them."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] < small[:, :-1]).tobytes(), "big")


def close_pairs(hashes: np.ndarray, distance: int = 3) -> np.ndarray:
    """uint64 (N,) -> int64 (M, 2), pairs i < j whose hashes differ in at most `distance` bits.

    Equal hashes are paired with the first of them alone, and further pairs are made of the first ones, so
    that M stays near N. The hash is cut into distance + 1 bands. Two close hashes agree in at least one, so
    only those with an equal band are compared, each with the next MAX_BUCKET in order; where more than that
    have a band in common, pairs may be missed. Time grows like N log N.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    numbers = np.arange(len(hashes))
    later = numbers[first[inverse] != numbers]
    pairs = [np.stack([first[inverse[later]], later], 1)]
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    for low, high in itertools.pairwise(edges):
        band = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        at = np.arange(len(order))
        for step in range(1, MAX_BUCKET + 1):
            at = at[at + step < len(order)]
            at = at[band[order[at]] == band[order[at + step]]]
            if not len(at):
                break
            a, b = order[at], order[at + step]
            near = _distance(unique[a], unique[b]) <= distance
            pairs.append(np.stack([first[a[near]], first[b[near]]], 1))
    found = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(found, axis=0)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint64 (M,), (M,) -> how many bits differ, (M,)."""
    return _BITS[(a ^ b).view(np.uint8).reshape(-1, 8)].sum(axis=1)
