"""Random numbers for routing that depend on a key and a counter alone: the same on CPU, GPU and in recompute.

    noise = KeyedNoise(seed=7)
    noise.advance()                      # once per forward
    noise.uniform((3, 4), device="cpu")  # (3, 4) float32, above 0 and below 1

The global random generators are neither used nor moved. Each number is the SplitMix64 hash (Steele et al.,
2014) of the key, the count of draws and its place in the tensor. So a GPU draws what a CPU draws, and a run
is continued from the key and the count alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.recomputation import Past, is_recomputation
from medplib.ops.reference.routing import GOLDEN, mix


class KeyedNoise(nn.Module):
    """Uniform and Gumbel numbers; another module with these methods may take its place.

    seed   the key; None takes one from torch's generator, so that every layer gets another

    The key and the count are kept in the buffer `state`, saved with the model.
    """

    state: Tensor

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        elif isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed must be a whole number or None, got {seed!r}.")
        self.register_buffer("state", torch.tensor([seed % 2**62, 0]))  # key, draws so far
        self._drawn = self._behind = 0  # draws of this process; how many before the latest one is in use
        self._past: Past[int] = Past()

    def advance(self) -> None:
        """Go to the next draw; in a forward that gradient checkpointing repeats, to the one that it had.

        A checkpoint around compiled code repeats the latest draw: run `backward` before the next forward.
        """
        if torch.compiler.is_compiling():
            self.state[1] += first_run(self.state)
            self._behind = 0
        else:
            draw = self._past.of_this_forward(self._next, keep=self.training)
            self._behind = self._drawn - draw

    def _next(self) -> int:
        self.state[1] += 1
        self._drawn += 1
        return self._drawn

    def uniform(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Float32 numbers above 0 and below 1, the same until `advance`. No host sync."""
        state = self.state.to(device or self.state.device)
        key = mix(state[0]) + (state[1] - self._behind) * GOLDEN  # ()
        # An operator, since torch.compile for the CPU gives a wrong loop to products that wrap around.
        bits = torch.ops.medplib.counter_bits(key, math.prod(shape))  # (count,) of 63 bits
        top = (bits >> 40).to(torch.float32)  # 23 bits, so that adding a half is exact
        return ((top + 0.5) * 2.0**-23).reshape(tuple(shape))

    def gumbel(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Float32 numbers of the Gumbel(0, 1) distribution."""
        return -torch.log(-torch.log(self.uniform(shape, device)))


def first_run(like: Tensor) -> Tensor | int:
    """1, or 0 in a forward that gradient checkpointing repeats.

    Compiled code finds out each time it runs, and so gets a tensor () on the device of `like`: a checkpoint
    around it runs the very same code again.
    """
    return _first_run(like) if torch.compiler.is_compiling() else int(not is_recomputation())


@torch.library.custom_op("medplib::first_run", mutates_args=())
def _first_run(like: Tensor) -> Tensor:
    return like.new_full((), int(not is_recomputation()), dtype=torch.int64)


@_first_run.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)
