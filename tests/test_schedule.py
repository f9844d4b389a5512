"""Training single experts: per layer, by step, from another expert's weights; and what freezing saves."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.experts import (
    GELUMLP,
    ExpertSchedule,
    MoERouter,
    Phase,
    SwiGLU,
    check_optimizer,
    force_expert,
    init_expert,
    train_experts,
)

DIM, HIDDEN = 6, 5


class Layers(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": MoERouter(DIM, ("grounding", "vqa"), hidden_dim=HIDDEN)})
            for _ in range(count)
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


def trained(model):
    return {
        f"{i}.{name}"
        for i, layer in enumerate(model.layers)
        for name in ("grounding", "vqa", "gate")
        if name not in layer["mlp"].frozen
    }


# Per layer


def test_names_train_in_every_layer_and_the_rest_of_the_routers_is_frozen():
    model = Layers()
    table = train_experts(model, ("vqa", "gate"))
    assert trained(model) == {f"{i}.{name}" for i in range(3) for name in ("vqa", "gate")}
    assert table == {f"layers.{i}.mlp": ("vqa", "gate") for i in range(3)}
    assert all(parameter.requires_grad for parameter in model.first.parameters())


def test_paths_choose_layers_and_the_first_match_counts():
    model = Layers()
    train_experts(model, {"layers.[01].mlp": ("grounding",), "**": ("gate",)})
    assert trained(model) == {"0.grounding", "1.grounding", "2.gate"}
    train_experts(model, {"layers.2.mlp": ["vqa"]})
    assert trained(model) == {"2.vqa"}
    train_experts(model.layers[0]["mlp"], {"": ("vqa",)})
    assert trained(model) == {"0.vqa", "2.vqa"}


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (("grounding", "vqq"), UnknownNameError, "'vqq'; it has grounding, vqa, gate"),
        ({"layers.0.mlp": ("vqq",)}, UnknownNameError, "'vqq'"),
        (
            {"layers.7.mlp": ("vqa",)},
            UnknownNameError,
            "No MoERouter lies at 'layers.7.mlp'. There are: layers.0",
        ),
        ((), InputError, "would freeze every expert"),
        ({"**": ()}, InputError, "would freeze every expert"),
    ],
)
def test_mistake_is_refused_before_anything_changes(train, error, message):
    model = Layers()
    train_experts(model, ("vqa",))
    before = trained(model)
    with pytest.raises(error, match=message):
        train_experts(model, train)
    assert trained(model) == before


def test_model_without_routers_is_refused():
    with pytest.raises(InputError, match="no MoERouter in this Linear"):
        train_experts(nn.Linear(2, 2), ("vqa",))


def test_frozen_expert_is_not_moved_by_momentum_weight_decay_or_an_old_gradient():
    model, x = Layers(1), torch.randn(20, DIM)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimiser.step()
    router = model.layers[0]["mlp"]
    before = copy.deepcopy(router.experts["vqa"].state_dict())
    train_experts(model, ("grounding",))  # the gradient of the last step is still there
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in router.experts["vqa"].state_dict().items())


# By step


def test_schedule_moves_through_its_phases_and_says_when():
    model = Layers(2)
    schedule = ExpertSchedule(
        [
            Phase("vqa", 2, ("vqa",)),
            Phase("grounding", 1, ("grounding",), init_from={"grounding": "vqa"}),
            Phase("mixture", 2, {"layers.0.mlp": ("gate",), "**": ("gate", "vqa")}),
        ]
    )
    assert schedule.total_steps == 5
    seen = []
    for step in range(5):
        changed = schedule.apply(model, step)
        seen.append((schedule.at(step).name, changed is not None, sorted(trained(model))))
    assert seen == [
        ("vqa", True, ["0.vqa", "1.vqa"]),
        ("vqa", False, ["0.vqa", "1.vqa"]),
        ("grounding", True, ["0.grounding", "1.grounding"]),
        ("mixture", True, ["0.gate", "1.gate", "1.vqa"]),
        ("mixture", False, ["0.gate", "1.gate", "1.vqa"]),
    ]
    with pytest.raises(InputError, match="step must be a whole number between 0 and 4, got 5"):
        schedule.apply(model, 5)
    with pytest.raises(InputError, match=r"whole number between 0 and 4, got 1\.5"):
        schedule.apply(model, 1.5)


def test_expert_starts_from_another_one_when_its_phase_begins_and_not_on_resuming():
    phases = [Phase("a", 2, ("vqa",)), Phase("b", 3, ("grounding",), init_from={"grounding": "vqa"})]
    for step, copied in ((2, True), (3, False)):
        model = Layers(1)
        experts = model.layers[0]["mlp"].experts
        before = experts["grounding"].up_proj.weight.detach().clone()
        assert ExpertSchedule(phases).apply(model, step) is not None
        wanted = experts["vqa"].up_proj.weight if copied else before
        assert torch.equal(experts["grounding"].up_proj.weight, wanted)


def test_experts_can_start_from_each_other():
    model = Layers(1)
    experts = model.layers[0]["mlp"].experts
    before = {name: experts[name].up_proj.weight.detach().clone() for name in ("vqa", "grounding")}
    swap = Phase("swap", 1, ("vqa",), init_from={"grounding": "vqa", "vqa": "grounding"})
    ExpertSchedule([swap]).apply(model, 0)
    assert torch.equal(experts["vqa"].up_proj.weight, before["grounding"])
    assert torch.equal(experts["grounding"].up_proj.weight, before["vqa"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, ("a",)), "needs a name"),
        (("x", 0, ("a",)), "steps must be at least 1, got 0"),
        (("x", 1, "vqa"), "tuple of names"),
        (("x", 1, {"**": "vqa"}), "tuple of names"),
        (("x", 1, ("a",), {"a": "a"}), "'a' cannot start from itself"),
    ],
)
def test_wrong_phase_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Phase(*arguments)


def test_phase_that_does_not_fit_the_model_changes_nothing():
    model = Layers(1)
    before = copy.deepcopy(model.state_dict())
    wide = Phase("wide", 1, ("vqa",), init_from={"grounding": "vqa", "vqa": SwiGLU(DIM, 9)})
    for phase, error in (
        (wide, CheckpointError),
        (Phase("who", 1, ("vqa",), init_from={"who": "vqa"}), UnknownNameError),
        (Phase("who", 1, ("who",), init_from={"grounding": "vqa"}), UnknownNameError),
    ):
        with pytest.raises(error):
            ExpertSchedule([phase]).apply(model, 0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(trained(model)) == 3


def test_optimiser_that_does_not_know_what_trains_is_refused():
    model = Layers(1)
    train_experts(model, ("vqa",))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    check_optimizer(model, optimiser)
    train_experts(model, ("grounding",))
    with pytest.raises(InputError, match=r"layers.0.mlp.experts.grounding.gate_proj.weight should train"):
        check_optimizer(model, optimiser)


# Where an expert starts from


def test_expert_starts_from_another_one_or_from_a_dense_block():
    router, dense = MoERouter(DIM, 3, hidden_dim=HIDDEN), SwiGLU(DIM, HIDDEN)
    router.pack()
    kept = list(router.parameters())
    router.init_expert("expert_0", "expert_1")
    init_expert(router, "expert_2", dense)
    x = torch.randn(4, DIM)
    assert torch.equal(router.experts["expert_0"](x), router.experts["expert_1"](x))
    assert torch.equal(router.experts["expert_2"](x), dense(x))
    assert all(a is b for a, b in zip(kept, router.parameters(), strict=True))
    assert router.packed_weights() is not None
    nn.init.zeros_(dense.up_proj.weight)
    assert router.experts["expert_2"].up_proj.weight.abs().sum() > 0


def test_start_that_does_not_fit_is_named():
    router = MoERouter(DIM, 2, hidden_dim=HIDDEN)
    with pytest.raises(
        CheckpointError, match=r"from SwiGLU: gate_proj.weight is \(5, 6\) in it and \(7, 6\) there"
    ):
        router.init_expert("expert_0", SwiGLU(DIM, 7))
    with pytest.raises(CheckpointError, match=r"from GELUMLP: .* absent"):
        router.init_expert("expert_0", GELUMLP(DIM, HIDDEN))
    with pytest.raises(UnknownNameError, match="'expert_9'"):
        router.init_expert("expert_0", "expert_9")
    for itself in ("expert_0", router.experts["expert_0"]):
        with pytest.raises(InputError, match="cannot start from itself"):
            router.init_expert("expert_0", itself)


# What freezing saves


def count_flops(router, x):
    with FlopCounterMode(display=False) as counter:
        router(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("pack", [False, True])
def test_weight_gradients_of_a_frozen_expert_are_not_computed(pack):
    router = MoERouter(DIM, ("grounding", "vqa"), hidden_dim=HIDDEN)
    if pack:
        router.pack()
    x = torch.randn(10, DIM, requires_grad=True)
    per_expert = 10 * 3 * 2 * DIM * HIDDEN  # one pass of 10 rows through three matrices
    with force_expert(router, "vqa"):
        whole = count_flops(router, x)
        router.freeze("vqa")
        frozen = count_flops(router, x)
        assert whole - frozen == per_expert
        router.freeze("gate")
        assert whole - count_flops(router, x) == per_expert + 2 * 10 * DIM * 2
        assert count_flops(router, x) == 2 * per_expert + 2 * 2 * 10 * DIM * 2
    router.unfreeze("vqa", "gate")
    with force_expert(router, "grounding"):
        router.freeze("vqa")
        assert count_flops(router, x) == whole
