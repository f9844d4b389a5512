"""What each operator of a mixture of experts means, in plain PyTorch; the kernel used when none is compiled.

T tokens, D width, E experts, K experts per token, R = T*K rows given to experts (fewer when a capacity drops
some). An assignment is one (token, choice) pair; its number is token * K + choice.

Everything is deterministic: ties go to the expert with the lowest index, rows keep the order of their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Score every expert for every token, in float32 whatever the inputs' type and autocast.

    tokens (T, D), weight (E, D) -> (T, E) float32. (float64 inputs stay float64, for numerical checks.)
    """
    precise = torch.float64 if torch.float64 in (tokens.dtype, weight.dtype) else torch.float32
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        return tokens.to(precise) @ weight.to(precise).T  # (T, E)


def choose_top_k(logits: Tensor, k: int) -> Tensor:
    """The k best experts of every token, best first; of equal logits the lowest index wins.

    logits (T, E) -> (T, K) int64.
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # (T, K)


def route(logits: Tensor, k: int, score: str = "softmax", renormalize: bool = False) -> tuple[Tensor, ...]:
    """Turn logits into probabilities (T, E), chosen experts (T, K) and their weights (T, K).

    `score` is "softmax" over all experts or "sigmoid" per expert. The choice is made on the logits. A weight
    is the raw probability of the chosen expert, or with `renormalize` its share among the K chosen ones.
    """
    probabilities = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()  # (T, E)
    experts = choose_top_k(logits, k)  # (T, K)
    weights = probabilities.gather(-1, experts)  # (T, K)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return probabilities, experts, weights


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order the assignments by expert, keeping the order of tokens within each expert.

    experts (T, K) -> order (R,) the assignment numbers, expert 0's first; counts (E,) how many each expert
    gets. An assignment to the index E is a dropped one and is left out of both.
    """
    flat = experts.reshape(-1)  # (T*K,)
    counts = torch.bincount(flat, minlength=num_experts + 1)  # (E+1,)
    order = flat.argsort(stable=True)  # (T*K,)
    kept = flat.numel() - int(counts[num_experts])
    return order[:kept], counts[:num_experts]  # (R,), (E,)


def permute(tokens: Tensor, order: Tensor, k: int) -> Tensor:
    """Gather each assignment's token: tokens (T, D), order (R,) -> rows (R, D), contiguous per expert."""
    return tokens.index_select(0, order // k)  # (R, D)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of what the chosen experts returned, in float32, choice 0 first.

    rows (R, D) in the order of `order` (R,), weights (T, K) -> (T, D) in the type of `rows`.
    An assignment without a row (dropped) adds nothing.
    """
    num_tokens, k = weights.shape
    rows, precise = _as_precise(rows, weights)
    back = rows.new_zeros(num_tokens * k, rows.shape[-1]).index_copy(0, order, rows)  # (T*K, D)
    back = back.view(num_tokens, k, -1)  # (T, K, D)
    total = weights[:, 0, None].to(rows.dtype) * back[:, 0]  # (T, D)
    for choice in range(1, k):
        total = total + weights[:, choice, None].to(rows.dtype) * back[:, choice]
    return total.to(precise)


def capacity_of(num_tokens: int, num_experts: int, factor: float) -> int:
    """Most rows that one expert may take: ceil(T / E * factor), in float32 as published."""
    share = torch.tensor(num_tokens / num_experts, dtype=torch.float32)
    return int(torch.ceil(share * torch.tensor(factor, dtype=torch.float32)))


def drop_overflow(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Drop what exceeds `capacity` rows per expert: first choices go before second ones, then earlier tokens.

    experts (T, K) -> (T, K), where a dropped assignment has the index E.
    """
    by_choice = experts.T.reshape(-1)  # (K*T,) all first choices, then all second ones
    one_hot = torch.nn.functional.one_hot(by_choice, num_experts)  # (K*T, E)
    place = (one_hot.cumsum(dim=0) * one_hot).sum(dim=-1)  # (K*T,) 1 for the first row of its expert
    by_choice = by_choice.masked_fill(place > capacity, num_experts)
    return by_choice.view(experts.shape[1], experts.shape[0]).T  # (T, K)


def _as_precise(rows: Tensor, weights: Tensor) -> tuple[Tensor, torch.dtype]:
    """The rows in the type of the weights when that is the wider one, and the type to return."""
    return rows.to(torch.promote_types(rows.dtype, weights.dtype)), rows.dtype
