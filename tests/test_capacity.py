"""Capacity: who is dropped, against a slow version; and the published gating as an option."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medplib.errors import InputError
from medplib.experts import MoERouter, Routing, SwiGLU, force_expert, record_routing, routing_mask
from medplib.experts.capacity import keep_best, limit
from medplib.experts.deepspeed import DeepSpeedGate, published_top1, published_top2
from medplib.experts.noise import KeyedNoise

DIM = 6


def make_router(num_experts=3, **kwargs):
    torch.manual_seed(0)
    return MoERouter(DIM, {f"e{i}": SwiGLU(DIM, 5) for i in range(num_experts)}, **kwargs)


def random_routing(tokens, num_experts, k, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, num_experts)
    probabilities, experts = logits.softmax(-1), logits.topk(k).indices
    return Routing(logits, probabilities, experts, probabilities.gather(1, experts))


def slow_keep(experts, priority, num_experts, capacity):
    served = torch.full_like(experts, num_experts)
    for expert in range(num_experts):
        pairs = [
            (t, c) for t in range(len(experts)) for c in range(experts.shape[1]) if experts[t, c] == expert
        ]
        pairs.sort(key=lambda pair: (-priority[pair].item(), pair))
        for pair in pairs[:capacity]:
            served[pair] = expert
    return served


@pytest.mark.parametrize(("k", "capacity"), [(1, 3), (2, 4), (3, 1), (2, 100)])
def test_those_with_the_highest_priority_are_kept(k, capacity):
    routing = random_routing(17, 4, k)
    priority = torch.randint(0, 5, routing.experts.shape).float()  # with ties
    assert torch.equal(
        keep_best(routing.experts, priority, 4, capacity), slow_keep(routing.experts, priority, 4, capacity)
    )
    by_weight = limit(routing, 4, capacity, "probability").served
    assert torch.equal(by_weight, slow_keep(routing.experts, routing.weights, 4, capacity))


def test_random_drops_are_those_of_the_hash_and_other_ones_in_the_next_step():
    routing, noise = random_routing(30, 2, 1), KeyedNoise(seed=5)
    served = limit(routing, 2, 6, "random", noise).served
    assert torch.equal(served, slow_keep(routing.experts, noise.uniform((30, 1)), 2, 6))
    assert not torch.equal(served, limit(routing, 2, 6, "random", noise).served)


def test_no_token_no_drop():
    assert keep_best(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), 3, 1).shape == (0, 2)


@pytest.mark.parametrize("drop", ["position", "probability", "random"])
def test_dropped_tokens_give_zero_and_the_others_their_full_output(drop):
    router = make_router(capacity_factor=0.5, drop=drop, seed=1)
    x = torch.randn(12, DIM)
    with record_routing(router) as trace:
        out = router(x)
    dropped = trace[0].served[0][:, 0] < 0
    assert dropped.sum() == sum(trace.rows()[0]["dropped"].values()) > 0
    assert (out[dropped] == 0).all()
    torch.testing.assert_close(out[~dropped], router.eval()(x)[~dropped])


def test_capacity_in_evaluation_and_its_least_value():
    router = make_router(num_experts=2, eval_capacity_factor=0.5, min_capacity=4).eval()
    nn.init.zeros_(router.gate.weight)
    assert (router(torch.randn(10, DIM)).abs().sum(-1) > 0).sum() == 4
    assert (router.train()(torch.randn(10, DIM)).abs().sum(-1) > 0).all()


def test_padding_takes_no_place():
    router = make_router(num_experts=2, capacity_factor=1.0, drop="random", seed=1)
    x = torch.randn(1, 8, DIM)
    alone = router(x)
    router.drop_noise.state[1] = 0
    mask = torch.arange(14)[None] < 8
    padded = router(torch.cat([x, torch.randn(1, 6, DIM)], dim=1), mask)
    torch.testing.assert_close(padded[:, :8], alone)


def test_recomputation_drops_the_same_tokens():
    router, gradients = make_router(capacity_factor=0.5, drop="random", seed=3), []
    x = torch.randn(12, DIM)
    for checkpointed in (False, True):
        router.drop_noise.state[1] = 0
        router.zero_grad()
        out = checkpoint(router, x, use_reentrant=False) if checkpointed else router(x)
        out.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in router.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": "last"}, "position, probability, random; got 'last'"),
        ({"drop": "probability"}, "drops nothing without a capacity"),
        ({"parity": "deepspeed", "gate_args": {"noise": "jitter"}}, "noise must be a module .* got 'jitter'"),
        ({"min_capacity": -1}, "min_capacity must be .* got -1"),
        ({"eval_capacity_factor": 0}, "eval_capacity_factor must be a finite number above 0"),
        ({"parity": "fairseq"}, "parity must be 'deepspeed' or None, got 'fairseq'"),
        ({"parity": "deepspeed", "gate": nn.Identity()}, "brings its own gate"),
        ({"parity": "deepspeed", "score": "sigmoid"}, "score='softmax'"),
        ({"parity": "deepspeed", "drop": "random"}, "drops as published"),
        ({"gate": "expert_choice", "capacity_factor": 1.0}, "ExpertChoiceGate has a capacity of its own"),
        ({"gate": "deepspeed", "eval_capacity_factor": 1.0}, "DeepSpeedGate has a capacity of its own"),
        ({"parity": "deepspeed", "top_k": 3}, "top_k 1 and 2, got 3"),
        ({"gate": nn.Identity(), "gate_args": {"a": 1}}, "gate_args go to a gate found by name"),
    ],
)
def test_wrong_setting_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make_router(**arguments)


# The published gating; its numbers are compared with recorded ones in tests/parity/test_moe.py


def test_published_gating_without_a_capacity_is_ours():
    x = torch.randn(2, 9, DIM)
    published, ours = make_router(parity="deepspeed"), make_router()
    torch.testing.assert_close(published(x), ours(x))
    two, ours_two = make_router(2, parity="deepspeed", top_k=2), make_router(2, top_k=2, renormalize=True)
    torch.testing.assert_close(two(x), ours_two(x))


def test_published_gating_routes_padding_and_takes_no_mask():
    router, x = make_router(parity="deepspeed"), torch.randn(2, 3, DIM)
    with routing_mask(torch.zeros(2, 3)):
        assert (router(x) != 0).all()
    with pytest.raises(InputError, match="give no mask"):
        router(x, torch.ones(2, 3))


def test_published_random_drops_are_repeated_by_key_and_count():
    gate = DeepSpeedGate(DIM, 2, capacity_factor=0.5, seed=9)
    x = torch.randn(20, DIM)
    first, second = gate(x).served, gate(x).served
    gate.noise.state[1] = 0
    assert torch.equal(gate(x).served, first)
    assert not torch.equal(first, second)
    assert (first < 2).sum() == (second < 2).sum() <= 10


def test_published_top_2_draws_its_second_expert_even_in_evaluation():
    gate = DeepSpeedGate(DIM, 4, top_k=2, capacity_factor=None, eval_capacity_factor=None, seed=1).eval()
    x = torch.randn(40, DIM)
    first, second = gate(x), gate(x)
    assert torch.equal(first.experts[:, 0], second.experts[:, 0])
    assert not torch.equal(first.experts[:, 1], second.experts[:, 1])
    assert (first.experts[:, 0] != first.experts[:, 1]).all()
    torch.testing.assert_close(first.weights.sum(1), torch.ones(40))


def test_published_top_2_drops_second_choices_first_and_gives_the_rest_their_weight():
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    routing = published_top2(logits, 1 / 3)  # capacity 1
    assert routing.served.tolist() == [[0, 2], [2, 2], [1, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))


def test_published_failures_are_refused_with_a_remedy():
    logits = torch.randn(3, 2)
    with pytest.raises(InputError, match="use min_capacity=0"):
        published_top1(logits, 2.0, min_capacity=4)
    with pytest.raises(InputError, match="factor of at most 2"):
        published_top1(logits, 3.0)


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_of_the_published_gating_are_those_of_finite_differences(k):
    router = make_router(parity="deepspeed", top_k=k, capacity_factor=0.6, seed=1).double()

    def run(x, *_):
        router.gate.noise.state[1] = 0
        return router(x)

    x = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *router.parameters()), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_published_gating_takes_no_token_and_half_precision(k):
    router = make_router(parity="deepspeed", top_k=k, capacity_factor=1.0, seed=1)
    assert router(torch.randn(0, DIM)).shape == (0, DIM)
    assert router.bfloat16()(torch.randn(7, DIM).bfloat16()).dtype == torch.bfloat16


def test_forced_expert_serves_all_in_parity_mode_too():
    router, x = make_router(parity="deepspeed", capacity_factor=0.5), torch.randn(9, DIM)
    with force_expert(router, "e1"):
        assert (router(x) != 0).all()


def test_forced_expert_serves_all_whatever_the_capacity():
    router, x = MoERouter(6, ["a", "b"], hidden_dim=5, eval_capacity_factor=1.0).eval(), torch.randn(40, 6)
    with router.force("b"), record_routing(router) as trace:
        out = router(x)
    assert trace[0].dropped().sum() == 0
    torch.testing.assert_close(out, router.experts["b"](x) * trace[0].scores()[:, 1:])
