"""The published config.json -> the settings of a MedPLIBConfig. No string in it runs or fetches anything.

The published configuration holds the sizes of the language model and of the mixture only. Those of CLIP and
SAM are `ClipSizes` and `SamSizes`: by default the published ones, or what the caller gives as `overrides`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from medplib.errors import InputError

MODEL_TYPES = ("medplib_moe_llama", "medplib_llama", "llava", "llava_llama", "llava_mistral")
CLIP_REPOSITORY = "openai/clip-vit-large-patch14-336"
CONTROL_TOKENS = 267  # 9 control tokens, <gen_1> to <gen_256>, <im_start> and <im_end>; <SEG> is the first
EXPERT_NAMES = ("grounding", "vqa")  # experts 0 and 1 of the published mixture

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "sliding_window"),
    "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """Sizes of the CLIP tower; the defaults are ViT-L/14 at 336 pixels."""

    hidden: int = 1024
    inter: int = 4096
    layers: int = 24
    heads: int = 16
    image: int = 336
    patch: int = 14

    def settings(self) -> dict[str, int]:
        """The arguments of a CLIPVisionConfig."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = dict(zip((*names, "image_size", "patch_size"), dataclasses.astuple(self), strict=True))
        return sizes | {"projection_dim": 768 if self == ClipSizes() else self.hidden}


@dataclasses.dataclass(frozen=True)
class SamSizes:
    """Sizes of the mask side; the defaults are SAM-Med2D's ViT-B with adapters at 256 pixels."""

    image_size: int = 256
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    heads: int = 12
    window: int = 14
    global_attn: tuple[int, ...] = (2, 5, 8, 11)
    prompt_dim: int = 256
    mask_in_chans: int = 16
    dec_mlp: int = 2048
    dec_heads: int = 8

    def settings(self) -> dict[str, Any]:
        """The `mask` part of a MedPLIBConfig."""
        encoder = {
            "image_size": self.image_size, "patch_size": self.patch_size, "dim": self.embed_dim,
            "depth": self.depth, "num_heads": self.heads, "window_size": self.window,
            "global_blocks": list(self.global_attn), "out_channels": self.prompt_dim,
        }  # fmt: skip
        return {
            "encoder": {"name": "sam_vit", "args": encoder},
            "decoder": {"name": "sam", "args": {"iou_head_hidden_dim": self.prompt_dim}},
            "dim": self.prompt_dim, "image_size": self.image_size, "mask_channels": self.mask_in_chans,
            "num_heads": self.dec_heads, "mlp_dim": self.dec_mlp,
        }  # fmt: skip


def is_official(content: Any) -> bool:
    """Whether a config.json is one of the published kinds: MedPLIB with or without mixture, or LLaVA.

    (The dense published runs say "medplib" like this package; theirs has no "text_config".)
    """
    if not isinstance(content, dict) or "text_config" in content:
        return False
    kind = content.get("model_type")
    return kind in MODEL_TYPES or (kind == "medplib" and "hidden_size" in content)


def is_start(content: Mapping[str, Any]) -> bool:
    """Whether a published config.json is LLaVA's, which has no mask side and no control tokens: a start."""
    return str(content.get("model_type")).startswith("llava")


def convert(
    content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, seg: int | None = None
) -> dict[str, Any]:
    """A published config.json -> the arguments of MedPLIBConfig.

    overrides: {"sam": {...}, "clip": {...}} with the fields of SamSizes and ClipSizes; "moe": fields of a
    MoEConfig, where {"parity": "deepspeed"} brings the file's capacities into force. seg: id of `<SEG>`, by
    default the first after the language model's own words. Raises InputError for what cannot be represented.
    """
    _check_mapping("overrides", overrides)
    overrides = dict(overrides or {})
    _check_mapping("overrides['moe']", overrides.get("moe"))
    clip, sam = (
        _sizes(cls, overrides.pop(name, None), name) for cls, name in ((ClipSizes, "clip"), (SamSizes, "sam"))
    )
    mixture = _mixture(content, overrides.pop("moe", None) or {})
    if overrides:
        raise InputError(f"overrides knows 'clip', 'sam' and 'moe', got {', '.join(map(repr, overrides))}.")
    projector = content.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise InputError(f"mm_projector_type must be 'mlp2x_gelu', got {projector!r:.80}.")
    text = _text(content)
    if seg is None and is_start(content):
        text["vocab_size"] += CONTROL_TOKENS
    seg = text["vocab_size"] - CONTROL_TOKENS if seg is None else seg
    pooler = {"max_points": _number(content, "max_sample_point", 512), "official": True}
    if content.get("region_geo_sampler"):
        raise InputError(
            "region_geo_sampler is true: no published weights use it, and their names for it are not known. "
            "Set it to false, or build the model with region pooler 'geometry'."
        )
    for key in ("mm_token_compress", "icl_mask_encoder"):
        if content.get(key):
            raise InputError(f"{key} is true: the parts of the in-context extension are not supported.")
    if (kind := content.get("mm_vision_select_feature")) not in (None, "patch"):
        raise InputError(f"mm_vision_select_feature must be 'patch', got {kind!r:.80}.")
    return {
        "text_config": text,
        "vision": {
            "tower": {
                "name": "clip",
                "args": {
                    "config": clip.settings(),
                    "select_layer": _number(content, "mm_vision_select_layer", -2),
                },
            },
            "projector": {"name": "mlp2x_gelu"},
            "image_size": clip.image,
        },
        "region": {"pooler": {"name": "mean", "args": pooler}},
        "mask": sam.settings(),
        "moe": mixture,
        "tokens": {"image": -200, "region": -300, "seg": seg},
        "template": "vicuna_v1",
        "dtype": _dtype(content),
    }


