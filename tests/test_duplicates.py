"""Near duplicates: small changes keep the hash, other pictures do not; pairs are those of all against all."""

import io

import numpy as np
import pytest
from PIL import Image

from medplib.data import load_mini
from medplib.data.duplicates import close_pairs, difference_hash


def bits(a, b):
    return bin(a ^ b).count("1")


def test_small_changes_keep_the_hash_and_other_cases_do_not():
    samples = load_mini()
    images = [samples[i].load_image() for i in range(0, len(samples), 40)]
    for image in images:
        half = np.asarray(Image.fromarray(image).resize((128, 128)))
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=60)
        jpeg = np.asarray(Image.open(out).convert("RGB"))
        brighter = (image * 0.8 + 20).astype(np.uint8)
        for changed in (half, jpeg, brighter):
            assert bits(difference_hash(image), difference_hash(changed)) <= 10
    datasets = {sample.dataset: sample for sample in samples}
    hashes = [difference_hash(sample.load_image()) for sample in datasets.values()]
    assert min(bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 3


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_pairs_are_those_of_all_against_all(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    for i in range(150):  # the second half: the first with a few bits changed
        flips = rng.choice(64, rng.integers(1, 9), replace=False)
        hashes[150 + i] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    wanted = {
        (i, j)
        for i in range(300)
        for j in range(i + 1, 300)
        if bits(int(hashes[i]), int(hashes[j])) <= distance
    }
    found = close_pairs(hashes, distance)
    assert {tuple(pair) for pair in found.tolist()} == wanted
    assert (distance == 0) == (not wanted)


def test_equal_hashes_are_paired_with_the_first():
    hashes = np.array([7, 1 << 40, 7, 7, 6], np.uint64)
    assert close_pairs(hashes, 1).tolist() == [[0, 2], [0, 3], [0, 4]]
    assert close_pairs(np.empty(0, np.uint64)).shape == (0, 2)
