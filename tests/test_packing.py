"""Packed experts: one tensor under all parameters, through everything that a model goes through."""

import copy
import io

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from medplib.errors import InputError
from medplib.experts import MoERouter, SwiGLU, upcycle
from medplib.experts.packing import pack_mixtures

DIM, HIDDEN = 6, 5


def make_router(num_experts=3, expert="swiglu", pack=True, **options):
    torch.manual_seed(0)
    return MoERouter(DIM, num_experts, expert=expert, hidden_dim=HIDDEN, pack=pack, **options)


def assert_packed(router):
    """The packed tensors hold the parameters' numbers, and writing to a parameter shows in them."""
    packed = router.packed_weights()
    assert packed is not None
    for e, expert in enumerate(router.experts.values()):
        for name, parameter in expert.named_parameters():
            if ".lora_" in name:
                continue
            name = name.replace(".base_layer", "")
            half = slice(None)
            if name.startswith(("gate_proj", "up_proj")) and hasattr(expert, "gate_proj"):
                half = slice(0, HIDDEN) if name.startswith("gate_proj") else slice(HIDDEN, 2 * HIDDEN)
                name = "gate_up_proj." + name.partition(".")[2]
            assert torch.equal(packed[name][e][half], parameter)
            assert packed[name][e][half].data_ptr() == parameter.data_ptr()
    return packed


def test_shapes_are_those_that_grouped_kernels_want():
    packed = assert_packed(make_router())
    assert {name: tuple(w.shape) for name, w in packed.items()} == {
        "gate_up_proj.weight": (3, 2 * HIDDEN, DIM),
        "down_proj.weight": (3, DIM, HIDDEN),
    }
    assert all(w.is_contiguous() and not w.requires_grad for w in packed.values())
    packed = assert_packed(make_router(expert="gelu"))
    assert {name: tuple(w.shape) for name, w in packed.items()} == {
        "up_proj.weight": (3, HIDDEN, DIM),
        "up_proj.bias": (3, HIDDEN),
        "down_proj.weight": (3, DIM, HIDDEN),
        "down_proj.bias": (3, DIM),
    }


def test_router_packs_what_it_builds_and_leaves_what_it_is_given():
    assert make_router(pack=False).packed_weights() is None
    given = MoERouter(DIM, {"a": SwiGLU(DIM, HIDDEN), "b": SwiGLU(DIM, HIDDEN)})
    assert given.packed_weights() is None
    given.pack()
    assert_packed(given)
    with torch.device("meta"):
        assert make_router().packed_weights() is None


def test_output_gradients_and_training_are_the_same_bit_for_bit():
    routers = [make_router(pack=pack, top_k=2) for pack in (False, True)]
    for router in routers:
        router.freeze("expert_1")
        optimiser = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(3):
            optimiser.zero_grad()
            x = torch.randn(9, DIM, generator=torch.Generator().manual_seed(step))
            router(x).square().sum().backward()
            optimiser.step()
    assert_packed(routers[1])
    before = make_router().experts["expert_1"].state_dict()
    for key, value in routers[0].state_dict().items():
        assert torch.equal(value, routers[1].state_dict()[key])
        if "expert_1" in key:
            assert torch.equal(value, before[key.removeprefix("experts.expert_1.")])


def test_packing_keeps_the_parameters_and_an_optimiser_that_knows_them():
    router = make_router(pack=False)
    optimiser = torch.optim.SGD(router.parameters(), lr=1.0)
    before = list(router.parameters())
    router.pack()
    assert all(a is b for a, b in zip(before, router.parameters(), strict=True))
    router(torch.randn(9, DIM)).sum().backward()
    optimiser.step()
    assert_packed(router)


@pytest.mark.parametrize(
    "change",
    [
        lambda router: router.half(),
        lambda router: router.double(),
        lambda router: router.to(torch.bfloat16),
        lambda router: nn.Sequential(router).to("cpu", torch.float64)[0],
        lambda router: copy.deepcopy(router),
        lambda router: copy.deepcopy(nn.Sequential(router))[0].double(),
        lambda router: router.requires_grad_(False),
        lambda router: router.share_memory(),
        lambda router: router.train_only("expert_2") or router,
        lambda router: router.load_state_dict(make_router(pack=False).state_dict()) and router,
    ],
    ids=[
        "half",
        "double",
        "to",
        "to inside",
        "deepcopy",
        "copy and cast",
        "grad",
        "share",
        "train",
        "load",
    ],
)
def test_experts_stay_packed(change):
    router = make_router()
    expected = {key: value.clone() for key, value in router.state_dict().items()}
    changed = change(router)
    assert_packed(changed)
    for key, value in changed.state_dict().items():
        torch.testing.assert_close(value.float(), expected[key], atol=4e-3, rtol=1e-2)


def test_deepcopy_shares_nothing():
    router = make_router()
    twin = copy.deepcopy(router)
    before = router.packed_weights()["down_proj.weight"].clone()
    with torch.no_grad():
        twin.packed_weights()["down_proj.weight"].zero_()
    assert torch.equal(router.packed_weights()["down_proj.weight"], before)
    assert twin.experts["expert_0"].down_proj.weight.abs().sum() == 0


def test_saved_module_comes_back_packed_and_its_file_is_no_larger():
    sizes = []
    for pack in (False, True):
        file = io.BytesIO()
        torch.save(make_router(num_experts=8, pack=pack).state_dict(), file)
        sizes.append(file.tell())
    assert sizes[1] <= sizes[0]
    file = io.BytesIO()
    torch.save(make_router(), file)
    file.seek(0)
    assert_packed(torch.load(file, weights_only=False))


