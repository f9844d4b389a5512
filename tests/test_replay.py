"""Replayed routing: what was recorded is repeated, call by call, while gradients reach the gates."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from medplib.errors import CheckpointError, InputError
from medplib.experts import MoERouter, RoutingTrace, record_routing, replay_routing, routing_mask

DIM = 6


def make_router(num_experts=4, **options):
    torch.manual_seed(0)
    return MoERouter(DIM, num_experts, hidden_dim=5, **options)


class TwoLayers(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(make_router(4, **options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "renormalize": True, "gate_args": {"scale": 2.0}},
        {"capacity_factor": 0.5, "drop": "random", "seed": 1},
        {"parity": "deepspeed", "top_k": 2, "capacity_factor": 0.4, "seed": 1},
        {"gate": "expert_choice"},
    ],
)
def test_replay_repeats_choices_drops_and_output_call_by_call(options):
    model, x = TwoLayers(**options), torch.randn(2, 6, DIM)
    mask = None if "parity" in options else torch.arange(6).expand(2, 6) < 5
    with record_routing(model) as trace, routing_mask(mask):
        first, second = model(x), model(x + 1)
    with replay_routing(model, trace), routing_mask(mask), record_routing(model) as again:
        assert torch.equal(model(x), first)
        assert torch.equal(model(x + 1), second)
    for one, other in zip(trace.layers.values(), again.layers.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.served, other.served, strict=True))


def test_replay_holds_the_choice_while_the_gate_changes_and_lets_it_learn():
    router, x = make_router(4), torch.randn(8, DIM)
    with record_routing(router) as trace:
        router(x)
    nn.init.normal_(router.gate.weight)
    with replay_routing(router, trace):
        out = checkpoint(router, x, use_reentrant=False)
    out.sum().backward()
    chosen = trace[0].choices()
    weights = (x @ router.gate.weight.T).softmax(-1).gather(1, chosen)
    experts = list(router.experts.values())
    wanted = torch.cat(
        [w * experts[e](row[None]) for w, e, row in zip(weights, chosen[:, 0], x, strict=True)]
    )
    torch.testing.assert_close(out, wanted)
    assert router.gate.weight.grad.abs().sum() > 0


def test_recording_is_replayed_from_a_file(tmp_path):
    model, x = TwoLayers(top_k=2, capacity_factor=0.7), torch.randn(2, 6, DIM)
    with record_routing(model) as trace:
        first, second = model(x), model(x + 1)
    trace.save(tmp_path / "trace.safetensors")
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert loaded.rows() == trace.rows()
    nn.init.normal_(model.layers[0].gate.weight)
    model.load_state_dict(TwoLayers(top_k=2).state_dict())
    with replay_routing(model, loaded):
        assert torch.equal(model(x), first)
        assert torch.equal(model(x + 1), second)
    save_file({"a": x}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no recording of routing"):
        RoutingTrace.load(tmp_path / "other.safetensors")


def test_replay_refuses_another_model_another_shape_and_one_call_more():
    model, x = TwoLayers(), torch.randn(2, 6, DIM)
    with record_routing(model) as trace:
        model(x)
    with (
        replay_routing(model, trace),
        pytest.raises(InputError, match=r"tokens of shape \(2, 6\), got \(2, 5\)"),
    ):
        model(x[:, :5])
    with replay_routing(model, trace):
        model(x)
        with pytest.raises(InputError, match="recorded for 1 forwards"):
            model(x)
    with pytest.raises(InputError, match=r"holds layers\.0, layers\.1"), replay_routing(model.layers, trace):
        pass
    model.layers[1] = MoERouter(DIM, ("a", "b"))
    with pytest.raises(InputError, match="was recorded with the experts"), replay_routing(model, trace):
        pass


def test_replay_refuses_another_mask():
    model, x, mask = TwoLayers(), torch.randn(2, 6, DIM), torch.arange(6).expand(2, 6) < 4
    with record_routing(model) as trace, routing_mask(mask):
        model(x)
    for other, count in ((None, 4), (torch.arange(6).expand(2, 6) > 0, 6)):
        with (
            replay_routing(model, trace),
            routing_mask(other),
            pytest.raises(InputError, match=rf"layers.0 was recorded with another mask: {count} tokens"),
        ):
            model(x)
