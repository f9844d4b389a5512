"""The gate, the order of rows, drops, permute and combine in plain PyTorch."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from medplib.ops.reference.precision import cast, precise_type, without_autocast

# splitmix64 (Steele, Lea and Flood, 2014): a counter becomes 64 well mixed bits. As signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gate_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens (T, D), weight (E, D) -> (T, E) in the precise type, autocast or not."""
    precise = precise_type(tokens, weight)
    with without_autocast(tokens):
        return cast(tokens, precise) @ cast(weight, precise).T  # (T, E)


def gate_logits_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, for_tokens: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """grad (T, E) of the logits -> that of the tokens (T, D) and of the weight (E, D), in their types.

    What is not asked for is not computed and comes back empty (0,).
    """
    grad_tokens, grad_weight = tokens.new_empty(0), weight.new_empty(0)
    with without_autocast(tokens):
        if for_tokens:
            grad_tokens = (grad @ weight.to(grad.dtype)).to(tokens.dtype)  # (T, D)
        if for_weight:
            grad_weight = (grad.T @ tokens.to(grad.dtype)).to(weight.dtype)  # (E, D)
    return grad_tokens, grad_weight


def choose_top_k(scores: Tensor, k: int) -> Tensor:
    """scores (T, E) -> (T, K) int64, the best first; of equal scores the lowest index wins."""
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)  # the first of equal ones, as documented
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()  # (T, K)


def gate(
    logits: Tensor,
    selection: Tensor | None,
    mask: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalize: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits (T, E) -> probabilities (T, E), experts (T, K), weights (T, K), counts (E,), sums (E + 3,).

    The choice is made on `selection` (T, E) where given, on the logits otherwise. Where `mask` (T,) is False
    the probabilities and weights are 0 and the expert is E. counts: choices per expert. sums, over the
    tokens: the probability of each expert, the entropy of the distribution in nats, the margin (best minus
    second best probability), the square of logsumexp. Both are empty without `statistics`.
    """
    logits = logits.contiguous()
    num_experts = logits.shape[1]
    probabilities = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)  # (T, E)
    experts = choose_top_k(logits if selection is None else selection, k)  # (T, K)
    weights = probabilities.gather(-1, experts)  # (T, K)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)  # sigmoids that are all 0 stay 0
    if mask is not None:
        hidden = ~mask.unsqueeze(1)  # (T, 1)
        probabilities, weights = probabilities.masked_fill(hidden, 0), weights.masked_fill(hidden, 0)
        experts = experts.masked_fill(hidden, num_experts)
    if not statistics:
        return probabilities, experts, weights, experts.new_empty(0), probabilities.new_empty(0)
    counts, sums = _gate_statistics(logits, probabilities, experts, mask)
    return probabilities, experts, weights, counts, sums


def _gate_statistics(
    logits: Tensor, probabilities: Tensor, experts: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The counts (E,) and the sums (E + 3,) of `gate`."""
    num_experts = logits.shape[1]
    flat = experts.reshape(-1, 1)  # (n, 1)
    counts = (flat == torch.arange(num_experts, device=flat.device)).sum(dim=0)  # (E,)
    shares = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-20)  # (T, E)
    entropy = -torch.xlogy(shares, shares).sum()
    best = F.pad(probabilities, (0, 1)).sort(dim=-1, descending=True).values  # (T, E + 1)
    square = logits.logsumexp(dim=-1).square()  # (T,)
    if mask is not None:
        square = square.masked_fill(~mask, 0)
    scalars = torch.stack([entropy, (best[:, 0] - best[:, 1]).sum(), square.sum()])
    return counts, torch.cat([probabilities.sum(dim=0), scalars])


