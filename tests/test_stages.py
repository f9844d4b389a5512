"""Stages as data, set_stage all-or-nothing on any network that holds routers, LoRA, and the schedule."""

import copy
import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from medplib.errors import InputError, UnknownNameError
from medplib.experts import MoERouter
from medplib.lora import LoRA, lora_layers, merge_lora
from medplib.parts import MEDPLIB_PARTS, module_parts
from medplib.stages import STAGES, Stage, StageSchedule, keep_frozen_in_eval, set_stage

DIM = 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.mlp = MoERouter(DIM, ("grounding", "vqa"), hidden_dim=4)

    def forward(self, x):
        return x + self.mlp(x + self.q_proj(x))


class Net(nn.Module):
    """Somebody's own network: an encoder with dropout, two layers with mixtures, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5), nn.BatchNorm1d(DIM))
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(DIM, 2)

    def forward(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def state_of(model):
    """Everything that set_stage may change."""
    return {
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "grads": {name: parameter.grad is None for name, parameter in model.named_parameters()},
    }


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_of_any_network_are_its_children_and_the_routers_inside(net):
    parts = module_parts(net)
    assert list(parts) == ["encoder", "layers", "head", "gates", "experts.grounding", "experts.vqa"]
    assert parts["gates"] == [layer.mlp.gate for layer in net.layers]
    assert parts["experts.vqa"] == [layer.mlp.experts["vqa"] for layer in net.layers]


def test_network_may_name_its_own_parts(net):
    Net.parts = property(lambda self: {"first": self.encoder[0], "heads": [self.head]})
    try:
        assert list(module_parts(net)) == ["first", "heads", "gates", "experts.grounding", "experts.vqa"]
        assert module_parts(net)["first"] == [net.encoder[0]]
        table = set_stage(net, Stage("heads", train=("heads",)))
        assert (
            table["(in no part)"].parameters == sum(layer.q_proj.weight.numel() for layer in net.layers) + 12
        )
    finally:
        del Net.parts


def test_stage_opens_its_parts_and_closes_the_rest(net):
    set_stage(net, Stage("mine", train=("experts.grounding", "gates")))
    expected = {
        name for name, _ in net.named_parameters() if ".experts.grounding." in name or ".gate.weight" in name
    }
    assert trains(net) == expected


def test_part_opens_what_lies_inside_it_except_what_is_frozen(net):
    set_stage(net, Stage("mine", train=("layers",), freeze=("experts.vqa",)))
    expected = {n for n, _ in net.named_parameters() if n.startswith("layers.") and ".experts.vqa." not in n}
    assert trains(net) == expected


def test_closed_parts_stay_the_same_and_in_eval_mode(net):
    before = copy.deepcopy(net.state_dict())
    net.train()
    set_stage(net, Stage("mine", train=("experts.grounding", "head")))
    assert not any(module.training for module in net.encoder.modules())
    assert not net.layers[0].mlp.experts["vqa"].training
    assert net.layers[0].mlp.experts["grounding"].training
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        net.train()
        keep_frozen_in_eval(net)
        optimiser.zero_grad()
        net(torch.randn(30, DIM)).square().sum().backward()
        optimiser.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trains(net)  # the batch statistics of the encoder are buffers and stayed as well


def test_closed_parameters_lose_their_gradient(net):
    net(torch.randn(5, DIM)).sum().backward()
    set_stage(net, Stage("mine", train=("head",)))
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in net.parameters())


def test_table_counts_every_number_once(net):
    table = set_stage(net, Stage("mine", train=("experts.grounding",)))
    assert table.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert table.trainable == 2 * 3 * DIM * 4
    assert table["experts.grounding"].share == 1.0
    assert (
        table["layers"].parameters == 2 * DIM * DIM
    )  # q_proj alone: experts and gates have rows of their own
    text = str(table).splitlines()
    assert text[0].split() == ["stage", "mine", "parameters", "trainable", "share"]
    assert text[-1].split() == ["total", f"{table.parameters}", "144", f"{144 / table.parameters:.1%}"]
    assert len({len(line) for line in text}) == 1


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (
            Stage("s", train=("head", "gate")),
            UnknownNameError,
            "'gate', which this model lacks. Did you mean 'gates'",
        ),
        (Stage("s", train=("head",), freeze=("ears",)), UnknownNameError, "'ears'"),
        (Stage("s", train=("mask_decoder?",)), InputError, "would train nothing in this Net"),
        (Stage("s", train=("head",), lora={"tail": LoRA(2, 4, ("q_proj",))}), UnknownNameError, "'tail'"),
        (Stage("s", lora={"layers": LoRA(2, 4, ("q_proj", "k_proj"))}), InputError, "targets k_proj"),
        (
            Stage("s", train=("layers",), lora={"layers": LoRA(2, 4, ("q_proj",))}),
            InputError,
            "in full and with LoRA",
        ),
        ("vqaa", UnknownNameError, "No stage named 'vqaa'. Did you mean 'vqa'"),
        ("grounding", UnknownNameError, "'mask_decoder', which this model lacks"),
    ],
)
def test_failed_set_stage_leaves_the_model_as_it_was(net, stage, error, message):
    set_stage(net, Stage("before", train=("encoder",)))
    net(torch.randn(5, DIM)).sum().backward()
    before = state_of(net)
    with pytest.raises(error) as raised:
        set_stage(net, stage)
    assert message in str(raised.value)
    assert state_of(net) == before


def test_optional_part_may_be_missing(net):
    set_stage(net, Stage("mine", train=("head", "mask_decoder?")))
    assert trains(net) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"train": "head"}, "train must be a tuple of names, got 'head'"),
        ({"train": ()}, "trains nothing"),
        ({"train": ("head", 3)}, "train must be"),
        ({"lora": {"layers": {"rank": 8}}}, "lora must be"),
        ({"loss_weights": {"ce": -1.0}}, "loss_weights must be"),
        ({"loss_weights": {"ce": "1"}}, "loss_weights must be"),
        ({"loss_weights": {"ce": math.inf}}, "loss_weights must be"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"epochs": math.inf}, "epochs must be a finite number above 0, got inf"),
        ({"clip": math.nan}, "clip must be"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number of at least 0"),
        ({"learning_rate": "1e-4"}, "learning_rate must be"),
        ({"epochs": True}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"steps": 0}, "steps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"warmup": -0.1}, "warmup must be"),
        ({"precision": "int8"}, "precision must be"),
        ({"decay": "cosin"}, "decay must be linear, cosine or constant"),
    ],
)
def test_wrong_setting_fails_where_it_is_made(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Stage("mine", train=("head",)), **changes)


def test_misspelt_setting_fails_and_a_stage_cannot_be_changed():
    with pytest.raises(TypeError, match="learnig_rate"):
        Stage("mine", train=("head",), learnig_rate=1e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        STAGES["vqa"].epochs = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.nan}, "alpha must be a finite number above 0, got nan"),
        ({"targets": "q_proj"}, "targets"),
        ({"targets": ()}, "at least one"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_lora_setting_is_named(values, message):
    with pytest.raises(InputError, match=message):
        LoRA(**{"rank": 2, "alpha": 4, "targets": ("q_proj",), **values})


def test_built_in_stages_carry_the_published_recipe():
    assert list(STAGES) == ["align", "vqa", "grounding", "mixture"]
    vqa, grounding, mixture = STAGES["vqa"], STAGES["grounding"], STAGES["mixture"]
    assert STAGES["align"].train == ("projector",)
    assert "region_adapter" in vqa.train
    assert (vqa.learning_rate, vqa.epochs, vqa.batch_size, vqa.max_length) == (1e-4, 3, 128, 2048)
    assert grounding.loss_weights == {"ce": 1, "dice": 5, "bce": 1, "focal": 1, "iou": 0}
    assert (grounding.learning_rate, grounding.epochs) == (3e-4, 10)
    assert mixture.loss_weights == {"ce": 1, "dice": 0.5, "bce": 2, "focal": 0, "iou": 0, "balance": 0}
    assert (mixture.learning_rate, mixture.epochs, mixture.max_length) == (3e-4, 3, 1024)
    ranks = {name: stage.lora and stage.lora["language_model"].rank for name, stage in STAGES.items()}
    assert ranks == {"align": None, "vqa": 16, "grounding": 8, "mixture": 8}
    assert set(mixture.lora["language_model"].targets) == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "q_proj",
        "v_proj",
    }
    named = {name for stage in STAGES.values() for name in (*stage.train, *(stage.lora or ()))}
    assert named <= set(MEDPLIB_PARTS)
    for stage in STAGES.values():
        assert (stage.betas, stage.weight_decay, stage.warmup, stage.clip, stage.seed) == (
            (0.9, 0.95),
            0,
            0.01,
            1,
            42,
        )


# LoRA


ADAPTED = Stage("adapted", train=("head",), lora={"layers": LoRA(2, 4, ("q_proj", "up_proj"), dropout=0.0)})


def test_lora_trains_the_adapters_alone_and_changes_no_output_at_first(net):
    net.eval()
    x = torch.randn(5, DIM)
    before = net(x)
    table = set_stage(net, ADAPTED)
    assert torch.equal(net(x), before)
    assert set(lora_layers(net)) == {
        *(f"layers.{i}.q_proj" for i in range(2)),
        *(f"layers.{i}.mlp.experts.{name}.up_proj" for i in range(2) for name in ("grounding", "vqa")),
    }
    assert all(".lora_" in name or name.startswith("head.") for name in trains(net))
    assert table["experts.vqa"].trainable == 2 * 2 * (DIM + 4)
    assert not hasattr(net, "peft_config")


def test_lora_leaves_a_frozen_expert_out(net):
    set_stage(net, dataclasses.replace(ADAPTED, freeze=("experts.vqa",)))
    assert not any("vqa" in name for name in lora_layers(net))


def test_parts_may_have_adapters_of_different_rank(net):
    lora = {
        "experts.vqa": LoRA(2, 4, ("up_proj",)),
        "experts.grounding": LoRA(3, 6, ("up_proj", "down_proj")),
    }
    set_stage(net, Stage("two", lora=lora))
    ranks = {name: layer.r["default"] for name, layer in lora_layers(net).items()}
    assert ranks["layers.0.mlp.experts.vqa.up_proj"] == 2
    assert ranks["layers.1.mlp.experts.grounding.down_proj"] == 3
    assert len(ranks) == 6


def test_merged_adapters_give_the_same_output_and_the_old_names(net):
    names = list(net.state_dict())
    set_stage(net, ADAPTED)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.randn(20, DIM)).square().sum().backward()
    optimiser.step()
    net.eval()
    x = torch.randn(5, DIM)
    before = net(x)
    assert len(merge_lora(net)) == 6
    torch.testing.assert_close(net(x), before)
    assert list(net.state_dict()) == names
    assert not lora_layers(net)
    assert merge_lora(net) == []


def test_broken_adapter_is_not_merged(net):
    set_stage(net, ADAPTED)
    layer = lora_layers(net)["layers.1.q_proj"]
    nn.init.constant_(layer.lora_B["default"].weight, float("nan"))
    with pytest.raises(InputError, match=r"layers\.1\.q_proj holds NaN"):
        merge_lora(net)
    assert len(lora_layers(net)) == 6


def test_next_stage_asks_for_the_merge_and_the_same_stage_keeps_the_adapters(net):
    set_stage(net, ADAPTED)
    layers = lora_layers(net)
    set_stage(net, ADAPTED)
    assert lora_layers(net) == layers
    before = state_of(net)
    with pytest.raises(InputError, match="call merge_lora"):
        set_stage(net, Stage("next", train=("head",)))
    assert state_of(net) == before
    set_stage(net, Stage("next", train=("head",)), merge=True)
    assert not lora_layers(net)


def test_lora_without_peft_says_what_to_install_and_changes_nothing(net, monkeypatch):
    before = state_of(net)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"medplib\[train\]"):
        set_stage(net, ADAPTED)
    assert state_of(net) == before


# Schedule


def test_schedule_changes_the_stage_at_its_step_and_merges_on_the_way(net):
    last = Stage("last", train=("gates",))
    schedule = StageSchedule([ADAPTED, last], steps=[3, 2])
    assert schedule.total_steps == 5
    assert [schedule.at(step).name for step in range(5)] == ["adapted"] * 3 + ["last"] * 2
    changed = []
    for step in range(5):
        if table := schedule.apply(net, step):
            changed.append((step, table.title))
            assert bool(lora_layers(net)) == (step < 3)
    assert changed == [(0, "stage adapted"), (3, "stage last")]
    assert trains(net) == {f"layers.{i}.mlp.gate.weight" for i in range(2)}


def test_schedule_resumes_in_the_middle_of_a_stage(net):
    stages = [Stage("a", train=("head",), steps=2), Stage("b", train=("encoder",), steps=2)]
    assert StageSchedule(stages).apply(net, 3).title == "stage b"


def test_schedule_needs_lengths_and_a_step_inside_it():
    with pytest.raises(InputError, match="Stage 'vqa' needs a length"):
        StageSchedule(["vqa"])
    with pytest.raises(InputError, match="2 stages need as many lengths"):
        StageSchedule(["vqa", "grounding"], steps=[3])
    with pytest.raises(InputError, match="step must be between 0 and 2, got 3"):
        StageSchedule(["vqa"], steps=[3]).at(3)


def test_a_step_or_a_model_of_another_kind_is_named(net):
    schedule = StageSchedule([Stage("one", train=("0",))], steps=[3])
    for step in (None, "a", 1.5, True):
        with pytest.raises(InputError, match=f"step must be between 0 and 2, got {step!r}"):
            schedule.at(step)
    for stages, steps in ((None, None), ("align", None), (["align"], 5)):
        with pytest.raises(InputError, match="must be a list"):
            StageSchedule(stages, steps)
    with pytest.raises(InputError, match=r"The model must be an nn\.Module, got None"):
        set_stage(None, "align")
    with pytest.raises(UnknownNameError, match=r"No stage named \[\]"):
        set_stage(net, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": None}, "betas must be two numbers"),
        ({"lora": {5: LoRA(rank=1, alpha=1, targets=("q",))}}, "lora must be a dict from part names"),
    ],
)
def test_settings_of_another_kind_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Stage("one", train=("0",), **changes)
    with pytest.raises(InputError, match="LoRA targets must be a tuple of layer names, got None"):
        LoRA(rank=1, alpha=1, targets=None)
