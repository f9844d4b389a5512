"""The weights of equal experts as views of one tensor, so that a grouped kernel reads them without a copy.

E experts, D width, H hidden width.

    router.pack()
    router.packed_weights()["gate_up_proj.weight"]     # (E, 2 * H, D), no copy
    router.experts["vqa"].up_proj.weight               # (H, D), still a parameter of its own

Packing changes where the numbers lie and nothing else: the parameters stay the same objects with their names,
their requires_grad and their place in an optimiser. Each has a storage of its own over its part of the
memory, so that whatever saves or shares tensors finds them apart. A router packs what it builds; modules that
it was given, whose storage others may share, only when asked.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medplib.errors import InputError
from medplib.experts.context import named_routers

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter

_PARTNER = {"gate_proj": "up_proj"}  # of equal shape, these become one matrix, as grouped kernels want them


class Packed:
    """The packed tensors of a router's experts, and the parameters that lie in them.

    `weights` looks whether they still do. Compiled code looks once, when it is compiled: on a GPU it must be
    compiled anew after weights were moved (`parameter.data = ...`).
    """

    def __init__(self, router: MoERouter, views: dict[str, Tensor]) -> None:
        self.views = views
        self.parameters = tuple(_base_parameters(router))
        self.places = tuple(parameter.data_ptr() for parameter in self.parameters)

    def weights(self, router: MoERouter) -> dict[str, Tensor] | None:
        """{name: (E, ...)} as MoERouter.packed_weights gives them."""
        current = _base_parameters(router)
        if len(current) != len(self.parameters):
            return None
        for ours, theirs in zip(self.parameters, current, strict=True):
            if ours is not theirs:
                return None
        return self.views if self._in_place() else None

    @torch.compiler.assume_constant_result
    def _in_place(self) -> bool:
        """Whether all are plain parameters where they were put."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if type(parameter) is not nn.Parameter or parameter.data_ptr() != place:
                return False
        return True


def _base_parameters(router: MoERouter) -> list[nn.Parameter]:
    """Those of all experts, without LoRA's own. (`named_parameters` takes more than twice as long, and
    a decoder's every layer asks at every token.)"""
    found: list[nn.Parameter] = []
    _gather(router.experts, found)
    return found


def _gather(module: nn.Module, found: list[nn.Parameter]) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            found.append(parameter)
    for name, part in module._modules.items():
        if part is not None and not name.startswith("lora_"):
            _gather(part, found)


def pack_experts(router: MoERouter) -> Packed:
    """Move the experts' parameters side by side, in place. See MoERouter.pack."""
    groups = _groups(router)
    for name, rows in groups.items():
        _check(name, rows, router.names)
    shared = any(parameter.is_shared() for parameter in _base_parameters(router) if not parameter.is_cuda)
    views = {}
    with torch.no_grad():
        for name, rows in groups.items():
            first = rows[0][0]
            packed = first.new_empty(len(rows), len(rows[0]), *first.shape)  # (E, 1 or 2, ...)
            if shared:
                packed.share_memory_()
            for e, row in enumerate(rows):
                for g, parameter in enumerate(row):
                    packed[e, g] = parameter
                    parameter.data = packed[e, g] if shared else _own_storage(packed[e, g])
            views[name] = packed.flatten(1, 2) if first.ndim else packed
    return Packed(router, views)


def _own_storage(part: Tensor) -> Tensor:
    """The same memory under a storage of its own (one that is shared between processes must stay whole)."""
    try:
        return torch.from_dlpack(part)
    except (BufferError, RuntimeError, TypeError):  # a type that DLPack lacks
        return part


def pack_mixtures(model: nn.Module, device: str = "cuda") -> None:
    """Pack the mixtures of a model that lie on this kind of device, where one kernel reads all experts.

    One layer after another, so that no more than one is twice in memory. Those that cannot be packed
    (quantised, sharded, unequal) stay as they are.
    """
    for router in named_routers(model).values():
        there = all(parameter.device.type == device for parameter in router.parameters())
        if there and router.packed_weights() is None:
            with contextlib.suppress(InputError):
                router.pack()


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
        if not any(part.startswith("lora_") for part in name.split(".")[:-1])
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
