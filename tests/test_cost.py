"""Cost of a mixture: rows, operations and bytes as they are, against one dense expert."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from medplib.errors import InputError
from medplib.experts import MoERouter, SwiGLU, measure_cost

DIM, HIDDEN = 6, 5
WEIGHTS = 3 * DIM * HIDDEN


def make_router(num_experts=2, **options):
    torch.manual_seed(0)
    return MoERouter(DIM, num_experts, hidden_dim=HIDDEN, **options)


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_costs_k_dense_experts_in_rows_and_operations(top_k):
    router, x = make_router(top_k=top_k).eval(), torch.randn(3, 20, DIM)
    report = router.cost_report(x)
    layer, row = report.layers["router"], report.rows()[0]
    assert (row["tokens"], layer.rows) == (60, 60 * top_k)
    assert row["rows_ratio"] == top_k
    assert layer.dense.flops == 2 * 60 * WEIGHTS
    assert layer.flops == top_k * 2 * 60 * WEIGHTS + 2 * 60 * DIM * 2
    assert layer.dense.bytes == 4 * (WEIGHTS + 2 * 60 * DIM)
    assert layer.bytes == 4 * (2 * WEIGHTS + 2 * 60 * top_k * DIM)


def test_operations_are_those_that_torch_counts():
    router, x = make_router(4, top_k=2), torch.randn(30, DIM)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        router(x)
    assert router.cost_report(x).layers["router"].flops == counter.get_total_flops()


def test_one_token_reads_the_weights_of_one_expert():
    row = make_router(8).half().cost_report(torch.randn(1, DIM).half()).rows()[0]
    assert row["bytes_ratio"] == 1.0
    assert row["bytes"] == 2 * (WEIGHTS + 2 * DIM)


def test_padding_and_dropped_tokens_cost_nothing():
    router = make_router(2, capacity_factor=0.5)
    nn.init.zeros_(router.gate.weight)
    x, mask = torch.randn(1, 16, DIM), torch.arange(16)[None] < 12
    row = router.cost_report(x, mask).rows()[0]
    assert row["tokens"] == 12
    assert row["rows"] == {"expert_0": 3, "expert_1": 0}


def test_layers_are_added_up_over_calls_and_recomputation_counts_once():
    model = nn.Sequential(make_router(), nn.Linear(DIM, DIM), make_router(3))
    x = torch.randn(5, DIM, requires_grad=True)
    with measure_cost(model) as cost:
        checkpoint(model, x, use_reentrant=False).sum().backward()
        model(x)
    assert [row["tokens"] for row in cost.rows()] == [10, 10]
    assert [cost.layers[name].rows for name in ("0", "2")] == [10, 10]
    assert sum(e.calls for e in cost.layers["0"].experts.values()) <= 4
    model(x)
    assert cost.layers["0"].tokens == 10


def test_table_names_layers_and_experts():
    router = MoERouter(DIM, {"vqa": SwiGLU(DIM, HIDDEN)})
    lines = str(router.cost_report(torch.randn(7, DIM))).splitlines()
    assert lines[0].split() == ["layer", "tokens", "rows", "flops", "bytes", "rows", "per", "expert"]
    assert lines[1].split()[:3] == ["router", "7", "1.00x"]
    assert lines[1].endswith("vqa 7")


def test_model_without_routers_is_refused():
    with pytest.raises(InputError, match="nothing to measure"), measure_cost(nn.Linear(2, 2)):
        pass
