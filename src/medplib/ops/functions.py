"""The operators as users call them: checked arguments, documented results.

T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows for experts (n,
or fewer when a capacity drops some). An assignment is one (token, choice) pair; its number is
token * K + choice.

    logits = ops.gate_logits(tokens, weight)  # (T, E)
    gated = ops.gate(logits, k=2)
    plan = ops.plan(gated.experts, num_experts)
    rows = ops.permute(tokens, plan.order, 2, plan.position)  # (R, D)
    ...  # each expert on its rows
    out = ops.combine(rows, plan.order, gated.weights, plan.position)  # (T, D)

All are deterministic and differentiable (once), on the CPU and on CUDA, in eager mode, under torch.compile
and in torch.export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.ops import _loader, reference
from medplib.ops import library as _library  # noqa: F401  registers torch.ops.medplib

SCORES = ("softmax", "sigmoid")
COUNTED = 16384  # assignments beyond which `drop_overflow` sorts by priority: a kernel counts the better ones


class Gated(NamedTuple):
    """What `gate` returns: probabilities (T, E), experts (T, K), weights (T, K), counts (E,), sums (E + 3,).

    counts: choices per expert. sums, over the tokens: the probability of each expert, then the entropy in
    nats, the margin between the two best probabilities, the square of logsumexp. The last two fields have no
    gradient and are empty without `statistics`.
    """

    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    counts: Tensor
    sums: Tensor


class Plan(NamedTuple):
    """What `plan` returns, all on the device: order (n,), position (T, K), counts (E,), ends (E,) int32.

    order: the assignment in each row, -1 in the rows left over by dropped ones, at the end. position: the row
    of each assignment, -1 if dropped. ends: where each expert's rows end (what F.grouped_mm calls offs).
    """

    order: Tensor
    position: Tensor
    counts: Tensor
    ends: Tensor


def gate_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Score every expert for every token, in float32 whatever the inputs' type and autocast.

    tokens (T, D), weight (E, D) -> (T, E) float32. (float64 inputs stay float64, for numerical checks.)
    """
    if tokens.ndim != 2 or weight.ndim != 2 or tokens.shape[1] != weight.shape[1]:
        raise InputError(
            f"gate_logits needs tokens (T, D) and weight (E, D), got {tuple(tokens.shape)} and "
            f"{tuple(weight.shape)}."
        )
    device = tokens.device.type
    if not (_loader.loaded(device) or (device == "cuda" and _loader.may_load(device))):
        return reference.gate_logits(tokens, weight)  # autograd then skips, FLOP counters see, each product
    if weight.dtype != tokens.dtype:  # a kernel takes one type, or 16-bit tokens and a float32 weight
        precise = reference.precise_type(tokens, weight)
        weight = reference.cast(weight, precise)
        tokens = tokens.to(precise) if precise == torch.float64 else tokens
    return _operator("gate_logits", tokens, weight)


def gate(
    logits: Tensor,
    k: int,
    score: str = "softmax",
    renormalize: bool = False,
    *,
    selection: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: bool = True,
) -> Gated:
    """Turn logits (T, E) into probabilities, the K chosen experts and their weights; see `Gated`.

    score        "softmax" over all experts or "sigmoid" per expert
    renormalize  a weight is the share among the K chosen ones instead of the raw probability
    selection    (T, E): choose on these numbers (biased, noisy, or with groups at -inf) instead of the logits
    mask         (T,) True for real tokens; the others get weight 0 and the expert E, and are not counted

    The choice is made in float32, the best first; of equal numbers the lowest index wins.
    """
    _check_gate(logits, k, score)
    if selection is not None and selection.shape != logits.shape:
        raise InputError(
            f"selection must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(selection.shape)}."
        )
    if mask is not None and mask.shape != logits.shape[:1]:
        raise InputError(
            f"mask must have one entry per token, ({logits.shape[0]},), got {tuple(mask.shape)}."
        )
    logits = reference.cast(logits, reference.precise_type(logits))
    if selection is not None:
        selection = selection.detach().to(logits.dtype)
    parts = _operator(
        "gate",
        logits,
        selection,
        None if mask is None else mask.to(torch.bool),
        k,
        score == "sigmoid",
        renormalize,
        statistics,
    )
    return Gated(*parts[:4], parts[4].detach())


def route(logits: Tensor, k: int, score: str = "softmax", renormalize: bool = False) -> tuple[Tensor, ...]:
    """The first three of `gate`: probabilities (T, E), chosen experts (T, K) and their weights (T, K)."""
    _check_gate(logits, k, score)
    logits = reference.cast(logits, reference.precise_type(logits))
    return _operator("gate", logits, None, None, k, score == "sigmoid", renormalize, False)[:3]


def _check_gate(logits: Tensor, k: int, score: str) -> None:
    """Raise InputError for logits, k or a score that `gate` does not take."""
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise InputError(
            f"gate needs logits (T, E) and k between 1 and E, got {tuple(logits.shape)} and {k}."
        )
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}; got {score!r}.")


