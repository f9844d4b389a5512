"""A limit on how many tokens an expert takes, and who is dropped: the last ones, the least probable, or any.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError
from medplib.experts.gate import Routing, gather_or_zero

DROPS = ("position", "probability", "random")


def limit(
    routing: Routing, num_experts: int, capacity: int, drop: str = "position", noise: nn.Module | None = None
) -> Routing:
    """The routing with `served` filled in: no expert keeps more than `capacity` (token, choice) pairs.

    drop  "position": first choices are kept before second ones, then earlier tokens before later ones
          "probability": the pairs with the highest probability are kept, of equal ones the earlier token
          "random": those with the highest numbers from `noise` (see KeyedNoise) are kept
    """
    experts = routing.experts  # (T, K)
    if drop == "position":
        served = ops.drop_overflow(experts, num_experts, capacity)  # (T, K)
    elif drop == "probability":
        served = keep_best(experts, gather_or_zero(routing.probabilities, experts), num_experts, capacity)
    else:
        if noise is None:
            raise InputError("drop='random' needs `noise`, a module such as KeyedNoise.")
        noise.advance()
        served = keep_best(experts, noise.uniform(experts.shape, experts.device), num_experts, capacity)
    return dataclasses.replace(routing, served=served)


def keep_best(experts: Tensor, priority: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Of each expert's (token, choice) pairs, keep the `capacity` with the highest priority.

    experts (T, K), priority (T, K) -> (T, K) with E where a pair was dropped. Ties go to the earlier token.
    """
    flat = experts.reshape(-1)  # (T*K,)
    by_priority = priority.detach().reshape(-1).argsort(descending=True, stable=True)  # (T*K,)
    order = by_priority[flat[by_priority].argsort(stable=True)]  # (T*K,) by expert, then by priority
    counts = ops.count_choices(flat, num_experts + 1)  # (E+1,) those without an expert too
    starts = (counts.cumsum(0) - counts)[flat[order]]  # (T*K,)
    late = torch.arange(len(flat), device=flat.device) - starts >= capacity  # (T*K,)
    dropped = torch.zeros_like(late).index_copy(0, order, late)
    return flat.masked_fill(dropped, num_experts).view(experts.shape)  # (T, K)
