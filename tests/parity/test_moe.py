"""The published gating and mixture layers, drops and random selection included, against recorded runs.

T tokens, E experts, K experts per token, C capacity.
"""

import re

import pytest
import torch
from torch import nn

from medplib import ops
from medplib.errors import InputError
from medplib.experts import MoERouter, SwiGLU, balance_loss, collect_aux_losses, record_routing
from medplib.experts.deepspeed import published_top1, published_top2


class RecordedNoise(nn.Module):
    """Draws what the published layer drew: torch's generator, seeded just before each call."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def advance(self):
        torch.manual_seed(self.seed)

    def uniform(self, shape, device=None):
        return torch.rand(shape)

    def gumbel(self, shape, device=None):
        return torch.distributions.Gumbel(0.0, 1.0).rsample(shape)


@pytest.fixture(scope="module")
def moe(golden):
    return golden("moe_gate/moe.json"), golden("moe_gate/moe.safetensors")


def cases(moe, kind):
    """The recorded calls that went well and those that failed."""
    calls = moe[0][kind]
    return [c for c in calls if c["status"] == "ok"], [c for c in calls if c["status"] != "ok"]


def route(case, tensors, k):
    """What our gating says to a recorded call."""
    logits = tensors[f"{case['tag']}.logits"]
    if k == 2:
        gumbel = tensors[f"{case['tag']}.gumbel"]
        return published_top2(logits, case["capacity_factor"], case["min_capacity"], gumbel)
    factor = case["capacity_factor"] if case["drop_tokens"] else None
    chance = tensors.get(f"{case['tag']}.rts_uniform", torch.ones_like(logits)) if case["use_rts"] else None
    return published_top1(logits, factor, case["min_capacity"], chance)


def combine_weights(routing, capacity):
    """The published (T, E, C) form of a routing: every kept token's weight at its place in its expert."""
    tokens, experts = routing.probabilities.shape
    dense = torch.zeros(tokens, experts, capacity)
    filled = [0] * experts
    for choice in range(routing.experts.shape[1]):
        for token, expert in enumerate(routing.served[:, choice].tolist()):
            if expert < experts:
                dense[token, expert, filled[expert]] = routing.weights[token, choice]
                filled[expert] += 1
    return dense


def assert_is_the_recorded(routing, combine, record):
    """Same experts, drops and counts; weights within 1e-6; the same balance loss."""
    experts = routing.probabilities.shape[1]
    ours = combine_weights(routing, combine.shape[2])
    assert torch.equal(ours > 0, combine > 0)
    torch.testing.assert_close(ours, combine, atol=1e-6, rtol=0)
    first = routing.experts[:, :1]
    assert torch.bincount(first[:, 0], minlength=experts).tolist() == record["exp_counts"]
    dropped = (routing.served == experts).all(dim=1).nonzero().flatten().tolist()
    assert dropped == record.get("dropped", record.get("dropped_tokens"))
    assert balance_loss(routing.probabilities, first).item() == pytest.approx(record["l_aux"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_every_recorded_call_of_the_gating_is_reproduced(moe, k):
    tensors = moe[1]
    good, _ = cases(moe, f"top{k}")
    assert good
    for case in good:
        routing = route(case, tensors, k)
        combine = tensors[f"{case['tag']}.combine"]
        assert combine.shape[2] == case["capacity"]
        assert_is_the_recorded(routing, combine, case)
        kept = torch.zeros(case["S"], case["E"] + 1).scatter_(1, routing.served, 1.0)[:, :-1]
        assert torch.equal(kept, tensors[f"{case['tag']}.kept"].float())


def test_settings_that_failed_are_refused(moe):
    for k in (1, 2):
        for case in cases(moe, f"top{k}")[1]:
            with pytest.raises(InputError, match=r"min_capacity|capacity factor"):
                route(case, moe[1], k)


def build(layer, tensors, use_rts):
    """The recorded layer with its weights, and the dense branch of a residual one (else None)."""
    names = [f"e{i}" for i in range(layer["E"])]
    seed = int(re.search(r"manual_seed\((\d+)\)", layer["note"])[1])
    gate_args = {"use_rts": use_rts, "noise": RecordedNoise(seed)}
    router = MoERouter(
        layer["h"], {name: SwiGLU(layer["h"], layer["i"]) for name in names}, top_k=layer["k"],
        parity="deepspeed", capacity_factor=layer["cf"], eval_capacity_factor=layer["ecf"],
        min_capacity=layer["minc"], gate_args=gate_args,
    )  # fmt: skip
    prefix, states = f"{layer['tag']}.w.", {"deepspeed_moe": {}, "mlp": {}, "coefficient": {}}
    for key in tensors:
        if key.startswith(prefix):
            part, _, name = key.removeprefix(prefix).partition(".")
            name = name.replace("gate.wg.", "gate.").replace("experts.deepspeed_experts.", "experts.e")
            states[part][name] = tensors[key]
    router.load_state_dict(states["deepspeed_moe"])
    if not layer.get("use_residual"):
        return router, None
    residual = nn.ModuleDict({"mlp": SwiGLU(layer["h"], layer["i"]), "coefficient": nn.Linear(layer["h"], 2)})
    for part in residual:
        residual[part].load_state_dict(states[part])
    return router, residual


def forward(router, residual, x):
    out = router(x)
    if residual is None:
        return out
    share = residual["coefficient"](x).softmax(-1)
    return out * share[..., :1] + residual["mlp"](x) * share[..., 1:]


def test_every_recorded_layer_is_reproduced_with_its_drops_and_gradients(moe):
    recorded, tensors = moe
    compared = 0
    for layer in recorded["layer"]:
        for name, run in layer["runs"].items():
            router, residual = build(layer, tensors, use_rts=name.endswith("_rts"))
            router.train(name.startswith("train"))
            tag = f"{layer['tag']}.{name}"
            x = tensors[f"{layer['tag']}.x"].clone().requires_grad_(True)
            if run["status"] != "ok":
                with pytest.raises(InputError, match=r"min_capacity|capacity factor"):
                    router(x)
                continue
            heard = []
            router.gate.register_forward_hook(lambda _, __, routing, heard=heard: heard.append(routing))
            with collect_aux_losses(router) as aux, record_routing(router) as trace:
                out = forward(router, residual, x)
            (out.square().sum() + aux.balance()).backward()
            assert_is_the_recorded(heard[0], tensors[f"{tag}.combine"], run)
            assert aux.balance().item() == pytest.approx(run["l_aux"], abs=1e-6)
            assert (trace[0].served[0] < 0).all(-1).flatten().nonzero().flatten().tolist() == run["dropped"]
            wanted = {"out": out, "grad_x": x.grad, "grad_wg": router.gate.weight.grad}
            wanted["gate_logits"] = heard[0].logits
            for key, ours in wanted.items():
                near = 1e-4 if key.startswith("grad") else 2e-5
                torch.testing.assert_close(
                    ours, tensors[f"{tag}.{key}"], atol=near, rtol=near, msg=lambda m, k=key: f"{k}: {m}"
                )
            compared += 1
    assert compared


def test_capacity_is_the_recorded_one(moe):
    for tokens, experts, factor, least, official, _ in moe[0]["capacity_table"]:
        assert max(ops.capacity_of(tokens, experts, factor), least) == official
