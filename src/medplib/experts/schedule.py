"""Which experts and gates train, layer by layer and step by step; and where an expert's weights start from.

    schedule = ExpertSchedule([
        Phase("vqa", steps=3000, train=("vqa",)),
        Phase("grounding", steps=2000, train=("grounding",), init_from={"grounding": "vqa"}),
        Phase("mixture", steps=1000, train={"model.layers.[01].mlp": ("gate",), "**": ("gate", "vqa")}),
    ])
    for step in range(schedule.total_steps):
        if changed := schedule.apply(model, step):
            optimiser = make_optimiser(model)      # other parameters train now

Only routers are touched; what else trains is the business of medplib.stages.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from medplib.errors import InputError, UnknownNameError
from medplib.experts.context import named_routers, unknown_expert
from medplib.experts.router import MoERouter
from medplib.experts.upcycle import check_source, init_expert, matches_path

Trained = Sequence[str] | Mapping[str, Sequence[str]]
"""Names of experts (and "gate") for all layers, or {path of routers: names}, where the first match counts."""


def train_experts(model: nn.Module, train: Trained) -> dict[str, tuple[str, ...]]:
    """Let these experts and gates of the model's routers train, freeze the others; returns what trains where.

    train  ("grounding", "gate"): in every layer that has them. {"layers.[01].mlp": ("grounding",)}: in the
           layers at these paths (`*` is one step, `**` any number); other layers are frozen.

        train_experts(model, {"**.layers.0.mlp": (), "**": ("grounding",)})

    Frozen ones lose their gradient, so that no optimiser moves them. Everything is checked before anything
    changes: UnknownNameError for an expert or a path that is not there, InputError if nothing would train.
    """
    wanted = _wanted(model, train)
    routers = named_routers(model)
    for path, names in wanted.items():
        router = routers[path]
        if names:
            router.train_only(*names)
        else:
            router.freeze(*router.names, "gate")
    return {path or "router": names for path, names in wanted.items()}


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError if a router's trainable parameter is not in the optimiser: it would stand still.

    To be called after the optimiser was made or the schedule has moved on.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for path, router in named_routers(model).items():
        for name, parameter in router.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise InputError(
                    f"{path + '.' if path else ''}{name} should train, but the optimiser does not hold it; "
                    f"make a new optimiser after a change of phase."
                )


@dataclass(frozen=True)
class Phase:
    """A stretch of training, checked when it is made.

    steps      its length in optimiser steps
    train      what trains; see `train_experts`
    init_from  {expert: another expert's name, or a dense FFN}: copied into every layer when the phase begins
    """

    name: str
    steps: int
    train: Trained
    init_from: Mapping[str, str | nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"A phase needs a name, got {self.name!r}.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"Phase '{self.name}': steps must be at least 1, got {self.steps!r}.")
        tables = self.train.values() if isinstance(self.train, Mapping) else [self.train]
        if any(isinstance(names, str) or not isinstance(names, Sequence) for names in tables):
            raise InputError(
                f"Phase '{self.name}': train must be a tuple of names, or tuples by path; got {self.train!r}."
            )
        for target, source in self.init_from.items():
            if source == target:
                raise InputError(f"Phase '{self.name}': '{target}' cannot start from itself.")


class ExpertSchedule:
    """Phases one after another; call `apply` before every optimiser step."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        if not self.phases:
            raise InputError("An ExpertSchedule needs at least one Phase.")
        self._ends = list(itertools.accumulate(phase.steps for phase in self.phases))
        self._applied: tuple[weakref.ref[nn.Module], int] | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all phases together."""
        return self._ends[-1]

    def at(self, step: int) -> Phase:
        """The phase that `step` (counted from 0) belongs to."""
        return self.phases[self._index(step)]

    def apply(self, model: nn.Module, step: int) -> dict[str, tuple[str, ...]] | None:
        """Bring the routers into the phase of `step`; returns {layer: what trains} if that changed them.

        `init_from` is carried out at the first step of its phase alone: a run resumed in the middle keeps the
        weights of its checkpoint.
        """
        index = self._index(step)
        if self._applied is not None and self._applied[0]() is model and self._applied[1] == index:
            return None
        phase, starts = self.phases[index], step == self._ends[index] - self.phases[index].steps
        _wanted(model, phase.train)
        copies = _copies(model, phase) if starts else []
        for router, target, source in copies:
            init_expert(router, target, source)
        changed = train_experts(model, phase.train)
        self._applied = (weakref.ref(model), index)
        return changed

    def _index(self, step: int) -> int:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < self.total_steps:
            raise InputError(
                f"step must be a whole number between 0 and {self.total_steps - 1}, got {step!r}."
            )
        return bisect.bisect_right(self._ends, step)


def _wanted(model: nn.Module, train: Trained) -> dict[str, tuple[str, ...]]:
    """What would train in each router, checked: {path: names}."""
    routers = named_routers(model)
    if not routers:
        raise InputError(f"There is no MoERouter in this {type(model).__name__}.")
    if isinstance(train, Mapping):
        wanted = _by_path(routers, train)
    else:
        known = tuple(dict.fromkeys(name for router in routers.values() for name in (*router.names, "gate")))
        for name in train:
            if name not in known:
                raise unknown_expert(name, known)
        wanted = {
            path: tuple(name for name in train if name in (*router.names, "gate"))
            for path, router in routers.items()
        }
    if not any(wanted.values()):
        raise InputError(f"train={train!r} would freeze every expert and gate; use router.freeze for that.")
    return wanted


def _by_path(routers: dict[str, MoERouter], train: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    for pattern in train:
        if not any(matches_path(path, pattern) for path in routers):
            shown = ", ".join(path or "(the model itself)" for path in routers)
            raise UnknownNameError(f"No MoERouter lies at '{pattern}'. There are: {shown}.")
    wanted = {}
    for path, router in routers.items():
        pattern = next((pattern for pattern in train if matches_path(path, pattern)), None)
        wanted[path] = () if pattern is None else tuple(train[pattern])
        for name in wanted[path]:
            if name not in (*router.names, "gate"):
                raise unknown_expert(name, (*router.names, "gate"))
    return wanted


def _copies(model: nn.Module, phase: Phase) -> list[tuple[MoERouter, str, str | nn.Module]]:
    """What the phase copies into which expert, checked."""
    copies: list[tuple[MoERouter, str, str | nn.Module]] = []
    for target, source in phase.init_from.items():
        found = [router for router in named_routers(model).values() if target in router.names]
        if not found:
            known = tuple(dict.fromkeys(n for r in named_routers(model).values() for n in r.names))
            raise unknown_expert(target, known)
        for router in found:
            check_source(router, target, source)
            if isinstance(source, str) and source in phase.init_from:  # as it is before any copy
                source = copy.deepcopy(router.experts[source])
            copies.append((router, target, source))
    return copies
