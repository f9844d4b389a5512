"""SAM-Med2D's image encoder, adapter and mask decoder equal the published ones on the recorded tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from medplib.decoders.mask_decoder import MaskDecoder
from medplib.decoders.two_way import TwoWayTransformer
from medplib.vision.sam_vit import SamImageEncoder

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def description(golden_dir):
    return json.loads((golden_dir / "sam" / "sam.json").read_text())


@pytest.fixture(scope="module")
def tensors(golden_dir):
    return load_file(golden_dir / "sam" / "sam.safetensors")


@pytest.fixture(scope="module")
def weights(tensors):
    return {name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def encoder(description, weights):
    d = description["dims"]
    encoder = SamImageEncoder(
        d["image_size"], d["patch_size"], d["embed_dim"], d["depth"], d["heads"], d["window"],
        d["global_attn"], out_channels=d["prompt_dim"],
    )  # fmt: skip
    encoder.load_sam_state_dict(weights)
    return encoder.eval()


@pytest.fixture(scope="module")
def decoder(description, weights):
    d = description["dims"]
    masks = weights["mask_decoder.mask_tokens.weight"].shape[0] - 1
    hidden = weights["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0]
    depth = len({k.split(".")[3] for k in weights if k.startswith("mask_decoder.transformer.layers.")})
    transformer = TwoWayTransformer(d["prompt_dim"], depth, d["dec_heads"], d["dec_mlp"])
    decoder = MaskDecoder(d["prompt_dim"], transformer, masks, iou_head_hidden_dim=hidden)
    decoder.load_sam_state_dict(weights)
    return decoder.eval()


@torch.no_grad()
def test_the_adapter_equals_the_published_one(encoder, tensors):
    out = encoder.network.blocks[0].adapter(tensors["adapter.in"])
    torch.testing.assert_close(out, tensors["adapter.out"], **CLOSE)


@torch.no_grad()
def test_the_first_block_equals_the_published_one(encoder, tensors):
    seen = []
    handle = encoder.network.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    encoder(tensors["image_encoder.in"].float())
    handle.remove()
    expected = tensors["image_encoder.block0.out_b0"]
    torch.testing.assert_close(seen[0][: len(expected)], expected, **CLOSE)


@torch.no_grad()
def test_the_image_encoder_equals_the_published_one(encoder, tensors):
    grid = encoder(tensors["image_encoder.in"].float()).grid
    torch.testing.assert_close(grid, tensors["image_encoder.out"], **CLOSE)


@torch.no_grad()
def test_the_mask_decoder_equals_the_published_one_on_every_recorded_prompt(decoder, description, tensors):
    assert description["decoder_cases"]
    for name, case in description["decoder_cases"].items():
        _, prompt, kind = name.split(".")
        images = tensors["image_encoder.out"]
        if "[:1]" in case["image_embeddings"]:
            images = images[:1]
        sparse = tensors[f"prompt.{prompt}.sparse"]
        dense = tensors[f"prompt.{prompt}.dense"].expand(-1, -1, *images.shape[-2:])
        masks, iou = decoder(images, tensors["prompt.dense_pe"], sparse, dense, multimask=kind == "multi")
        stored = case["stored_batch"]
        for value, what in ((masks, "low_res"), (iou, "iou")):
            expected = tensors[f"{name}.{what}"]
            torch.testing.assert_close(
                value[:stored], expected, msg=lambda m, n=f"{name}.{what}": f"{n}: {m}", **CLOSE
            )


def test_the_published_vit_b_names_and_shapes_all_fit(golden_dir):
    shapes = json.loads((golden_dir / "sam" / "sam_med2d_vit_b_keys.json").read_text())
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        encoder, decoder = SamImageEncoder(), MaskDecoder(256, TwoWayTransformer(256))
    encoder.load_sam_state_dict(state)
    decoder.load_sam_state_dict(state)
    fitted = len(encoder.state_dict()) + len(decoder.state_dict())
    assert fitted == sum(not name.startswith("prompt_encoder.") for name in shapes)