def gate_backward(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    experts: Tensor,
    sigmoid: bool,
    renormalize: bool,
) -> Tensor:
    """Gradients of the probabilities (T, E) and of the weights (T, K) -> that of the logits (T, E)."""
    grad = torch.zeros_like(probabilities) if grad_probabilities is None else grad_probabilities  # (T, E)
    if grad_weights is not None:
        served = (experts >= 0) & (experts < probabilities.shape[1])  # (T, K)
        place = experts.where(served, 0)
        if renormalize:
            chosen = probabilities.gather(-1, place).masked_fill(~served, 0)  # (T, K)
            total = chosen.sum(dim=-1, keepdim=True)
            total = total.masked_fill(total == 0, 1)
            shared = (grad_weights * (chosen / total / total)).sum(dim=-1, keepdim=True)
            grad_weights = grad_weights / total - shared
        grad = grad.scatter_add(-1, place, grad_weights.masked_fill(~served, 0))
    if sigmoid:
        return torch.ops.aten.sigmoid_backward(grad.contiguous(), probabilities)
    return torch.ops.aten._softmax_backward_data(grad.contiguous(), probabilities, -1, probabilities.dtype)


def plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """experts (T, K) -> order (n,), position (T, K), counts (E,), ends (E,) int32.

    order: the assignment in each row, expert 0's first, by token within an expert; -1 in the rows left over
    by dropped assignments, at the end. position: the row of each assignment, -1 if dropped. ends: where each
    expert's rows end. An index outside 0..E-1 counts as dropped.
    """
    flat = experts.reshape(-1)  # (n,)
    served = (flat >= 0) & (flat < num_experts)
    flat = flat.where(served, num_experts)
    by_expert, order = flat.sort(stable=True)  # (n,), (n,)
    edges = torch.arange(num_experts + 1, device=flat.device)
    starts = torch.searchsorted(by_expert, edges)  # (E + 1,)
    rows = torch.arange(flat.numel(), device=flat.device)
    position = torch.empty_like(order).scatter(0, order, rows).where(served, -1)  # (n,)
    order = order.where(by_expert < num_experts, -1)
    return order, position.view(experts.shape), starts.diff(), starts[1:].to(torch.int32)


def counter_bits(seed: Tensor, count: int) -> Tensor:
    """(count,) int64 in [0, 2^63): the hash of each counter 0..count-1 under the seed () int64.

    The counter is the assignment's number, so that any device, any number of threads and a recomputation
    draw the same.
    """
    key = mix(seed.reshape(()))
    counters = torch.arange(1, count + 1, device=seed.device)  # (count,)
    return _shift(mix(key + counters * GOLDEN), 1)


def mix(bits: Tensor) -> Tensor:
    """The finalizer of splitmix64, on int64 that wrap around."""
    bits = (bits ^ _shift(bits, 30)) * MIX_1
    bits = (bits ^ _shift(bits, 27)) * MIX_2
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift int64 right, filling with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def drop(
    experts: Tensor, priority: Tensor | None, seed: Tensor | None, num_experts: int, capacity: int
) -> Tensor:
    """experts (T, K) -> (T, K), where what exceeds `capacity` rows per expert has the index E.

    The assignments with the highest `priority` (T, K) stay, or with the highest hash under `seed` (). Ties,
    and everything when neither is given, go by choice, then by token: first choices before second ones.
    """
    num_tokens, k = experts.shape
    if priority is None and seed is not None:
        priority = counter_bits(seed, experts.numel()).view(num_tokens, k)
    flat = experts.T.reshape(-1)  # (K*T,) all first choices, then all second ones
    served = (flat >= 0) & (flat < num_experts)
    flat = flat.where(served, num_experts)
    ranked = torch.arange(flat.numel(), device=flat.device)
    if priority is not None:
        ranked = priority.T.reshape(-1).sort(descending=True, stable=True).indices  # (K*T,)
    by_expert, order = flat[ranked].sort(stable=True)
    order = ranked[order]  # by expert, the best first
    starts = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=flat.device))  # (E + 1,)
    place = torch.arange(flat.numel(), device=flat.device) - starts[by_expert]  # rank within its expert
    kept = torch.empty_like(served).scatter(0, order, place < capacity)
    return flat.where(kept & served, num_experts).view(k, num_tokens).T.contiguous()  # (T, K)


def permute(tokens: Tensor, order: Tensor, position: Tensor | None, k: int) -> Tensor:
    """tokens (T, D), order (R,) -> rows (R, D), a row of zeros where the order is -1.

    `position` (T, K), the inverse of the order, serves the gradient.
    """
    if not len(tokens):
        return tokens.new_zeros(len(order), tokens.shape[1])
    return _gather(tokens, torch.div(order, k, rounding_mode="floor"))  # (R, D)


