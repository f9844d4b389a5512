"""The difference between two mixtures: where they send the same tokens, and how far apart their experts are.

T tokens, E experts, K experts per token.

    with record_routing(before) as first:
        before(x)
    with record_routing(after) as second:
        after(x)
    compare_routing(first, second)     # [{"layer": ..., "changed": 0.12, "divergence": 0.03, ...}, ...]
    compare_experts(before, after)     # how far training has moved each expert
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.context import named_routers
from medplib.experts.trace import LayerTrace, RoutingTrace


def compare_routing(first: RoutingTrace, second: RoutingTrace) -> list[dict[str, Any]]:
    """How two recordings of the same tokens differ, layer by layer.

    tokens      how many were routed in both
    changed     share of them whose first choice is another expert
    overlap     mean share of a token's choices that both made
    divergence  mean KL divergence of the second's probabilities from the first's, in nats
    moved       {expert: share of all choices in the second, less that in the first}
    flow        {expert in the first: {expert in the second: tokens}}, by first choices

    Raises InputError unless both hold the same layers with the same experts and tokens.
    """
    names = [name for name, layer in first.layers.items() if layer.experts]
    others = [name for name, layer in second.layers.items() if layer.experts]
    if names != others:
        raise InputError(f"The recordings hold other layers: {', '.join(names)} and {', '.join(others)}.")
    return [{"layer": name, **_compare(name, first.layers[name], second.layers[name])} for name in names]


def _compare(name: str, first: LayerTrace, second: LayerTrace) -> dict[str, Any]:
    if first.names != second.names:
        raise InputError(f"{name} has the experts {', '.join(first.names)} and {', '.join(second.names)}.")
    choices, scores = [], []
    for layer in (first, second):
        choices.append(layer.choices().reshape(-1, layer.choices().shape[-1]))
        scores.append(layer.scores().reshape(-1, len(layer.names)))
    if len(choices[0]) != len(choices[1]):
        raise InputError(f"{name} was recorded for {len(choices[0])} and {len(choices[1])} tokens.")
    routed = ~(scores[0].isnan().any(-1) | scores[1].isnan().any(-1))  # (T,)
    one, two = (values[routed] for values in choices)  # (T, K)
    before, after = (_normal(values[routed].double()) for values in scores)  # (T, E)
    tokens, experts = len(one), len(first.names)
    flow = torch.zeros(experts + 1, experts + 1, dtype=torch.long)  # the last for tokens without an expert
    flow.index_put_((one[:, 0], two[:, 0]), torch.ones(tokens, dtype=torch.long), accumulate=True)
    shares = [layer.counts() / layer.counts().sum().clamp_min(1) for layer in (first, second)]
    return {
        "tokens": tokens,
        "changed": _mean(one[:, 0] != two[:, 0]),
        "overlap": _mean(_overlap(one, two)),
        "divergence": _mean((torch.xlogy(before, before) - torch.xlogy(before, after)).sum(-1)),
        "moved": dict(zip(first.names, (shares[1] - shares[0]).tolist(), strict=True)),
        "flow": {
            a: {b: int(flow[i, j]) for j, b in enumerate(first.names)} for i, a in enumerate(first.names)
        },
    }


def compare_experts(first: nn.Module, second: nn.Module | None = None) -> list[dict[str, Any]]:
    """How alike experts are as vectors of weights: {"layer", "pair", "cosine", "distance"} per pair.

    With one model, all pairs of experts within each layer: how far they have specialised. With two, each
    expert with its namesake: how far training has moved it. The distance is |a - b| / |a|; 0 means equal.
    Raises InputError where layers, names or shapes differ.
    """
    routers = named_routers(first)
    others = routers if second is None else named_routers(second)
    if not routers or routers.keys() != others.keys():
        raise InputError(
            f"The models need the same MoERouters, got {', '.join(routers) or 'none'} and "
            f"{', '.join(others) or 'none'}."
        )
    rows = []
    for name, router in routers.items():
        vectors = {expert: _weights(router.experts[expert]) for expert in router.names}
        if second is None:
            pairs = [(a, b, vectors[a], vectors[b]) for a, b in itertools.combinations(router.names, 2)]
        else:
            if others[name].names != router.names:
                raise InputError(
                    f"{name} has the experts {', '.join(router.names)} and {', '.join(others[name].names)}."
                )
            pairs = [(e, e, vectors[e], _weights(others[name].experts[e])) for e in router.names]
        for a, b, one, two in pairs:
            if one.shape != two.shape:
                raise InputError(f"The experts {a} and {b} of {name or 'router'} have other sizes.")
            cosine = torch.dot(one, two) / (one.norm() * two.norm()).clamp_min(1e-30)
            distance = (one - two).norm() / one.norm().clamp_min(1e-30)
            measures = {"cosine": cosine.item(), "distance": distance.item()}
            rows.append({"layer": name or "router", "pair": (a, b), **measures})
    return rows


def _weights(expert: nn.Module) -> Tensor:
    """All numbers of an expert, in double precision: (n,)."""
    parts = [p.detach().double().reshape(-1).cpu() for _, p in sorted(expert.named_parameters())]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _overlap(one: Tensor, two: Tensor) -> Tensor:
    """Share of each token's choices that both made: (T, K), (T, K') -> (T,)."""
    same = (one[:, :, None] == two[:, None, :]) & (one[:, :, None] >= 0)  # (T, K, K')
    most = torch.maximum((one >= 0).sum(1), (two >= 0).sum(1)).clamp_min(1)
    return same.any(-1).sum(-1) / most


def _normal(scores: Tensor) -> Tensor:
    """Scores that sum to 1 per token, none of them 0: (T, E)."""
    scores = scores.clamp_min(1e-20)
    return scores / scores.sum(dim=-1, keepdim=True)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
