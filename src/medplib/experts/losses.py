"""Auxiliary losses of a mixture: load balance (Switch) and router z-loss, collected around a forward.

T tokens, E experts, K experts per token.

    with collect_aux_losses(model) as aux:
        loss = task_loss(model(x))
    (loss + aux.total()).backward()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medplib.experts.context import named_routers, observe

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter, Routing


def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """E * sum over experts of (mean probability * share of the choices): 1 when balanced, up to E when not.

    probabilities (T, E), experts (T, K) -> scalar. The share has no gradient. Sigmoid scores are first
    divided by their sum per token. Fedus et al., Switch Transformers, 2021, equation 4; with K > 1 all
    choices count equally.
    """
    num_experts = probabilities.shape[-1]
    if not len(probabilities):
        return probabilities.sum()  # 0, with a gradient
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-20)  # (T, E)
    share = (
        torch.bincount(experts.reshape(-1), minlength=num_experts).to(probabilities) / experts.numel()
    )  # (E,)
    return num_experts * (probabilities.mean(dim=0) * share).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small: logits (T, E) -> scalar.

    Zoph et al., ST-MoE, 2022, equation 5.
    """
    if not len(logits):
        return logits.sum()
    return logits.logsumexp(dim=-1).square().mean()


class AuxLosses:
    """The losses of every router forward that was listened to; see `collect_aux_losses`."""

    def __init__(self, routers: dict[str, MoERouter]) -> None:
        self._names = {id(router): name or "router" for name, router in routers.items()}
        self._grad_enabled = torch.is_grad_enabled()
        self._heard: list[tuple[str, MoERouter, Routing]] = []

    def receive(self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
        """Keep what a router decided (called by the router)."""
        name = self._names.get(id(router))
        if name is None:
            return
        if self._grad_enabled and router.training and not torch.is_grad_enabled():
            warnings.warn(
                f"{name} ran without gradients inside collect_aux_losses, so its auxiliary losses train "
                f"nothing. If this is gradient checkpointing, use use_reentrant=False.",
                stacklevel=2,
            )
        self._heard.append((name, router, routing))

    def balance(self) -> Tensor:
        """Sum over layers (and calls) of the balance loss, without coefficients."""
        return self._sum(lambda router, routing: balance_loss(routing.probabilities, routing.experts))

    def z(self) -> Tensor:
        """Sum over layers (and calls) of the z-loss, without coefficients."""
        return self._sum(lambda router, routing: z_loss(routing.logits))

    def total(self) -> Tensor:
        """Sum of both, each multiplied by its router's `balance_loss_coef` and `z_loss_coef`."""

        def weighted(router: MoERouter, routing: Routing) -> Tensor:
            loss = routing.logits.new_zeros(())
            if router.balance_loss_coef:
                loss = loss + router.balance_loss_coef * balance_loss(routing.probabilities, routing.experts)
            if router.z_loss_coef:
                loss = loss + router.z_loss_coef * z_loss(routing.logits)
            return loss

        return self._sum(weighted)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Mean of each loss per layer, as numbers for a log."""
        table: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for name, _, routing in self._heard:
                pair = [balance_loss(routing.probabilities, routing.experts), z_loss(routing.logits)]
                table.setdefault(name, []).append(torch.stack(pair))
        means = {name: torch.stack(pairs).mean(dim=0).tolist() for name, pairs in table.items()}
        return {name: {"balance": balance, "z": z} for name, (balance, z) in means.items()}

    def _sum(self, loss: Callable[[MoERouter, Routing], Tensor]) -> Tensor:
        terms = [loss(router, routing) for _, router, routing in self._heard]
        if not terms:
            return torch.zeros(())
        device = terms[-1].device  # layers may lie on several devices
        return torch.stack([term.to(device) for term in terms]).sum()


@contextmanager
def collect_aux_losses(model: nn.Module) -> Iterator[AuxLosses]:
    """Listen to the routers of `model`; the losses may be taken inside the block or after it.

    Safe with gradient checkpointing (use_reentrant=False): a recomputed forward is not counted again, and no
    loss is computed inside the checkpointed region. A model without routers gives losses of 0.
    """
    losses = AuxLosses(named_routers(model))
    with observe(losses):
        yield losses
