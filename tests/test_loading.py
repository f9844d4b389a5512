"""Saving and loading: exact, strict, without pickles and noise; and through transformers' Auto classes."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from medplib import (
    Box,
    CheckpointError,
    MedPLIB,
    MedPLIBConfig,
    MedPLIBProcessor,
    UnknownNameError,
    loading,
    model_folder,
)
from medplib.errors import InputError, MedPLIBError
from medplib.processing import Sample
from medplib.stages import LoRA, Stage, merge_lora, set_stage

CLIP = {
    "name": "clip",
    "args": {
        "config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "projection_dim": 8,
        },
    },
}  # fmt: skip
SAM = {
    "name": "sam_vit",
    "args": {
        "image_size": 64, "dim": 16, "depth": 2, "num_heads": 2, "window_size": 3, "global_blocks": [1],
        "out_channels": 32,
    },
}  # fmt: skip
RELATIVE = {"name": "timm", "args": {"model": "test_vit_relpos", "model_args": {"img_size": 64}}}
MIXED = {"name": "timm", "args": {"model": "test_coatnet", "model_args": {"img_size": 64}}}


def vision(tower, **changes):
    return {"vision": {"tower": tower, "image_size": 64, **changes}}


TOWERS = {
    "pyramid": {},
    "timm with non-persistent buffers": vision(RELATIVE),
    "timm of convolutions and attention": vision(MIXED),
    "clip": vision(CLIP),
    "sam_vit": {"mask": {"encoder": SAM}},
    "tied embeddings": {"text": {"model_type": "gemma2", "head_dim": 8, "tie_word_embeddings": True}},
    "dense": {"moe": None},
}


def state(model):
    """All parameters and all buffers, also those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def outputs(model, pictures):
    sample = Sample(
        [pictures[0]], [("What is in <region>?", "A <SEG>.")], [Box(3, 4, 30, 40)], masks=[np.eye(48, 60) > 0]
    )
    with torch.no_grad():
        out = model(**model.processor([sample], training=True).tensors)
    return [out.logits, out.mask_logits, out.iou_scores]


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_a_saved_model_comes_back_exactly_parameters_and_buffers(new_model, pictures, tmp_path, changes):
    model = new_model(**changes)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # values that nothing could rebuild from the configuration
        elif name not in saved:  # transformers' own models rebuild theirs
            assert name.startswith(("language_model.", "vision_tower.network.embeddings.position_ids")), name
    model.save_pretrained(tmp_path)
    first, second = MedPLIB.from_pretrained(tmp_path), MedPLIB.from_pretrained(tmp_path)
    wanted = state(model)
    for loaded in (first, second):
        found = state(loaded)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        assert not loaded.training
    for a, b, c in zip(*(outputs(m, pictures) for m in (first, second, model)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(
            a, c, atol=1e-4, rtol=1e-3
        )  # other places in memory, another order of sums
    assert first.config.to_dict() == second.config.to_dict()


def test_shards_load_as_one_file_does(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = MedPLIB.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in tiny_model.state_dict().items())


def test_the_loaded_model_answers_as_the_saved_one(tiny_model, tiny_folder, pictures):
    loaded = MedPLIB.from_pretrained(tiny_folder)
    options = {"prompts": [Box(3, 4, 30, 40)], "max_new_tokens": 6}
    one, two = (model.ask(pictures[0], "What is in <region>?", **options) for model in (tiny_model, loaded))
    assert one.text == two.text
    assert two.model == {"name": str(tiny_folder), "weights_sha256": loading.weights_sha256(tiny_folder)}
    assert len(two.model["weights_sha256"]) == 64


@pytest.mark.parametrize(
    ("saved", "wanted"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_half_precision_is_loaded_as_something_a_cpu_can_compute(
    new_model, pictures, tmp_path, saved, wanted
):
    model = new_model().to(saved)
    model.save_pretrained(tmp_path)
    assert all(
        v.dtype == saved for v in load_file(tmp_path / "model.safetensors").values() if v.is_floating_point()
    )
    loaded = MedPLIB.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert all(
        torch.equal(value.to(saved), model.state_dict()[name]) for name, value in loaded.state_dict().items()
    )
    assert {p.dtype for p in MedPLIB.from_pretrained(tmp_path, dtype=saved).parameters()} == {saved}
    loaded.ask(pictures[0], "What?", max_new_tokens=2)


def test_settings_may_be_replaced_while_loading(tiny_folder):
    assert MedPLIB.from_pretrained(tiny_folder, template="vicuna_v1").config.template == "vicuna_v1"
    with pytest.raises(InputError, match="losses has no setting ec"):
        MedPLIB.from_pretrained(tiny_folder, losses={"ec": 1.0})


def test_the_auto_classes_of_transformers_find_the_model(tiny_model, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder)
    assert type(config) is MedPLIBConfig
    for auto in (AutoModelForImageTextToText, AutoModel):
        loaded = auto.from_pretrained(tiny_folder)
        assert type(loaded) is MedPLIB
        assert torch.equal(loaded.seg_projector[0].weight, tiny_model.seg_projector[0].weight)
        assert loaded.processor is not None
    assert type(AutoModelForImageTextToText.from_config(config)) is MedPLIB


def test_the_processor_loads_alone(tiny_model, tiny_folder, pictures):
    sample = Sample([pictures[0]], [("What is in <region>?", None)], [Box(3, 4, 30, 40)])
    wanted = tiny_model.processor([sample]).tensors
    for loaded in (AutoProcessor.from_pretrained(tiny_folder), MedPLIBProcessor.from_pretrained(tiny_folder)):
        assert type(loaded) is MedPLIBProcessor
        found = loaded([sample]).tensors
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_saving_and_loading_print_nothing_and_leave_the_logging_as_it_was(tiny_model, tmp_path, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    tiny_model.save_pretrained(tmp_path)
    MedPLIB.from_pretrained(tmp_path)
    MedPLIBProcessor.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


LANGUAGE = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
PLACES = {
    "cpu": lambda names: "cpu",
    "auto": lambda names: "auto",
    "named": lambda names: dict.fromkeys(names, "cpu"),
    "language on disk": lambda names: dict.fromkeys(names, "cpu") | {"language_model": "disk"},
    "a layer on disk": lambda names: (
        dict.fromkeys([n for n in names if n != "language_model"], "cpu")
        | dict.fromkeys((f"language_model.{n}" for n in LANGUAGE), "cpu")
        | {"language_model.model.layers.1": "disk"}
    ),
    "all on disk": lambda names: dict.fromkeys(names, "disk"),
}


@pytest.mark.parametrize("sides", [{}, vision(CLIP) | {"mask": {"encoder": SAM}}], ids=["timm", "clip, sam"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_parts_may_lie_elsewhere_even_on_disk_and_answer_the_same(
    new_model, pictures, tmp_path, place, sides
):
    plain = new_model(**sides)
    plain.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    device_map = place([name for name, _ in plain.named_children()])
    loaded = MedPLIB.from_pretrained(tmp_path / "saved", device_map=device_map)
    assert loaded.device.type in ("cpu", "cuda")
    on_disk = [name for name, value in loaded.named_parameters() if value.is_meta]
    assert bool(on_disk) == ("disk" in str(device_map))
    for a, b in zip(outputs(loaded, pictures), outputs(plain, pictures), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, check_device=False)
    options = {"prompts": [Box(3, 4, 30, 40)], "max_new_tokens": 4}
    one, two = (m.ask(pictures[0], "What is in <region>?", **options) for m in (plain, loaded))
    assert one.text == two.text


def test_blocks_that_device_map_keeps_whole_have_these_names(tiny_model):
    assert {"LlamaDecoderLayer", "TimmPyramid", "MaskDecoder"} <= set(tiny_model._no_split_modules)


# ---------------------------------------------------------------------------------------- damaged checkpoints


def rewrite(folder, change):
    """Change the saved tensors, as somebody would who also removes the checksums."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / loading.CHECKSUMS).unlink()


def poison(tensors):
    tensors["seg_projector.0.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("seg_projector.0.bias"), r"missing seg_projector\.0\.bias \(1\)"),
        (lambda t: t.update(extra=torch.ones(2)), r"unexpected extra \(1\)"),
        (
            lambda t: t.update({"region_adapter.bias": torch.ones(5)}),
            r"other shape region_adapter\.bias \(5,\) for \(32,\)",
        ),
        (poison, r"seg_projector\.0\.weight.* NaN or infinity"),
    ],
    ids=["missing", "extra", "misshapen", "NaN"],
)
def test_weights_that_do_not_fit_are_named(tiny_folder, tmp_path, capfd, change, message):
    folder = copy_of(tiny_folder, tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        MedPLIB.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def damage(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))


def flip(content):
    content[-1000] ^= 1
    return content


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda c: c[: len(c) // 2], "model.safetensors.* damaged"),
        ("model.safetensors", lambda c: b"", "model.safetensors.* damaged"),
        ("model.safetensors", lambda c: b"\xff" * 50, "model.safetensors.* damaged"),
        ("model.safetensors", flip, "SHA-256 differs from weights.sha256"),
        ("weights.sha256", lambda c: b"", "SHA-256 differs from weights.sha256"),
        ("config.json", lambda c: c[: len(c) // 2], "config.json .* cannot be read as JSON"),
        ("config.json", lambda c: b"\x00\xff garbage", "config.json .* cannot be read as JSON"),
        ("config.json", lambda c: b"[1, 2]", "config.json .* not a model's configuration"),
        ("config.json", lambda c: b"[" * 100_000, "config.json .* cannot be read as JSON"),
        ("tokenizer.json", lambda c: c[: len(c) // 2], "tokenizer of .* cannot be read"),
        ("tokenizer.json", lambda c: b"{}", "tokenizer of .* cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tiny_folder, tmp_path, file, change, message):
    folder = copy_of(tiny_folder, tmp_path)
    damage(folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        MedPLIB.from_pretrained(folder)


def test_a_damaged_processor_file_is_named(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    for content in ("{", "[]", '{"grid": 4}', '{"grid": "x", "num_image_tokens": 4}'):
        (folder / "medplib_processor.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"medplib_processor\.json' is damaged"):
            MedPLIBProcessor.from_pretrained(folder)
    (folder / "medplib_processor.json").unlink()
    with pytest.raises(CheckpointError, match=r"no medplib_processor\.json"):
        MedPLIBProcessor.from_pretrained(folder)
    assert MedPLIB.from_pretrained(folder).processor.grid == 4


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no model.safetensors"),
        ("tokenizer.json", "tokenizer of .* cannot be read"),
    ],
)
def test_a_missing_file_is_named(tiny_folder, tmp_path, file, message):
    folder = copy_of(tiny_folder, tmp_path)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        MedPLIB.from_pretrained(folder)


def test_pickles_are_refused_with_a_remedy(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle.*safetensors\.torch\.save_file"):
        MedPLIB.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "gone.safetensors", 3])
def test_an_index_that_names_other_files_is_refused(tiny_folder, tmp_path, name):
    folder = copy_of(tiny_folder, tmp_path)
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json' (names the file|is damaged)"):
        MedPLIB.from_pretrained(folder)


def set_in(content, path, value):
    *parents, last = path.split(".")
    for key in parents:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.num_hidden_layers", 100_000, "num_hidden_layers must be .* got 100000"),
        ("text_config.num_hidden_layers", 1024, "num_hidden_layers is 1024, but its weights have 2 layers"),
        ("text_config.num_hidden_layers", -1, "num_hidden_layers must be .* got -1"),
        ("text_config.hidden_size", -32, "hidden_size"),
        ("text_config.hidden_size", 64, "other shape|Could not load"),
        ("text_config.vocab_size", 10**12, "vocab_size must be"),
        ("text_config.model_type", "no_such_decoder", "model_type must be a decoder.*no_such_decoder"),
        ("text_config.attn_implementation", "someone/kernels", "may not name code"),
        ("text_config.auto_map", {"AutoModelForCausalLM": "a--b.C"}, "may not name code"),
        ("vision.tower.name", "clipp", "No vision tower named 'clipp'. Did you mean 'clip'"),
        ("vision.tower.args.model", "no_such_model", "timm has no model named 'no_such_model'"),
        ("vision.tower.args.model_args", {"layers": [9000, 1]}, "layers must be"),
        ("vision.image_size", 0, "vision.image_size must be"),
        ("mask.depth", 100_000, "mask.depth must be"),
        ("mask.threshold", "high", "mask.*threshold"),
        ("moe.layers", [7], "moe.layers"),
        ("moe.top_k", 9, "moe.top_k must be"),
        ("moe", {"expert": ["a"]}, "moe has no setting expert"),
        ("vison", {}, "no setting 'vison'. Did you mean 'vision'"),
        ("template", "chatty", "No chat template named 'chatty'"),
        ("model_type", "llama", "'llama' model, not of a 'medplib' model"),
        ("tokens.seg", 5, "tokenizer's id of <SEG> is 3.*tokens.seg is 5"),
        ("id2label", "x", "configuration cannot be used"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_error_that_names_the_setting(
    tiny_folder, tmp_path, path, value, message
):
    folder = copy_of(tiny_folder, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    set_in(content, path, value)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(MedPLIBError, match=message):
        MedPLIB.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["medplib-tinny", "", ".", "a/b/c", "~nobody/x", "x" * 5000, "a\0b", "../no", "http://a/b"]
)
def test_an_unknown_name_is_refused_with_what_would_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedPLIBError, match=r"medplib-tiny|no config\.json"):
        MedPLIB.from_pretrained(name)


def test_a_device_is_refused_with_what_moves_the_model():
    with pytest.raises(
        InputError, match=r"takes no device; call \.to\('cuda:1'\) on the model, or give device_"
    ):
        MedPLIB.from_pretrained("medplib-tiny", device="cuda:1")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="give the folder"):
        MedPLIB.from_pretrained(tmp_path / "model.safetensors")
    model_file = tmp_path / "taken"
    model_file.write_text("")
    with pytest.raises(UnknownNameError):
        MedPLIB.from_pretrained("nothing-here")


def test_a_hub_id_is_downloaded_without_pickles_and_then_a_folder(tiny_folder, monkeypatch):
    asked = {}

    def fetch(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tiny_folder)

    monkeypatch.setattr(model_folder, "snapshot_download", fetch)
    loaded = MedPLIB.from_pretrained("somebody/some-model", revision="v2", token="t")
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("somebody/some-model", "v2", "t")
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    assert loaded.identity()["name"] == "somebody/some-model"
    assert type(MedPLIBProcessor.from_pretrained("somebody/some-model")) is MedPLIBProcessor


def test_a_failing_download_is_one_clear_error(monkeypatch):
    def fetch(repo_id, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(model_folder, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"no folder 'somebody/some-model'.*no route\. Check"):
        MedPLIB.from_pretrained("somebody/some-model")


def test_saving_to_a_file_or_to_the_hub_is_refused_before_anything_is_written(tiny_model, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        tiny_model.save_pretrained(tmp_path / "taken")
    with pytest.raises(InputError, match="push_to_hub"):
        tiny_model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_saved_weights_can_be_read_by_whom_the_configuration_can(tiny_model, tmp_path):
    before = os.umask(0o022)
    try:
        tiny_model.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] != 0o600


@pytest.mark.parametrize(
    "content",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"repetition_penalty": 50.0},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 3.0},
        {"custom_generate": "someone/something", "num_beams": 3},
    ],
)
def test_a_file_beside_the_weights_does_not_choose_the_way_of_decoding(
    tiny_model, tiny_folder, tmp_path, pictures, content
):
    folder = copy_of(tiny_folder, tmp_path)
    sampling = {"do_sample": True, "temperature": 0.5, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(content | sampling))
    loaded = MedPLIB.from_pretrained(folder)
    assert loaded.generation_config.temperature == 0.5
    loaded.save_pretrained(tmp_path / "again")
    one, two = (m.ask(pictures[0], "What is this?", max_new_tokens=6) for m in (tiny_model, loaded))
    assert one.text == two.text


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_a_configuration_that_names_a_quantization_is_refused(tiny_folder, tmp_path, where):
    folder = copy_of(tiny_folder, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    part = content
    for key in where:
        part = part[key]
    part["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="quantization_config"):
        MedPLIB.from_pretrained(folder)


def test_an_adapter_that_names_another_model_is_refused(tiny_folder, tmp_path):
    folder = copy_of(tiny_folder, tmp_path)
    content = {"base_model_name_or_path": str(tiny_folder), "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="adapter_config"):
        MedPLIB.from_pretrained(folder)


def test_a_model_with_lora_is_saved_after_it_is_merged(new_model, tmp_path):
    pytest.importorskip("peft")
    model = new_model()
    adapter = LoRA(rank=2, alpha=4, targets=("q_proj", "up_proj"))
    set_stage(model, Stage("lora", lora={"language_model": adapter}))
    with pytest.raises(InputError, match=r"carries LoRA layers.*merge_lora\(model\) first"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merge_lora(model)
    model.save_pretrained(tmp_path / "saved")
    assert MedPLIB.from_pretrained(tmp_path / "saved").state_dict().keys() == model.state_dict().keys()
