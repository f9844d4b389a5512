"""Two processes whose experts are spread, against one that holds all: what test_parallel.py runs.

python tests/parallel_run.py '{"model": ..., "out": ...}'   # prints {case: "" or what failed}
"""

import copy
import datetime
import json
import pickle
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from medplib import MedPLIB, MoERouter, record_routing
from medplib.errors import InputError
from medplib.experts import (
    average_expert_gradients,
    count_routing,
    distribute_experts,
    expert_parameters,
    gather_experts,
    gathered_state_dict,
    ignore_experts_in_ddp,
    measure_cost,
)

D = 8


def router(experts=2, **settings):
    torch.manual_seed(0)
    return MoERouter(D, experts=experts, hidden_dim=12, **settings)


def batches(sizes):
    torch.manual_seed(1)
    return [torch.randn(size, D) for size in sizes]


def whole_gradients(whole, parts, keywords, joined):
    """What one process finds: outputs, gradients of the tokens; those of the weights are left in `whole`."""
    parts = [part.clone().requires_grad_() for part in parts]
    if joined:
        outs = whole(torch.cat(parts)).split([len(part) for part in parts])
    else:
        outs = [whole(part, **arguments) for part, arguments in zip(parts, keywords, strict=True)]
    torch.cat([out.sin() for out in outs]).sum().backward()
    return outs, [part.grad for part in parts]


def compare(mesh, whole, sizes, keywords=({}, {}), tokens_want=True, joined=True, run=None):
    """Spread a copy of `whole`; outputs and all gradients are those of one process."""
    rank, spread = dist.get_rank(), distribute_experts(copy.deepcopy(whole), mesh)
    parts = batches(sizes)
    outs, grads = whole_gradients(whole, parts, keywords, joined)
    mine = parts[rank].clone().requires_grad_(tokens_want)
    out = (run or (lambda r, x, **k: r(x, **k)))(spread, mine, **keywords[rank])
    out.sin().sum().backward()
    torch.testing.assert_close(out, outs[rank])
    if tokens_want:
        torch.testing.assert_close(mine.grad, grads[rank])
    if any(p.requires_grad for p in whole.gate.parameters()):
        total = spread.gate.weight.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, whole.gate.weight.grad)
    for name in list(whole.names)[rank::2] if whole.num_experts == 2 else whole.names[2 * rank :][:2]:
        for ours, theirs in zip(
            spread.experts[name].parameters(), whole.experts[name].parameters(), strict=True
        ):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            found = torch.zeros_like(ours) if ours.grad is None else ours.grad
            torch.testing.assert_close(found, expected)
            assert (ours.grad is None) or theirs.requires_grad
    return spread


def equal_e2_k1(mesh):
    compare(mesh, router(2), (70, 9))


def equal_e2_k2(mesh):
    compare(mesh, router(2, top_k=2), (9, 70))


def equal_e4_k1(mesh):
    compare(mesh, router(4), (3, 5))


def equal_e4_k2(mesh):
    compare(mesh, router(4, top_k=2), (40, 90))


def no_tokens_in_a_process(mesh):
    compare(mesh, router(4, top_k=2), (0, 5))


def an_expert_without_tokens(mesh):
    whole = router(2)
    with whole.force("expert_0"):
        reference = whole(batches((6, 7))[dist.get_rank()])
    spread = distribute_experts(whole, mesh)
    with spread.force("expert_0"):
        out = spread(batches((6, 7))[dist.get_rank()])  # tokens want no gradient
        out.sum().backward()
    torch.testing.assert_close(out, reference)
    grads = [parameter.grad for parameter in expert_parameters(spread)]
    assert all(grad is None for grad in grads) == (dist.get_rank() == 1)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(D))

    def forward(self, rows):
        return self.value.expand(len(rows), -1)


def an_expert_that_does_not_look(mesh):
    torch.manual_seed(0)
    compare(mesh, MoERouter(D, {"fixed": Constant(), "usual": nn.Linear(D, D)}), (70, 9))


def a_frozen_expert(mesh):
    whole = router(2)
    whole.train_only("expert_1")  # the gate, the tokens and all of process 0 want no gradient
    compare(mesh, whole, (70, 9), tokens_want=False)


def adapters(mesh):
    whole = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up_proj"]), router(2))
    for key, parameter in whole.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    spread = gather_experts(compare(mesh, whole, (70, 9)))
    assert all(torch.equal(value, before[key]) for key, value in spread.state_dict().items())


def masks(mesh):
    masks = [torch.arange(size) % 3 > 0 for size in (70, 9)]
    compare(mesh, router(2), (70, 9), [{"mask": mask} for mask in masks], joined=False)


def a_capacity(mesh):
    compare(mesh, router(4, top_k=2, capacity_factor=0.5), (40, 12), joined=False)


def checkpointing(mesh):
    def run(spread, x):
        return checkpoint(spread, x, use_reentrant=False)

    compare(mesh, router(4), (70, 1), run=run)
    compare(mesh, router(4), (0, 2), run=run)


