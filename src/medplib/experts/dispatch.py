"""Giving tokens to their experts and adding up the answers: the part of a mixture that costs time.

T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows given to
experts.

Every way gives the same sum. Which one is taken:

    few       on the CPU, n <= FEW: sorted on the host, where the operators would cost more than the experts
    streamed  on CUDA, n <= STREAMED, packed SwiGLU experts, no gradient: one kernel that reads the chosen
              experts' weights and no others
    grouped   compiled, captured into a CUDA graph, or on CUDA with T < GROUPED: one grouped product for all
              experts; on CUDA the host never waits for a number
    sorted    all else: one product per expert, on rows that lie together; a frozen expert's weight gradient
              is not computed
    everyone  compiled or captured, and experts that no grouped product takes: each expert on all tokens, its
              answers masked; the price is E times the work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib import ops
from medplib.experts.checks import run_expert
from medplib.experts.grouped import Layered, Packed, PlainSwiGLU, group_experts, packed_swiglu, product_type
from medplib.ops.reference import cast, precise_type

FEW = 64
STREAMED = 16
GROUPED = 2048

Experts = Mapping[str, Callable[[Tensor], Tensor]]  # in their order; modules, or anything that is called


def mix(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    modules: Mapping[str, nn.Module],
    packed: Packed | None = None,
) -> Tensor:
    """Sum over a token's experts of weight * expert(token): tokens (T, D), (T, K), (T, K) -> (T, D).

    An index of E in `experts` adds nothing. Outside compiled and captured code every expert runs once at
    most, on its rows in the order of the tokens, and one that has none does not run. packed: gives the
    experts' packed weights, if they are (see packing.py).
    """
    if is_captured(tokens):
        grouped = group_experts(tokens, modules, packed)
        if grouped is None:
            return _mix_everywhere(tokens, experts, weights, modules)
        tokens = tokens.to(product_type(tokens))
        return _mix_tables(tokens, experts, weights, grouped, len(modules))
    plain = None
    if tokens.is_cuda and not torch.is_grad_enabled():
        plain = packed_swiglu(tokens, modules, packed)
    return mix_eager(tokens, experts, weights, modules, plain)


def mix_eager(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    modules: Experts,
    plain: PlainSwiGLU | None = None,
) -> Tensor:
    """`mix` where the host may read numbers. plain: the experts' tables where they are no more than that and
    nobody wants a gradient."""
    if not tokens.is_cuda:
        few = experts.numel() <= FEW and tokens.shape[0]
        return (_mix_few if few else _mix_sorted)(tokens, experts, weights, modules)
    if plain is not None and (experts.numel() <= STREAMED or tokens.shape[0] < GROUPED):
        return _mix_tables(tokens, experts, weights, plain, len(modules))
    return _mix_sorted(tokens, experts, weights, modules, plain)


def is_captured(tensor: Tensor) -> bool:
    """Whether this runs inside torch.compile or torch.export, or into a CUDA graph: nothing may be read."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _mix_sorted(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    modules: Experts,
    plain: PlainSwiGLU | None = None,
) -> Tensor:
    """One product per expert. plain: their tables, for use without gradients."""
    plan = ops.plan(experts, len(modules))
    counts = _read_later(plan.counts)
    rows = ops.permute(tokens, plan.order, experts.shape[1], plan.position)  # (n, D), the dropped ones last
    sizes = counts()
    sizes.append(len(rows) - sum(sizes))
    parts = rows.split(sizes)[:-1]
    if plain is not None:
        joined, tables = torch.empty_like(rows), (plain.gate_up, plain.down)
        for part, out, gate_up, down in zip(parts, joined.split(sizes)[:-1], *tables, strict=True):
            torch.mm(ops.swiglu(F.linear(part, gate_up)), down.T, out=out)
        return ops.combine(joined, plan.order, weights, plan.position)  # (T, D)
    answers = [
        run_expert(expert, part, name)
        for (name, expert), part in zip(modules.items(), parts, strict=True)
        if len(part)
    ]
    if not answers:
        return tokens.new_zeros(tokens.shape, dtype=product_type(tokens))
    joined = torch.cat(answers) if len(answers) > 1 else answers[0]  # (R, D)
    return ops.combine(joined, plan.order[: len(joined)], weights, plan.position)  # (T, D)


