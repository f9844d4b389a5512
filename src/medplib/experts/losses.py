"""Auxiliary losses of a mixture: load balance over all tokens or per sequence, and z-loss.

T tokens, E experts, K experts per token, B sequences.

    router = MoERouter(512, experts=4, balance_loss_coef=0.01)   # the coefficients are 0 by default
    with collect_aux_losses(model) as aux:
        loss = task_loss(model(x))
    (loss + aux.total()).backward()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.experts.context import named_routers, observe

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter, Routing


def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """E * sum over experts of (mean probability * share of the choices): 1 when balanced, up to E when not.

    probabilities (T, E), experts (T, K) -> scalar. The share has no gradient. Sigmoid scores are first
    divided by their sum per token. Fedus et al., Switch Transformers, 2021, equation 4; with K > 1 all
    choices count equally. An index of E in `experts` means no expert and is not counted.
    """
    num_experts = probabilities.shape[-1]
    if not len(probabilities):
        return probabilities.sum()  # 0, with a gradient
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-20)  # (T, E)
    counts = ops.count_choices(experts, num_experts)  # (E,)
    share = counts.to(probabilities) / counts.sum().clamp_min(1)
    return num_experts * (probabilities.mean(dim=0) * share).sum()


def sequence_balance_loss(
    probabilities: Tensor, experts: Tensor, sequences: Tensor, num_sequences: int
) -> Tensor:
    """The balance loss of each sequence by itself, averaged over the sequences that have tokens.

    probabilities (T, E), experts (T, K), sequences (T,) the sequence (0 to B-1) of each token -> scalar. It
    keeps single sequences from going to one expert, which the loss over a batch does not notice.
    DeepSeek-V3, 2024, equations 17 to 20.
    """
    num_experts = probabilities.shape[-1]
    if not len(probabilities):
        return probabilities.sum()
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-20)  # (T, E)
    bins = (sequences[:, None] * (num_experts + 1) + experts).reshape(-1)  # (T*K,)
    counts = ops.count_choices(bins, num_sequences * (num_experts + 1))
    counts = counts.view(num_sequences, num_experts + 1)[:, :num_experts].to(probabilities)  # (B, E)
    share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    member = sequences == torch.arange(num_sequences, device=sequences.device)[:, None]  # (B, T)
    lengths = member.sum(dim=1).to(probabilities)  # (B,)
    sums = member.to(probabilities) @ probabilities  # (B, E), in a fixed order, which index_add has not
    means = sums / lengths.clamp_min(1)[:, None]  # (B, E)
    return num_experts * (means * share).sum() / (lengths > 0).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the logits small: logits (T, E) -> scalar.

    Zoph et al., ST-MoE, 2022, equation 5.
    """
    if not len(logits):
        return logits.sum()
    return logits.logsumexp(dim=-1).square().mean()


@dataclass(frozen=True)
class Heard:
    """One forward of one router: its losses."""

    name: str
    router: MoERouter
    routing: Routing
    shape: torch.Size
    kept: Tensor | None

    def balance(self) -> Tensor:
        """The balance loss, of first choices alone where the gate was published so."""
        routing = self.routing.without_padding()
        experts = routing.experts
        if getattr(self.router.gate, "balances_first_choice", False):
            experts = experts[:, :1]
        return balance_loss(routing.probabilities, experts)

    def sequence(self) -> Tensor:
        """The balance loss per sequence; the last of the token dimensions is the sequence."""
        length = self.shape[-1] if self.shape else 1
        places = self.kept
        if places is None:
            places = torch.arange(self.shape.numel(), device=self.routing.experts.device)
            places = places if self.routing.real is None else places[self.routing.real]
        sequences = places // max(length, 1)  # (T,)
        count = self.shape[:-1].numel()
        routing = self.routing.without_padding()
        return sequence_balance_loss(routing.probabilities, routing.experts, sequences, count)

    def z(self) -> Tensor:
        """The z-loss."""
        return z_loss(self.routing.without_padding().logits)

    def total(self) -> Tensor:
        """The sum, each multiplied by the router's coefficient."""
        loss = self.routing.logits.new_zeros(())
        if self.router.balance_loss_coef:
            loss = loss + self.router.balance_loss_coef * self.balance()
        if self.router.sequence_loss_coef:
            loss = loss + self.router.sequence_loss_coef * self.sequence()
        if self.router.z_loss_coef:
            loss = loss + self.router.z_loss_coef * self.z()
        return loss


class AuxLosses:
    """The losses of every router forward that was listened to; see `collect_aux_losses`."""

    def __init__(self, routers: dict[str, MoERouter]) -> None:
        self._names = {id(router): name or "router" for name, router in routers.items()}
        self._grad_enabled = torch.is_grad_enabled()
        self._heard: list[Heard] = []

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
        self._heard.append(Heard(name, router, routing, shape, kept))

    def balance(self) -> Tensor:
        """Sum over layers (and calls) of the balance loss, without coefficients."""
        return self._sum(Heard.balance)

    def sequence(self) -> Tensor:
        """Sum over layers (and calls) of the balance loss per sequence, without coefficients."""
        return self._sum(Heard.sequence)

    def z(self) -> Tensor:
        """Sum over layers (and calls) of the z-loss, without coefficients."""
        return self._sum(Heard.z)

    def total(self) -> Tensor:
        """Sum of all, each multiplied by its router's `..._loss_coef`; these are 0 unless you give them."""
        return self._sum(Heard.total)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Mean of each loss per layer, as numbers for a log."""
        table: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for heard in self._heard:
                losses = [heard.balance(), heard.sequence(), heard.z()]
                table.setdefault(heard.name, []).append(torch.stack(losses))
        means = {name: torch.stack(losses).mean(dim=0).tolist() for name, losses in table.items()}
        return {name: dict(zip(("balance", "sequence", "z"), m, strict=True)) for name, m in means.items()}

    def _sum(self, loss: Callable[[Heard], Tensor]) -> Tensor:
        terms = [loss(heard) for heard in self._heard]
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
