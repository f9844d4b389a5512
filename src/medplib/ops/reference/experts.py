"""The experts' matrix products and SwiGLU in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medplib.ops.reference.precision import precise_type, without_autocast
from medplib.ops.reference.routing import sum_choices


def grouped_mm(rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    """rows (R, D), weights E times (H, D), ends (E,) -> (R, H): each row by its expert's weight, as F.linear
    does.

    Expert e has the rows from ends[e - 1] to ends[e]; rows after the last end become zeros. The ends are read
    on the host.
    """
    out = rows.new_empty(rows.shape[0], weights[0].shape[0])
    start = 0
    with without_autocast(rows):
        for weight, end in zip(weights, ends.tolist(), strict=True):
            if end > start:
                torch.mm(rows[start:end], weight.T, out=out[start:end])
            start = end
    out[start:] = 0
    return out


def grouped_mm_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    ends: Tensor,
    for_rows: bool,
    for_weights: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """grad (R, H) -> that of the rows (R, D) and of each weight (H, D).

    What is not asked for is not computed and comes back empty (0,).
    """
    grad_rows = rows.new_empty(rows.shape if for_rows else (0,))
    grad_weights, start = [], 0
    with without_autocast(rows):
        for weight, asked, end in zip(weights, for_weights, ends.tolist(), strict=True):
            part = slice(start, end)
            if for_rows and end > start:
                torch.mm(grad[part], weight, out=grad_rows[part])
            # of an expert without rows it is zeros
            grad_weights.append(torch.mm(grad[part].T, rows[part]) if asked else weight.new_empty(0))
            start = end
    if for_rows:
        grad_rows[start:] = 0
    return grad_rows, grad_weights


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (R, 2H), gate first -> silu(gate) * up (R, H), computed in the precise type."""
    gate, up = gate_up.to(precise_type(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """grad (R, H), gate_up (R, 2H) -> the gradient of gate_up (R, 2H)."""
    precise = precise_type(gate_up)
    gate, up = gate_up.to(precise).chunk(2, dim=-1)
    grad = grad.to(precise)
    sigmoid = gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, grad * gate * sigmoid], dim=-1).to(gate_up.dtype)


def decode_ffn(
    tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None
) -> Tensor:
    """tokens (T, D), experts (T, K), weights (T, K), gate_up (E, 2H, D), down (E, D, H) -> (T, D).

    What permute, the experts and combine do together, reading the weights of the chosen experts and no
    others. For few tokens, at inference.
    """
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)  # (n,)
    served = (flat >= 0) & (flat < len(gate_up))
    position = torch.arange(flat.numel(), device=flat.device).where(served, -1).view(num_tokens, k)
    with without_autocast(tokens):
        if tokens.device.type == "cpu":
            rows = _run_chosen(tokens, flat.tolist(), k, gate_up, down)  # (n, D)
        else:  # no counts on the host: a graph may be recording
            chosen = flat.where(served, 0)
            inputs = tokens.repeat_interleave(k, dim=0).unsqueeze(2)  # (n, D, 1)
            hidden = swiglu(torch.bmm(gate_up[chosen], inputs).squeeze(2))  # (n, H)
            rows = torch.bmm(down[chosen], hidden.unsqueeze(2)).squeeze(2)  # (n, D)
    return sum_choices(rows, position, weights, residual)


def _run_chosen(tokens: Tensor, experts: list[int], k: int, gate_up: Tensor, down: Tensor) -> Tensor:
    """One pass per chosen expert: tokens (T, D), n experts -> rows (n, D) in the order of assignments."""
    members: dict[int, list[int]] = {}
    for assignment, expert in enumerate(experts):
        if 0 <= expert < len(gate_up):
            members.setdefault(expert, []).append(assignment)
    if len(members) == 1 and len(tokens) == len(experts) == len(next(iter(members.values()))):
        expert = next(iter(members))
        return F.linear(swiglu(F.linear(tokens, gate_up[expert])), down[expert])  # (n, D)
    rows = tokens.new_zeros(len(experts), tokens.shape[1])
    for expert, assignments in members.items():
        place = torch.tensor(assignments, device=tokens.device)
        part = tokens.index_select(0, place // k)
        rows.index_copy_(0, place, F.linear(swiglu(F.linear(part, gate_up[expert])), down[expert]))
    return rows
