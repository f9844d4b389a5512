"""Giving tokens to their experts and adding up the answers: the part of a mixture that costs time.

T tokens, D width, E experts, K experts per token, R rows given to experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.experts.checks import run_expert


def mix(tokens: Tensor, experts: Tensor, weights: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """Sum over a token's experts of weight * expert(token): tokens (T, D), (T, K), (T, K) -> (T, D).

    An index of E in `experts` adds nothing. Every expert runs once at most, on its rows in the order of the
    tokens; one that has none does not run.
    """
    if len(tokens) == 1:
        return _mix_one(tokens, experts, weights, modules)
    order, counts = ops.sort_by_expert(experts, len(modules))  # (R,), (E,)
    rows = ops.permute(tokens, order, experts.shape[1])  # (R, D)
    answers = []
    for (name, expert), part in zip(modules.items(), rows.split(counts.tolist()), strict=True):
        if len(part):
            answers.append(run_expert(expert, part, name))
    if not answers:
        return torch.zeros_like(tokens)
    return ops.combine(torch.cat(answers), order, weights)  # (T, D)


def _mix_one(tokens: Tensor, experts: Tensor, weights: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """The same for one token, as in generation, where sorting would cost more than the experts: (1, D)."""
    names = list(modules)
    total = None
    for choice, index in enumerate(experts[0].tolist()):
        if index == len(names):
            continue
        answer = run_expert(modules[names[index]], tokens, names[index])  # (1, D)
        term = weights[:, choice, None] * answer  # (1, D), in the wider of the two types
        total = term if total is None else total + term
        kind = answer.dtype
    return torch.zeros_like(tokens) if total is None else total.to(kind)
