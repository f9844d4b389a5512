"""Expert parallelism: each process of a device mesh holds some of the experts, and rows travel to them.

T tokens of a process, D width, E experts, K experts per token, W processes, L = E / W experts per process,
R rows that a process sends, S rows that it gets.

    mesh = init_device_mesh("cuda", (8,))
    distribute_experts(model, mesh)          # after loading; process p keeps experts p * L to (p + 1) * L - 1
    ignore_experts_in_ddp(model)
    model = DistributedDataParallel(model)
    ...
    loss.backward()
    average_expert_gradients(model.module)   # then optimizer.step()
    state = gathered_state_dict(model.module, to=0)

The gate is in every process and routes its own tokens; masks, capacities, forced choices, recording and
statistics see these, with the numbers of all E experts. Forward and backward of a layer are collective: every
process runs each layer equally often, with no token at all if need be. Under autocast the answer has the type
of the tokens.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from medplib import ops
from medplib.errors import InputError
from medplib.experts.context import named_routers
from medplib.experts.dispatch import is_captured, mix
from medplib.experts.router import MoERouter

NO_GRAPH, NO_GRADIENT, GRADIENT = range(3)  # what a process says about its forward


class Elsewhere(nn.Module):
    """Stands where an expert is that another process holds; has no parameters.

    `skeleton` is that expert on the meta device, in a tuple so that it is no child.
    """

    def __init__(self, expert: nn.Module, process: int) -> None:
        super().__init__()
        self.skeleton, self.process = (expert,), process

    def forward(self, rows: Tensor) -> Tensor:
        """Refuse: rows (R, D) reach the expert through the router."""
        raise InputError(f"This expert is held by process {self.process}; call the router, or gather first.")

    def extra_repr(self) -> str:
        return f"process {self.process}"


class Exchange:
    """Sends the rows of a router to the processes that hold their experts, and the answers back.

    It is called with what `mix` gets and returns what `mix` returns; see `distribute_experts`.
    """

    def __init__(self, mesh: DeviceMesh, num_experts: int, packed: bool) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.size, self.process = mesh.size(), mesh.get_local_rank()
        self.share = num_experts // self.size  # L
        self.packed = packed  # whether the router was, before

    def __call__(
        self, tokens: Tensor, experts: Tensor, weights: Tensor, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        """tokens (T, D), experts (T, K), weights (T, K) -> (T, D); an index of E adds nothing."""
        if is_captured(tokens):
            raise InputError(
                "Distributed experts exchange rows whose number is known only when they run; that cannot "
                "be inside torch.compile or a CUDA graph. Run this eagerly, or gather_experts(model) first."
            )
        plan = ops.plan(experts, len(modules))
        local = dict(self.own(modules))
        counts, sizes, gradient = self._agree(tokens, plan.counts, local)
        num_rows = sum(sizes[0])
        rows = ops.permute(tokens, plan.order, experts.shape[1], plan.position)[:num_rows]  # (R, D)
        tie = tokens.new_zeros(0, requires_grad=True) if gradient else None
        received = _AllToAll.apply(rows, tie, sizes, self.group)  # (S, D), by sender, then by expert
        answers = received
        if len(received):
            numbers = torch.arange(self.share, device=tokens.device).repeat(self.size)  # (W*L,)
            chosen = numbers.repeat_interleave(counts.flatten(), output_size=len(received))[:, None]  # (S, 1)
            answers = mix(received, chosen, received.new_ones(len(received), 1), local).to(tokens.dtype)
        back = _AllToAll.apply(answers, received if gradient else None, sizes[::-1], self.group)  # (R, D)
        return ops.combine(back, plan.order[:num_rows], weights, plan.position)  # (T, D)

    def own(self, modules: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The names and experts that this process holds."""
        return islice(modules.items(), self.process * self.share, (self.process + 1) * self.share)

    def _agree(
        self, tokens: Tensor, counts: Tensor, local: Mapping[str, nn.Module]
    ) -> tuple[Tensor, tuple[list[int], list[int]], bool]:
        """Tell each process how many rows come for each of its experts, counts (E,): (W, L) that come here,
        (rows to, rows from) each process, and whether any process wants a gradient.

        If one does, all take part in the backward pass.
        """
        says = NO_GRAPH
        if torch.is_grad_enabled():
            own = (parameter for expert in local.values() for parameter in expert.parameters())
            wanted = tokens.requires_grad or any(parameter.requires_grad for parameter in own)
            says = GRADIENT if wanted else NO_GRADIENT
        table = torch.cat([counts.view(self.size, self.share), counts.new_full((self.size, 1), says)], dim=1)
        answer = torch.empty_like(table)  # (W, L + 1)
        dist.all_to_all_single(answer, table, group=self.group)
        incoming = answer[:, :-1]
        numbers = torch.stack([table[:, :-1].sum(1), incoming.sum(1), answer[:, -1]]).tolist()  # one wait
        if GRADIENT in numbers[2] and NO_GRAPH in numbers[2]:
            raise InputError(
                "Some processes run this layer without gradients (torch.no_grad) and others with; let all do "
                "the same."
            )
        return incoming, (numbers[0], numbers[1]), GRADIENT in numbers[2]

    def __deepcopy__(self, memo: dict) -> Exchange:
        """A copy of a model talks through the same mesh."""
        return self

    def __reduce__(self) -> Any:
        raise InputError(
            "A model with distributed experts is not pickled; save gathered_state_dict(model), or "
            "gather_experts(model) first."
        )


