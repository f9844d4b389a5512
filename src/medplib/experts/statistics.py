"""Routing statistics kept on the device: no host sync, no list that grows; for long runs and CUDA graphs.

T tokens, E experts, K experts per token, N remembered tokens.

    with count_routing(model) as statistics:
        for batch in batches:
            model(batch)
    statistics.rows()       # the numbers of record_routing's rows(), without the tokens themselves

A captured CUDA graph keeps counting at every replay, as long as it was captured inside the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError, check_whole
from medplib.experts.context import named_routers
from medplib.experts.recomputation import is_recomputation

if TYPE_CHECKING:
    from medplib.experts.gate import Routing
    from medplib.experts.router import MoERouter


class RoutingStatistics:
    """Running sums of one router, changed in place by `add`.

    counts (E,) chosen, dropped (E,) of them dropped; probability (E,), entropy () and margin () summed;
    tokens (); recent (N, K) the experts of the latest N tokens, -1 where none, written in turn from row 0,
    where K is the gate's top_k.
    """

    def __init__(self, router: MoERouter, remember: int = 0) -> None:
        device = next(router.parameters()).device
        experts = router.num_experts
        self.names = router.names
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        self.dropped = torch.zeros(experts, dtype=torch.int64, device=device)
        self.probability = torch.zeros(experts, dtype=torch.float32, device=device)
        self.entropy = torch.zeros((), dtype=torch.float32, device=device)
        self.margin = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        width = getattr(router.gate, "top_k", experts)
        self.recent = torch.full((remember, width), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count one forward."""
        if is_recomputation():
            return
        experts, scores = routing.experts, routing.probabilities.detach().float()  # (T, K), (T, E)
        if routing.real is not None:  # padding has no probability, so it adds 0 to all sums
            scores = scores.masked_fill(~routing.real.unsqueeze(1), 0)
        chosen = ops.count_choices(experts, len(self.counts))
        self.counts += chosen
        if routing.served is not None:
            self.dropped += chosen - ops.count_choices(routing.served, len(self.counts))
        self.probability += scores.sum(dim=0)
        normal = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        self.entropy -= torch.xlogy(normal, normal).sum()
        best = torch.cat([scores, torch.zeros_like(scores[:, :1])], dim=-1).topk(2, dim=-1).values  # (T, 2)
        self.margin += (best[:, 0] - best[:, 1]).sum()
        if len(self.recent) and len(experts):
            self._remember(experts)
        self.tokens += len(experts) if routing.real is None else routing.real.sum()

    def _remember(self, experts: Tensor) -> None:
        size, width = self.recent.shape
        latest = experts[-size:, :width]  # (n, K), less wide while an expert is forced
        latest = latest.masked_fill(latest == len(self.counts), -1)
        latest = nn.functional.pad(latest, (0, width - latest.shape[1]), value=-1)
        skipped = len(experts) - len(latest)
        rows = (self.tokens + skipped + torch.arange(len(latest), device=latest.device)) % size  # (n,)
        self.recent.index_copy_(0, rows, latest)

    def summary(self) -> dict[str, Any]:
        """The numbers as `LayerTrace.summary()` gives them; reads the device once per kind of number."""
        tokens, counts = int(self.tokens), self.counts.cpu()
        shares = counts / counts.sum().clamp_min(1)
        per_token = max(tokens, 1)
        return {
            "tokens": tokens,
            "counts": dict(zip(self.names, counts.tolist(), strict=True)),
            "shares": dict(zip(self.names, shares.tolist(), strict=True)),
            "dropped": dict(zip(self.names, self.dropped.tolist(), strict=True)),
            "probability": dict(zip(self.names, (self.probability / per_token).tolist(), strict=True)),
            "entropy": float(self.entropy) / per_token,
            "margin": float(self.margin) / per_token,
        }


class ModelStatistics:
    """The statistics of a model's routers: `layers` by qualified name."""

    def __init__(self, layers: dict[str, RoutingStatistics]) -> None:
        self.layers = layers

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per layer that ran: its name and its numbers."""
        rows = [{"layer": name, **layer.summary()} for name, layer in self.layers.items()]
        return [row for row in rows if row["tokens"]]


@contextmanager
def count_routing(model: nn.Module, remember: int = 0) -> Iterator[ModelStatistics]:
    """Count what the routers of `model` decide inside the block, on their device; read it at any time.

    remember   how many of the latest tokens' choices to keep per layer (`layers[name].recent`)

    Raises InputError if the model has no MoERouter or is being counted already.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(
            f"There is no MoERouter in this {type(model).__name__}, so there is nothing to count."
        )
    if any(router.statistics is not None for router in routers.values()):
        raise InputError("The routers are being counted already; count_routing cannot be nested.")
    check_whole(0, remember=remember)
    layers = {name or "router": RoutingStatistics(router, remember) for name, router in routers.items()}
    for name, router in routers.items():
        router.statistics = layers[name or "router"]
    try:
        yield ModelStatistics(layers)
    finally:
        for router in routers.values():
            router.statistics = None
