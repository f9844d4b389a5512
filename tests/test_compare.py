"""Two mixtures compared: where the tokens went, and how far the experts are apart."""

import copy
import math

import pytest
import torch
from torch import nn

from medplib.errors import InputError
from medplib.experts import MoERouter, compare_experts, compare_routing, record_routing, routing_mask

DIM = 6


def make_router(num_experts=3, seed=0, **options):
    torch.manual_seed(seed)
    return MoERouter(DIM, num_experts, hidden_dim=4, **options)


def record(router, x, mask=None):
    with record_routing(router) as trace, routing_mask(mask):
        router(x)
    return trace


def test_differences_are_counted_token_by_token():
    routers = [make_router(seed=seed, top_k=2) for seed in (0, 1)]
    x, mask = torch.randn(2, 20, DIM), torch.arange(20).expand(2, 20) < 15
    row = compare_routing(*(record(router, x, mask) for router in routers))[0]
    one, two = (router.gate(x[mask]) for router in routers)
    pairs = list(zip(one.experts.tolist(), two.experts.tolist(), strict=True))
    assert row["layer"] == "router"
    assert row["tokens"] == 30
    assert row["changed"] == pytest.approx(sum(a[0] != b[0] for a, b in pairs) / 30)
    assert row["overlap"] == pytest.approx(sum(len({*a} & {*b}) / 2 for a, b in pairs) / 30)
    divergence = 0.0
    for p, q in zip(one.probabilities.tolist(), two.probabilities.tolist(), strict=True):
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 30
    assert row["divergence"] == pytest.approx(divergence, rel=1e-5)
    for e, name in enumerate(routers[0].names):
        share = [sum(e in pair[i] for pair in pairs) / 60 for i in (0, 1)]
        assert row["moved"][name] == pytest.approx(share[1] - share[0], abs=1e-6)
        for f, other in enumerate(routers[0].names):
            assert row["flow"][name][other] == sum((a[0], b[0]) == (e, f) for a, b in pairs)


def test_same_router_does_not_differ():
    router, x = make_router(), torch.randn(9, DIM)
    row = compare_routing(record(router, x), record(router, x))[0]
    assert (row["changed"], row["overlap"], row["divergence"]) == (0.0, 1.0, 0.0)


def test_recordings_of_other_things_are_refused():
    x = torch.randn(9, DIM)
    first = record(make_router(), x)
    with pytest.raises(InputError, match="9 and 5 tokens"):
        compare_routing(first, record(make_router(), x[:5]))
    with pytest.raises(InputError, match="has the experts expert_0"):
        compare_routing(first, record(make_router(2), x))
    with pytest.raises(InputError, match="hold other layers"):
        compare_routing(first, record(nn.Sequential(make_router()), x))


def test_distance_of_experts_within_a_model_and_from_an_earlier_one():
    router = make_router(2)
    later = copy.deepcopy(router)
    with torch.no_grad():
        for parameter in later.experts["expert_1"].parameters():
            parameter.mul_(-1.5)
    rows = compare_experts(router, later)
    assert [row["pair"] for row in rows] == [("expert_0", "expert_0"), ("expert_1", "expert_1")]
    assert (rows[0]["cosine"], rows[0]["distance"]) == (pytest.approx(1), 0)
    assert (rows[1]["cosine"], rows[1]["distance"]) == (pytest.approx(-1), pytest.approx(2.5))
    (row,) = compare_experts(router)
    vectors = [nn.utils.parameters_to_vector(expert.parameters()) for expert in router.experts.values()]
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(*vectors, dim=0).item(), rel=1e-5)
    with pytest.raises(InputError, match="same MoERouters"):
        compare_experts(router, nn.Linear(2, 2))
    with pytest.raises(InputError, match="other sizes"):
        compare_experts(MoERouter(DIM, {"a": nn.Linear(6, 6), "b": nn.Identity()}))