def permute_backward(grad: Tensor, position: Tensor) -> Tensor:
    """grad (R, D) of the rows, position (T, K) -> that of the tokens (T, D), summed choice 0 first."""
    return sum_choices(grad, position, None, None)


def combine(
    rows: Tensor, order: Tensor, position: Tensor, weights: Tensor, residual: Tensor | None
) -> Tensor:
    """rows (R, D), position (T, K), weights (T, K), residual (T, D) -> (T, D) in the type of the rows.

    The sum of weight * row over the choices, choice 0 first, plus the residual, computed in the type of the
    weights (float32 or float64) and rounded once. `order` (R,) is the inverse of the position, for the
    gradient.
    """
    return sum_choices(rows, position, weights, residual)


def combine_backward(
    grad: Tensor, rows: Tensor, order: Tensor, position: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """grad (T, D) -> the gradients of the rows (R, D) and of the weights (T, K)."""
    k = weights.shape[1]
    wide = grad.to(weights.dtype)  # (T, D)
    if not len(rows) or not len(grad):
        return torch.zeros_like(rows), torch.zeros_like(weights)
    scale = weights.reshape(-1).index_select(0, order.clamp_min(0)).where(order >= 0, 0)  # (R,)
    grad_rows = _gather(wide, torch.div(order, k, rounding_mode="floor")) * scale.unsqueeze(1)  # (R, D)
    dots = [(wide * _gather(rows, position[:, j]).to(weights.dtype)).sum(dim=-1) for j in range(k)]
    return grad_rows.to(rows.dtype), torch.stack(dots, dim=-1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (R, D), index (n,) -> (n, D), zeros where the index is negative."""
    if index.device.type == "cpu" and (not index.numel() or int(index.min()) >= 0):
        return rows.index_select(0, index)  # the usual case, without another pass
    return rows.index_select(0, index.clamp_min(0)).masked_fill(index.unsqueeze(1) < 0, 0)


def sum_choices(rows: Tensor, position: Tensor, weights: Tensor | None, residual: Tensor | None) -> Tensor:
    """Sum over k of weights[:, k] * rows[position[:, k]], in order, in the precise type."""
    num_tokens, k = position.shape
    precise = precise_type(rows) if weights is None else weights.dtype
    if not len(rows) or not num_tokens:
        total = rows.new_zeros(num_tokens, rows.shape[1], dtype=precise)
    else:
        total = _weighted(rows, position, weights, 0, precise)  # (T, D)
        for choice in range(1, k):
            total = total + _weighted(rows, position, weights, choice, precise)
    if residual is not None:
        total = total + residual.to(precise)
    return total.to(rows.dtype)


def _weighted(
    rows: Tensor, position: Tensor, weights: Tensor | None, choice: int, precise: torch.dtype
) -> Tensor:
    """One term of the sum: (T, D), exactly 0 where there is no row, whatever the weight."""
    index = position[:, choice]  # (T,)
    term = _gather(rows, index).to(precise)
    if weights is None:
        return term
    return term * weights[:, choice].where(index >= 0, 0).unsqueeze(1)


def invert(order: Tensor, num_tokens: int, k: int) -> Tensor:
    """The row of each assignment, -1 where there is none: order (R,) -> position (T, K)."""
    count = num_tokens * k
    place = order.where(order >= 0, count)  # leftover rows go to a last place that is cut off
    rows = torch.arange(order.shape[0], device=order.device)
    position = order.new_full((count + 1,), -1).scatter(0, place, rows)
    return position[:count].view(num_tokens, k)


def capacity_of(num_tokens: int, num_experts: int, factor: float) -> int:
    """Most rows that one expert may take: ceil(T / E * factor), in float32 as published."""
    return _capacity_of(operator.index(num_tokens), num_experts, factor)  # a number under torch.compile, too


@torch.compiler.assume_constant_result
def _capacity_of(num_tokens: int, num_experts: int, factor: float) -> int:
    share = torch.tensor(num_tokens / num_experts, dtype=torch.float32)
    return int(torch.ceil(share * torch.tensor(factor, dtype=torch.float32)))
