"""MoERouter and its gate against a slow, obvious version; masks, forcing, freezing, auxiliary losses."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medplib import ops
from medplib.errors import InputError, UnknownNameError
from medplib.experts import (
    GELUMLP,
    MoERouter,
    Routing,
    SwiGLU,
    TopKGate,
    balance_loss,
    collect_aux_losses,
    force_expert,
    record_routing,
    routing_mask,
    z_loss,
)

DIM = 8


def make_router(num_experts=3, seed=0, **kwargs) -> MoERouter:
    torch.manual_seed(seed)
    experts = {name: SwiGLU(DIM, 12) for name in ("vessel", "bone", "fat", "air")[:num_experts]}
    return MoERouter(DIM, experts, **kwargs)


def slow_mixture(router: MoERouter, x: torch.Tensor) -> torch.Tensor:
    """Token by token, as the definition reads."""
    out = torch.zeros_like(x)
    experts = list(router.experts.values())
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).reshape(-1, x.ndim - 1):
        token = x[tuple(place)]
        logits = [float(row.float() @ token.float()) for row in router.gate.weight.detach()]
        if router.gate.score == "softmax":
            scores = torch.tensor(logits).softmax(0)
        else:
            scores = torch.tensor(logits).sigmoid()
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: router.gate.top_k]
        total = sum(scores[e] for e in chosen) if router.gate.renormalize else 1.0
        out[tuple(place)] = sum(scores[e] / total * experts[e](token) for e in chosen)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"top_k": 3, "renormalize": True},
        {"score": "sigmoid"},
        {"top_k": 2, "score": "sigmoid", "renormalize": True},
    ],
)
def test_output_is_the_weighted_sum_of_the_chosen_experts(options):
    router = make_router(**options)
    x = torch.randn(2, 5, DIM)
    torch.testing.assert_close(router(x), slow_mixture(router, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(DIM,), (0, DIM), (1, DIM), (2, 3, 4, DIM)])
def test_any_token_shape_goes_in_and_comes_out(shape):
    assert make_router()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_are_given_exactly_the_chosen_rows_and_never_none(top_k):
    router = make_router(num_experts=4, top_k=top_k).eval()
    with torch.no_grad():
        router.gate.weight[3] = 0.0
        router.gate.weight[3, 0] = -1e4  # nobody with a positive first number chooses "air"
    seen = {}
    for name, expert in router.experts.items():
        expert.register_forward_hook(
            lambda _, args, __, name=name: seen.setdefault(name, []).append(len(args[0]))
        )
    router(torch.rand(3, 7, DIM) + 0.1)
    assert "air" not in seen
    assert all(len(calls) == 1 for calls in seen.values())
    assert sum(sum(calls) for calls in seen.values()) == 21 * top_k


def test_equal_logits_go_to_the_lowest_index():
    gate = TopKGate(DIM, 4, top_k=2)
    nn.init.zeros_(gate.weight)
    assert gate(torch.randn(5, DIM)).experts.tolist() == [[0, 1]] * 5
    assert ops.choose_top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist() == [[1, 2, 3]]


def test_gate_scores_in_float32_even_under_autocast_and_in_bfloat16():
    gate = TopKGate(DIM, 3)
    tokens = torch.randn(6, DIM)
    exact = gate(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(tokens).logits, exact)
    half = copy.deepcopy(gate).bfloat16()
    expected = tokens.bfloat16().float() @ half.weight.float().T
    assert torch.equal(half(tokens.bfloat16()).logits, expected)


def test_output_has_the_type_that_the_dense_block_would_give():
    x = torch.randn(4, DIM)
    assert make_router().bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    router = make_router(num_experts=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router(x).dtype == router.experts["bone"](x).dtype


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "renormalize": True}, {"score": "sigmoid", "top_k": 2}])
def test_gradients_are_those_of_finite_differences(options):
    router = make_router(**options).double()
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    weights = tuple(router.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: router(x), (x, *weights), atol=1e-6)


def test_top_1_with_renormalisation_is_refused_because_the_gate_would_not_learn():
    with pytest.raises(InputError, match="zero gradient"):
        make_router(renormalize=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 2, "top_k": 3}, "top_k must be between 1 and 2 .the number of experts., got 3"),
        ({"experts": 2, "top_k": 0}, "got 0"),
        ({"experts": 0}, "at least one expert"),
        ({"experts": ["a", "a"]}, "name of its own"),
        ({"experts": ["a.b"]}, "cannot be an expert's name"),
        ({"experts": ["gate"]}, "cannot be an expert's name"),
        ({"experts": ["keys"]}, "cannot be an expert's name"),
        ({"experts": {"a": 3}}, "must be an nn.Module"),
        (
            {"experts": "swiglu"},
            "experts must be modules by name, a list of names, or a number; got 'swiglu'",
        ),
        ({"experts": nn.ModuleList([nn.Identity()])}, "or a number; got a ModuleList"),
        ({"experts": [nn.Identity()]}, r"need names, such as \{'a': Identity\(.*\}; got a list"),
        ({"experts": 2, "score": "softmin"}, "softmax, sigmoid; got 'softmin'"),
        ({"experts": 2, "capacity_factor": 0}, "capacity_factor must be a finite number above 0"),
        ({"experts": 2, "capacity_factor": "1"}, "capacity_factor must be a finite number above 0"),
        ({"experts": 2, "capacity_factor": float("inf")}, "above 0, or None to serve all; got inf"),
        ({"experts": 2, "gate_args": {"scale": 0.0}}, "scale must be a finite number above 0, got 0.0"),
        ({"experts": 2, "gate_args": {"scale": float("nan")}}, "scale must be a finite number above 0"),
        ({"experts": 2, "balance_loss_coef": -1}, "balance_loss_coef must be a finite number of at least 0"),
        ({"experts": 2, "z_loss_coef": "x"}, "z_loss_coef must be a finite number of at least 0, got 'x'"),
    ],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        MoERouter(DIM, **arguments)


def test_unknown_expert_and_gate_names_give_a_hint():
    with pytest.raises(UnknownNameError, match="Did you mean 'swiglu'"):
        MoERouter(DIM, 2, expert="swigluu")
    with pytest.raises(UnknownNameError, match="Did you mean 'topk'"):
        MoERouter(DIM, 2, gate="topkk")


def test_experts_may_be_names_a_number_or_any_modules():
    assert MoERouter(DIM, ("a", "b"), expert="gelu", hidden_dim=5).experts["b"].up_proj.out_features == 5
    assert MoERouter(DIM, 2).names == ("expert_0", "expert_1")
    mixed = MoERouter(DIM, {"small": GELUMLP(DIM, 2), "none": nn.Identity()})
    assert mixed(torch.randn(9, DIM)).shape == (9, DIM)


def test_one_module_cannot_be_two_experts():
    shared = SwiGLU(DIM, 4)
    with pytest.raises(InputError, match="same module"):
        MoERouter(DIM, {"a": shared, "b": shared})


def test_checkpoint_keys_carry_the_names():
    keys = set(make_router(num_experts=2).state_dict())
    projections = {f"experts.{n}.{p}_proj.weight" for n in ("vessel", "bone") for p in ("gate", "up", "down")}
    assert keys == {"gate.weight", *projections}


def test_own_gate_takes_the_place_of_the_built_in_one():
    class First(nn.Module):
        def forward(self, tokens):
            ones = torch.ones(len(tokens), 1)
            return Routing(ones.expand(-1, 3), ones.expand(-1, 3) / 3, torch.zeros_like(ones).long(), ones)

    router = make_router(gate=First())
    x = torch.randn(4, DIM)
    torch.testing.assert_close(router(x), router.experts["vessel"](x))


def test_gate_that_returns_something_else_is_named():
    router = make_router(gate=nn.Identity())
    with pytest.raises(InputError, match="The gate Identity must return a Routing"):
        router(torch.randn(4, DIM))


def test_expert_of_another_width_is_named():
    router = MoERouter(DIM, {"wide": nn.Linear(DIM, 9)})
    with pytest.raises(InputError, match="expert 'wide' must return"):
        router(torch.randn(4, DIM))


def test_input_of_another_width_is_refused():
    with pytest.raises(InputError, match="width 8 got a tensor of shape"):
        make_router()(torch.randn(4, 7))


# Padding


@pytest.mark.parametrize("by_context", [True, False])
def test_masked_tokens_give_zero_and_the_others_do_not_notice(by_context):
    router = make_router()
    x = torch.randn(2, 4, DIM)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    spoiled = x.clone()
    spoiled[mask == 0] = float("nan")
    with routing_mask(mask if by_context else None):
        out = router(spoiled) if by_context else router(spoiled, mask)
    assert (out[mask == 0] == 0).all()
    torch.testing.assert_close(out[mask == 1], router(x)[mask == 1])


def test_fully_masked_input_gives_zeros():
    x = torch.randn(2, 3, DIM)
    assert (make_router()(x, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


def test_mask_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"mask has shape \(3, 2\), but the tokens have shape \(2, 3\)"):
        make_router()(torch.randn(2, 3, DIM), torch.ones(3, 2))


def test_mask_of_one_thread_is_not_seen_by_another():
    router = make_router()
    x = torch.randn(3, DIM)
    seen = []
    with routing_mask(torch.zeros(3)):
        thread = threading.Thread(target=lambda: seen.append(router(x)))
        thread.start()
        thread.join()
        assert (router(x) == 0).all()
    torch.testing.assert_close(seen[0], router(x))


# Forcing


def test_forced_expert_gets_every_token_with_its_own_probability():
    router = make_router(top_k=2)
    x = torch.randn(6, DIM)
    probability = (x @ router.gate.weight.T).softmax(-1)[:, 1:2]
    with router.force("bone"), record_routing(router) as trace:
        out = router(x)
    torch.testing.assert_close(out, probability * router.experts["bone"](x))
    assert trace.by_expert()["router"] == {"vessel": 0.0, "bone": 1.0, "fat": 0.0}
    torch.testing.assert_close(router(x), slow_mixture(router, x))


def test_forcing_covers_a_whole_model_and_ends_with_the_block():
    model = nn.Sequential(make_router(seed=1), make_router(seed=2))
    x = torch.randn(6, DIM)
    before = model(x)
    with force_expert(model, "vessel"), model[0].force("bone"), record_routing(model) as trace:
        model(x)
    assert [layer["bone"] for layer in trace.by_expert().values()] == [1.0, 0.0]
    assert torch.equal(model(x), before)
    with pytest.raises(UnknownNameError, match="it has vessel, bone, fat"), force_expert(model, "bones"):
        pass
    with pytest.raises(InputError, match="no MoERouter"), force_expert(nn.Linear(2, 2), "bone"):
        pass


# Freezing


def test_frozen_expert_does_not_move_and_the_others_do():
    router = make_router()
    router.freeze("bone")
    before = copy.deepcopy(router.state_dict())
    optimiser = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimiser.zero_grad()
        router(torch.randn(20, DIM, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimiser.step()
    after = router.state_dict()
    moved = {key.rpartition(".weight")[0] for key in after if not torch.equal(after[key], before[key])}
    assert not any("bone" in key for key in moved)
    assert {"gate", "experts.vessel.up_proj", "experts.fat.down_proj"} <= moved
    assert all(p.grad is None for p in router.experts["bone"].parameters())


def test_running_statistics_of_a_frozen_expert_and_the_bias_of_a_frozen_gate_stay():
    def expert():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    torch.manual_seed(0)
    router = MoERouter(8, {"a": expert(), "b": expert()}, gate_args={"bias_rate": 0.1})
    router.freeze("a", "gate")
    before = {name: value.clone() for name, value in router.state_dict().items()}
    for _ in range(3):
        nn.Sequential(router).train()(torch.randn(40, 8))
    moved = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"experts.b.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    router.unfreeze("a", "gate")
    assert router.experts["a"].training
    router(torch.randn(40, 8))
    assert not torch.equal(router.experts["a"][1].running_mean, before["experts.a.1.running_mean"])
    assert router.gate.bias.load.sum() == 40


def test_gradient_still_flows_through_a_frozen_expert():
    router = make_router()
    router.freeze("vessel", "bone", "fat", "gate")
    x = torch.randn(5, DIM, requires_grad=True)
    router(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_train_only_freezes_all_the_rest():
    router = make_router()
    router.train_only("bone")
    assert router.frozen == ("vessel", "fat", "gate")
    router.train_only("bone", "gate")
    assert router.frozen == ("vessel", "fat")
    router.unfreeze("fat")
    assert router.frozen == ("vessel",)


@pytest.mark.parametrize("method", ["train_only", "freeze", "unfreeze"])
def test_unknown_name_changes_nothing(method):
    router = make_router()
    router.freeze("fat")
    with pytest.raises(UnknownNameError, match="'bones'"):
        getattr(router, method)("vessel", "bones")
    assert router.frozen == ("fat",)
    with pytest.raises(InputError, match="Name at least one"):
        getattr(router, method)()


# Capacity


def test_capacity_drops_the_later_tokens_in_training_only():
    router = make_router(num_experts=2, capacity_factor=0.5)
    nn.init.zeros_(
        router.gate.weight
    )  # everyone goes to the first expert, which takes ceil(10 / 2 * 0.5) = 3
    x = torch.randn(10, DIM)
    full = 0.5 * router.experts["vessel"](x)
    out = router.train()(x)
    torch.testing.assert_close(out[:3], full[:3])
    assert (out[3:] == 0).all()
    torch.testing.assert_close(router.eval()(x), full)


def test_first_choices_are_served_before_second_ones():
    experts = torch.tensor([[0, 1], [1, 0], [1, 0]])
    assert ops.drop_overflow(experts, 2, 1).tolist() == [[0, 2], [1, 2], [2, 2]]
    assert ops.drop_overflow(experts, 2, 2).tolist() == [[0, 2], [1, 0], [1, 2]]


def test_capacity_is_counted_in_float32():
    assert ops.capacity_of(25, 2, 1.2) == 16  # 12.5 * 1.2 is 15 in double precision


# Auxiliary losses


def test_balance_loss_is_one_when_balanced_and_e_when_not():
    even = torch.full((4, 2), 0.5)
    assert balance_loss(even, torch.tensor([[0], [1], [0], [1]])).item() == pytest.approx(1.0)
    lopsided = torch.tensor([[1.0, 0.0]] * 4)
    assert balance_loss(lopsided, torch.zeros(4, 1, dtype=torch.long)).item() == pytest.approx(2.0)


def test_losses_are_those_of_their_definitions():
    logits = torch.randn(7, 3)
    gate = logits.softmax(-1)
    chosen = logits.topk(2).indices
    share = torch.tensor([(chosen == e).sum() / chosen.numel() for e in range(3)])
    torch.testing.assert_close(balance_loss(gate, chosen), 3 * (gate.mean(0) * share).sum())
    torch.testing.assert_close(z_loss(logits), logits.exp().sum(-1).log().pow(2).mean())


def test_collected_losses_weigh_each_router_and_leave_out_padding():
    model = nn.Sequential(make_router(seed=1, balance_loss_coef=0.1, z_loss_coef=0.01), make_router(seed=2))
    x, mask = torch.randn(2, 6, DIM), torch.ones(2, 6)
    mask[1, 3:] = 0
    with collect_aux_losses(model) as aux, routing_mask(mask):
        model(x)
    first = model[0].gate(x[mask == 1])
    expected = 0.1 * balance_loss(first.probabilities, first.experts) + 0.01 * z_loss(first.logits)
    torch.testing.assert_close(aux.total(), expected)
    assert set(aux.by_layer()) == {"0", "1"}
    torch.testing.assert_close(
        aux.balance(), torch.tensor(sum(row["balance"] for row in aux.by_layer().values()))
    )


def test_model_without_routers_has_no_auxiliary_loss():
    with collect_aux_losses(nn.Linear(2, 2)) as aux:
        pass
    assert aux.total().item() == 0


class Block(nn.Module):
    """A residual mixture whose forward may be checkpointed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.router = make_router(balance_loss_coef=1.0, z_loss_coef=0.5)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return x + checkpoint(self.router, x, use_reentrant=False)
        return x + self.router(x)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_and_counts_once(backward_inside):
    x = torch.randn(2, 6, DIM)
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    gradients, losses, tokens = [], [], []
    for checkpointed in (False, True):
        block = Block(checkpointed)
        with record_routing(block) as trace, collect_aux_losses(block) as aux:
            with routing_mask(mask), block.router.force("bone"):
                out = block(x)
            if backward_inside:
                (out.square().sum() + aux.total()).backward()
        if not backward_inside:
            (out.square().sum() + aux.total()).backward()
        gradients.append({name: p.grad for name, p in block.named_parameters() if p.grad is not None})
        losses.append(aux.total())
        tokens.append(trace.rows()[0]["tokens"])
    assert tokens == [10, 10]
    assert torch.equal(losses[0], losses[1])
    assert "router.gate.weight" in gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_reentrant_checkpointing_is_warned_about():
    router = make_router()
    x = torch.randn(4, DIM, requires_grad=True)
    with collect_aux_losses(router), pytest.warns(UserWarning, match="use_reentrant=False"):
        checkpoint(router, x, use_reentrant=True)


def test_llama_feed_forward_weights_load_as_they_are():
    llama = nn.ModuleDict({f"{n}_proj": nn.Linear(DIM, 12, bias=False) for n in ("gate", "up")})
    llama["down_proj"] = nn.Linear(12, DIM, bias=False)
    ours = SwiGLU(DIM, 12)
    ours.load_state_dict(llama.state_dict())
    x = torch.randn(3, DIM)
    expected = llama["down_proj"](nn.functional.silu(llama["gate_proj"](x)) * llama["up_proj"](x))
    assert torch.equal(ours(x), expected)


def test_whole_numbers_as_input_are_refused():
    with pytest.raises(InputError, match=r"floating-point tensor, got torch\.int64"):
        make_router()(torch.ones(2, DIM, dtype=torch.int64))
