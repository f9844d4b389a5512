"""The mixture of experts: MoERouter owns a gate and named experts and stands where a feed-forward block can.

T tokens, D width, E experts, K experts per token, R rows given to experts.

    router = MoERouter(512, experts={"grounding": a, "vqa": b}, top_k=1)
    router(torch.randn(2, 7, 512)).shape  # (2, 7, 512)

Output = sum over the K chosen experts of weight * expert(x), where the weight is the raw probability of that
expert (softmax over all experts, not renormalised): the published semantics of MedPLIB.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError, check_whole
from medplib.experts.capacity import limit
from medplib.experts.checks import (
    build_gate,
    check_capacity,
    check_coefficients,
    check_parity,
    check_routing,
    expert_names,
)
from medplib.experts.context import (
    Choice,
    Padding,
    current_mask,
    forced_choice,
    routing_mask,
    tell_observers,
    unknown_expert,
)
from medplib.experts.dispatch import is_captured, mix
from medplib.experts.force import force_expert
from medplib.experts.gate import Routing, TopKGate
from medplib.experts.noise import KeyedNoise
from medplib.experts.packing import Packed, pack_experts
from medplib.experts.recomputation import Past
from medplib.registry import EXPERTS

if TYPE_CHECKING:
    from medplib.experts.cost import CostReport
    from medplib.experts.parallel import Exchange
    from medplib.experts.statistics import RoutingStatistics

__all__ = ["MoERouter", "Routing", "TopKGate", "force_expert", "routing_mask"]


class MoERouter(nn.Module):
    """A mixture of named experts, (..., D) -> (..., D): a drop-in for any feed-forward block.

    dim            width D of the tokens
    experts        modules by name; or names, or a number ("expert_0", ...), built from the next two
    expert         name in the registry EXPERTS, with `hidden_dim` (default 4 * dim)
    top_k, score, renormalize   how the gate chooses and weighs; see TopKGate
    gate           name in the registry GATES, or a module: tokens (T, D) -> Routing
    gate_args      further arguments of a gate found by name, such as {"groups": 4}; see TopKGate
    capacity_factor  None (default): every token is served. A number: in training, an expert takes at most
                   ceil(T / E * factor) tokens, but no fewer than `min_capacity`, and the others get 0 from it
    eval_capacity_factor   the same in eval mode
    drop           whom a full expert drops: "position" (later tokens), "probability" (less probable ones) or
                   "random" (by a hash of `seed`, the step and the place, not by torch's generators)
    parity         "deepspeed": the published gating exactly, capacities, random drops and padding included;
                   see medplib.experts.deepspeed
    balance_loss_coef, sequence_loss_coef, z_loss_coef   what `collect_aux_losses(model).total()` multiplies
                   the losses with
    pack           lay the weights of the experts that are built here side by side; see `pack`

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
        gate_args: Mapping[str, Any] | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        drop: str = "position",
        seed: int | None = None,
        parity: str | None = None,
        balance_loss_coef: float = 0.0,
        sequence_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        pack: bool = True,
    ) -> None:
        super().__init__()
        check_whole(dim=dim)
        check_capacity(capacity_factor, eval_capacity_factor, min_capacity, drop)
        check_coefficients(
            balance_loss_coef=balance_loss_coef,
            sequence_loss_coef=sequence_loss_coef,
            z_loss_coef=z_loss_coef,
        )
        names = expert_names(experts)
        if not isinstance(gate, str | nn.Module):
            raise InputError(f"gate must be a name or a module, got {gate!r}.")
        if gate_args is not None and not isinstance(gate_args, Mapping):
            raise InputError(f"gate_args must be a dict of the gate's settings, got {gate_args!r}.")
        gate_args = dict(gate_args or {})
        if parity is not None:
            check_parity(parity, gate, drop)
            gate = "deepspeed"
            gate_args = {
                "capacity_factor": capacity_factor,
                "eval_capacity_factor": eval_capacity_factor,
                "min_capacity": min_capacity,
                "seed": seed,
                **gate_args,
            }
        if isinstance(gate, str):
            settings = {"top_k": top_k, "score": score, "renormalize": renormalize, **gate_args}
            gate = build_gate(gate, dim, len(names), settings)
        elif gate_args:
            raise InputError(f"gate_args go to a gate found by name; this one is a {type(gate).__name__}.")
        limited = capacity_factor is not None or eval_capacity_factor is not None
        if drop != "position" and not limited:
            raise InputError(f"drop={drop!r} drops nothing without a capacity; give capacity_factor.")
        if limited and parity is None and getattr(gate, "own_capacity", False):
            raise InputError(
                f"{type(gate).__name__} has a capacity of its own; give none to the router (see gate_args)."
            )
        ours = not isinstance(experts, Mapping)
        if ours:
            hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
            experts = {name: EXPERTS.build(expert, dim, hidden_dim) for name in names}
        self.dim, self.parity = dim, parity
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop = min_capacity, drop
        self.balance_loss_coef, self.sequence_loss_coef = balance_loss_coef, sequence_loss_coef
        self.z_loss_coef = z_loss_coef
        self.gate = gate
        self.experts = nn.ModuleDict(experts)
        self.statistics: RoutingStatistics | None = None  # set by count_routing
        self.exchange: Exchange | None = None  # set by distribute_experts
        self._packed: Packed | None = None
        self.drop_noise = KeyedNoise(seed) if drop == "random" and limited and parity is None else None
        if ours and pack and not any(parameter.is_meta for parameter in self.experts.parameters()):
            with contextlib.suppress(InputError):  # a kind of expert whose weights cannot lie together
                self.pack()
        self._past: Past[tuple[Padding | None, Choice | None]] = Past()  # see _surroundings

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
        """x (..., D), mask (...) True for real tokens -> (..., D), 0 where the mask is False.

        With parity="deepspeed" padding is routed like any token, as published: a surrounding `routing_mask`
        is not looked at, and a mask given here is refused.
        """
        if not isinstance(x, Tensor):
            raise InputError(f"MoERouter needs a tensor (..., {self.dim}), got a {type(x).__name__}.")
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise InputError(f"MoERouter of width {self.dim} got a tensor of shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise InputError(f"MoERouter needs a floating-point tensor, got {x.dtype}; cast it first.")
        if self.parity is not None and mask is not None:
            raise InputError(f"parity={self.parity!r} routes padding too, as published; give no mask.")
        padding, choice = self._surroundings(mask)
        shape, tokens = x.shape[:-1], x.reshape(-1, self.dim)  # (...), (all tokens, D)
        if padding is not None and is_captured(x):
            real = padding.flat(shape, x.device)  # (all tokens,)
            tokens = tokens.masked_fill(~real.unsqueeze(1), 0)  # what is no number must not reach a gradient
            return self._mix(tokens, choice, shape, None, real).view(x.shape)
        kept = None if padding is None else padding.positions(shape, x.device)  # (T,)
        out = self._mix(tokens if kept is None else tokens.index_select(0, kept), choice, shape, kept)
        if kept is not None:
            out = out.new_zeros(tokens.shape).index_copy(0, kept, out)  # (all tokens, D)
        return out.view(x.shape)

    def _route(
        self,
        tokens: Tensor,
        choice: Choice | None,
        shape: torch.Size,
        kept: Tensor | None,
        real: Tensor | None,
    ) -> Routing:
        """What is decided for tokens (T, D): by the gate, then a forced choice, then the capacity.

        real (T,): the rows may not be taken out, so those that are padding are sent to no expert.
        """
        if real is not None:
            self._check_padding_along()
        gate = self.gate
        routing = gate(tokens)
        check_routing(routing, tokens.shape[0], self.num_experts, gate)
        if choice is not None:
            routing = choice(self, routing, shape, kept)
        if real is not None:
            nobody = ~real.unsqueeze(1)  # (T, 1)
            return dataclasses.replace(
                routing,
                experts=routing.experts.masked_fill(nobody, self.num_experts),
                weights=routing.weights.masked_fill(nobody, 0),
                served=None
                if routing.served is None
                else routing.served.masked_fill(nobody, self.num_experts),
                real=real,
            )
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None or routing.served is not None or self.parity is not None:
            return routing
        capacity = max(ops.capacity_of(tokens.shape[0], self.num_experts, factor), self.min_capacity)
        return limit(routing, self.num_experts, capacity, self.drop, self.drop_noise)

    def _check_padding_along(self) -> None:
        """Refuse, in compiled or captured code, what would count padding: how many tokens are real is not
        known there."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        counts = self.training and getattr(self.gate, "bias", None) is not None
        if factor is not None or counts or getattr(self.gate, "own_capacity", False):
            raise InputError(
                "A capacity, a load bias and experts that choose cannot leave padding out inside "
                "torch.compile or a CUDA graph; run this router eagerly, or give it no mask."
            )

    def _mix(
        self,
        tokens: Tensor,
        choice: Choice | None,
        shape: torch.Size,
        kept: Tensor | None,
        real: Tensor | None = None,
    ) -> Tensor:
        """tokens (T, D) -> (T, D), all of them routed."""
        routing = self._route(tokens, choice, shape, kept, real)
        tell_observers(self, routing, shape, kept)
        if self.statistics is not None:
            self.statistics.add(routing)
        experts = routing.experts if routing.served is None else routing.served  # (T, K)
        if self.exchange is not None:
            return self.exchange(tokens, experts, routing.weights, self.experts)  # (T, D)
        return mix(tokens, experts, routing.weights, self.experts, self.packed_weights)  # (T, D)

    def _surroundings(self, mask: Tensor | None) -> tuple[Padding | None, Choice | None]:
        """The mask and the forced choice of this forward.

        Gradient checkpointing repeats a forward during `backward`, when the `with` blocks around it have
        ended; so they are remembered from the forward itself.
        """
        outer, choice = self._past.of_this_forward(
            lambda: (None if self.parity else current_mask(), forced_choice(self)), keep=self.training
        )
        return (outer if mask is None else Padding(mask)), choice

    def init_expert(self, name: str, source: str | nn.Module) -> None:
        """Copy the weights of another expert, by name, or of a dense FFN into the expert called `name`."""
        from medplib.experts.upcycle import init_expert

        init_expert(self, name, source)

    def cost_report(self, x: Tensor, mask: Tensor | None = None) -> CostReport:
        """Run x (..., D) once without gradients and count rows, operations and bytes; print it."""
        from medplib.experts.cost import measure_cost

        with torch.no_grad(), measure_cost(self) as report:
            self(x, mask)
        return report

    def pack(self) -> None:
        """Lay the weights of equal experts side by side in memory; parameters, names and training stay.

        They stay packed through .to(), .half(), deepcopy, torch.save, load_state_dict and LoRA; after
        from_pretrained or fully_shard they are apart, and `packed_weights` says so by None. See
        medplib.experts.packing. Raises InputError for experts that differ, before anything changes.
        """
        self._packed = pack_experts(self)

    def packed_weights(self) -> dict[str, Tensor] | None:
        """The packed weights, (E, ...) each, without gradient and without a copy; None if they lie apart.

        {"gate_up_proj.weight": (E, 2 * H, D), "down_proj.weight": (E, D, H)} for SwiGLU experts. Of a layer
        with LoRA it is the base weight.
        """
        return None if self._packed is None else self._packed.weights(self)

    def _apply(self, fn: Any, recurse: bool = True) -> MoERouter:
        """Move or cast everything (called by .to() and the like), and pack again what was packed."""
        packed = self.packed_weights() is not None
        super()._apply(fn, recurse)
        if packed and not any(parameter.is_meta for parameter in self.parameters()):
            self.pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or saved: not where the weights lie."""
        return {**self.__dict__, "_packed": self.packed_weights() is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or loaded: pack again what was packed."""
        packed = state.get("_packed")
        super().__setstate__({**state, "_packed": None})
        if packed:
            self.pack()

    def force(self, name: str) -> AbstractContextManager[None]:
        """`with router.force("vqa"):` sends every token to that expert, weighted by its own probability."""
        return force_expert(self, name)

    def freeze(self, *names: str) -> None:
        """Stop training these experts (or "gate"): they keep their weights and lose their gradient.

        A frozen expert is in evaluation mode, so that running statistics stay too; a frozen gate keeps its
        load bias.
        """
        self._check_parts(names)
        self._require_grad(names, False)

    def unfreeze(self, *names: str) -> None:
        """Let these experts (or "gate") train again."""
        self._check_parts(names)
        self._require_grad(names, True)

    def train_only(self, *names: str) -> None:
        """Freeze everything in this router, the gate too, except the named experts (and "gate" if named)."""
        self._check_parts(names)
        self._require_grad(tuple(name for name in (*self.names, "gate") if name not in names), False)
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
        for name in names:
            for parameter in self._part(name).parameters():
                parameter.requires_grad_(value)
                if not value:
                    parameter.grad = None  # else an optimiser with momentum or weight decay would move it
            if name != "gate":
                self.experts[name].train(value and self.training)

    def train(self, mode: bool = True) -> MoERouter:
        """Like `nn.Module.train`, but a frozen expert stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            if name != "gate":
                self.experts[name].eval()
        return self

    def _check_parts(self, names: tuple[str, ...]) -> None:
        if not names:
            raise InputError(f"Name at least one of {', '.join((*self.names, 'gate'))}.")
        for name in names:
            if name != "gate" and name not in self.names:
                raise unknown_expert(name, (*self.names, "gate"))

    def _part(self, name: str) -> nn.Module:
        return self.gate if name == "gate" else self.experts[name]

    def extra_repr(self) -> str:
        parity = "" if self.parity is None else f", parity={self.parity!r}"
        return f"{self.dim}, capacity_factor={self.capacity_factor}{parity}"
