"""The mixture of experts: MoERouter owns a gate and named experts and stands where a feed-forward block can.

T tokens, D width, E experts, K experts per token.

    router = MoERouter(512, experts={"grounding": a, "vqa": b}, top_k=1)
    router(torch.randn(2, 7, 512)).shape  # (2, 7, 512)

Output = sum over the K chosen experts of weight * expert(x), where the weight is the raw probability of that
expert (softmax over all experts, not renormalised): the published semantics of MedPLIB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError
from medplib.experts.context import (
    current_mask,
    force_expert,
    forced_index,
    is_recomputation,
    routing_mask,
    tell_observers,
    unknown_expert,
)
from medplib.experts.gate import Routing, TopKGate
from medplib.registry import EXPERTS, GATES

__all__ = ["MoERouter", "Routing", "TopKGate", "force_expert", "routing_mask"]


class MoERouter(nn.Module):
    """A mixture of named experts, (..., D) -> (..., D): a drop-in for any feed-forward block.

    dim            width D of the tokens
    experts        modules by name; or names, or a number ("expert_0", ...), built from the next two
    expert         name in the registry EXPERTS, with `hidden_dim` (default 4 * dim)
    top_k, score, renormalize   how the gate chooses and weighs; see TopKGate
    gate           name in the registry GATES, or a module: tokens (T, D) -> Routing
    capacity_factor  None (default): every token is served. A number: in training, an expert takes at most
                   ceil(T / E * factor) tokens and later ones get 0 from it. Never applied in eval mode.
    balance_loss_coef, z_loss_coef   what `collect_aux_losses(model).total()` multiplies the losses with

    Each expert runs once, on the rows chosen for it and no others: T * K rows in all, no padding; an expert
    that nobody chose does not run. (Under DistributedDataParallel use find_unused_parameters=True for that
    reason.)
    """

    def __init__(
        self,
        dim: int,
        experts: Mapping[str, nn.Module] | Sequence[str] | int,
        *,
        expert: str = "swiglu",
        hidden_dim: int | None = None,
        top_k: int = 1,
        score: str = "softmax",
        renormalize: bool = False,
        gate: str | nn.Module = "topk",
        capacity_factor: float | None = None,
        balance_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise InputError(f"dim must be a whole number of at least 1, got {dim!r}.")
        if capacity_factor is not None and not capacity_factor > 0:
            raise InputError(
                f"capacity_factor must be above 0, or None to serve all; got {capacity_factor!r}."
            )
        names = _expert_names(experts)
        if isinstance(gate, str):
            gate = GATES.build(gate, dim, len(names), top_k=top_k, score=score, renormalize=renormalize)
        if not isinstance(experts, Mapping):
            hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
            experts = {name: EXPERTS.build(expert, dim, hidden_dim) for name in names}
        self.dim = dim
        self.capacity_factor = capacity_factor
        self.balance_loss_coef, self.z_loss_coef = balance_loss_coef, z_loss_coef
        self.gate = gate
        self.experts = nn.ModuleDict(experts)
        self._replay: tuple[Tensor | None, int | None] = (
            None,
            None,
        )  # mask, forced expert; see _surroundings

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in the order of the gate's rows."""
        return tuple(self.experts)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def index_of(self, name: str) -> int:
        """The gate's row for the expert called `name`."""
        if name not in self.names:
            raise unknown_expert(name, self.names)
        return self.names.index(name)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., D), mask (...) True for real tokens -> (..., D), 0 where the mask is False."""
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise InputError(f"MoERouter of width {self.dim} got a tensor of shape {tuple(x.shape)}.")
        mask, forced = self._surroundings(mask)
        tokens = x.reshape(-1, self.dim)  # (all tokens, D)
        kept = None if mask is None else _positions(mask, x.shape[:-1], x.device)  # (T,)
        out = self._mix(tokens if kept is None else tokens.index_select(0, kept), forced, x.shape[:-1], kept)
        if kept is not None:
            out = out.new_zeros(tokens.shape).index_copy(0, kept, out)  # (all tokens, D)
        return out.view(x.shape)

    def _mix(self, tokens: Tensor, forced: int | None, shape: torch.Size, kept: Tensor | None) -> Tensor:
        """tokens (T, D) -> (T, D), all of them routed."""
        routing = self.gate(tokens)
        if forced is not None:
            routing = _force(routing, forced)
        _check_routing(routing, len(tokens), self.num_experts, self.gate)
        tell_observers(self, routing, shape, kept)
        experts, k = routing.experts, routing.experts.shape[1]  # (T, K)
        if self.training and self.capacity_factor is not None:
            capacity = ops.capacity_of(len(tokens), self.num_experts, self.capacity_factor)
            experts = ops.drop_overflow(experts, self.num_experts, capacity)  # (T, K)
        order, counts = ops.sort_by_expert(experts, self.num_experts)  # (R,), (E,)
        rows = ops.permute(tokens, order, k)  # (R, D)
        answers = []
        for name, part in zip(self.names, rows.split(counts.tolist()), strict=True):
            if len(part):
                answers.append(_run(self.experts[name], part, name))
        if not answers:
            return torch.zeros_like(tokens)
        return ops.combine(torch.cat(answers), order, routing.weights)  # (T, D)

    def _surroundings(self, mask: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The mask and the forced expert of this forward.

        Gradient checkpointing repeats a forward during `backward`, when the `with` blocks around it have
        ended; so they are remembered from the forward itself.
        """
        if is_recomputation():
            outer, forced = self._replay
        else:
            outer, forced = current_mask(), forced_index(self)
            if self.training or torch.is_grad_enabled():
                self._replay = (outer, forced)
        return (outer if mask is None else mask), forced

    def force(self, name: str) -> AbstractContextManager[None]:
        """`with router.force("vqa"):` sends every token to that expert, weighted by its own probability."""
        return force_expert(self, name)

    def freeze(self, *names: str) -> None:
        """Stop training these experts (or "gate"): they keep their weights and get no gradient."""
        self._require_grad(names, False)

    def unfreeze(self, *names: str) -> None:
        """Let these experts (or "gate") train again."""
        self._require_grad(names, True)

    def train_only(self, *names: str) -> None:
        """Freeze everything in this router, the gate too, except the named experts (and "gate" if named)."""
        self._check_parts(names)
        self.requires_grad_(False)
        self._require_grad(names, True)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The experts (and "gate") that have parameters, none of which trains."""
        return tuple(
            name
            for name in (*self.names, "gate")
            if (flags := [p.requires_grad for p in self._part(name).parameters()]) and not any(flags)
        )

    def _require_grad(self, names: tuple[str, ...], value: bool) -> None:
        self._check_parts(names)
        for name in names:
            self._part(name).requires_grad_(value)

    def _check_parts(self, names: tuple[str, ...]) -> None:
        if not names:
            raise InputError(f"Name at least one of {', '.join((*self.names, 'gate'))}.")
        for name in names:
            if name != "gate" and name not in self.names:
                raise unknown_expert(name, (*self.names, "gate"))

    def _part(self, name: str) -> nn.Module:
        return self.gate if name == "gate" else self.experts[name]

    def extra_repr(self) -> str:
        return f"{self.dim}, capacity_factor={self.capacity_factor}"


def _expert_names(experts: Mapping[str, nn.Module] | Sequence[str] | int) -> tuple[str, ...]:
    """The names asked for, checked."""
    if (
        isinstance(experts, bool)
        or not isinstance(experts, int | Mapping | Sequence)
        or isinstance(experts, str)
    ):
        raise InputError(f"experts must be modules by name, a list of names, or a number; got {experts!r}.")
    names = tuple(f"expert_{i}" for i in range(experts)) if isinstance(experts, int) else tuple(experts)
    if not names:
        raise InputError(f"A MoERouter needs at least one expert, got {experts!r}.")
    taken = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str) or not name or "." in name or name == "gate" or hasattr(taken, name):
            raise InputError(f"{name!r} cannot be an expert's name; use a plain word such as 'grounding'.")
    if len(set(names)) < len(names):
        raise InputError(f"Every expert needs a name of its own, got {', '.join(names)}.")
    if isinstance(experts, Mapping):
        for name, module in experts.items():
            if not isinstance(module, nn.Module):
                raise InputError(f"The expert '{name}' must be an nn.Module, got {module!r}.")
        if len({id(module) for module in experts.values()}) < len(names):
            raise InputError("Two experts are the same module; give each its own copy (copy.deepcopy).")
    return names


def _positions(mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Where the mask is True, in the flattened tokens: mask (...) -> (T,)."""
    if mask.shape != shape and not (len(shape) == 1 and mask.numel() == shape[0]):
        raise InputError(
            f"The routing mask has shape {tuple(mask.shape)}, but the tokens have shape {tuple(shape)}; "
            f"give one entry per token."
        )
    return mask.to(device).reshape(-1).ne(0).nonzero().squeeze(1)  # (T,)


