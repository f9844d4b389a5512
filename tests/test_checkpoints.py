"""Published checkpoints load whole or not at all, from whatever files there are, and go out unchanged."""

import copy
import json
import shutil

import pytest
import torch
from parity.recorded_model import Recorded
from safetensors.torch import load_file, save_file

from medplib import CheckpointError, InputError, MedPLIB, MedPLIBConfig, model_folder
from medplib.checkpoints import load_sam
from medplib.official.configuration import convert
from medplib.official.export import export_official
from medplib.official.names import official_name, our_name
from medplib.official.tokenizer import LegacyLlamaTokenizer
from medplib.prompts.types import Box


@pytest.fixture(scope="module")
def recorded(golden_dir):
    return Recorded(golden_dir / "model_tiny")


@pytest.fixture(scope="module")
def model(recorded):
    return recorded.load()


@pytest.fixture
def folder(recorded, tmp_path):
    """A copy of the published folder, to change."""
    copy = tmp_path / "published"
    names = (
        "config.json",
        "tokenizer.model",
        "added_tokens.json",
        "tokenizer_config.json",
        "model.safetensors",
    )
    copy.mkdir()
    for name in names:
        shutil.copy(recorded.folder / name, copy / name)
    return copy


@pytest.fixture
def load(recorded, folder):
    def make(**kwargs):
        return MedPLIB.from_pretrained(folder, **{"overrides": recorded.overrides} | kwargs)

    return make


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def assert_equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_every_published_name_has_a_place_and_finds_back(recorded, model):
    experts = model.config.moe.experts
    ours = {name: our_name(name, experts) for name in recorded.json("keys")}
    assert set(ours.values()) - {None} == set(model.state_dict())
    assert all(official_name(name, experts) == theirs for theirs, name in ours.items() if name)


def test_every_name_of_the_published_mask_side_has_a_place(golden):
    """The full-size list: what the tiny one may lack, such as more blocks, is renamed alike."""
    keys = golden("sam/sam_med2d_vit_b_keys.json")
    assert len(keys) > 300
    for name in keys:
        ours = our_name(f"model.visual_model.{name}")
        assert ours.split(".")[0] in ("mask_encoder", "prompt_encoder", "mask_decoder")
        assert official_name(ours) == f"model.visual_model.{name}"


def test_without_overrides_the_sizes_are_the_published_ones(golden):
    """The mask side of a full-size model, built without memory, has the published names and shapes."""
    content = {
        "model_type": "medplib_moe_llama", "vocab_size": 32267, "hidden_size": 4096, "num_hidden_layers": 1,
        "intermediate_size": 11008, "num_attention_heads": 32,
        "moe": {"num_experts": [2], "moe_layers_idx": [0], "top_k_experts": 1},
    }  # fmt: skip
    with torch.device("meta"):
        model = MedPLIB(MedPLIBConfig(**convert(content)))
    published = golden("sam/sam_med2d_vit_b_keys.json")
    start = "model.visual_model."
    ours = {official_name(k, model.config.moe.experts): list(v.shape) for k, v in model.state_dict().items()}
    ours = {name.removeprefix(start): shape for name, shape in ours.items() if name.startswith(start)}
    assert ours == published
    assert model.config.tokens.seg == 32000
    assert model.num_image_tokens == 576


def test_import_and_export_give_the_same_file(recorded, model, tmp_path):
    export_official(model, tmp_path)
    theirs, ours = load_file(recorded.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype
        assert torch.equal(value, ours[name]), name
    for name in ("config.json", "added_tokens.json"):
        assert json.loads((recorded.folder / name).read_text()) == json.loads((tmp_path / name).read_text())
    assert (recorded.folder / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()


def test_shards_load_whatever_index_lies_beside_them(recorded, model, tmp_path):
    export_official(model, tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "gone.bin"}}')
    assert_equal(MedPLIB.from_pretrained(tmp_path, overrides=recorded.overrides), model)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="lacks shard 2 of"):
        MedPLIB.from_pretrained(tmp_path, overrides=recorded.overrides)


def test_a_published_folder_may_stay_on_the_disk(model, load, tmp_path, pictures):
    device_map = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    options = {"device_map": device_map | {"language_model": "disk"}}
    spread = load(**options, offload_folder=tmp_path / "offload")
    assert all(value.is_meta for value in spread.language_model.parameters())
    one, two = (m.ask(pictures[0], "What?", max_new_tokens=4) for m in (model, spread))
    assert one.text == two.text
    with pytest.raises(CheckpointError, match="provide an `offload_folder`"):
        load(**options)