def _read_later(counts: Tensor) -> Callable[[], list[int]]:
    """Start copying numbers to the host; calling the result waits for them. What is queued between the two
    hides the wait."""
    if not counts.is_cuda:
        return counts.tolist
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(counts.device))  # the current device may be another one

    def read() -> list[int]:
        done.synchronize()
        return host.tolist()

    return read


def _mix_few(tokens: Tensor, experts: Tensor, weights: Tensor, modules: Mapping[str, nn.Module]) -> Tensor:
    """The same with the few assignments sorted on the host."""
    num_tokens, k = experts.shape
    chosen, called_by = experts.reshape(-1).tolist(), list(modules.items())  # (n,), E
    if k == 1 and 0 <= chosen[0] < len(called_by) and chosen.count(chosen[0]) == num_tokens:
        name, expert = called_by[chosen[0]]  # all tokens, in their order
        answer = run_expert(expert, tokens, name)  # (T, D)
        return cast(answer * weights, answer.dtype)
    members: list[list[int]] = [[] for _ in called_by]
    for assignment, expert in enumerate(chosen):
        if 0 <= expert < len(members):
            members[expert].append(assignment)
    called = [(name, part) for name, part in zip(modules, members, strict=True) if part]
    if not called:
        return tokens.new_zeros(tokens.shape, dtype=product_type(tokens))
    answers = []
    for name, part in called:
        rows = tokens if num_tokens == 1 else tokens[[assignment // k for assignment in part]]
        answers.append(run_expert(modules[name], rows, name))  # (R_e, D)
    rows = torch.cat(answers) if len(answers) > 1 else answers[0]  # (R, D)
    place = {assignment: row for row, assignment in enumerate(a for _, part in called for a in part)}
    total = None
    for choice in range(k):
        index = [place.get(token * k + choice, -1) for token in range(num_tokens)]
        term = weights[:, choice, None] * rows[index]  # (T, D), in the wider of the two types
        if -1 in index:
            nobody = torch.tensor(index, device=rows.device) < 0
            term = term.masked_fill(nobody[:, None], 0)
        total = term if total is None else total + term
    return total.to(rows.dtype)


def _mix_tables(
    tokens: Tensor, experts: Tensor, weights: Tensor, grouped: PlainSwiGLU | Layered, num_experts: int
) -> Tensor:
    """The same streamed or with grouped products; on CUDA nothing is read on the host."""
    if isinstance(grouped, PlainSwiGLU) and not torch.is_grad_enabled() and experts.numel() <= STREAMED:
        return ops.decode_ffn(tokens, experts, weights, grouped.gate_up, grouped.down)
    plan = ops.plan(experts, num_experts)
    rows = ops.permute(tokens, plan.order, experts.shape[1], plan.position)  # (n, D)
    answers = grouped(rows, plan.ends)  # (n, D), anything where dropped
    return ops.combine(answers, plan.order, weights, plan.position)  # (T, D)


def _mix_everywhere(
    tokens: Tensor, experts: Tensor, weights: Tensor, modules: Mapping[str, nn.Module]
) -> Tensor:
    """The same with every expert on all tokens."""
    total = tokens.new_zeros(tokens.shape, dtype=precise_type(tokens, weights))
    kind = tokens.dtype
    for index, (name, expert) in enumerate(modules.items()):
        answer = run_expert(expert, tokens, name)  # (T, D)
        kind = answer.dtype
        chosen = experts == index  # (T, K)
        share = weights.masked_fill(~chosen, 0).sum(dim=-1, keepdim=True)  # (T, 1)
        total = total + (share * answer).masked_fill(~chosen.any(dim=-1, keepdim=True), 0)
    return total.to(kind)
