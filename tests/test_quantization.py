"""Quantised models: what is in fewer bits, that answers stay, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medplib import Box, MedPLIB, Stage, quantization, set_stage
from medplib.errors import InputError
from medplib.experts.router import MoERouter
from medplib.official.export import export_official
from medplib.processing import Sample

IMAGES = Path(__file__).parents[1] / "examples" / "images"
QUESTIONS = (
    ("chest_ct", "the right lung"),
    ("chest_ct", "the left lung"),
    ("brain_mr", "the left hemisphere"),
    ("brain_mr", "the right hemisphere"),
    ("nuclei", "the largest nucleus"),
)


@pytest.fixture(scope="module")
def folder(new_model, tmp_path_factory):
    """A saved model with widths that int4 can divide in groups, in bfloat16 and in shards."""
    wide = {"hidden_size": 64, "intermediate_size": 96}
    path = tmp_path_factory.mktemp("wide")
    new_model(text=wide).to(torch.bfloat16).save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.fixture(params=quantization.KINDS)
def kind(request):
    return request.param


def answers(model):
    return [model.segment(IMAGES / f"{image}.png", name) for image, name in QUESTIONS]


def dice(one, other):
    a, b = one.masks.any(0), other.masks.any(0)
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


@pytest.fixture(scope="module")
def plain_answers():
    return answers(MedPLIB.from_pretrained())


@pytest.mark.parametrize(("kind", "lowest"), [("int8", 0.99), ("int4", 0.95)])
def test_the_embedded_model_answers_as_before(plain_answers, kind, lowest):
    model = MedPLIB.from_pretrained(quantize=kind)
    assert model.identity()["quantized"] == kind
    for plain, found in zip(plain_answers, answers(model), strict=True):
        assert found.text == plain.text
        assert dice(found, plain) > lowest


def test_linear_layers_and_experts_are_quantised_and_nothing_else(folder, kind):
    model = MedPLIB.from_pretrained(folder, quantize=kind)
    small = {name for name, value in model.named_parameters() if quantization.is_quantized(value)}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wanted = {
        f"{name}.weight"
        for name, module in model.language_model.named_modules(prefix="language_model")
        if isinstance(module, torch.nn.Linear) and name.endswith(names)
    }
    assert small == wanted
    assert sum(".experts.vqa." in name for name in small) == 6
    assert not any(value.requires_grad for n, value in model.named_parameters() if n in small)


def test_the_report_counts_weights_and_bytes(folder, kind):
    plain, model = MedPLIB.from_pretrained(folder), MedPLIB.from_pretrained(folder, quantize=kind)
    report = model.quantization
    sizes = {name: value.numel() for name, value in plain.named_parameters()}
    assert report.parameters == sum(sizes.values())
    small = {name for name, value in model.named_parameters() if quantization.is_quantized(value)}
    assert report.quantized == sum(sizes[name] for name in small)
    assert report.share == report.quantized / report.parameters
    assert sum(report.left_out.values()) == report.parameters - report.quantized
    assert report.left_out["language_model.lm_head"] == sizes["language_model.lm_head.weight"]
    assert "language_model.model.layers.*.mlp.gate" in report.left_out
    assert report.bytes_before == 2 * report.parameters
    rows = sum(plain.get_parameter(name).shape[0] for name in small)
    stored = {"int8": report.quantized + 5 * rows, "int4": report.quantized / 2 + report.quantized / 32 * 4}
    assert report.bytes_after == stored[kind] + 2 * (report.parameters - report.quantized)
    assert f"{kind}: {report.share:.1%} of" in str(report)
    assert plain.quantization is None


def test_a_quantised_layer_computes_nearly_what_the_plain_one_does(folder, kind):
    plain, model = MedPLIB.from_pretrained(folder), MedPLIB.from_pretrained(folder, quantize=kind)
    one, two = (m.language_model.model.layers[0].mlp for m in (plain, model))
    assert isinstance(two, MoERouter)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected, found = one(x).float(), two(x).float()
    assert (found - expected).norm() / expected.norm() < {"int8": 0.03, "int4": 0.25}[kind]


def test_batches_regions_and_masks_work(folder, kind, pictures):
    model = MedPLIB.from_pretrained(folder, quantize=kind)
    samples = [
        Sample([picture], [("What is in <region>?", None)], [Box(3, 4, 30, 40)]) for picture in pictures
    ]
    assert len(model.answer(samples, max_new_tokens=3)) == 3
    drawn = Sample([pictures[0]], [("What?", "A <SEG>.")], masks=[np.eye(48, 60) > 0])
    batch = model.processor([drawn], training=True).to(model.device, model.dtype)
    with torch.no_grad():
        assert model(**batch.tensors).mask_logits.isfinite().all()


def test_places_may_be_named_when_all_are_the_cpu(folder, kind):
    plain = MedPLIB.from_pretrained(folder)
    places = {name: "cpu" for name, _ in plain.named_children()}
    assert MedPLIB.from_pretrained(folder, quantize=kind, device_map=places).quantization.share > 0
    assert MedPLIB.from_pretrained(folder, quantize=kind, device_map="auto").quantization.share > 0


def test_a_published_folder_loads_quantised(golden_dir):
    from parity.recorded_model import Recorded

    recorded = Recorded(golden_dir / "model_tiny")
    model = recorded.load(quantize="int8")
    assert 0 < model.quantization.share < 1
    assert not quantization.is_quantized(model.mask_decoder.iou_token.weight)
    with pytest.raises(InputError, match="A quantised model cannot be exported"):
        export_official(model, "nowhere")


def test_full_training_is_refused_and_changes_nothing(folder, kind):
    model = MedPLIB.from_pretrained(folder, quantize=kind)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    with pytest.raises(InputError, match=r"quantised and cannot be trained in full; use LoRA|no gradient"):
        set_stage(model, Stage("all", train=("experts.grounding",)))
    assert before == {name: value.requires_grad for name, value in model.named_parameters()}
    with pytest.raises(InputError, match="A quantised model is not saved"):
        model.save_pretrained("nowhere")


def test_lora_trains_on_int8_layers_and_int4_refuses(folder, pictures):
    model = MedPLIB.from_pretrained(folder, quantize="int8")
    set_stage(model, "vqa")
    sample = Sample([pictures[0]], [("What?", "A liver.")])
    batch = model.processor([sample], training=True).to(model.device, model.dtype)
    model(**batch.tensors).loss.backward()
    assert any("lora_B" in name and value.grad is not None for name, value in model.named_parameters())
    with pytest.raises(InputError, match="int4 layers pass no gradient on"):
        set_stage(MedPLIB.from_pretrained(folder, quantize="int4"), "vqa")


def test_wrong_settings_are_refused_before_loading(tiny_folder, folder, monkeypatch):
    with pytest.raises(InputError, match="quantize must be one of int8, int4, got 'int3'"):
        MedPLIB.from_pretrained(tiny_folder, quantize="int3")
    with pytest.raises(InputError, match=r"int4 computes in bfloat16; leave dtype='torch.float32' out"):
        MedPLIB.from_pretrained(folder, quantize="int4", dtype=torch.float32)
    with pytest.raises(InputError, match="cannot stay on the disk"):
        MedPLIB.from_pretrained(folder, quantize="int8", device_map={"": "disk"})
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"pip install .medplib\[quant\]"):
        MedPLIB.from_pretrained(folder, quantize="int8")


def test_a_model_too_narrow_for_int4_is_refused(new_model, tmp_path):
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    new_model(text=narrow).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="No layer of this model can be stored as int4"):
        MedPLIB.from_pretrained(tmp_path, quantize="int4")


def test_int4_groups_are_the_largest_that_divide_every_width(tiny_config):
    def group(**text):
        return quantization._group_size(tiny_config(text=text).text_config)

    assert group(hidden_size=4096, intermediate_size=11008, num_attention_heads=32) == 128
    assert group(hidden_size=128, intermediate_size=192, num_attention_heads=4) == 64
    assert group(hidden_size=128, intermediate_size=352, num_attention_heads=4) == 32
    assert group(hidden_size=16, intermediate_size=24, num_attention_heads=2) == 32


@pytest.mark.parametrize(
    ("device_map", "cuda"),
    [(None, False), ("cpu", False), ("cuda", True), ("cuda:1", True), (0, True), ({"": 0}, True),
     ({"a": "cpu", "b": "disk"}, False), ({"": torch.device("cuda")}, True)],
)  # fmt: skip
def test_the_kernels_follow_the_device(device_map, cuda):
    assert quantization._on_cuda(device_map) is cuda
