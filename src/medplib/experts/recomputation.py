"""What a forward decided, for the moment when gradient checkpointing repeats it.

    past = Past()
    mask = past.of_this_forward(current_mask, keep=self.training)   # repeated: that of the first run

A forward is repeated during `backward`, when what surrounded it has ended and others may have followed it. It
is known by its place in the order of autograd's nodes, which are numbered as they are made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from medplib.errors import InputError

T = TypeVar("T")
LENGTH = 256  # forwards and repetitions that are remembered, of one module


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, which is where gradient checkpointing repeats it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Forward(NamedTuple):
    """The number of the next node when it ran, whether it made nodes, and the value."""

    number: int
    graded: bool
    value: Any


class Past(Generic[T]):
    """A value of each of a module's latest forwards. A copy and what is saved of it are empty."""

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=LENGTH)

    def of_this_forward(self, make: Callable[[], T], keep: bool) -> T:
        """What `make` returns, or returned in the forward that is repeated now.

        keep   also of a forward without gradients, which a reentrant checkpoint begins with
        """
        if torch.compiler.is_compiling():
            return make()
        value = self._found() if is_recomputation() and self._forwards else make()
        graded = torch.is_grad_enabled()
        if keep or graded:
            self._forwards.append(_Forward(torch.autograd._get_sequence_nr(), graded, value))
        return value

    def _found(self) -> T:
        """The value of the forward that the node of this backward belongs to.

        The node of a reentrant checkpoint was made just before that forward, which then made none. Others
        repeat a forward for a node that was made in it or after it.
        """
        node = torch._C._current_autograd_node()
        number = node._sequence_nr()
        after = [one for one in self._forwards if not one.graded and one.number > number]
        before = [one for one in self._forwards if one.number <= number]
        found = after[:1] if "Checkpoint" in node.name() and after else before[-1:]
        full = len(self._forwards) == LENGTH
        if not found or (full and found[0] is self._forwards[0]):  # an earlier one may be forgotten
            raise InputError(
                f"More than {LENGTH} forwards lie between this one and its backward; gradient checkpointing "
                f"cannot repeat it as it was. Run `backward` earlier."
            )
        return found[0].value

    def __reduce__(self) -> tuple[Any, ...]:
        return Past, ()