def other_types(mesh):
    for kind in (torch.float64, torch.bfloat16):
        whole = router(2).to(kind)
        mine = batches((70, 9))[dist.get_rank()].to(kind)
        expected = whole(mine)
        found = distribute_experts(whole, mesh)(mine)
        assert found.dtype == kind
        torch.testing.assert_close(found, expected)
    whole = router(2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = whole(mine := batches((70, 0))[dist.get_rank()])
        found = distribute_experts(whole, mesh)(mine)
    torch.testing.assert_close(found, expected.float(), atol=1e-2, rtol=1e-2)


def records(mesh):
    rank, whole = dist.get_rank(), router(4)
    spread = distribute_experts(copy.deepcopy(whole), mesh)
    mine = batches((11, 6))[rank]
    tables = []
    for one in (whole, spread):
        with count_routing(one) as counts, record_routing(one) as trace, torch.no_grad():
            one(mine)
        tables.append((counts.rows(), trace.rows()))
    assert tables[0] == tables[1]
    assert tables[0][0][0]["tokens"] == len(mine)
    assert spread.names == whole.names


def memory(mesh):
    whole = router(4)
    assert whole.packed_weights() is not None
    spread = distribute_experts(copy.deepcopy(whole), mesh)
    kept = {key for key, _ in spread.named_parameters()}
    names = whole.names[2 * dist.get_rank() :][:2]
    assert kept == {
        key
        for key, _ in whole.named_parameters()
        if key.startswith(("gate", *(f"experts.{n}." for n in names)))
    }
    for parameter in expert_parameters(spread):
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # not a view of all experts' weights
    assert sum(p.numel() for p in expert_parameters(spread)) == 2 * 3 * D * 12


def round_trip(mesh):
    rank, whole = dist.get_rank(), router(4)
    whole.experts["expert_3"].register_buffer("scale", torch.tensor(3.0), persistent=False)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    spread = distribute_experts(whole, mesh)
    spread.freeze("expert_1")
    for to in (None, 1):
        state = gathered_state_dict(spread, to=to)
        if to in (None, rank):
            assert state.keys() == before.keys()
            assert all(torch.equal(state[key], before[key]) for key in before)
            router(4).load_state_dict(state)
        else:
            assert state == {}
    spread.double()
    assert gather_experts(spread) is spread
    assert spread.exchange is None
    assert spread.frozen == ("expert_1",)
    assert spread.experts["expert_3"].scale == 3
    assert all(torch.equal(value.float(), before[key]) for key, value in spread.state_dict().items())
    assert spread(batches((3,))[0].double()).shape == (3, D)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = router(4)
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        return self.head(x + self.mix(x))


def learn_as_one(mesh, wrap):
    """With a mean loss a step is that of one process on the joined batch."""
    torch.manual_seed(2)
    whole = Net()
    net = distribute_experts(copy.deepcopy(whole), mesh)
    wrapped = wrap(net)
    parts = batches((20, 20))
    for model, x in ((whole, torch.cat(parts)), (wrapped, parts[dist.get_rank()])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if model is wrapped:
                average_expert_gradients(net)
            optimizer.step()
    state = gathered_state_dict(net)
    assert state.keys() == whole.state_dict().keys()
    for key, value in state.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(value, whole.state_dict()[key])


def beside_ddp(mesh):
    def wrap(net):
        ignore_experts_in_ddp(net)
        return DistributedDataParallel(net)

    learn_as_one(mesh, wrap)


def beside_fsdp2(mesh):
    def wrap(net):
        return fully_shard(net, mesh=mesh, ignored_params=set(expert_parameters(net)))

    learn_as_one(mesh, wrap)


def refused(call, words):
    with pytest.raises(Exception, match=words) as error:  # dynamo wraps ours
        call()
    return error.value


def errors(mesh):
    three = router(3)
    before = three.state_dict()
    assert isinstance(refused(lambda: distribute_experts(three, mesh), "3 experts"), InputError)
    assert three.state_dict().keys() == before.keys()
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "experts"))
    refused(lambda: distribute_experts(router(2), square), "one dimension")
    refused(lambda: distribute_experts(router(2), 2), "DeviceMesh")
    refused(lambda: distribute_experts(nn.Linear(2, 2), mesh), "no MoERouter")
    refused(lambda: distribute_experts(router(2).to("meta"), mesh), "on meta")
    refused(lambda: gather_experts(router(2)), "No experts")
    spread = distribute_experts(router(2), square["experts"])
    refused(lambda: distribute_experts(spread, mesh), "already")
    refused(lambda: pickle.dumps(spread), "gathered_state_dict")
    refused(lambda: spread.cost_report(torch.zeros(1, D)), "gather_experts")
    refused(lambda: measure_cost(spread).__enter__(), "gather_experts")
    refused(lambda: spread.experts[f"expert_{1 - dist.get_rank()}"](torch.zeros(1, D)), "held by process")
    refused(spread.pack, "equal experts")
    compiled = torch.compile(spread, backend="eager", fullgraph=True)
    refused(lambda: compiled(torch.zeros(4, D)), "CUDA graph")
    with torch.set_grad_enabled(dist.get_rank() == 0):
        refused(lambda: spread(torch.zeros(4, D)), "without gradients")


def model_saved(mesh, model, out):
    net = distribute_experts(MedPLIB.from_pretrained(model), mesh)
    refused(lambda: net.save_pretrained(out), "gathered_state_dict")
    state = gathered_state_dict(net, to=0)
    if dist.get_rank() == 0:
        net.save_pretrained(out, state_dict=state)
        found, expected = (load_file(f"{folder}/model.safetensors") for folder in (out, model))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        MedPLIB.from_pretrained(out)
    dist.barrier()


CASES = (
    equal_e2_k1, equal_e2_k2, equal_e4_k1, equal_e4_k2, no_tokens_in_a_process, an_expert_without_tokens,
    an_expert_that_does_not_look, a_frozen_expert, adapters, masks, a_capacity, checkpointing, other_types,
    records, memory, round_trip, beside_ddp, beside_fsdp2, errors,
)  # fmt: skip


def main(arguments):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for case in (*CASES, model_saved):
        try:
            case(mesh, **(arguments if case is model_saved else {}))
            found[case.__name__] = ""
        except Exception:
            found[case.__name__] = traceback.format_exc()
    print("\n" + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