class _AllToAll(torch.autograd.Function):
    """Rows (R, D) -> rows (S, D), sizes = (rows to, rows from) each process; backward sends gradients back.

    tie: a tensor that wants a gradient and gets none. It makes every process run the backward, also one
    whose own rows, or lack of rows, would not need it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, tie: Tensor | None, sizes: tuple[list[int], list[int]], group: Any
    ) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _send(rows, *sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _send(gradient, *ctx.sizes[::-1], ctx.group), None, None, None


def _send(rows: Tensor, to: list[int], of: list[int], group: Any) -> Tensor:
    received = rows.new_empty(sum(of), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), of, to, group=group)
    return received


def distribute_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep 1 / W of the experts of every MoERouter of `model` here, in place; returns `model`.

    mesh: one dimension of W processes, all with the same weights, which call this together. Parameters that
    stay are the same objects, without the memory they shared when they were packed; make the optimiser
    afterwards. A model may be distributed on the CPU and moved to the mesh's device then. Raises InputError,
    before anything changes, for another mesh, E that W does not divide, and weights that are quantised,
    sharded or on the meta device.
    """
    routers = distributable(model, mesh)
    for router in routers:
        exchange = Exchange(mesh, router.num_experts, router.packed_weights() is not None)
        own = dict(exchange.own(router.experts))
        if exchange.packed:
            for expert in own.values():
                for parameter in expert.parameters():
                    parameter.data = parameter.data.clone()
        for place, (name, expert) in enumerate(list(router.experts.items())):
            if name not in own:
                router.experts[name] = Elsewhere(expert.to("meta"), place // exchange.share)
        router._packed, router.exchange = None, exchange
    return model


def distributable(model: nn.Module, mesh: DeviceMesh) -> list[MoERouter]:
    """The routers of the model, if `distribute_experts` can take them."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.get_coordinate() is None:
        raise InputError(
            f"mesh must be a DeviceMesh of one dimension with this process in it, such as "
            f"init_device_mesh('cuda', (2,)) or the part mesh['experts'] of a larger one; got {mesh!r}."
        )
    routers = list(named_routers(model).items())
    if not routers:
        raise InputError(f"There is no MoERouter in this {type(model).__name__}.")
    for layer, router in routers:
        label = layer or "the router"
        if router.exchange is not None:
            raise InputError(f"The experts of {label} are distributed already; gather_experts(model) first.")
        if router.num_experts % mesh.size():
            raise InputError(
                f"{router.num_experts} experts of {label} cannot be spread evenly over {mesh.size()} "
                f"processes; use a mesh whose size divides {router.num_experts}."
            )
        for name, parameter in router.experts.named_parameters():
            if type(parameter.data) is not Tensor or parameter.is_meta:
                raise InputError(
                    f"{name} of {label} is a {type(parameter.data).__name__} on {parameter.device}; only "
                    f"plain weights can be distributed: after loading, before quantising or sharding."
                )
    return [router for _, router in routers]


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the distributed experts that this process holds: no other process has them."""
    for router in _distributed(model).values():
        yield from router.experts.parameters()


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel, before it wraps `model`, to leave the distributed experts alone."""
    names = [
        f"{layer}.experts.{name}" if layer else f"experts.{name}"
        for layer, router in _distributed(model).items()
        for name in _tensors(router.experts)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def average_expert_gradients(model: nn.Module) -> None:
    """Divide the gradients of the distributed experts by W, once per step, after the last `backward`.

    An expert's gradient is the sum over the losses of all processes, where DDP gives the rest of the model
    the mean. Not needed for losses that are to be summed.
    """
    for router in _distributed(model).values():
        for parameter in router.experts.parameters():
            if parameter.grad is not None:
                parameter.grad /= router.exchange.size


def gathered_state_dict(model: nn.Module, to: int | None = None) -> dict[str, Tensor]:
    """The state dict of the whole model, as before `distribute_experts`; all processes call this together.

    to: the process of the mesh that gets it, the others get {}; None gives it to all. Experts of other
    processes arrive one after another and are laid on the CPU. `model.save_pretrained(folder,
    state_dict=...)` writes them.
    """
    state = model.state_dict()
    for layer, router in _distributed(model).items():
        here = to is None or to == router.exchange.process
        for name in router.names:
            for key, (tensor, saved, _) in _receive(router, name, keep=here).items():
                if saved:
                    state.setdefault(".".join(filter(None, (layer, "experts", name, key))), tensor)
        if not here:
            state = {}
    return state


def gather_experts(model: nn.Module) -> nn.Module:
    """Undo `distribute_experts`: every process holds all experts again; returns `model`.

    All processes call this together. Raises InputError, before anything changes, for an expert that has
    other weights now than it had when it was distributed, such as adapters.
    """
    found = []
    for layer, router in _distributed(model).items():
        for name, module in router.experts.items():
            table = _receive(router, name)
            if isinstance(module, Elsewhere):
                expert = copy.deepcopy(module.skeleton[0])
                if list(_tensors(expert)) != list(table):
                    raise InputError(
                        f"The expert '{name}' of {layer or 'the router'} has other weights than when it was "
                        f"distributed; use gathered_state_dict(model)."
                    )
                found.append((router, name, expert, table))
    for router, name, expert, table in found:
        device = next(router.parameters()).device
        expert.to_empty(device=device).train(router.training)
        for key, tensor in _tensors(expert).items():
            tensor.data, trains = table[key][0].to(device), table[key][2]
            tensor.requires_grad_(trains)
        router.experts[name] = expert
    for router in _distributed(model).values():
        packed, router.exchange = router.exchange.packed, None
        if packed:
            with contextlib.suppress(InputError):  # made unequal meanwhile
                router.pack()
    return model


def _distributed(model: nn.Module) -> dict[str, MoERouter]:
    """The routers whose experts are distributed. InputError if there are none."""
    routers = {name: router for name, router in named_routers(model).items() if router.exchange is not None}
    if not routers:
        raise InputError(
            f"No experts of this {type(model).__name__} are distributed; distribute_experts does."
        )
    return routers


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _receive(router: MoERouter, name: str, keep: bool = True) -> dict[str, tuple[Tensor, bool, bool]]:
    """{key: (tensor, whether it is saved, whether it trains)} of an expert, from its process."""
    exchange = router.exchange
    owner = router.index_of(name) // exchange.share
    device = torch.device(exchange.mesh.device_type)
    tensors, rows = {}, []
    if owner == exchange.process:
        module = router.experts[name]
        tensors, saved = _tensors(module), module.state_dict().keys()
        rows = [
            [key, str(t.dtype).removeprefix("torch."), [*t.shape], key in saved, t.requires_grad]
            for key, t in tensors.items()
        ]
    text = json.dumps(rows).encode()
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, group=exchange.group, group_src=owner)
    written = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if owner == exchange.process:
        written = torch.tensor(list(text), dtype=torch.uint8, device=device)
    dist.broadcast(written, group=exchange.group, group_src=owner)
    table = {}
    for key, kind, shape, saved, trains in json.loads(bytes(written.tolist())):
        if owner == exchange.process:
            tensor = tensors[key].detach()
            dist.broadcast(tensor.to(device).contiguous(), group=exchange.group, group_src=owner)
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, kind), device=device)
            dist.broadcast(tensor, group=exchange.group, group_src=owner)
            tensor = tensor.cpu()
        if keep:
            table[key] = (tensor, saved, trains)
    return table
