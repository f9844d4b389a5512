"""Dense network to mixture, and a mixture put together from two training runs."""

import copy

import pytest
import torch
from torch import nn

from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.experts import MoERouter, SwiGLU, assemble_mixture, upcycle
from medplib.experts.upcycle import PUBLISHED_OVERRIDES
from medplib.stages import Stage, set_stage

DIM = 6


class Dense(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(DIM, DIM), "mlp": SwiGLU(DIM, 4)}) for _ in range(3)
        )
        self.seg_projector = nn.Linear(DIM, 2)
        self.mask_decoder = nn.Linear(2, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"](layer["attn"](x))
        return self.mask_decoder(self.seg_projector(x))


def snapshot(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}


def test_upcycled_block_gives_the_best_probability_times_the_dense_output():
    model = Dense(0)
    dense = copy.deepcopy(model.layers[1]["mlp"])
    assert upcycle(model, "layers.*.mlp") == [f"layers.{i}.mlp" for i in range(3)]
    router = model.layers[1]["mlp"]
    assert router.names == ("grounding", "vqa")
    x = torch.randn(2, 5, DIM)
    best = (x @ router.gate.weight.T).softmax(-1).max(-1, keepdim=True).values
    torch.testing.assert_close(router(x), best * dense(x))
    weights = [expert.up_proj.weight for expert in router.experts.values()]
    assert torch.equal(*weights)
    assert weights[0].data_ptr() != weights[1].data_ptr()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1.mlp", ["layers.1.mlp"]),
        ("layers.[02].mlp", ["layers.0.mlp", "layers.2.mlp"]),
        (["layers.2.mlp", "layers.0.mlp"], ["layers.0.mlp", "layers.2.mlp"]),
        ("**.mlp", ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]),
    ],
)
def test_layers_are_chosen_by_path(pattern, expected):
    model = Dense(0)
    assert upcycle(model, pattern, ("a", "b", "c"), top_k=2) == expected
    found = [name for name, module in model.named_modules() if isinstance(module, MoERouter)]
    assert found == expected
    assert model.get_submodule(found[0]).gate.top_k == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "mlp"}, UnknownNameError, "matches 'mlp'. Modules that end so: layers.0.mlp"),
        ({"layers": ["layers.0.mlp", "blocks.*"]}, UnknownNameError, "'blocks.*'"),
        ({"layers": ["layers.*", "layers.*.mlp"]}, InputError, "lies inside another"),
        ({"layers": "layers.*.mlp", "top_k": 3}, InputError, "top_k must be between 1 and 2"),
        ({"layers": "layers.*.mlp", "experts": ("a.b",)}, InputError, "cannot be an expert's name"),
    ],
)
def test_failed_upcycling_changes_nothing(arguments, error, message):
    model = Dense(0)
    before = snapshot(model)
    with pytest.raises(error) as raised:
        upcycle(model, **arguments)
    assert message in str(raised.value)
    assert snapshot(model) == before


def test_mixture_is_not_upcycled_twice():
    model = Dense(0)
    upcycle(model, "layers.0.mlp")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"layers\.0\.mlp is or holds a MoERouter already"):
        upcycle(model, "layers.*.mlp")
    assert snapshot(model) == before


def test_gate_takes_type_and_mode_of_the_block():
    model = Dense(0).bfloat16().eval()
    upcycle(model, "layers.*.mlp")
    assert model.layers[0]["mlp"].gate.weight.dtype == torch.bfloat16
    assert not model.layers[0]["mlp"].training


def test_block_without_linear_layer_needs_its_width():
    model = nn.Sequential(nn.LayerNorm(DIM))
    with pytest.raises(InputError, match="give dim="):
        upcycle(model, "0")
    upcycle(model, "0", dim=DIM)
    assert model(torch.randn(3, DIM)).shape == (3, DIM)


@pytest.mark.parametrize("as_state", [True, False])
def test_assembled_mixture_takes_each_tensor_from_its_run(as_state):
    vqa, grounding, model = Dense(1), Dense(2), Dense(3)
    upcycle(model, "layers.*.mlp")
    gate = model.layers[0]["mlp"].gate.weight.clone()
    runs = {"grounding": grounding, "vqa": vqa}
    sources = {name: run.state_dict() for name, run in runs.items()} if as_state else runs
    taken = assemble_mixture(model, sources, rest="vqa", overrides=PUBLISHED_OVERRIDES)
    for i, layer in enumerate(model.layers):
        assert torch.equal(
            layer["mlp"].experts["grounding"].up_proj.weight, grounding.layers[i]["mlp"].up_proj.weight
        )
        assert torch.equal(
            layer["mlp"].experts["vqa"].down_proj.weight, vqa.layers[i]["mlp"].down_proj.weight
        )
        assert torch.equal(layer["attn"].weight, vqa.layers[i]["attn"].weight)
    assert torch.equal(model.seg_projector.weight, grounding.seg_projector.weight)
    assert torch.equal(model.mask_decoder.bias, grounding.mask_decoder.bias)
    assert torch.equal(model.layers[0]["mlp"].gate.weight, gate)
    assert taken["layers.0.mlp.experts.grounding.up_proj.weight"] == "grounding"
    assert taken["layers.0.attn.weight"] == "vqa"
    assert set(model.state_dict()) - set(taken) == {f"layers.{i}.mlp.gate.weight" for i in range(3)}


