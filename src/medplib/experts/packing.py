"""The weights of equal experts as views of one tensor, so that a grouped kernel reads them without a copy.

E experts, D width, H hidden width.

    router.pack()
    router.packed_weights()["gate_up_proj.weight"]     # (E, 2 * H, D), no copy
    router.experts["vqa"].up_proj.weight               # (H, D), still a parameter of its own

Packing changes where the numbers lie and nothing else: the parameters stay the same objects with their names,
their requires_grad and their place in an optimiser. A router packs what it builds; modules that it was given,
whose storage others may share, only when asked. One place needs care: torch.save of a single expert writes
the storage of all of them (safetensors and save_pretrained do not).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medplib.errors import InputError

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter

_PARTNER = {"gate_proj": "up_proj"}  # of equal shape, these become one matrix, as grouped kernels want them


class Packed:
    """The packed tensors of a router's experts, and the parameters that are views of them.

    `weights` looks whether they still are; torch.compile cannot see where a tensor lies, and is content with
    the same parameters.
    """

    def __init__(self, router: MoERouter) -> None:
        self.views = packed_views(router)
        self.parameters = tuple(_base_parameters(router))
        self.places = tuple(parameter.data_ptr() for parameter in self.parameters)

    def weights(self, router: MoERouter) -> dict[str, Tensor] | None:
        """{name: (E, ...)} as MoERouter.packed_weights gives them."""
        current = _base_parameters(router)
        if len(current) != len(self.parameters):
            return None
        if any(ours is not theirs for ours, theirs in zip(self.parameters, current, strict=True)):
            return None
        if not torch.compiler.is_compiling() and not self._in_place():
            return None
        return self.views

    def _in_place(self) -> bool:
        return all(
            type(parameter.data) is Tensor and parameter.data_ptr() == place
            for parameter, place in zip(self.parameters, self.places, strict=True)
        )


def _base_parameters(router: MoERouter) -> list[nn.Parameter]:
    """Those of all experts, without LoRA's own."""
    return [
        parameter
        for expert in router.experts.values()
        for name, parameter in expert.named_parameters()
        if ".lora_" not in name
    ]


def pack_experts(router: MoERouter) -> Packed:
    """Move the experts' parameters side by side, in place. See MoERouter.pack."""
    groups = _groups(router)
    for name, rows in groups.items():
        _check(name, rows, router.names)
    with torch.no_grad():
        for rows in groups.values():
            first = rows[0][0]
            packed = first.new_empty(len(rows), len(rows[0]), *first.shape)  # (E, 1 or 2, ...)
            for e, row in enumerate(rows):
                for g, parameter in enumerate(row):
                    packed[e, g] = parameter
                    parameter.data = packed[e, g]
    return Packed(router)


def packed_views(router: MoERouter) -> dict[str, Tensor] | None:
    """Each kind of weight as one tensor (E, ...) without gradient, or None if the parameters lie apart."""
    views = {}
    for name, rows in _groups(router).items():
        view = _view(rows)
        if view is None:
            return None
        views[name] = view
    return views or None


def _groups(router: MoERouter) -> dict[str, list[list[nn.Parameter]]]:
    """The parameters that lie together: {name: [[of expert 0], [of expert 1], ...]}, LoRA's own left out.

    The inner lists hold two where a gate and an up projection form one matrix, else one.
    """
    tables = [_table(expert) for expert in router.experts.values()]
    groups: dict[str, list[list[nn.Parameter]]] = {}
    taken = set()
    for name in tables[0]:
        if name in taken:
            continue
        partner = _partner(name, tables)
        members = (name,) if partner is None else (name, partner)
        taken.update(members)
        label = name if partner is None else re.sub(r"\bgate_proj\b", "gate_up_proj", name)
        groups[label] = [[table[member] for member in members if member in table] for table in tables]
    for table in tables[1:]:
        for name in table:
            if name not in tables[0]:
                groups[name] = [[t[name]] if name in t else [] for t in tables]
    return groups


def _table(expert: nn.Module) -> dict[str, nn.Parameter]:
    """An expert's parameters by the names they have without LoRA, without those of LoRA itself."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in expert.named_parameters()
        if ".lora_" not in name
    }


def _partner(name: str, tables: list[dict[str, nn.Parameter]]) -> str | None:
    """The up projection that goes with a gate projection, if every expert has both in one shape."""
    for gate, up in _PARTNER.items():
        other = re.sub(rf"\b{gate}\b", up, name)
        if other != name and all(
            name in table and other in table and table[name].shape == table[other].shape for table in tables
        ):
            return other
    return None


def _check(name: str, rows: list[list[nn.Parameter]], experts: tuple[str, ...]) -> None:
    """Raise InputError unless the parameters can lie in one tensor."""
    parameters = [parameter for row in rows for parameter in row]
    if len({len(row) for row in rows}) > 1:
        lacking = [expert for expert, row in zip(experts, rows, strict=True) if len(row) < 1]
        raise InputError(f"Only equal experts can be packed; {', '.join(lacking)} has no {name}.")
    first = parameters[0]
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            raise InputError(f"{name} is a {type(parameter.data).__name__} and cannot be packed.")
        if parameter.is_meta:
            raise InputError(f"{name} is on the meta device; load the weights, then pack.")
        kinds = [(tuple(p.shape), p.dtype, p.device) for p in (first, parameter)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"Only equal experts can be packed; {name} is {kinds[0]} in one and {kinds[1]} in another."
            )
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise InputError(f"{name} is one and the same parameter in several experts; it cannot be packed.")


def _view(rows: list[list[nn.Parameter]]) -> Tensor | None:
    """The tensor that these parameters are views of, with the members of a row one after another."""
    if len({len(row) for row in rows}) > 1:
        return None
    first = rows[0][0]
    if type(first.data) is not Tensor or first.is_meta or not first.is_contiguous():
        return None
    size, storage = first.numel(), first.untyped_storage().data_ptr()
    place = first.storage_offset()
    for row in rows:
        for parameter in row:
            if (
                parameter.shape != first.shape
                or parameter.dtype != first.dtype
                or not parameter.is_contiguous()
                or parameter.untyped_storage().data_ptr() != storage
                or parameter.storage_offset() != place
            ):
                return None
            place += size
    members, shape = len(rows[0]), list(first.shape)
    stacked = [len(rows), members * shape[0], *shape[1:]] if shape else [len(rows), members]
    return first.detach().as_strided(stacked, _contiguous_strides(stacked), first.storage_offset())


def _contiguous_strides(shape: list[int]) -> list[int]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return strides
