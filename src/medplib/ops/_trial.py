"""Tries compiled kernels against their meaning before they are used, in a process of its own, once.

    python -m medplib.ops._trial cuda LIBRARY     exit status 0: every operator does what PyTorch's does

A kernel that is wrong, crashes or hangs on somebody's GPU then costs a warning and not an answer. Orders and
counts must be equal, sums within a tolerance. T tokens, D width, H hidden width, E experts, K per token.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 600.0  # seconds
SHAPES = ((1, 64, 96, 2, 1), (37, 64, 96, 2, 1), (300, 72, 40, 8, 2), (5, 33, 17, 3, 3))  # T, D, H, E, K
TOLERANCE = {"float32": 2e-4, "bfloat16": 4e-2, "float16": 4e-3}


class TrialError(RuntimeError):
    """The compiled kernels do not do here what PyTorch's operators do."""


def try_once(device: str, library: Path, folder: Path) -> None:
    """Try a library unless it passed here before; a mark in `folder` says so. Raises TrialError."""
    mark = folder / f"{library.stem}-{_hardware(device)}.tried"
    if mark.is_file():
        return
    command = [sys.executable, "-m", "medplib.ops._trial", device, str(library)]
    environment = {**os.environ, "MEDPLIB_OPS": "off", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TrialError(f"the compiled kernels did not end within {LIMIT:.0f} s when tried") from error
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        raise TrialError(f"the compiled kernels failed when tried: {' '.join(said) or done.returncode}")
    with contextlib.suppress(OSError):  # where nothing can be written, the next process tries it again
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()


def differences(device: str) -> Iterator[str]:
    """What the kernels that are loaded do otherwise than `reference`, as lines of text."""
    import torch

    from medplib.ops import library, reference

    for kind in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            for name, arguments in _calls(shape, kind):
                wanted = getattr(reference, name)(*arguments)
                moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
                got = getattr(getattr(torch.ops, library.NAMESPACE), name)(*moved)
                wanted, got = (x if isinstance(x, tuple) else (x,) for x in (wanted, got))
                for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
                    if not _agree(a, b.cpu(), TOLERANCE[str(kind).removeprefix("torch.")]):
                        yield f"{name}, result {number}, at T D H E K {shape} in {kind}"


def _calls(shape: tuple[int, ...], kind: Any) -> Iterator[tuple[str, tuple]]:
    """Every operator with arguments of these sizes, as `reference` takes them."""
    import torch

    from medplib.ops import reference

    count, dim, hidden, experts, k = shape
    random = torch.Generator().manual_seed(count)

    def draw(*size: int) -> Any:
        return torch.randn(*size, generator=random).to(kind)

    tokens, weight = draw(count, dim), draw(experts, dim)
    mask = torch.rand(count, generator=random) > 0.2
    logits = reference.gate_logits(tokens, weight)
    gated = reference.gate(logits, None, mask, k, False, k > 1, True)
    chosen, weights = gated[1], gated[2]
    order, position, _, _ = reference.plan(chosen, experts)
    rows, grad = draw(len(order), dim), draw(count, dim)
    gate_up, gate_ups, downs = (
        draw(count, 2 * hidden),
        draw(experts, 2 * hidden, dim),
        draw(experts, dim, hidden),
    )
    seed = torch.tensor(count)
    yield "gate_logits", (tokens, weight)
    yield "gate", (logits, None, mask, k, False, k > 1, True)
    yield "gate", (logits, None, None, k, True, False, True)
    yield (
        "gate_backward",
        (torch.ones_like(gated[0]), torch.ones_like(weights), gated[0], chosen, False, k > 1),
    )
    yield "plan", (chosen, experts)
    yield "counter_bits", (seed, 100)
    yield "drop", (chosen, None, None, experts, max(1, count // experts))
    yield "drop", (chosen, weights, None, experts, max(1, count // experts))
    yield "drop", (chosen, None, seed, experts, max(1, count // experts))
    yield "permute", (tokens, order, position, k)
    yield "permute_backward", (rows, position)
    yield "combine", (rows, order, position, weights, grad)
    yield "combine_backward", (grad, rows, order, position, weights)
    yield "swiglu", (gate_up,)
    yield "swiglu_backward", (draw(count, hidden), gate_up)
    if count * k <= 16:
        scaled = (gate_ups * dim**-0.5, downs * hidden**-0.5)
        yield "decode_ffn", (tokens, chosen, weights, *scaled, grad)


def _agree(wanted: Any, got: Any, tolerance: float) -> bool:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if not wanted.is_floating_point():
        return bool((wanted == got).all())
    if not wanted.numel():
        return True
    wanted, got = wanted.double(), got.double()
    scale = max(1.0, float(wanted.abs().max()))
    return bool(((wanted - got).abs() <= tolerance * scale).all())


def _hardware(device: str) -> str:
    """What a trial's result depends on beside the library."""
    if device == "cpu":
        return "cpu"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}-{torch.version.cuda}"


def main(device: str, library: str) -> int:
    """Load the library, compare, and say what differs first; returns the exit status."""
    import torch

    from medplib.ops import library as _schemas  # noqa: F401  defines the operators

    torch.ops.load_library(library)
    for line in differences(device):
        sys.stdout.write(f"{line} differs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
