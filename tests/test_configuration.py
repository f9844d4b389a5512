"""MedPLIBConfig: checked when it is made, exact through JSON, and free of anything that names code."""

import copy
import json
import math

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from medplib.configuration import (
    LossConfig,
    MaskConfig,
    MedPLIBConfig,
    MoEConfig,
    Part,
    RegionConfig,
    TokenConfig,
    VisionConfig,
)
from medplib.errors import InputError


def test_the_defaults_are_the_published_sizes():
    config = MedPLIBConfig()
    assert config.text_config.model_type == "llama"
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (4096, 32267)
    assert (config.tokens.image, config.tokens.region, config.tokens.seg) == (-200, -300, 32000)
    assert (config.vision.tower.name, config.vision.image_size) == ("clip", 336)
    assert (config.mask.encoder.name, config.mask.image_size, config.mask.dim) == ("sam_vit", 256, 256)
    assert config.moe is None
    assert config.moe_layers == []


def test_a_configuration_comes_back_from_json_as_it_was(tiny_config, tmp_path):
    config = tiny_config(moe={"experts": ["a", "b", "c"], "layers": [1], "top_k": 2}, template="vicuna_v1")
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    for loaded in (MedPLIBConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MedPLIBConfig
        assert isinstance(loaded.moe, MoEConfig)
        assert isinstance(loaded.vision.tower, Part)
        for part in ("vision", "region", "mask", "moe", "tokens", "losses", "template"):
            assert getattr(loaded, part) == getattr(config, part), part
        assert loaded.text_config.to_dict() == config.text_config.to_dict()
    again = MedPLIBConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()


def test_parts_may_be_given_as_dicts_or_as_objects():
    one = MedPLIBConfig(
        text_config=Qwen2Config(num_hidden_layers=3),
        vision=VisionConfig(Part("timm", {"model": "test_vit"})),
        region=RegionConfig(mask_mode="area"),
        mask=MaskConfig(Part("sam_vit"), threshold=0.25),
        moe=MoEConfig(["x", "y"]),
        tokens=TokenConfig(1, 2, 3),
        losses=LossConfig(dice=5.0),
    )
    two = MedPLIBConfig(
        text_config={"model_type": "qwen2", "num_hidden_layers": 3},
        vision={"tower": {"name": "timm", "args": {"model": "test_vit"}}},
        region={"mask_mode": "area"},
        mask={"encoder": {"name": "sam_vit"}, "threshold": 0.25},
        moe={"experts": ("x", "y")},
        tokens={"image": 1, "region": 2, "seg": 3},
        losses={"dice": 5},
    )
    assert one.to_dict() == two.to_dict()
    assert two.losses.dice == 5.0
    assert two.moe_layers == [0, 1, 2]


def test_the_mixture_may_cover_some_layers():
    text = {"num_hidden_layers": 4}
    assert MedPLIBConfig(text_config=text, moe={"layers": [3, 1]}).moe_layers == [3, 1]
    for wrong in ([4], [-1], [1, 1]):
        with pytest.raises(InputError, match=r"moe\.layers must be different numbers from 0 to 3"):
            MedPLIBConfig(text_config=text, moe={"layers": wrong})


@pytest.mark.parametrize("tied", [True, False])
def test_whether_embeddings_are_tied_is_the_language_models_business(tied):
    config = MedPLIBConfig(text_config=LlamaConfig(tie_word_embeddings=tied), tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vison": {}}, "no setting 'vison'. Did you mean 'vision'"),
        ({"mo": None, "experts": 3}, "no setting 'mo'. Did you mean 'moe'"),
        ({"auto_map": {"AutoModel": "x--y"}}, "no setting 'auto_map'"),
        ({"vision": {"towr": {"name": "clip"}}}, "vision has no setting towr. Known: tower, projector"),
        ({"vision": {}}, "vision: .*tower"),
        ({"vision": "clip"}, "vision must be a VisionConfig or a dict of its fields, got 'clip'"),
        ({"vision": {"tower": "clip"}}, r"vision\.tower must be a Part or a dict"),
        ({"vision": {"tower": {"name": 7}}}, r"vision\.tower: .*'name' expected str, got int"),
        ({"vision": {"tower": {"name": "clip"}, "image_size": "big"}}, "vision: .*'image_size' expected int"),
        ({"vision": {"tower": {"name": "clip"}, "image_size": 4}}, r"vision\.image_size must be between 8"),
        ({"vision": {"tower": {"name": "clip"}, "std": [1, 0, 1]}}, r"vision\.std must be three finite"),
        ({"vision": {"tower": {"name": "clip"}, "mean": [1.0]}}, r"vision\.mean must be three"),
        ({"region": {"mask_mode": "soft"}}, "region: .*mask_mode"),
        ({"region": {"point_size": 0}}, r"region\.point_size must be between 1"),
        ({"mask": {"encoder": {"name": "sam_vit"}, "threshold": 1.0}}, r"mask\.threshold is a probability"),
        ({"mask": {"encoder": {"name": "sam_vit"}, "num_heads": -1}}, r"mask\.num_heads must be between 1"),
        ({"moe": {"experts": []}}, r"moe\.experts must be a list of different names"),
        ({"moe": {"experts": ["a", "a"]}}, r"moe\.experts must be a list of different names"),
        ({"moe": {"experts": [str(i) for i in range(300)]}}, "at most 256 names, got 300"),
        ({"moe": {"drop": "any"}}, "moe: .*drop"),
        ({"moe": {"z_loss_coef": math.inf}}, r"moe\.z_loss_coef must be a finite number"),
        ({"moe": {"top_k": 3}}, r"moe\.top_k must be between 1 and 2"),
        ({"moe": {"top_k": True}}, "moe: .*'top_k' expected int, got bool"),
        ({"moe": {"balance_loss_coef": math.nan}}, r"moe\.balance_loss_coef must be a finite number"),
        ({"tokens": {"image": 1, "region": 1, "seg": 2}}, "three different ids"),
        ({"tokens": {"image": 1, "region": 2}}, "tokens: .*seg"),
        ({"losses": {"dice": -1}}, r"losses\.dice must be a finite number of at least 0, got -1"),
        ({"losses": {"dice": "much"}}, "losses: .*'dice' expected float, got str"),
        ({"template": 3}, "template must be the name of a chat template, got 3"),
        ({"text_config": "llama"}, "text_config must be a configuration or a dict, got 'llama'"),
        ({"text_config": {"model_type": "nothing"}}, r"model_type must be a decoder.*got 'nothing'"),
        ({"text_config": {"model_type": ["llama"]}}, r"text_config\.model_type must be a decoder"),
        ({"text_config": {"num_hidden_layers": 100_000}}, "num_hidden_layers must be .*1024.* got 100000"),
        ({"text_config": {"hidden_size": -4}}, "text_config.* got -4|text_config: .*hidden"),
        ({"text_config": {"vocab_size": 0}}, r"text_config\.vocab_size must be a number between 1"),
        ({"text_config": {"hidden_size": 30, "num_attention_heads": 4}}, "text_config: "),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_its_value(settings, message):
    with pytest.raises(InputError, match=message):
        MedPLIBConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"text_config": {"_attn_implementation": "someone/kernel:fn"}},
        {"text_config": {"experts_implementation": {"": "a.b"}}},
        {"text_config": {"auto_map": {"AutoModelForCausalLM": "repo--file.Class"}}},
        {
            "vision": {
                "tower": {"name": "clip", "args": {"config": {"attn_implementation": "someone/kernel"}}}
            }
        },
        {"attn_implementation": "someone/kernel"},
    ],
)
def test_nothing_in_a_configuration_may_name_code_from_elsewhere(settings):
    with pytest.raises(InputError, match="may not name code from elsewhere"):
        MedPLIBConfig(**settings)


def test_a_plain_name_of_an_attention_is_allowed():
    config = MedPLIBConfig(attn_implementation="eager")
    assert config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "args",
    [
        {"depth": 100_000}, {"model_args": {"layers": [1000, 1000]}}, {"dim": 1 << 30}, {"dim": -(1 << 30)},
        {"ratio": math.nan}, {"ratio": math.inf},
        {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}},
    ],
)  # fmt: skip
def test_sizes_that_no_part_has_are_refused(args):
    with pytest.raises(InputError, match=r"vision\.tower\.args"):
        MedPLIBConfig(vision={"tower": {"name": "timm", "args": args}})


def test_what_transformers_keeps_in_configurations_is_allowed():
    config = MedPLIBConfig(
        dtype="float32", architectures=["MedPLIB"], use_cache=True, output_hidden_states=False
    )
    assert str(config.dtype) == "torch.float32"
    assert MedPLIBConfig.from_dict({**config.to_dict(), "max_length": 20, "_commit_hash": None}).architectures


def test_the_configuration_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="'llama' model, not of a 'medplib' model"):
        MedPLIBConfig.from_dict(LlamaConfig().to_dict())
