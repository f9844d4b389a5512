"""The time that a call takes, the work it leaves on a GPU included."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
