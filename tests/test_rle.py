"""COCO run-length encoding: the text pycocotools writes, and masks back from it."""

import contextlib

import numpy as np
import pytest

from medplib.errors import InputError
from medplib.io import rle


def slow_encode(mask):
    """One pixel, one run and one group of bits at a time."""
    runs, current, length = [], False, 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != current:
                runs.append(length)
                current, length = mask[y, x], 0
            length += 1
    runs.append(length)
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return text


def random_masks():
    rng = np.random.default_rng(7)
    for density in (0.0, 0.02, 0.5, 0.98, 1.0):
        for _ in range(8):
            height, width = rng.integers(1, 40, 2)
            yield rng.random((height, width)) < density
    blocks = np.zeros((700, 900), bool)  # long runs, so that several groups of bits are needed
    blocks[100:650, 30:800] = True
    blocks[300:320, 400:420] = False
    yield blocks
    yield np.ones((1, 1), bool)


def test_text_equals_the_slow_version():
    for mask in random_masks():
        assert rle.encode(mask) == {"size": list(mask.shape), "counts": slow_encode(mask)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools.*")
def test_text_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    for mask in random_masks():
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle.encode(mask)["counts"] == theirs["counts"].decode()
        assert np.array_equal(coco.decode({**rle.encode(mask), "counts": theirs["counts"]}), mask)


def test_decoding_gives_the_mask_back():
    for mask in random_masks():
        decoded = rle.decode(rle.encode(mask))
        assert decoded.dtype == np.bool_
        assert np.array_equal(decoded, mask)


def test_bytes_and_plain_run_lengths_are_decoded_too():
    mask = np.array([[0, 1], [0, 1], [1, 0]], bool)  # by columns: 0 0 1, 1 1 0
    assert np.array_equal(rle.decode({"size": [3, 2], "counts": [2, 3, 1]}), mask)
    assert np.array_equal(rle.decode({"size": [3, 2], "counts": rle.encode(mask)["counts"].encode()}), mask)


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2), np.uint8), np.zeros((1, 2, 2), bool), np.zeros((0, 4), bool)], ids=str
)
def test_only_flat_bool_masks_are_encoded(mask):
    with pytest.raises(InputError, match=r"must be bool \(height, width\)"):
        rle.encode(mask)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        None,
        {"size": [3], "counts": "1"},
        {"size": [3, 2], "counts": ""},
        {"size": [3, 2], "counts": b""},
        {"size": [3, 2], "counts": "é"},
        {"size": [3, 2], "counts": "o"},  # says that more follows
        {"size": [3, 2], "counts": "o" * 30 + "0"},
        {"size": [3, 2], "counts": "5"},  # 5 of 6 pixels
        {"size": [3, 2], "counts": "OO"},  # negative runs
        {"size": [3, 2], "counts": [2, -1, 5]},
        {"size": [3, 2], "counts": [2.0, 4.0]},
        {"size": [3, 2], "counts": []},
        {"size": [3, 2], "counts": None},
        {"size": [3, 2], "counts": [2**80]},
        {"size": [-3, -2], "counts": "6"},
        {"size": [10**9, 10**9], "counts": "6"},
    ],
    ids=lambda value: str(value)[:50],
)
def test_damaged_encodings_are_refused(broken):
    with pytest.raises(InputError):
        rle.decode(broken)


def test_random_text_never_escapes_as_another_error():
    rng = np.random.default_rng(1)
    for _ in range(500):
        text = "".join(chr(c) for c in rng.integers(40, 115, rng.integers(1, 12)))
        with contextlib.suppress(InputError):
            assert rle.decode({"size": [4, 5], "counts": text}).shape == (4, 5)
