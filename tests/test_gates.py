"""The options of the gates against slow versions: scale, groups, bias, noise, expert choice."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medplib.errors import InputError
from medplib.experts import (
    ExpertChoiceGate,
    MoERouter,
    Routing,
    TopKGate,
    balance_loss,
    collect_aux_losses,
    record_routing,
    routing_mask,
    sequence_balance_loss,
    update_biases,
)
from medplib.registry import GATES

DIM = 6


def make_gate(num_experts=8, **options):
    torch.manual_seed(0)
    gate = TopKGate(DIM, num_experts, **options)
    nn.init.normal_(gate.weight)
    return gate


def make_router(num_experts=4, **options):
    torch.manual_seed(0)
    return MoERouter(DIM, num_experts, hidden_dim=5, **options)


def slow_choice(logits, gate, bias):
    """One token: the experts in Python lists."""
    scores = (logits.softmax(0) if gate.score == "softmax" else logits.sigmoid()).tolist()
    biased = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = len(scores) // gate.groups
    worth = []
    for group in range(gate.groups):
        best = sorted(biased[group * size : (group + 1) * size], reverse=True)[: gate.group_best]
        worth.append((-sum(best), group))
    allowed = {group for _, group in sorted(worth)[: gate.top_groups]}
    open_to = [e for e in range(len(scores)) if e // size in allowed]
    chosen = sorted(open_to, key=lambda e: (-biased[e], e))[: gate.top_k]
    total = sum(scores[e] for e in chosen) if gate.renormalize else 1.0
    return chosen, [scores[e] / total * gate.scale for e in chosen]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "scale": 2.5},
        {"top_k": 2, "renormalize": True, "scale": 2.5, "score": "sigmoid"},
        {"top_k": 2, "groups": 4, "top_groups": 2},
        {"top_k": 3, "groups": 2, "top_groups": 1, "group_best": 2, "score": "sigmoid", "renormalize": True},
        {"top_k": 2, "bias_rate": 0.1},
        {"top_k": 2, "bias_rate": 0.05, "score": "sigmoid", "groups": 4, "top_groups": 2, "group_best": 2},
    ],
)
def test_choice_and_weights_are_those_of_the_slow_version(options):
    gate = make_gate(**options).eval()
    bias = [0.0] * 8
    if gate.bias is not None:
        gate.bias.steps.copy_(torch.tensor([3, -2, 0, 1, -4, 0, 2, 5]))
        bias = gate.bias().tolist()
    tokens = torch.randn(50, DIM)
    routing = gate(tokens)
    for token in range(50):
        experts, weights = slow_choice(routing.logits[token].detach(), gate, bias)
        assert routing.experts[token].tolist() == experts
        torch.testing.assert_close(routing.weights[token], torch.tensor(weights))


def test_gradients_of_the_options_are_those_of_finite_differences():
    options = {"groups": 2, "top_groups": 1, "scale": 1.5, "bias_rate": 0.1, "bias_update": "call"}
    router = make_router(top_k=2, renormalize=True, score="sigmoid", gate_args=options).double()
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: router(x), (x, *router.parameters()), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups must divide the 8 experts evenly, got 3"),
        ({"groups": 4}, "say in top_groups"),
        ({"groups": 4, "top_groups": 5}, "top_groups must be between 1 and 4"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "1 groups of 2 experts hold fewer than top_k=3"),
        ({"groups": 4, "top_groups": 1, "group_best": 3}, "group_best must be between 1 and 2"),
        ({"noise": "white"}, "jitter, multiplicative, gumbel or None, got 'white'"),
        ({"noise": "jitter", "noise_scale": 1.0}, "must be below 1"),
        ({"noise": "gumbel", "noise_scale": 0}, "noise_scale must be a finite number above 0"),
        ({"noise": "gumbel", "noise_scale": "1"}, "noise_scale must be a finite number above 0, got '1'"),
        ({"noise_scale": 0.5}, "scales nothing without noise"),
        ({"groups": 2.0, "top_groups": 1}, "groups must divide the 8 experts evenly, got 2.0"),
        ({"bias_rate": 0}, "bias_rate must be a finite number above 0"),
        ({"bias_rate": True}, "bias_rate must be a finite number above 0"),
        ({"bias_rate": 0.1, "bias_update": "often"}, "forward, call; got 'often'"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        make_gate(**options)


# Balance by bias


def test_setting_that_a_gate_does_not_have_is_named():
    with pytest.raises(
        InputError, match=r"The gate 'topk' has no setting scal\. Known: top_k, score, .*scale"
    ):
        make_router(4, gate_args={"scal": 2.0})


def test_a_gate_of_your_own_needs_only_the_settings_that_it_has(monkeypatch):
    class Even(nn.Module):
        def __init__(self, dim, num_experts):
            super().__init__()
            self.linear = nn.Linear(dim, num_experts)

        def forward(self, tokens):
            logits = self.linear(tokens.float())
            probabilities = logits.softmax(dim=-1)
            weights, experts = probabilities.topk(2, dim=-1)
            return Routing(logits, probabilities, experts, weights)

    monkeypatch.setitem(GATES._entries, "even", Even)
    router = MoERouter(DIM, 3, gate="even", hidden_dim=4)
    assert router(torch.randn(5, DIM)).shape == (5, DIM)
    with pytest.raises(InputError, match=r"The gate 'even' has no setting top_k\. Known: none\."):
        MoERouter(DIM, 3, gate="even", top_k=2)


def test_bias_follows_the_load_and_is_no_part_of_the_weights():
    gate = make_gate(4, bias_rate=0.5, bias_update="call")
    tokens = torch.randn(30, DIM)
    routing = gate(tokens)
    load = torch.bincount(routing.experts.flatten(), minlength=4)
    assert torch.equal(gate.bias.load, load)
    update_biases(gate)
    assert gate.bias().tolist() == [0.5 * ((n < 7.5) - (n > 7.5)) for n in load.tolist()]
    assert gate.bias.load.sum() == 0
    after = gate(tokens)
    torch.testing.assert_close(after.weights, after.probabilities.gather(1, after.experts))
    assert not torch.equal(after.experts, routing.experts)


def test_bias_balances_a_lopsided_gate_in_training_alone():
    router = make_router(4, gate_args={"bias_rate": 0.01})
    x = torch.randn(200, DIM).abs()
    router.gate.weight.data[0] = 0.5
    before = torch.bincount(router.gate(x).experts[:, 0], minlength=4)
    assert before.max() > 150
    for _ in range(60):
        router(x)
    after = torch.bincount(router.gate(x).experts[:, 0], minlength=4)
    assert after.max() < 80
    state = copy.deepcopy(router.state_dict())
    router.eval()(x)
    assert all(torch.equal(value, state[key]) for key, value in router.state_dict().items())
    assert "gate.bias.steps" in state


def test_bias_survives_half_precision_and_saving_exactly():
    gate = make_gate(4, bias_rate=0.001)
    gate.bias.steps.fill_(1037)
    half = copy.deepcopy(gate).bfloat16()
    twin = make_gate(4, bias_rate=0.001)
    twin.load_state_dict(half.state_dict())
    assert torch.equal(half.bias(), gate.bias())
    assert torch.equal(twin.bias(), gate.bias())


def test_repeated_forward_of_gradient_checkpointing_neither_counts_nor_changes_its_choice():
    router = make_router(4, gate_args={"bias_rate": 0.5, "noise": "gumbel", "seed": 1})
    x = torch.randn(20, DIM, requires_grad=True)
    chosen = []
    router.gate.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts))
    for _ in range(3):
        checkpoint(router, x, use_reentrant=False).sum().backward()
    assert len(chosen) == 6
    assert all(torch.equal(chosen[i], chosen[i + 1]) for i in (0, 2, 4))
    assert router.gate.bias.load.sum() == 20


def test_padding_is_not_counted_in_the_load():
    router = make_router(4, top_k=2, gate_args={"bias_rate": 0.1, "bias_update": "call"})
    router(torch.randn(2, 5, DIM), torch.arange(5).expand(2, 5) < 3)
    assert router.gate.bias.load.sum() == 12


# Noise


@pytest.mark.parametrize("kind", ["jitter", "multiplicative", "gumbel"])
def test_noise_changes_choices_in_training_alone_and_not_the_global_generator(kind):
    gate = make_gate(8, top_k=2, noise=kind, noise_scale=0.9, seed=1)
    tokens = torch.randn(60, DIM)
    before = torch.get_rng_state()
    first, second = gate(tokens), gate(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.experts, second.experts)
    quiet = make_gate(8, top_k=2)(tokens)
    assert torch.equal(gate.eval()(tokens).experts, quiet.experts)
    assert (kind == "jitter") != torch.equal(first.logits, quiet.logits)
    torch.testing.assert_close(first.weights, first.probabilities.gather(1, first.experts))


def test_each_noise_is_applied_as_defined():
    tokens = torch.randn(9, DIM)
    for kind in ("jitter", "multiplicative", "gumbel"):
        gate = make_gate(8, noise=kind, noise_scale=0.5, seed=2)
        routing = gate(tokens)
        logits = tokens @ gate.weight.T
        if kind == "jitter":
            wanted = (tokens * (0.5 + gate.draws.uniform((9, DIM)))) @ gate.weight.T
            torch.testing.assert_close(routing.logits, wanted)
        elif kind == "multiplicative":
            wanted = logits * (0.5 + gate.draws.uniform((9, 8)))
        else:
            wanted = logits + 0.5 * gate.draws.gumbel((9, 8))
        assert torch.equal(routing.experts[:, 0], wanted.argmax(-1))


# Expert choice


def test_every_expert_takes_the_tokens_that_like_it_best():
    router = make_router(4, top_k=2, gate="expert_choice")
    x = torch.randn(2, 9, DIM)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [5]])
    with record_routing(router) as trace:
        out = router(x, mask)
    tokens = x[mask]
    scores = (tokens @ router.gate.weight.T).softmax(-1)
    wanted = torch.zeros_like(tokens)
    for e, expert in enumerate(router.experts.values()):
        for token in sorted(range(14), key=lambda t: (-scores[t, e].item(), t))[:7]:
            wanted[token] += scores[token, e] * expert(tokens[token])
    torch.testing.assert_close(out[mask], wanted)
    assert list(trace.rows()[0]["counts"].values()) == [7, 7, 7, 7]


def test_expert_choice_is_refused_in_evaluation_unless_tokens_choose_there():
    router = make_router(4, gate="expert_choice").eval()
    with pytest.raises(InputError, match="depend on the tokens after it"):
        router(torch.randn(3, DIM))
    router = make_router(4, gate="expert_choice", gate_args={"eval_top_k": 2}).eval()
    x = torch.randn(5, DIM)
    with pytest.warns(UserWarning, match="not what was trained"):
        out = router(x)
    torch.testing.assert_close(out, make_router(4, top_k=2).eval()(x))


def test_expert_choice_takes_no_token_and_refuses_other_scores():
    assert make_router(4, gate="expert_choice")(torch.randn(0, DIM)).shape == (0, DIM)
    with pytest.raises(InputError, match="score='softmax'"):
        ExpertChoiceGate(DIM, 4, score="sigmoid")


def test_gradients_of_expert_choice_are_those_of_finite_differences():
    router = make_router(3, top_k=2, gate="expert_choice").double()
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: router(x), (x, *router.parameters()), atol=1e-6)


# Balance per sequence


def test_sequence_loss_is_the_mean_of_the_balance_losses_of_the_sequences():
    router = make_router(4, top_k=2, sequence_loss_coef=0.3, score="sigmoid")
    x = torch.randn(3, 7, DIM)
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [0]])
    with collect_aux_losses(router) as aux, routing_mask(mask):
        router(x)
    rows = [router.gate(x[row][mask[row]]) for row in range(2)]
    wanted = sum(balance_loss(row.probabilities, row.experts) for row in rows) / 2
    torch.testing.assert_close(aux.sequence(), wanted)
    torch.testing.assert_close(aux.total(), 0.3 * wanted)
    assert aux.by_layer()["router"]["sequence"] == pytest.approx(wanted.item())


def test_sequence_loss_sees_what_the_loss_over_the_batch_does_not():
    probabilities = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    experts, sequences = torch.tensor([[0], [0], [1], [1]]), torch.tensor([0, 0, 1, 1])
    assert balance_loss(probabilities, experts).item() == pytest.approx(1.0)
    assert sequence_balance_loss(probabilities, experts, sequences, 2).item() == pytest.approx(2.0)
    assert sequence_balance_loss(probabilities[:0], experts[:0], sequences[:0], 2) == 0


def test_default_router_warns_of_nothing_and_keeps_its_checkpoint_keys():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = make_router(2)
        router(torch.randn(3, DIM))
    assert {key for key in router.state_dict() if not key.startswith("experts.")} == {"gate.weight"}
