"""What a mixture costs: rows, operations and bytes of its experts, against one dense expert.

T tokens, D width, E experts, R rows given to an expert.

    print(router.cost_report(x))                 # one router
    with measure_cost(model) as cost:            # all of a model's
        model(x)
    print(cost)

Rows are counted where they go into the experts, so what is reported is what was computed. Compiled code runs
uncompiled inside the block; it gives the experts the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.context import named_routers, observe
from medplib.experts.recomputation import is_recomputation

if TYPE_CHECKING:
    from medplib.experts.gate import Routing
    from medplib.experts.router import MoERouter


@dataclass
class ExpertCost:
    """What one expert did: calls, rows, operations of its matrices (2 per weight and row), bytes moved.

    The bytes are its weights once per call, and its input and output rows.
    """

    calls: int = 0
    rows: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, expert: nn.Module, rows: int, row_bytes: int) -> None:
        """Count one call of `expert` on that many rows."""
        weights = list(expert.parameters())
        self.calls += 1
        self.rows += rows
        self.flops += 2 * rows * sum(w.numel() for w in weights if w.ndim > 1)
        self.bytes += sum(w.numel() * w.element_size() for w in weights) + 2 * rows * row_bytes


@dataclass
class LayerCost:
    """One router: its tokens T (padding not counted), its experts, and one dense expert on the same tokens.

    `gate_flops` are the gate's operations, which a dense network does not have.
    """

    tokens: int = 0
    experts: dict[str, ExpertCost] = field(default_factory=dict)
    dense: ExpertCost = field(default_factory=ExpertCost)
    gate_flops: int = 0

    @property
    def rows(self) -> int:
        """Rows given to experts: T * K, less what was dropped."""
        return sum(expert.rows for expert in self.experts.values())

    @property
    def flops(self) -> int:
        """Operations of the experts and the gate."""
        return sum(expert.flops for expert in self.experts.values()) + self.gate_flops

    @property
    def bytes(self) -> int:
        """Bytes moved by the experts."""
        return sum(expert.bytes for expert in self.experts.values())


class CostReport:
    """The cost of every router that ran: `layers` by name; `str(report)` is a table."""

    def __init__(self, routers: dict[str, MoERouter]) -> None:
        self._names = {id(router): name or "router" for name, router in routers.items()}
        self.layers = {
            name or "router": LayerCost(experts={expert: ExpertCost() for expert in router.names})
            for name, router in routers.items()
        }

    def receive(self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
        """Count the tokens and what a dense expert would do with them (called by the router)."""
        name = self._names.get(id(router))
        if name is None:
            return
        layer, tokens, expert = self.layers[name], len(routing.experts), router.experts[router.names[0]]
        size = next((parameter.element_size() for parameter in expert.parameters()), 4)
        layer.tokens += tokens
        layer.gate_flops += 2 * tokens * router.dim * router.num_experts
        layer.dense.add(expert, tokens, router.dim * size)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per layer that ran; ratios are to one dense expert (the layer's first)."""
        return [
            {
                "layer": name,
                "tokens": layer.tokens,
                "rows": {expert: cost.rows for expert, cost in layer.experts.items()},
                "rows_ratio": layer.rows / layer.tokens,
                "flops": layer.flops,
                "flops_ratio": layer.flops / max(layer.dense.flops, 1),
                "bytes": layer.bytes,
                "bytes_ratio": layer.bytes / max(layer.dense.bytes, 1),
            }
            for name, layer in self.layers.items()
            if layer.tokens
        ]

    def __str__(self) -> str:
        lines = [("layer", "tokens", "rows", "flops", "bytes", "rows per expert")]
        for row in self.rows():
            ratios = (f"{row[key]:.2f}x" for key in ("rows_ratio", "flops_ratio", "bytes_ratio"))
            experts = "  ".join(f"{name} {count}" for name, count in row["rows"].items())
            lines.append((row["layer"], str(row["tokens"]), *ratios, experts))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join(
            "  ".join([f"{line[0]:<{widths[0]}}", *(f"{line[i]:>{widths[i]}}" for i in range(1, 5)), line[5]])
            for line in lines
        )


@contextmanager
def measure_cost(model: nn.Module) -> Iterator[CostReport]:
    """Count what the routers of `model` cost inside the block; read the report after it.

    Raises InputError if the model has no MoERouter, or if its experts are spread over processes.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(
            f"There is no MoERouter in this {type(model).__name__}, so there is nothing to measure."
        )
    if any(router.exchange is not None for router in routers.values()):
        raise InputError("The experts are spread over processes; gather_experts(model), then measure.")
    report = CostReport(routers)
    hooks = []
    for name, router in routers.items():
        for expert_name, expert in router.experts.items():
            cost = report.layers[name or "router"].experts[expert_name]
            hooks.append(expert.register_forward_pre_hook(_counting(cost)))
    try:
        with torch.compiler.set_stance("force_eager"), observe(report):
            yield report
    finally:
        for hook in hooks:
            hook.remove()


def _counting(cost: ExpertCost) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds each call of an expert to `cost`; what gradient checkpointing repeats counts once."""

    def count(expert: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not is_recomputation():
            cost.add(expert, len(args[0]), args[0].shape[-1] * args[0].element_size())

    return count
