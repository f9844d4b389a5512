"""Choosing in place of the gates: `force_expert` (one for all tokens), `replay_routing` (as recorded).

T tokens, E experts, K experts per token.

    with record_routing(model) as trace:
        model(x)
    with replay_routing(model, trace):
        model(x)            # every token goes where it went before, whatever the gates say now

In both cases the weights come from the gate as it is now, so gradients reach it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.context import Choice, choices_from, named_routers
from medplib.experts.dispatch import is_captured
from medplib.experts.gate import Routing, gather_or_zero

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter
    from medplib.experts.trace import LayerTrace, RoutingTrace


@contextmanager
def force_expert(model: nn.Module, name: str) -> Iterator[None]:
    """Send every token of every MoERouter in `model` to the expert called `name`.

    No capacity drops any. The weight is that expert's own probability, as the gate gives it, whether or not
    it is the best one: what the token would have had, had the gate chosen so. Meant for ablations and oracle
    routing.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(f"There is no MoERouter in this {type(model).__name__}, so no expert can be forced.")
    chosen = {id(router): _one_expert(router.index_of(name)) for router in routers.values()}
    with choices_from(chosen):
        yield


@contextmanager
def replay_routing(model: nn.Module, trace: RoutingTrace) -> Iterator[None]:
    """Repeat the routing of `trace` in the routers of `model`, by the layers' names, call by call.

    Drops are repeated too. The input must have the token shape and mask of the recording, forward by forward;
    InputError names the layer where it has not, and when the recording is over. Only the recorded layers are
    replayed.
    """
    routers = {name or "router": router for name, router in named_routers(model).items()}
    recorded = {name: layer for name, layer in trace.layers.items() if layer.experts}
    missing = [name for name in recorded if name not in routers]
    if missing or not recorded:
        raise InputError(
            f"The recording holds {', '.join(recorded) or 'no layer'}, but this {type(model).__name__} has "
            f"the routers {', '.join(routers) or 'none'}."
        )
    for name, layer in recorded.items():
        if layer.names != routers[name].names:
            raise InputError(
                f"{name} was recorded with the experts {', '.join(layer.names)}, but has "
                f"{', '.join(routers[name].names)}."
            )
    with choices_from({id(routers[name]): _Tape(name, layer) for name, layer in recorded.items()}):
        yield


def _one_expert(index: int) -> Callable[[], Choice]:
    def choose(router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> Routing:
        """The same probabilities, with one expert chosen for all: experts (T, 1), weights (T, 1)."""
        chosen = torch.full_like(routing.experts[:, :1], index)  # (T, 1)
        weights = routing.probabilities[:, index : index + 1] * getattr(router.gate, "scale", 1.0)
        return dataclasses.replace(routing, experts=chosen, weights=weights, served=chosen)

    return lambda: choose


class _Tape:
    """Gives the recorded choices of one layer, one call after another."""

    def __init__(self, name: str, layer: LayerTrace) -> None:
        self.name, self.layer, self.call = name, layer, 0

    def __call__(self) -> Choice:
        if self.call == len(self.layer.experts):
            raise InputError(f"{self.name} was recorded for {self.call} forwards, and this is one more.")
        experts, served = self.layer.experts[self.call], self.layer.served[self.call]
        real = ~self.layer.probabilities[self.call][..., 0].isnan()  # (...)
        self.call += 1

        def choose(router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> Routing:
            if experts.shape[:-1] != shape:
                raise InputError(
                    f"{self.name} was recorded with tokens of shape {tuple(experts.shape[:-1])}, got "
                    f"{tuple(shape)}."
                )
            _check_padding(self.name, real.reshape(-1), kept)
            return _with_choice(
                router, routing, *(_routed(a, router, routing, kept) for a in (experts, served))
            )

        return choose


def _check_padding(name: str, was_real: Tensor, kept: Tensor | None) -> None:
    """Raise InputError where a token that is routed now was padding in the recording, or the other way round.

    was_real (all tokens,). In compiled and captured code nothing can be read, and nothing is checked.
    """
    if is_captured(was_real if kept is None else kept):
        return
    real = torch.ones_like(was_real)
    if kept is not None:
        real = torch.zeros_like(was_real).index_fill(0, kept.to(was_real.device), True)
    if not torch.equal(real, was_real):
        raise InputError(
            f"{name} was recorded with another mask: {int((real != was_real).sum())} tokens are padding in "
            "one of the two; give the mask of the recording."
        )


def _routed(recorded: Tensor, router: MoERouter, routing: Routing, kept: Tensor | None) -> Tensor:
    """The recorded experts (..., K) of the routed tokens: (T, K), E where there was none."""
    flat = recorded.to(routing.experts.device).reshape(-1, recorded.shape[-1])
    if kept is not None:
        flat = flat.index_select(0, kept)
    return flat.masked_fill(flat < 0, router.num_experts)  # (T, K)


def _with_choice(router: MoERouter, routing: Routing, experts: Tensor, served: Tensor) -> Routing:
    """The routing with other experts, weighed as the gate would have weighed them."""
    weigh = getattr(router.gate, "weigh", None)
    if weigh is None:
        weights = gather_or_zero(routing.probabilities, experts)  # (T, K)
    else:
        weights = weigh(routing.probabilities, experts, served)
    return dataclasses.replace(routing, experts=experts, weights=weights, served=served)