def test_source_may_be_a_mixture_itself():
    first, second = Dense(1), Dense(2)
    upcycle(first, "layers.*.mlp")
    upcycle(second, "layers.*.mlp")
    nn.init.zeros_(first.layers[0]["mlp"].experts["grounding"].up_proj.weight)
    assemble_mixture(second, {"grounding": first, "vqa": first})
    for (name, a), b in zip(second.state_dict().items(), first.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_router_itself_can_be_assembled():
    router = MoERouter(DIM, ("grounding", "vqa"), hidden_dim=4)
    runs = {name: SwiGLU(DIM, 4) for name in router.names}
    assemble_mixture(router, runs)
    for name, run in runs.items():
        assert torch.equal(router.experts[name].up_proj.weight, run.up_proj.weight)


def drop(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g, v: {"sources": {"vqa": v}}, InputError, "No source for grounding; given: vqa"),
        (lambda g, v: {"rest": "align"}, InputError, "No source for align"),
        (lambda g, v: {"overrides": {"ears": "vqa"}}, UnknownNameError, "part 'ears'"),
        (
            lambda g, v: {"sources": {"grounding": drop(g, "layers.1.mlp.up_proj.weight"), "vqa": v}},
            CheckpointError,
            "layers.1.mlp.experts.grounding.up_proj.weight: 'grounding' has no",
        ),
        (
            lambda g, v: {"sources": {"grounding": g, "vqa": {**v, "layers.0.attn.bias": torch.zeros(9)}}},
            CheckpointError,
            "layers.0.attn.bias of 'vqa' has shape (9,), needed (6,)",
        ),
    ],
)
def test_failed_assembly_changes_nothing(change, error, message):
    grounding, vqa, model = Dense(1).state_dict(), Dense(2).state_dict(), Dense(3)
    upcycle(model, "layers.*.mlp")
    before = copy.deepcopy(model.state_dict())
    arguments = {"sources": {"grounding": grounding, "vqa": vqa}, **change(grounding, vqa)}
    with pytest.raises(error) as raised:
        assemble_mixture(model, **arguments)
    assert message in str(raised.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_adapters_must_be_merged_before_assembly():
    from medplib.lora import LoRA

    run, model = Dense(1), Dense(2)
    set_stage(run, Stage("s", lora={"layers": LoRA(2, 4, ("attn",))}))
    upcycle(model, "layers.*.mlp")
    with pytest.raises(CheckpointError, match="merge_lora"):
        assemble_mixture(model, {"grounding": run, "vqa": Dense(3)})


def test_dense_model_is_not_a_mixture():
    with pytest.raises(InputError, match="use `upcycle` first"):
        assemble_mixture(Dense(0), {"vqa": Dense(1)})


@pytest.mark.parametrize(
    ("layers", "experts", "message"),
    [
        ("0", ["a", "a"], "Every expert needs a name of its own, got a, a"),
        ("0", None, "experts must be modules by name, a list of names"),
        ("0", ["a.b"], "'a.b' cannot be an expert's name"),
        (None, ["a", "b"], "layers must be a dotted path or a list of them, got None"),
        ([], ["a", "b"], r"layers must be a dotted path or a list of them, got \[\]"),
        ([None], ["a", "b"], "layers must be a dotted path"),
    ],
)
def test_layers_and_experts_that_cannot_be_are_named(layers, experts, message):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    with pytest.raises(InputError, match=message):
        upcycle(model, layers, experts)
    assert isinstance(model[0], nn.Sequential)


def test_what_is_no_model_is_named():
    for call in (lambda: upcycle("a", "0"), lambda: assemble_mixture(None, {})):
        with pytest.raises(InputError, match=r"The model must be an nn\.Module, got"):
            call()
    mixture = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    upcycle(mixture, "0", ["a", "b"])
    with pytest.raises(InputError, match="sources must be a dict by name, got 5"):
        assemble_mixture(mixture, 5)
    with pytest.raises(InputError, match="The source 'b' must be a model or its state dict, got 5"):
        assemble_mixture(mixture, {"a": mixture, "b": 5}, rest="a")
