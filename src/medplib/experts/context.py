"""What surrounds a router's forward: the padding mask, a forced expert, and who is listening.

All three are set by `with` blocks and held per thread, so models run in parallel do not see each other's. A
block of a network calls its feed-forward part with one tensor only; this is how the rest reaches a router
that took its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from medplib.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter, Routing

_mask: ContextVar[Tensor | None] = ContextVar("medplib_routing_mask", default=None)
_forced: ContextVar[dict[int, int]] = ContextVar("medplib_forced_expert")
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("medplib_routing_observers", default=())


class Observer(Protocol):
    """Somebody who listens to routers; see `observe`."""

    def receive(self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
        """One forward of one router: what it chose for the routed tokens (T of them).

        `shape` is the token shape (...) of its input; `kept` (T,) holds the positions of the routed tokens in
        the flattened input when a mask excluded some, else None.
        """


@contextmanager
def routing_mask(mask: Tensor | None) -> Iterator[None]:
    """Exclude padding from every MoERouter run inside: their output there is 0 and no statistic counts it.

    mask (...) has the token shape of the routers' input; True (or non-zero) marks a real token.

        with routing_mask(attention_mask):
            model(input_ids, attention_mask=attention_mask)

    With gradient checkpointing the router remembers the mask for the recomputation, which happens in
    `backward` after this block has ended. It remembers the latest one: run `backward` before the next
    forward, or give the mask as an argument of the router.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(f"routing_mask needs a tensor with one entry per token, or None; got {mask!r}.")
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


@contextmanager
def force_expert(model: nn.Module, name: str) -> Iterator[None]:
    """Send every token of every MoERouter in `model` to the expert called `name`.

    The weight is that expert's own probability, as the gate gives it, whether or not it is the best one: what
    the token would have had, had the gate chosen so. Meant for ablations and oracle routing.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(f"There is no MoERouter in this {type(model).__name__}, so no expert can be forced.")
    forced = dict(_forced.get({}))
    for router in routers.values():
        forced[id(router)] = router.index_of(name)
    token = _forced.set(forced)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every forward of every MoERouter inside. Nested blocks each hear everything."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def current_mask() -> Tensor | None:
    """The mask of the innermost `routing_mask`."""
    return _mask.get()


def forced_index(router: MoERouter) -> int | None:
    """The expert that the innermost `force_expert` names for this router."""
    return _forced.get({}).get(id(router))


def tell_observers(router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
    """Report one forward, unless it is gradient checkpointing running an earlier one again."""
    observers = _observers.get()
    if observers and not is_recomputation():
        for observer in observers:
            observer.receive(router, routing, shape, kept)


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, which is where gradient checkpointing repeats it."""
    return torch._C._current_graph_task_id() != -1


def named_routers(model: nn.Module) -> dict[str, MoERouter]:
    """Every MoERouter in `model` by its qualified name, which is "" for the model itself."""
    from medplib.experts.router import MoERouter

    return {name: module for name, module in model.named_modules() if isinstance(module, MoERouter)}


def unknown_expert(name: Any, known: tuple[str, ...]) -> UnknownNameError:
    """The error for an expert that a router does not have."""
    return UnknownNameError(f"This router has no expert named {name!r}; it has {', '.join(known)}.")
