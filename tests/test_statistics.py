"""Running statistics: the numbers of a recording, without keeping the tokens."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medplib.errors import InputError
from medplib.experts import MoERouter, count_routing, force_expert, record_routing, routing_mask

DIM = 6


def make_router(num_experts=3, **options):
    torch.manual_seed(0)
    return MoERouter(DIM, num_experts, hidden_dim=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "score": "sigmoid"},
        {"capacity_factor": 0.5},
        {"gate": "expert_choice", "top_k": 2},
        {"parity": "deepspeed", "top_k": 2, "capacity_factor": 0.4, "seed": 1},
    ],
)
def test_numbers_are_those_of_a_recording(options):
    model = nn.Sequential(make_router(**options), make_router(**options))
    mask = None if "parity" in options else torch.arange(9).expand(2, 9) < 7
    with record_routing(model) as trace, count_routing(model) as statistics, routing_mask(mask):
        for _ in range(3):
            model(torch.randn(2, 9, DIM))
    for row, wanted in zip(statistics.rows(), trace.rows(), strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-5))


def test_latest_choices_are_kept_in_turn():
    router = make_router(top_k=2)
    with count_routing(router, remember=5) as statistics, record_routing(router) as trace:
        for tokens in (3, 4, 9):
            router(torch.randn(tokens, DIM))
        with force_expert(router, "expert_1"):
            router(torch.randn(1, DIM))
    chosen = [row for call in trace[0].experts for row in call.tolist()]
    wanted = [[-1, -1]] * 5
    for place, row in enumerate(chosen):
        wanted[place % 5] = [*row, -1][:2]
    assert statistics.layers["router"].recent.tolist() == wanted


def test_counting_ends_with_the_block_and_changes_nothing():
    router, x = make_router(), torch.randn(5, DIM, requires_grad=True)
    plain = router(x)
    with count_routing(router) as statistics:
        out = checkpoint(router, x, use_reentrant=False)
        out.sum().backward()
        assert torch.equal(out, plain)
        assert not any("statistics" in key for key in router.state_dict())
    router(x)
    assert statistics.rows()[0]["tokens"] == 5
    assert statistics.layers["router"].recent.numel() == 0


def test_layer_that_did_not_run_is_left_out():
    model = nn.ModuleList([make_router(), make_router()])
    with count_routing(model) as statistics:
        model[1](torch.randn(2, DIM))
    assert [row["layer"] for row in statistics.rows()] == ["1"]


def test_compiled_router_counts_and_gives_the_same_output():
    router, x = make_router(top_k=2), torch.randn(11, DIM)
    plain = router(x)
    with count_routing(router) as statistics:
        compiled = torch.compile(router, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), plain)
    assert statistics.rows()[0]["tokens"] == 22


def test_misuse_is_refused():
    router = make_router()
    with pytest.raises(InputError, match="nothing to count"), count_routing(nn.Linear(2, 2)):
        pass
    with pytest.raises(InputError, match="remember must be"), count_routing(router, remember=-1):
        pass
    with count_routing(router), pytest.raises(InputError, match="already"), count_routing(router):
        pass
    assert router.statistics is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counting_does_not_wait_for_the_gpu():
    router = make_router(top_k=2).cuda()
    routing = router.gate(torch.randn(64, DIM, device="cuda"))
    with count_routing(router, remember=16) as statistics:
        counter = statistics.layers["router"]
        counter.add(routing)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                counter.add(routing)
            for _ in range(3):
                graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert statistics.rows()[0]["tokens"] == 4 * 64
