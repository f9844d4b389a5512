"""Recording of routing: what is counted, how it is laid out, and that nothing else changes."""

import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from medplib.errors import InputError, UnknownNameError
from medplib.experts import MoERouter, record_routing, routing_mask

DIM = 6


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MoERouter(DIM, ("grounding", "vqa"), hidden_dim=4, top_k=k) for k in (1, 2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoLayers()


def test_trace_holds_what_each_token_chose(model):
    x = torch.randn(2, 9, DIM)
    with record_routing(model) as trace:
        model(x)
    assert list(trace.layers) == ["layers.0", "layers.1"]
    probabilities = (x @ model.layers[0].gate.weight.T).softmax(-1)
    assert torch.equal(trace["layers.0"].choices()[..., 0], probabilities.argmax(-1))
    torch.testing.assert_close(trace[0].scores(), probabilities.detach())
    assert trace[-1].choices().shape == (2, 9, 2)
    row = trace.rows()[0]
    assert row["tokens"] == 18
    assert sum(row["counts"].values()) == 18
    assert row["probability"]["vqa"] == pytest.approx(probabilities[..., 1].mean().item())
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert row["entropy"] == pytest.approx(entropy.item(), abs=1e-6)
    assert row["margin"] == pytest.approx((probabilities[..., 0] - probabilities[..., 1]).abs().mean().item())
    assert trace.by_expert()["layers.1"] == {"grounding": 0.5, "vqa": 0.5}


def test_recording_changes_neither_output_nor_gradient(model):
    x = torch.randn(2, 9, DIM)
    plain = model(x)
    with record_routing(model) as trace:
        assert torch.equal(model(x), plain)
    assert not trace[0].probabilities[0].requires_grad


def test_compiled_model_is_recorded_as_the_plain_one_is(model):
    x = torch.randn(2, 9, DIM)
    with record_routing(model) as plain:
        model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with record_routing(model) as trace:
        for _ in range(2):
            compiled(x)
    for name, layer in plain.layers.items():
        assert all(torch.equal(call, layer.experts[0]) for call in trace[name].experts)
        assert len(trace[name].experts) == 2


def test_masked_tokens_are_marked_and_not_counted(model):
    mask = torch.tensor([[True, True, False], [False, True, True]])
    with record_routing(model) as trace, routing_mask(mask):
        model(torch.randn(2, 3, DIM))
    assert torch.equal(trace[0].choices()[..., 0] >= 0, mask)
    assert torch.equal(~trace[0].scores()[..., 0].isnan(), mask)
    assert trace.rows()[0]["tokens"] == 4


def test_calls_of_a_generation_are_joined_along_the_sequence(model):
    prompt, step = torch.randn(2, 5, DIM), torch.randn(2, 1, DIM)
    with record_routing(model) as trace:
        model(prompt)
        model(step)
        model(step)
    assert trace[0].choices().shape == (2, 7, 1)
    shares = trace.by_token_type([["image"] * 3 + ["text"] * 2] * 2, rest="generated")["layers.0"]
    assert set(shares) == {"image", "text", "generated"}
    assert all(sum(share.values()) == pytest.approx(1.0) for share in shares.values())


def test_shares_by_token_type_are_counted_one_by_one(model):
    types = torch.randint(0, 3, (2, 9))
    with record_routing(model) as trace:
        model(torch.randn(2, 9, DIM))
    chosen = trace[0].choices()[..., 0]
    for kind, shares in trace.by_token_type(types)["layers.0"].items():
        here = [int(c) for c, t in zip(chosen.flatten(), types.flatten(), strict=True) if t == kind]
        assert shares["vqa"] == pytest.approx(here.count(1) / len(here))
    with pytest.raises(InputError, match="one label per recorded token"):
        trace.by_token_type(types[:, :4])


def test_expert_map_lays_the_image_tokens_out_as_the_image(model):
    with record_routing(model) as trace:
        model(torch.randn(2, 9, DIM))
    grid = trace.expert_map("layers.0", slice(1, 7), (2, 3), sample=1)
    assert np.array_equal(grid, trace[0].choices()[1, 1:7, 0].reshape(2, 3).numpy())
    soft = trace.expert_map(0, [1, 2, 3, 4, 5, 6], (3, 2), expert="grounding")
    assert np.array_equal(soft, trace[0].scores()[0, 1:7, 0].reshape(3, 2).numpy())
    with pytest.raises(InputError, match="6 tokens were picked"):
        trace.expert_map(0, slice(1, 7), (3, 3))
    with pytest.raises(InputError, match="sample must be between 0 and 1, got 2"):
        trace.expert_map(0, slice(1, 7), (2, 3), sample=2)
    with pytest.raises(UnknownNameError, match=r"No recorded layer 'layers\.7'"):
        trace.expert_map("layers.7", slice(1, 7), (2, 3))
    with pytest.raises(UnknownNameError, match="No expert named 'ground'"):
        trace.expert_map(0, slice(1, 7), (2, 3), expert="ground")


def test_nested_recordings_each_hear_their_own_part(model):
    x = torch.randn(1, 4, DIM)
    with record_routing(model) as outer:
        model(x)
        with record_routing(model.layers[1]) as inner:
            model(x)
        model(x)
    assert outer.rows()[0]["tokens"] == 12
    assert [row["layer"] for row in inner.rows()] == ["router"]
    assert inner.rows()[0]["tokens"] == 4


def test_recording_in_another_thread_does_not_mix(model):
    def other():
        with record_routing(model) as trace:
            model(torch.randn(1, 3, DIM))
        traces.append(trace)

    traces = []
    with record_routing(model) as trace:
        thread = threading.Thread(target=other)
        thread.start()
        model(torch.randn(1, 5, DIM))
        thread.join()
    assert trace.rows()[0]["tokens"] == 5
    assert traces[0].rows()[0]["tokens"] == 3


def test_table_names_layers_and_experts(model):
    with record_routing(model) as trace:
        model(torch.randn(1, 4, DIM))
    lines = trace.table().splitlines()
    assert lines[0].split()[:4] == ["layer", "tokens", "entropy", "margin"]
    assert "layers.1" in lines[2]
    assert "grounding  50.0%" in lines[2]


def test_model_without_routers_is_refused():
    with pytest.raises(InputError, match="no MoERouter in this Linear"), record_routing(nn.Linear(2, 2)):
        pass


def test_layer_that_did_not_run_is_left_out(model):
    with record_routing(model) as trace:
        model.layers[0](torch.randn(4, DIM))
    assert [row["layer"] for row in trace.rows()] == ["layers.0"]
    with pytest.raises(InputError, match="did not run"):
        trace[1].choices()


def test_plot_draws_every_layer_and_expert(model):
    pytest.importorskip("matplotlib")
    with record_routing(model) as trace:
        model(torch.randn(1, 4, DIM))
    axes = trace.plot().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["grounding", "vqa"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0", "layers.1"]


def test_plot_without_matplotlib_says_what_to_install(model, monkeypatch):
    with record_routing(model) as trace:
        model(torch.randn(1, 4, DIM))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"medplib\[notebook\]"):
        trace.plot()


def test_forward_without_tokens_has_token_types():
    router = MoERouter(6, ["a", "b"], hidden_dim=5)
    with record_routing(router) as trace:
        router(torch.randn(2, 0, 6))
    assert trace.by_token_type(torch.zeros(2, 0)) == {"router": {}}