def expert_names(count: int) -> list[str]:
    """Names for `count` published experts, in the order of their numbers."""
    return list(EXPERT_NAMES) if count == 2 else [f"expert_{i}" for i in range(count)]


def _sizes(cls: type, given: Any, name: str) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    if given is None:
        return cls()
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise InputError(
            f"overrides['{name}'] must be a dict with some of {', '.join(known)}; got {given!r:.200}."
        )
    made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    for key, value in dataclasses.asdict(made).items():
        numbers = value if isinstance(value, tuple) else [value]
        least = 0 if key in ("window", "global_attn") else 1
        if not all(type(n) is int and n >= least for n in numbers):
            raise InputError(
                f"overrides['{name}']['{key}'] must be whole numbers from {least}, got {value!r:.80}."
            )
    return made


def _check_mapping(name: str, given: Any) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} must be a dict, got {given!r:.80}.")


def _text(content: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's own settings. `rope_scaling` of old files becomes today's `rope_parameters`."""
    needed = ("vocab_size", "hidden_size", "num_hidden_layers")
    lacking = [key for key in needed if type(content.get(key)) is not int]
    if lacking:
        raise InputError(f"This published config.json lacks {', '.join(lacking)}; copy it again.")
    text = {key: content[key] for key in _TEXT_KEYS if content.get(key) is not None}
    text["model_type"] = "mistral" if content.get("model_type") == "llava_mistral" else "llama"
    rope = {"rope_type": "default", "rope_theta": _number(content, "rope_theta", 10000.0)}
    scaling = content.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else None
        if kind not in ("linear", "dynamic"):
            raise InputError(f"rope_scaling must be null, or of type linear or dynamic, got {scaling!r:.80}.")
        rope |= {"rope_type": kind, "factor": _number(scaling, "factor", 1.0)}
    return text | {"rope_parameters": rope}


def _mixture(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `moe` part of a MedPLIBConfig; None for a dense checkpoint."""
    moe = content.get("moe") or {}
    if not isinstance(moe, Mapping):
        raise InputError(f"moe must be a dict, got {moe!r:.80}.")
    if not moe or moe.get("moe_enable", True) is False:
        return None
    if moe.get("use_residual"):
        raise InputError("moe.use_residual is true: a residual expert beside the mixture is not supported.")
    layers, counts = _numbers(moe.get("moe_layers_idx")), _numbers(moe.get("num_experts"))
    if layers is None:
        layers = list(range(content["num_hidden_layers"]))
    if not counts or len(set(counts)) > 1 or len(counts) not in (1, len(layers)):
        raise InputError(
            "moe.num_experts must be one number for every mixed layer, all equal, got "
            f"{moe.get('num_experts')!r:.80}."
        )
    top_k = changes.get("top_k", moe.get("top_k_experts") or 1)
    mixture = {
        "experts": expert_names(counts[0]),
        "layers": layers,
        "top_k": top_k,
        "renormalize": top_k == 2 and not changes.get("parity"),  # the published gate does so by itself
        "balance_loss_coef": _number(moe, "router_aux_loss_coef", 0.0),
    }
    if changes.get("parity"):
        names = ("capacity_factor", "eval_capacity_factor", "min_capacity")
        defaults = (1.0, 1.0, 0)
        mixture |= {name: _number(moe, name, value) for name, value in zip(names, defaults, strict=True)}
    return mixture | dict(changes)


def _number(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """A number of the default's type, or the default where there is none. Raises InputError for others."""
    value = content.get(key)
    if value is None:
        return default
    if type(value) is int or (type(value) is float and type(default) is float):
        return type(default)(value)
    raise InputError(f"{key} must be a number, got {value!r:.80}.")


def _numbers(value: Any) -> list[int] | None:
    """[0, 1], 2 or the text "0,1" (as some runs wrote it) -> a list."""
    if value is None or isinstance(value, int):
        return None if value is None else [value]
    if isinstance(value, str):
        value = [int(word) for word in re.findall(r"\d+", value)]
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise InputError(f"moe holds {value!r:.80} where whole numbers are needed.")


def _dtype(content: Mapping[str, Any]) -> str:
    kind = content.get("torch_dtype") or content.get("dtype") or "float32"
    if kind not in ("float32", "bfloat16", "float16"):
        raise InputError(f"torch_dtype must be float32, bfloat16 or float16, got {kind!r:.80}.")
    return kind
