"""Fixtures every test may use: the folder of recorded numbers from the published implementation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The recordings kept with the tests; tests/parity may take others."""
    return Path(__file__).parent / "fixtures" / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir):
    """`golden("sam/sam.json")` gives what the file holds, `golden("sam/sam.safetensors")` its tensors."""
    return opener(golden_dir)


def opener(folder: Path) -> Callable[[str], dict]:
    """What reads the JSON and safetensors files of a folder of recordings."""

    def load(name: str) -> dict:
        if name.endswith(".json"):
            return json.loads((folder / name).read_text(encoding="utf-8"))
        from safetensors.torch import load_file

        return load_file(folder / name)

    return load


# The tiny model of these tests has random weights: 2 layers of width 32, two experts, images of 64 pixels.

TINY_PYRAMID = {
    "name": "timm_pyramid",
    "args": {
        "model": "test_resnet",
        "dim": 32,
        "coordinates": True,
        "skip_strides": [8, 4],
        "skip_channels": [16, 8],
    },
}
TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with the control tokens, learned from a few questions and answers."""
    from medplib.training.tokenizer import build_tokenizer

    texts = [
        "USER: ",
        " ASSISTANT:",
        "Segment the right lung.",
        "What is in this region?",
        "Here is the liver.",
    ]
    return build_tokenizer(texts * 3, vocab_size=320)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    """`tiny_config(moe=None, text={...}, mask={...})`: a configuration; parts given replace the tiny ones."""
    from medplib.configuration import MedPLIBConfig

    def make(text: dict | None = None, **changes):
        mask = {
            "encoder": TINY_PYRAMID, "dim": 32, "image_size": 64, "mask_channels": 8, "num_heads": 4,
            "mlp_dim": 32,
            "decoder": {"name": "sam", "args": {"num_multimask_outputs": 0, "iou_head_hidden_dim": 16}},
        }  # fmt: skip
        vision = {
            "tower": {"name": "timm_pyramid", "args": {**TINY_PYRAMID["args"], "skip_strides": []}},
            "projector": {"name": "pooled_mlp", "args": {"factor": 2}}, "image_size": 64,
        }  # fmt: skip
        parts = {
            "vision": vision,
            "region": {"mask_mode": "area", "pooler": {"name": "mean", "args": {"weights": "area"}}},
            "moe": {"experts": ["grounding", "vqa"]},
            "tokens": {"image": -200, "region": -300, "seg": tokenizer.convert_tokens_to_ids("<SEG>")},
            "losses": {"ce": 1.0, "dice": 0.5, "bce": 2.0, "focal": 0.3, "iou": 0.1},
            "template": "brief",
        } | changes
        parts["mask"] = mask | changes.get("mask", {})
        return MedPLIBConfig(text_config={**TINY_TEXT, "vocab_size": len(tokenizer)} | (text or {}), **parts)

    return make


@pytest.fixture(scope="session")
def new_model(tokenizer, tiny_config):
    """`new_model(seed=0, moe=None, ...)` makes a tiny random model in evaluation mode, with its processor."""
    import torch

    from medplib.modeling import MedPLIB
    from medplib.processing import MedPLIBProcessor

    def make(seed: int = 0, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MedPLIB(tiny_config(**changes)).eval()
            for name, parameter in model.named_parameters():
                if "norm" not in name and parameter.ndim > 1 and name.startswith("language_model"):
                    torch.nn.init.normal_(parameter, std=0.3)  # larger than usual, so that tokens matter
        grid = model.config.vision.image_size // model.vision_tower.stride
        model.processor = MedPLIBProcessor(tokenizer, model.config, model.num_image_tokens, grid)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_model(new_model):
    """One tiny mixture for tests that do not change it."""
    return new_model()


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):
    """Where `tiny_model` was saved; copy it before changing a file."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """Three different uint8 RGB images of different sizes."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 60), (70, 40), (64, 64))]