def choose_top_k(logits: Tensor, k: int) -> Tensor:
    """The k best experts of every token, best first; of equal logits the lowest index wins.

    logits (T, E) -> (T, K) int64.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise InputError(
            f"choose_top_k needs logits (T, E) and k between 1 and E, got {tuple(logits.shape)} and {k}."
        )
    return reference.choose_top_k(logits, k)


def plan(experts: Tensor, num_experts: int) -> Plan:
    """Order the assignments by expert, keeping the order of tokens, without asking the device for a number.

    experts (T, K); an index outside 0..E-1 (E, by convention) is a dropped assignment.
    """
    if experts.ndim != 2 or num_experts < 1:
        raise InputError(
            f"plan needs experts (T, K) and at least one expert, got {tuple(experts.shape)} and "
            f"{num_experts}."
        )
    return Plan(*_operator("plan", experts.to(torch.int64), num_experts))


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`plan`, with the dropped assignments cut off: order (R,), counts (E,).

    How many there are is asked of the device, so this waits for it; `plan` does not.
    """
    order, _, counts, ends = plan(experts, num_experts)
    return order[: int(ends[-1])], counts  # (R,), (E,)


def drop_overflow(
    experts: Tensor,
    num_experts: int,
    capacity: int,
    *,
    priority: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Drop what exceeds `capacity` rows per expert: first choices go before second ones, then earlier tokens.

    experts (T, K) -> (T, K), where a dropped assignment has the index E. With `priority` (T, K), such as the
    weights, the highest stay; with `seed` (a number, or an int64 tensor of one) those with the highest hash
    of seed and assignment number, which is the same on every device and in a recomputation.
    """
    if experts.ndim != 2 or capacity < 0:
        raise InputError(
            f"drop_overflow needs experts (T, K) and a capacity of at least 0, got {tuple(experts.shape)} "
            f"and {capacity}."
        )
    if priority is not None and seed is not None:
        raise InputError("Give drop_overflow a priority or a seed, not both.")
    if priority is not None:
        if priority.shape != experts.shape:
            raise InputError(
                f"priority must have the shape of the experts, {tuple(experts.shape)}, got "
                f"{tuple(priority.shape)}."
            )
        priority = priority.detach().to(reference.precise_type(priority))
    seed = None if seed is None else _as_seed(seed, experts.device)
    experts = experts.to(torch.int64)
    if experts.numel() > COUNTED and (priority is not None or seed is not None):
        return reference.drop(experts, priority, seed, num_experts, capacity)
    return _operator("drop", experts, priority, seed, num_experts, capacity)


def uniform(count: int, seed: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float32 in [0, 1): a hash of seed and counter, the same on every device."""
    if isinstance(seed, Tensor):
        device = seed.device
    bits = torch.ops.medplib.counter_bits(_as_seed(seed, torch.device(device)), count)
    return (bits >> 39).to(torch.float32) * 2.0**-24  # the top 24 of 63 bits


def _operator(name: str, *args: Any) -> Any:
    """`torch.ops.medplib.<name>`; or its meaning at once, without the 20 us that the dispatcher takes, on the
    CPU where no compiled kernel, gradient or tracer is concerned. Without gradients the dispatcher leaves out
    what is written in Python for autograd, which has nothing to do then."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.medplib, name)(*args)
    if not _loader.loaded("cpu") and _are_plain(args):
        return getattr(reference, name)(*args)
    if torch.is_grad_enabled():
        return getattr(torch.ops.medplib, name)(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.medplib, name)(*args)


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors lie on the CPU, and nobody wants a gradient of one."""
    for arg in args:
        if isinstance(arg, list):
            if not _are_plain(arg):
                return False
        elif isinstance(arg, Tensor):
            if type(arg) not in (Tensor, nn.Parameter) or not arg.is_cpu:
                return False
            if arg.requires_grad and torch.is_grad_enabled():
                return False
    return True


def _as_seed(seed: Tensor | int, device: torch.device) -> Tensor:
    """A seed as an int64 tensor of one number on the device."""
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise InputError(f"A seed must be one int64 number, got {tuple(seed.shape)} {seed.dtype}.")
    return seed.to(device)


def permute(tokens: Tensor, order: Tensor, k: int, position: Tensor | None = None) -> Tensor:
    """Gather each assignment's token: tokens (T, D), order (R,) -> rows (R, D), contiguous per expert.

    A row whose order is -1 is all zeros. `position` (T, K), as `plan` returns it, saves its computation.
    """
    if tokens.ndim != 2 or order.ndim != 1 or k < 1:
        raise InputError(
            f"permute needs tokens (T, D), order (R,) and k of at least 1, got {tuple(tokens.shape)}, "
            f"{tuple(order.shape)} and {k}."
        )
    return _operator("permute", tokens, order, position, k)


def combine(
    rows: Tensor,
    order: Tensor,
    weights: Tensor,
    position: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Weighted sum of what the chosen experts returned, in float32, choice 0 first, plus the residual.

    rows (R, D) in the order of `order` (R,), weights (T, K), residual (T, D) -> (T, D) in the type of `rows`,
    rounded once. An assignment without a row (dropped) adds nothing. (float64 inputs stay float64.)
    """
    if rows.ndim != 2 or weights.ndim != 2 or order.shape != rows.shape[:1]:
        raise InputError(
            f"combine needs rows (R, D), order (R,) and weights (T, K), got {tuple(rows.shape)}, "
            f"{tuple(order.shape)} and {tuple(weights.shape)}."
        )
    if residual is not None and residual.shape != (weights.shape[0], rows.shape[1]):
        raise InputError(
            f"residual must be {(weights.shape[0], rows.shape[1])}, got {tuple(residual.shape)}."
        )
    position = invert(order, *weights.shape) if position is None else position
    weights = weights.to(reference.precise_type(rows))
    residual = None if residual is None else residual.to(rows.dtype)
    return _operator("combine", rows, order, position, weights, residual)


def grouped_mm(rows: Tensor, weights: Tensor | Sequence[Tensor], ends: Tensor) -> Tensor:
    """Each expert's product with its own rows, in any type: rows (R, D) -> (R, H).

    weights: (E, H, D), or each expert's own (H, D), of which those without requires_grad cost no product in
    the backward. ends (E,), from `plan`, says where each expert's rows end; rows after the last one give
    zeros. It reads the ends on the host: on CUDA in bfloat16, F.grouped_mm does without.
    """
    tables = list(weights.unbind(0) if isinstance(weights, Tensor) and weights.ndim == 3 else weights)
    shapes = {tuple(weight.shape) for weight in tables}
    if rows.ndim != 2 or len(shapes) != 1 or any(len(s) != 2 or s[1] != rows.shape[1] for s in shapes):
        raise InputError(
            f"grouped_mm needs rows (R, D) and weights (E, H, D), got {tuple(rows.shape)} and "
            f"{tuple(weights.shape) if isinstance(weights, Tensor) else sorted(shapes)}."
        )
    if ends.shape != (len(tables),):
        raise InputError(f"ends must be one per expert, ({len(tables)},), got {tuple(ends.shape)}.")
    kinds = {weight.dtype for weight in tables}
    if kinds != {rows.dtype}:
        raise InputError(
            f"grouped_mm needs one type, got rows {rows.dtype} and weights {', '.join(map(str, kinds))}."
        )
    return _operator("grouped_mm", rows, tables, ends)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two halves of one projection: gate_up (..., 2H), gate first -> (..., H)."""
    if not gate_up.ndim or gate_up.shape[-1] % 2:
        raise InputError(f"swiglu needs (..., 2H), got {tuple(gate_up.shape)}.")
    return _operator("swiglu", gate_up)


def decode_ffn(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """The whole mixture of SwiGLU experts for few tokens, reading only the chosen experts' weights.

    tokens (T, D), experts (T, K), weights (T, K), gate_up (E, 2H, D), down (E, D, H), residual (T, D)
    -> (T, D). For inference: it has no gradient.
    """
    (num_tokens, dim), (num_experts, hidden2, _) = tokens.shape, gate_up.shape
    if gate_up.shape[2] != dim or down.shape != (num_experts, dim, hidden2 // 2):
        raise InputError(
            f"decode_ffn needs tokens (T, D), gate_up (E, 2H, D) and down (E, D, H), got "
            f"{tuple(tokens.shape)}, {tuple(gate_up.shape)} and {tuple(down.shape)}."
        )
    if experts.shape != weights.shape or experts.shape[0] != num_tokens:
        raise InputError(
            f"decode_ffn needs experts and weights ({num_tokens}, K), got {tuple(experts.shape)} and "
            f"{tuple(weights.shape)}."
        )
    if not tokens.dtype == gate_up.dtype == down.dtype:
        raise InputError(
            f"decode_ffn needs one type, got tokens {tokens.dtype}, gate_up {gate_up.dtype} and down "
            f"{down.dtype}."
        )
    weights = reference.cast(weights, reference.precise_type(tokens))
    experts = reference.cast(experts, torch.int64)
    residual = None if residual is None else residual.to(tokens.dtype)
    return _operator("decode_ffn", tokens, experts, weights, gate_up, down, residual)


def count_choices(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in `experts` (...): (E,) int64, without host sync. E is not counted."""
    flat = experts.reshape(-1)  # (n,)
    ones = torch.ones_like(flat)
    return ones.new_zeros(num_experts + 1).scatter_add(0, flat, ones)[:num_experts]


invert = reference.invert
capacity_of = reference.capacity_of
