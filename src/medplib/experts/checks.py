"""What MoERouter checks: its settings, the names of its experts, what a gate and an expert return.

T tokens, D width, E experts, K experts per token, R rows given to an expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medplib.errors import InputError, check_whole, is_number
from medplib.experts.capacity import DROPS
from medplib.experts.gate import Routing
from medplib.registry import GATES

_DEFAULTS = {"top_k": 1, "score": "softmax", "renormalize": False}  # MoERouter's, for every gate


def expert_names(experts: Mapping[str, nn.Module] | Sequence[str] | int) -> tuple[str, ...]:
    """The names asked for, checked."""
    if (
        isinstance(experts, bool)
        or not isinstance(experts, int | Mapping | Sequence)
        or isinstance(experts, str)
    ):
        raise InputError(
            f"experts must be modules by name, a list of names, or a number; got {_short(experts)}."
        )
    names = tuple(f"expert_{i}" for i in range(experts)) if isinstance(experts, int) else tuple(experts)
    if not names:
        raise InputError(f"A MoERouter needs at least one expert, got {experts!r}.")
    taken = nn.ModuleDict()
    for name in names:
        if isinstance(name, nn.Module):
            raise InputError(
                f"Experts that are modules need names, such as {{'a': {type(name).__name__}(...), 'b': ...}}"
                f"; got {_short(experts)}."
            )
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


def _short(experts: object) -> str:
    """What was given, in one line: a module's repr has many."""
    return f"a {type(experts).__name__}" if isinstance(experts, nn.Module | list | tuple) else repr(experts)


def check_coefficients(**coefficients: float) -> None:
    """Raise InputError for a loss's coefficient that is no finite number of at least 0."""
    for name, value in coefficients.items():
        if not is_number(value) or value < 0:
            raise InputError(f"{name} must be a finite number of at least 0, got {value!r}.")


def check_capacity(
    capacity_factor: float | None, eval_capacity_factor: float | None, min_capacity: int, drop: str
) -> None:
    """Refuse what cannot be a capacity."""
    for name, value in (
        ("capacity_factor", capacity_factor),
        ("eval_capacity_factor", eval_capacity_factor),
    ):
        if value is not None and not (is_number(value) and value > 0):
            raise InputError(f"{name} must be a finite number above 0, or None to serve all; got {value!r}.")
    check_whole(0, min_capacity=min_capacity)
    if drop not in DROPS:
        raise InputError(f"drop must be one of {', '.join(DROPS)}; got {drop!r}.")


def check_parity(parity: str, gate: str | nn.Module, drop: str) -> None:
    """Refuse an unknown implementation, and another gate or way to drop beside it."""
    if parity != "deepspeed":
        raise InputError(f"parity must be 'deepspeed' or None, got {parity!r}.")
    if gate != "topk":
        raise InputError("parity='deepspeed' brings its own gate; leave `gate` out.")
    if drop != "position":
        raise InputError(
            f"parity='deepspeed' drops as published; leave drop={drop!r} out. Its random selection is on; "
            f"gate_args={{'use_rts': False}} turns it off."
        )


def build_gate(name: str, dim: int, num_experts: int, settings: Mapping[str, Any]) -> nn.Module:
    """The gate called `name`. Raises InputError for a setting that it does not have; one that MoERouter has
    by default is then left out."""
    kind = GATES.get(name)
    known = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return kind(dim, num_experts, **settings)
    unknown = [k for k, v in settings.items() if k not in known and (k not in _DEFAULTS or v != _DEFAULTS[k])]
    if unknown:
        names = ", ".join(list(known)[2:]) or "none"
        raise InputError(f"The gate {name!r} has no setting {', '.join(unknown)}. Known: {names}.")
    return kind(dim, num_experts, **{k: v for k, v in settings.items() if k in known})


def check_routing(routing: Routing, num_tokens: int, num_experts: int, gate: nn.Module) -> None:
    """Refuse what a gate from elsewhere may have got wrong."""
    right = isinstance(routing, Routing) and routing.probabilities.shape == (num_tokens, num_experts)
    if right:
        shape = routing.experts.shape
        right = len(shape) == 2 and shape[0] == num_tokens and routing.weights.shape == shape
        right = right and (routing.served is None or routing.served.shape == shape)
    if not right:
        raise InputError(
            f"The gate {type(gate).__name__} must return a Routing with probabilities ({num_tokens}, "
            f"{num_experts}) and experts and weights ({num_tokens}, K)."
        )


def run_expert(expert: nn.Module, rows: Tensor, name: str) -> Tensor:
    """rows (R, D) -> (R, D), checked."""
    answer = expert(rows)
    if not isinstance(answer, Tensor) or answer.shape != rows.shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise InputError(f"The expert '{name}' must return a tensor of shape {tuple(rows.shape)}, got {got}.")
    return answer
