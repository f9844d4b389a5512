"""What surrounds a router's forward: the padding mask, who chooses for the gate, and who is listening.

All three are set by `with` blocks and held per thread, so models run in parallel do not see each other's
(under torch.compile before torch 2.14 all threads share them). A block of a network calls its feed-forward
part with one tensor only; this is how the rest reaches a router that took its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from medplib.errors import InputError, UnknownNameError
from medplib.experts.recomputation import is_recomputation

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter, Routing

T = TypeVar("T")
TRACED = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"  # torch.compile reads a ContextVar


class _Surrounding(Generic[T]):
    """A context variable, None outside of `hold`; `latest` is its double for a torch.compile that traces
    attributes only."""

    def __init__(self, name: str) -> None:
        self.variable: ContextVar[T | None] = ContextVar(name, default=None)
        self.latest: T | None = None

    def get(self) -> T | None:
        return self.variable.get() if self._is_readable() else self.latest

    @contextmanager
    def hold(self, value: T | None) -> Iterator[None]:
        token = self.variable.set(value) if self._is_readable() else None
        before, self.latest = self.latest, value
        try:
            yield
        finally:
            self.latest = before
            if token is not None:
                self.variable.reset(token)

    def _is_readable(self) -> bool:
        return TRACED or not torch.compiler.is_compiling()


_mask: _Surrounding[Padding] = _Surrounding("medplib_routing_mask")
_sources: _Surrounding[dict[int, Callable[[], Choice]]] = _Surrounding("medplib_choices")
_observers: _Surrounding[tuple[Observer, ...]] = _Surrounding("medplib_observers")


class Choice(Protocol):
    """What makes a routing of another one; see `choices_from`."""

    def __call__(
        self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None
    ) -> Routing:
        """The routing to be used in place of the gate's; `shape` and `kept` as an Observer gets them."""


class Padding:
    """A mask over tokens, True for the real ones; the device says once, for all layers, where they are."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._latest: tuple[tuple, Tensor | None] | None = None

    def flat(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The mask over tokens of shape (...), flattened: (all tokens,) bool. InputError where it has another
        shape."""
        mask = self.mask
        if mask.shape != shape and not (len(shape) == 1 and mask.numel() == shape[0]):
            raise InputError(
                f"The routing mask has shape {tuple(mask.shape)}, but the tokens have shape {tuple(shape)}; "
                f"give one entry per token."
            )
        return mask.to(device).reshape(-1).ne(0)

    def positions(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Where the real tokens are among all: (T,), or None when all of them are real."""
        key = None if self.mask.is_inference() else (shape, device, self.mask._version)
        if key is None or self._latest is None or self._latest[0] != key:
            found = self.flat(shape, device).nonzero().squeeze(1)  # (T,)
            self._latest = (key, None if len(found) == shape.numel() else found)
        return self._latest[1]


class Observer(Protocol):
    """Somebody who listens to routers; see `observe`."""

    def receive(self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
        """One forward of one router: what it chose for the routed tokens (T of them).

        `shape` is the token shape (...) of its input; `kept` (T,) holds the positions of the routed tokens in
        the flattened input when a mask excluded some, else None; compiled or captured forwards route padding
        along, and `routing.real` says which tokens are none.
        """


@contextmanager
def routing_mask(mask: Tensor | None) -> Iterator[None]:
    """Exclude padding from every MoERouter run inside: their output there is 0 and no statistic counts it.

    mask (...) has the token shape of the routers' input; True (or non-zero) marks a real token.

        with routing_mask(attention_mask):
            model(input_ids, attention_mask=attention_mask)

    With gradient checkpointing the router remembers the mask for the recomputation, which happens in
    `backward` after this block has ended. A checkpoint around compiled code does not know it then: compile
    what holds the checkpoint, or give the mask as an argument of the router. The same goes for forced and
    replayed choices.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(f"routing_mask needs a tensor with one entry per token, or None; got {mask!r}.")
    with _mask.hold(None if mask is None else Padding(mask)):
        yield


@contextmanager
def choices_from(sources: dict[int, Callable[[], Choice]]) -> Iterator[None]:
    """Let `sources`, by the id of their router, choose the experts instead of the gates.

    A source is asked once per forward. Of nested blocks the innermost that knows the router is asked.
    """
    with _sources.hold({**(_sources.get() or {}), **sources}):
        yield


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every forward of every MoERouter inside. Nested blocks each hear everything."""
    with _observers.hold((*(_observers.get() or ()), observer)):
        yield


def current_mask() -> Padding | None:
    """The mask of the innermost `routing_mask`."""
    return _mask.get()


def forced_choice(router: MoERouter) -> Choice | None:
    """What chooses the experts of this forward of the router instead of its gate, if anything."""
    sources = _sources.get()
    source = None if sources is None else sources.get(id(router))
    return None if source is None else source()


def tell_observers(router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
    """Report one forward, unless it is gradient checkpointing running an earlier one again."""
    observers = _observers.get()
    if observers and not is_recomputation():
        for observer in observers:
            observer.receive(router, routing, shape, kept)


def named_routers(model: nn.Module) -> dict[str, MoERouter]:
    """Every MoERouter in `model` by its qualified name, which is "" for the model itself."""
    from medplib.experts.router import MoERouter

    if not isinstance(model, nn.Module):
        raise InputError(f"The model must be an nn.Module, got {model!r:.80}.")
    return {name: module for name, module in model.named_modules() if isinstance(module, MoERouter)}


def unknown_expert(name: Any, known: tuple[str, ...]) -> UnknownNameError:
    """The error for an expert that a router does not have."""
    return UnknownNameError(f"This router has no expert named {name!r}; it has {', '.join(known)}.")