def test_a_bin_file_alone_loads(recorded, model, folder, load):
    (folder / "model.safetensors").unlink()
    shutil.copy(recorded.folder / "pytorch_model.bin", folder)
    assert_equal(load(), model)


class Harmful:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_code_in_a_pickle_is_refused(folder, load, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(3), "x": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load()
    assert "ran" not in capsys.readouterr().out


def test_our_own_save_carries_our_names_and_loads_without_overrides(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    again = MedPLIB.from_pretrained(tmp_path)
    assert_equal(again, model)
    image = torch.zeros(20, 30, 3, dtype=torch.uint8).numpy()
    one, two = (
        m.ask(image, "What is <region>?", [Box(2, 2, 9, 9)], max_new_tokens=3) for m in (model, again)
    )
    assert one.text == two.text


def test_missing_and_unexpected_tensors_are_listed(folder, load):
    def change(state):
        state["model.surprise.weight"] = state.pop("model.norm.weight")
        return state

    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=r"missing .*norm\.weight.*unexpected .*surprise"):
        load()


def test_sizes_that_do_not_fit_are_listed(folder, recorded):
    with pytest.raises(CheckpointError, match=r"other shape mask_decoder.*mlp.* for \(7,\)"):
        MedPLIB.from_pretrained(
            folder, overrides=recorded.overrides | {"sam": recorded.dims["sam"] | {"dec_mlp": 7}}
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sam": {"depht": 2}}, "depht"),
        ({"vision": {}}, "'vision'"),
        ({"clip": {"heads": "4"}}, "whole numbers"),
    ],
)
def test_a_misspelt_override_is_refused(folder, overrides, message):
    with pytest.raises(InputError, match=message):
        MedPLIB.from_pretrained(folder, overrides=overrides)


def test_overrides_are_refused_for_our_own_layout(tiny_folder):
    with pytest.raises(InputError, match="published layouts"):
        MedPLIB.from_pretrained(tiny_folder, overrides={})


def without_clip(state):
    return {name: value for name, value in state.items() if "vision_tower" not in name}