def test_weights_go_through_safetensors_one_expert_alone_too(tmp_path):
    router = make_router()
    safetensors.torch.save_file(router.state_dict(), tmp_path / "all.safetensors")
    twin = make_router()
    nn.init.zeros_(twin.experts["expert_0"].up_proj.weight)
    twin.load_state_dict(safetensors.torch.load_file(tmp_path / "all.safetensors"))
    assert_packed(twin)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), router.parameters(), strict=True))
    one = safetensors.torch.save(router.experts["expert_1"].state_dict())
    assert len(one) < 3 * DIM * HIDDEN * 4 + 500


class Shared(nn.Module, PyTorchModelHubMixin):
    """A user's model, saved as the hub's mixin does."""

    def __init__(self):
        super().__init__()
        self.mixture = make_router()


def test_whatever_saves_a_model_keeps_every_expert(tmp_path):
    model = Shared()
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "hub")
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"))
    for file in ("hub/model.safetensors", "model.safetensors", "accelerate/model.safetensors"):
        found = safetensors.torch.load_file(tmp_path / file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    size = len(safetensors.torch.save(wanted))
    torch.save(model.mixture.experts["expert_0"].state_dict(), tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < size / 3 + 3000
    twin = Shared.from_pretrained(tmp_path / "hub")
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in wanted.items())


def test_shared_memory_is_shared_by_every_expert():
    router = make_router().share_memory()
    assert all(parameter.is_shared() for parameter in router.parameters())
    assert_packed(router)


def test_replaced_parameters_are_noticed_and_packed_again_on_request():
    router = make_router()
    router.load_state_dict(make_router(pack=False).state_dict(), assign=True)
    assert router.packed_weights() is None
    router.pack()
    assert_packed(router)


def test_another_expert_put_in_place_is_noticed():
    router = make_router()
    router.experts["expert_1"] = SwiGLU(DIM, HIDDEN)
    assert router.packed_weights() is None
    router.pack()
    assert_packed(router)
    router.experts["expert_0"] = nn.Linear(DIM, DIM)
    assert router.packed_weights() is None


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_experts_lie_apart_and_give_the_same_output():
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed, not yet in use")
    from torch.distributed.fsdp import fully_shard

    router, x = make_router(), torch.randn(7, DIM)
    expected = router(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        fully_shard(router, mesh=mesh)
        assert router.packed_weights() is None
        out = router(x)
        out.square().sum().backward()
        torch.testing.assert_close(out, expected)
        with pytest.raises(InputError, match="DTensor and cannot be packed"):
            router.pack()
    finally:
        distributed.destroy_process_group()


def test_meta_device_is_refused_until_the_weights_are_there():
    with torch.device("meta"):
        router = make_router(pack=False)
    with pytest.raises(InputError, match="is on the meta device"):
        router.pack()
    router = make_router()
    assert router.to("meta").packed_weights() is None


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"a": SwiGLU(DIM, 4), "b": SwiGLU(DIM, 5)}, r"gate_up_proj.weight is \(\(4, 6\).* and \(\(5, 6\)"),
        ({"a": SwiGLU(DIM, 4), "b": nn.Linear(DIM, DIM)}, r"b has no gate_proj.weight"),
        ({"a": SwiGLU(DIM, 4), "b": SwiGLU(DIM, 4).half()}, "float16"),
    ],
)
def test_experts_that_differ_are_refused_and_left_as_they_were(experts, message):
    router = MoERouter(DIM, experts)
    places = [parameter.data_ptr() for parameter in router.parameters()]
    with pytest.raises(InputError, match=message):
        router.pack()
    assert places == [parameter.data_ptr() for parameter in router.parameters()]


def test_lora_on_the_linears_leaves_the_base_weights_packed():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(make_router())
    x = torch.randn(7, DIM)
    before = model(x)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    router = tuned.base_model.model[0]
    assert_packed(router)
    torch.testing.assert_close(tuned(x), before)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        tuned(x).square().sum().backward()
        optimiser.step()
    after = tuned(x)
    assert not torch.allclose(after, before)
    merged = tuned.merge_and_unload()
    assert_packed(merged[0])
    torch.testing.assert_close(merged(x), after)


def test_lora_on_whole_experts_leaves_its_own_weights_unpacked():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(MoERouter(DIM, {"a": nn.Linear(DIM, DIM), "b": nn.Linear(DIM, DIM)}))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a", "b"]))
    router = tuned.base_model.model[0]
    router.pack()
    assert set(router.packed_weights()) == {"base_layer.weight", "base_layer.bias"}
    router.experts["b"].base_layer.weight.data = torch.zeros(DIM, DIM)
    assert router.packed_weights() is None


def test_transformers_saves_packed_experts_and_loads_them_apart(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, tie_word_embeddings=False,
    )  # fmt: skip

    class Mixed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            upcycle(self, "model.layers.*.mlp")

    torch.manual_seed(0)
    model = Mixed(config).eval()
    for layer in model.model.layers:
        layer.mlp.pack()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in stored.items())
    loaded = Mixed.from_pretrained(tmp_path).eval()
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[0].mlp.packed_weights() is None
    loaded.model.layers[0].mlp.pack()
    assert loaded.model.layers[0].mlp.packed_weights()["gate_up_proj.weight"].shape == (2, 24, 8)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_mixtures_of_a_model_are_packed_where_they_lie_on_the_device_named():
    model = nn.Sequential(make_router(pack=False), MoERouter(DIM, {"a": SwiGLU(DIM, 4), "b": SwiGLU(DIM, 5)}))
    x = torch.randn(7, DIM)
    before = model(x)
    pack_mixtures(model)  # on CUDA, where none is
    assert model[0].packed_weights() is None
    pack_mixtures(model, "cpu")
    assert_packed(model[0])
    assert model[1].packed_weights() is None  # they differ, and stay as they were
    assert torch.equal(model(x), before)
