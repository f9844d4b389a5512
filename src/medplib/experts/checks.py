"""What MoERouter checks: the names of its experts, the mask, what a gate and an expert return.

T tokens, D width, E experts, K experts per token, R rows given to an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.gate import Routing


def expert_names(experts: Mapping[str, nn.Module] | Sequence[str] | int) -> tuple[str, ...]:
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


def check_routing(routing: Routing, num_tokens: int, num_experts: int, gate: nn.Module) -> None:
    """Refuse what a gate from elsewhere may have got wrong."""
    right = (
        isinstance(routing, Routing)
        and routing.probabilities.shape == (num_tokens, num_experts)
        and routing.experts.ndim == 2
        and routing.experts.shape[0] == num_tokens
        and routing.experts.shape == routing.weights.shape
        and (routing.served is None or routing.served.shape == routing.experts.shape)
    )
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