def test_an_absent_clip_tower_is_named_and_not_fetched(folder, load, monkeypatch):
    def fetch(*args, **options):
        pytest.fail("something was fetched")

    monkeypatch.setattr(model_folder, "snapshot_download", fetch)
    change_weights(folder, without_clip)
    change_config(folder, mm_vision_tower="/home/authors/clip", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(CheckpointError, match="openai/clip-vit-large-patch14-336"):
        load()


def test_an_absent_clip_tower_comes_from_where_the_caller_says(recorded, folder, load, model, tmp_path):
    tower = tmp_path / "tower"
    tower.mkdir()
    shutil.copy(recorded.folder / "clip-tiny" / "config.json", tower)
    prefix = "model.vision_tower.vision_tower."
    state = load_file(folder / "model.safetensors")
    vision = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    vision["vision_model.embeddings.position_ids"] = torch.arange(5)  # an old buffer, not needed
    vision["text_model.final_layer_norm.weight"] = torch.ones(4)
    save_file(vision, tower / "model.safetensors")
    change_weights(folder, without_clip)
    with pytest.warns(UserWarning, match="CLIP tower is not in the checkpoint; it is taken from"):
        loaded = load(clip=tower)
    assert_equal(loaded, model)


def test_from_the_hub_the_tower_comes_from_its_own_repository(recorded, folder, model, tmp_path, monkeypatch):
    """One call for each, and what the configuration names is not what is asked for."""
    tower = tmp_path / "tower"
    tower.mkdir()
    prefix = "model.vision_tower.vision_tower."
    state = load_file(folder / "model.safetensors")
    vision = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    (tower / "config.json").write_text("{}")
    torch.save(vision, tower / "pytorch_model.bin")
    change_weights(folder, without_clip)
    change_config(folder, mm_vision_tower="/home/authors/openai/clip-vit-large-patch14-336")
    places = {"Huangxs/MedPLIB-7b-2e": folder, "openai/clip-vit-large-patch14-336": tower}
    monkeypatch.setattr(model_folder, "snapshot_download", lambda name, **_: str(places[name]))
    with pytest.warns(UserWarning, match="taken from 'openai/clip-vit-large-patch14-336'"):
        loaded = MedPLIB.from_pretrained("Huangxs/MedPLIB-7b-2e", overrides=recorded.overrides)
    assert_equal(loaded, model)


@pytest.mark.parametrize(
    "change",
    [
        {"mm_vision_select_layer": "import os"},
        {"max_sample_point": [1]},
        {"hidden_size": "48"},
        {"num_hidden_layers": 10**9},
        {"mm_projector_type": "linear"},
        {"torch_dtype": "__import__"},
        {"moe": {"num_experts": [2, 2], "moe_layers_idx": [0, 1], "router_aux_loss_coef": "x"}},
        {"moe": [1]},
        {"rope_scaling": {"type": "evil", "factor": 2.0}},
    ],
)
def test_a_damaged_published_configuration_is_an_input_error(folder, load, change):
    change_config(folder, **change)
    with pytest.raises(InputError):
        load()


def as_dense(state):
    """The published dense runs: every layer has the FFN that expert 0 has in the mixture."""
    dense = {}
    for name, value in state.items():
        if ".experts.deepspeed_experts.0." in name:
            dense[name.replace("deepspeed_moe.experts.deepspeed_experts.0.", "")] = value
        elif "deepspeed_moe" not in name:
            dense[name] = value
    return dense


def test_a_dense_published_run_loads(folder, load, model, golden):
    content = golden("moe_init/moe_init.json")["stage_config_json"]
    (folder / "config.json").write_text(json.dumps(content))
    change_weights(folder, as_dense)
    dense = load()
    assert dense.config.moe is None
    first = model.config.moe.experts[0]
    for name, value in dense.state_dict().items():
        theirs = name.replace(".mlp.", f".mlp.experts.{first}.") if ".layers." in name else name
        theirs = theirs if theirs in model.state_dict() else name
        assert torch.equal(value, model.state_dict()[theirs]), name


@pytest.mark.parametrize("kind", ["llava_llama", "llava_mistral"])  # LLaVA 1.5, LLaVA-Med 1.5
def test_a_llava_checkpoint_becomes_a_start(folder, load, recorded, kind):
    words = recorded.dims["seg_token_idx"]

    def change(state):
        rows = ("model.embed_tokens.weight", "lm_head.weight")
        kept = ("model.layers", "model.norm", "model.mm_projector", "model.vision_tower")
        cut = {name: value[:words].clone() for name, value in state.items() if name in rows}
        return cut | {name: value for name, value in as_dense(state).items() if name.startswith(kept)}

    change_weights(folder, change)
    (folder / "added_tokens.json").unlink()
    change_config(folder, model_type=kind, vocab_size=words, moe=None)
    start = load()
    assert start.config.text_config.model_type == kind.removeprefix("llava_")
    rows = start.get_input_embeddings().weight
    assert len(rows) == recorded.dims["vocab"]
    torch.testing.assert_close(rows[words], rows[:words].mean(0))
    assert start.processor.tokenizer.get_added_vocab() == recorded.json("added_tokens")
    assert start.config.tokens.seg == words


def test_adapters_are_merged_on_the_way(folder, load, model):
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(state):
        state = {f"base_model.model.{key}": value for key, value in state.items()}
        weight = state.pop(f"base_model.model.{name}")
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        change.wanted = weight + 3.0 * (up @ down)
        extra = {"base_layer.weight": weight, "lora_A.default.weight": down, "lora_B.default.weight": up}
        return state | {f"{stem}.{key}": value for key, value in extra.items()}

    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load()
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    merged = load().state_dict()[our_name(name)]
    torch.testing.assert_close(merged, change.wanted)


def test_an_adapter_folder_is_merged_into_the_folder_it_was_trained_on(folder, load, model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 2}')
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    width = model.config.text_config.hidden_size
    pair = {f"{stem}.lora_A.weight": torch.ones(1, width), f"{stem}.lora_B.weight": torch.ones(width, 1)}
    save_file(pair, adapter / "adapter_model.safetensors")
    name = "language_model.model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(load(adapter=adapter).state_dict()[name], model.state_dict()[name] + 2)


def test_sam_weights_fill_the_mask_side_or_nothing(recorded, model, tmp_path):
    state = load_file(recorded.folder / "model.safetensors")
    start = "model.visual_model."
    sam = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    sam["pixel_mean"] = torch.ones(3, 1, 1)
    torch.save({"model": sam}, tmp_path / "sam.pth")
    other = MedPLIB(model.config)
    load_sam(other, tmp_path / "sam.pth")
    assert torch.equal(other.mask_encoder.network.pos_embed, model.mask_encoder.network.pos_embed)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    torch.save({"model": {**sam, "mask_decoder.iou_token.weight": torch.ones(2, 2)}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"other shape mask_decoder\.iou_token"):
        load_sam(other, tmp_path / "bad.pth")
    torch.save(
        sam | {"mask_decoder.iou_token.weight": sam["mask_decoder.iou_token.weight"] / 0},
        tmp_path / "nan.pth",
    )
    with pytest.raises(CheckpointError, match=r"iou_token\.weight.* holds NaN or infinity"):
        load_sam(other, tmp_path / "nan.pth")
    torch.save(sam | {"head.weight": torch.ones(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"unexpected head\.weight \(1\)"):
        load_sam(other, tmp_path / "more.pth")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_device_map_work_as_for_our_own_files(load, dtype):
    loaded = load(dtype=dtype, device_map="cpu")
    assert {value.dtype for value in loaded.parameters()} == {dtype}


@pytest.mark.parametrize(
    "moe", [{"use_residual": True}, {"num_experts": [2, 3]}, {"moe_layers_idx": [9]}, {"num_experts": "none"}]
)
def test_a_mixture_that_cannot_be_represented_is_refused(folder, load, moe):
    content = json.loads((folder / "config.json").read_text())
    change_config(folder, moe=content["moe"] | moe)
    with pytest.raises(InputError, match="moe"):
        load()


def test_layers_written_as_text_are_read(folder, load, model):
    content = json.loads((folder / "config.json").read_text())
    layers = ",".join(map(str, content["moe"]["moe_layers_idx"]))
    change_config(folder, moe=content["moe"] | {"moe_layers_idx": layers})
    assert_equal(load(), model)


def test_the_command_exports(model, tmp_path):
    from typer.testing import CliRunner

    from medplib.apps.cli import app

    model.save_pretrained(tmp_path / "ours")
    words = ["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "official"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    exported = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(exported) == {official_name(n, model.config.moe.experts) for n in model.state_dict()} | {
        name for name in exported if name.endswith("inv_freq")
    }


def test_another_model_than_the_published_cannot_be_exported(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"vision\.tower"):
        export_official(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"attention_bias": True}, r"text_config\.attention_bias is True, needed False"),
        ({"mlp_bias": True}, r"text_config\.mlp_bias is True, needed False"),
        ({"head_dim": 16}, r"text_config\.head_dim is 16, needed 8"),
    ],
)
def test_a_language_model_that_the_published_layout_cannot_tell_of_is_refused(
    new_model, tmp_path, text, message
):
    with pytest.raises(InputError, match=message):
        export_official(new_model(text=text, moe=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.moe, "score", "sigmoid"), r"moe\.score is 'sigmoid', needed 'softmax'"),
        (lambda c: setattr(c.moe, "gate", "expert_choice"), r"moe\.gate is 'expert_choice', needed 'topk'"),
        (lambda c: c.moe.gate_args.update(scale=2.0), r"moe\.gate_args is \['scale'\], needed \[\]"),
        (lambda c: setattr(c.moe, "top_k", 2), r"moe\.renormalize is False, needed True"),
        (
            lambda c: c.text_config.rope_parameters.update(rope_type="yarn", factor=4.0),
            r"text_config\.rope_parameters is 'yarn', needed 'default'",
        ),
        (lambda c: c.mask.encoder.args.update(adapters=False), r"adapters is False, needed True"),
        (lambda c: c.region.pooler.args.update(weights="area"), r"weights is 'area', needed 'binary'"),
    ],
)
def test_what_the_published_code_would_compute_otherwise_is_not_exported(model, tmp_path, change, message):
    config = copy.deepcopy(model.config)
    change(config)
    with pytest.raises(InputError, match=message):
        export_official(MedPLIB(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", [2, 1])
def test_a_top_2_mixture_renormalises_its_two_weights_as_published(recorded, folder, load, said):
    """Three experts, the third a copy of the second; compared with the sum over both choices written out."""

    def with_third(state):
        for name in [name for name in state if ".deepspeed_experts.1." in name]:
            state[name.replace("experts.1.", "experts.2.")] = state[name] * 1.5
        for name in [name for name in state if name.endswith("gate.wg.weight")]:
            state[name] = torch.cat([state[name], -state[name][:1]])
        return state

    change_weights(folder, with_third)
    content = json.loads((folder / "config.json").read_text())
    change_config(
        folder, moe=content["moe"] | {"num_experts": 3, "top_k_experts": said}, mm_vision_select_feature=None
    )
    overrides = recorded.overrides | ({} if said == 2 else {"moe": {"top_k": 2}})
    mixture = load(overrides=overrides).language_model.model.layers[0].mlp
    x = torch.randn(7, mixture.dim, generator=torch.Generator().manual_seed(0))
    weights, experts = (x @ mixture.gate.weight.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    every = torch.stack([expert(x) for expert in mixture.experts.values()])  # (E, T, D)
    wanted = sum(weights[:, k, None] * every[experts[:, k], torch.arange(7)] for k in range(2))
    torch.testing.assert_close(mixture(x), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"mm_vision_select_feature": "cls_patch"},
        {"mm_token_compress": True},
        {"icl_mask_encoder": True},
    ],
)
def test_a_setting_that_would_change_the_numbers_is_refused(folder, load, change):
    change_config(folder, **change)
    with pytest.raises(InputError, match=next(iter(change))):
        load()


@pytest.mark.parametrize(
    "overrides", ["sam", ["sam"], {"moe": ["parity"]}, {"clip": {"patch": 0}}, {"sam": {"heads": 0}}]
)
def test_overrides_of_another_kind_are_refused(folder, overrides):
    with pytest.raises(InputError, match="overrides"):
        MedPLIB.from_pretrained(folder, overrides=overrides)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_torn_configuration_is_named_and_not_the_overrides(folder, load, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="copy it again"):
        load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"v_proj": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"v_proj": 4}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 8}, r"does not fit.*rank 8"),
        ({"r": -1}, "r -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(folder, load, model, tmp_path, settings, message):
    width = model.config.text_config.hidden_size
    adapter = write_adapter(tmp_path, width, {"r": 1, "lora_alpha": 2} | settings)
    with pytest.raises(CheckpointError, match=message):
        load(adapter=adapter)


def test_an_adapter_that_does_not_fit_its_layer_is_refused(folder, load, model, tmp_path):
    adapter = write_adapter(tmp_path, model.config.text_config.hidden_size - 1, {"r": 1, "lora_alpha": 2})
    with pytest.raises(CheckpointError, match=r"adapter of .*v_proj.* does not fit"):
        load(adapter=adapter)
    with pytest.raises(InputError, match="adapter must be the path of a folder, got 5"):
        load(adapter=5)


def test_an_adapter_with_a_bias_of_its_own_is_refused(folder, load, model, tmp_path):
    width = model.config.text_config.hidden_size
    adapter = write_adapter(tmp_path, width, {"r": 1, "lora_alpha": 2, "lora_bias": True})
    pair = load_file(adapter / "adapter_model.safetensors")
    (name,) = [name for name in pair if "lora_B" in name]
    bias = {name.replace(".weight", ".bias"): torch.ones(width)}
    save_file(pair | bias, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_B\.bias' is a bias of the adapter's own"):
        load(adapter=adapter)


def write_adapter(folder, width, settings):
    """A folder with an adapter of rank 1 for one square layer of that width."""
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    pair = {f"{stem}.lora_A.weight": torch.ones(1, width), f"{stem}.lora_B.weight": torch.ones(width, 1)}
    save_file(pair, folder / "adapter" / "adapter_model.safetensors")
    return folder / "adapter"


@pytest.mark.parametrize(
    "change",
    [
        lambda added: added | {"<ref>": added["<SEG>"]},
        lambda added: {token: number + 1 for token, number in added.items()},
        lambda added: {token: number - 1 for token, number in added.items()},
    ],
)
def test_added_tokens_that_do_not_follow_the_words_are_refused(folder, load, change):
    path = folder / "added_tokens.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load()


def test_a_tokenizer_without_the_tokens_of_a_prompt_is_refused(folder, load):
    path = folder / "added_tokens.json"
    added = json.loads(path.read_text())
    path.write_text(json.dumps({token: number for token, number in added.items() if token != "<im_end>"}))
    with pytest.raises(InputError, match="lacks <im_end>"):
        load()


def test_bytes_of_no_character_are_read_one_by_one(recorded):
    """As sentencepiece does it: two bytes of a character of three give two marks."""
    tokenizer = LegacyLlamaTokenizer.from_pretrained(recorded.folder)
    first = tokenizer.byte_ids[0xE6]
    ids = [first, tokenizer.byte_ids[0x97], *tokenizer.encode("a")]
    assert tokenizer.decode(ids) == "\ufffd\ufffd a"
