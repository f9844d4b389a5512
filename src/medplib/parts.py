"""The named parts of a model: one table, used by stages to open, close and count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from medplib.errors import InputError
from medplib.experts.context import named_routers

MEDPLIB_PARTS = (
    "vision_tower",
    "projector",
    "region_adapter",
    "language_model",
    "embeddings",
    "lm_head",
    "norms",
    "gates",
    "experts.grounding",
    "experts.vqa",
    "mask_encoder",
    "prompt_encoder",
    "mask_decoder",
    "seg_projector",
)
"""The names in `MedPLIB.parts`. Parts may lie inside one another: the language model holds the experts."""


def module_parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The parts of any model by name.

    `model.parts`, if the model has such a mapping (name -> module or modules), else its direct children. In
    both cases the MoERouters inside add "gates" and one "experts.<name>" per expert name, over all layers.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"The model must be an nn.Module, got {model!r:.80}.")
    declared = getattr(model, "parts", None)
    if isinstance(declared, Mapping):
        parts = {name: _as_modules(name, value) for name, value in declared.items()}
    else:
        parts = {name: [child] for name, child in model.named_children()}
    routed: dict[str, list[nn.Module]] = {}
    for router in named_routers(model).values():
        routed.setdefault("gates", []).append(router.gate)
        for name in router.names:
            routed.setdefault(f"experts.{name}", []).append(router.experts[name])
    return {**parts, **{name: modules for name, modules in routed.items() if name not in parts}}


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put every closed module in eval mode: those with parameters, none of which trains, and all inside them.

    A frozen encoder then has no dropout and its batch statistics stay. Call it after each `model.train()`,
    which undoes it. (Code that enables gradient checkpointing only for modules in training mode skips closed
    ones.)
    """
    flags = [parameter.requires_grad for parameter in model.parameters()]
    if flags and not any(flags):
        model.eval()
        return
    for child in model.children():
        keep_frozen_in_eval(child)


@dataclass(frozen=True)
class PartRow:
    """How many numbers a part holds and how many train. Nested parts are counted in the inner one."""

    part: str
    parameters: int
    trainable: int

    @property
    def share(self) -> float:
        """The trainable share, from 0 to 1."""
        return self.trainable / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class PartTable:
    """What trains, part by part; `str(table)` is meant to be printed."""

    title: str
    rows: tuple[PartRow, ...]

    @property
    def parameters(self) -> int:
        """All numbers of the model, each counted once."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Those that train."""
        return sum(row.trainable for row in self.rows)

    def __getitem__(self, part: str) -> PartRow:
        return {row.part: row for row in self.rows}[part]

    def __str__(self) -> str:
        lines = [(self.title, "parameters", "trainable", "share")]
        for row in (*self.rows, PartRow("total", self.parameters, self.trainable)):
            lines.append((row.part, f"{row.parameters:,}", f"{row.trainable:,}", f"{row.share:.1%}"))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines
        )


def part_table(model: nn.Module, title: str = "part") -> PartTable:
    """Count the parameters of `model` by part, each in the smallest part that holds it."""
    owners: dict[int, str] = {}
    parts = {
        name: {id(parameter): parameter for module in modules for parameter in module.parameters()}
        for name, modules in module_parts(model).items()
    }
    for name, held in sorted(parts.items(), key=lambda item: -len(item[1])):
        owners.update(dict.fromkeys(held, name))  # smaller parts come later and win
    totals = {name: [0, 0] for name in parts}
    for parameter in model.parameters():
        count = totals.setdefault(owners.get(id(parameter), "(in no part)"), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    return PartTable(title, tuple(PartRow(name, *count) for name, count in totals.items()))


def _as_modules(name: str, value: object) -> list[nn.Module]:
    modules = [value] if isinstance(value, nn.Module) else list(value)  # type: ignore[call-overload]
    if not all(isinstance(module, nn.Module) for module in modules):
        raise InputError(f"The part '{name}' must be a module or a list of modules, got {value!r}.")
    return modules