def _force(routing: Routing, expert: int) -> Routing:
    """The same probabilities, with one expert chosen for all: experts (T, 1), weights (T, 1)."""
    chosen = torch.full_like(routing.experts[:, :1], expert)  # (T, 1)
    return replace(routing, experts=chosen, weights=routing.probabilities[:, expert : expert + 1])


def _check_routing(routing: Routing, num_tokens: int, num_experts: int, gate: nn.Module) -> None:
    """Refuse what a gate from elsewhere may have got wrong."""
    right = (
        isinstance(routing, Routing)
        and routing.probabilities.shape == (num_tokens, num_experts)
        and routing.experts.ndim == 2
        and routing.experts.shape[0] == num_tokens
        and routing.experts.shape == routing.weights.shape
    )
    if not right:
        raise InputError(
            f"The gate {type(gate).__name__} must return a Routing with probabilities ({num_tokens}, "
            f"{num_experts}) and experts and weights ({num_tokens}, K)."
        )


def _run(expert: nn.Module, rows: Tensor, name: str) -> Tensor:
    """rows (R, D) -> (R, D), checked."""
    answer = expert(rows)
    if not isinstance(answer, Tensor) or answer.shape != rows.shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise InputError(f"The expert '{name}' must return a tensor of shape {tuple(rows.shape)}, got {got}.")
    return answer
