"""Our model -> a folder in the published layout: config.json, sharded safetensors, tokenizer files.

export_official(model, "MedPLIB-export")     # what was imported comes out bit-identical
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from medplib.errors import InputError
from medplib.official.configuration import CLIP_REPOSITORY, is_official
from medplib.official.names import official_name

if TYPE_CHECKING:
    from medplib.modeling import MedPLIB

# Settings of a gate that leave its choice and its weights as they are.
_GATE_ARGS = {"use_rts", "seed", "noise", "noise_scale"}
INDEX = "model.safetensors.index.json"
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def export_official(model: MedPLIB, folder: str | Path, max_shard_size: int | str = "5GB") -> Path:
    """Write a model in the published layout; returns the folder.

    Sizes of CLIP and SAM have no place in it: where they are not the published ones, a reader needs them as
    `overrides`. Raises InputError, before anything is written, for a model with parts that the published one
    does not have.
    """
    folder = Path(folder)
    _check(model, folder)
    content = official_content(model)
    state = official_state_dict(model)
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in plan.filename_to_tensors.items():
        shard = {key: state[key].contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", content)
    if model.processor is not None:
        model.processor.tokenizer.save_pretrained(folder)
    return folder


def official_state_dict(model: MedPLIB) -> dict[str, Tensor]:
    """{published name: tensor}, the old rotary tables included, which the published code writes."""
    experts = model.config.moe.experts if model.config.moe else []
    state = {
        official_name(name, experts): value.detach().cpu()
        for name, value in model.state_dict().items()
        if not name.endswith(".gate.noise.state")
    }
    text = model.config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = (getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    table = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)  # (width / 2,)
    for layer in range(text.num_hidden_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = table.to(model.dtype).clone()
    return state


def official_content(model: MedPLIB) -> dict[str, Any]:
    """The published config.json of a model; what an imported one said beside this is kept."""
    from medplib.checkpoints import read_content

    config = model.config
    kept = read_content(model.source) if getattr(model, "source", None) else {}
    text, moe = config.text_config, config.moe
    rope = dict(getattr(text, "rope_parameters", None) or {})
    scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if rope.get("factor") else None
    content = {key: getattr(text, key) for key in _TEXT_KEYS if hasattr(text, key)} | {
        "architectures": ["MedPLIBForCausalLM" if moe else "LISAForCausalLM"],
        "model_type": "medplib_moe_llama" if moe else "medplib",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
        "mm_vision_tower": CLIP_REPOSITORY, "vision_tower": CLIP_REPOSITORY,
        "mm_hidden_size": model.vision_tower.channels,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": model.vision_tower.select_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": True, "mm_use_im_patch_token": False,
        "max_sample_point": config.region.pooler.args.get("max_points", 512),
        "region_fea_adapter": True, "region_geo_sampler": False,
        "out_dim": config.mask.dim, "train_mask_decoder": True,
    }  # fmt: skip
    if moe:
        count = len(config.moe_layers)
        content["moe"] = {
            "moe_enable": True, "moe_mode": "dense", "ep_size": 1, "use_residual": False,
            "moe_layers_idx": config.moe_layers, "num_experts": [len(moe.experts)] * count,
            "top_k_experts": moe.top_k, "router_aux_loss_coef": moe.balance_loss_coef,
            "capacity_factor": 1.5 if moe.capacity_factor is None else moe.capacity_factor,
            "eval_capacity_factor": moe.eval_capacity_factor or float(len(moe.experts)),
            "min_capacity": moe.min_capacity,
        }  # fmt: skip
    if not is_official(kept):
        return content
    own = kept.get("moe")
    same = {key for key in ("mm_vision_tower", "vision_tower", "rope_theta", "architectures") if key in kept}
    if "rope_theta" not in kept and content["rope_theta"] == 10000.0:
        del content["rope_theta"]
    merged = kept | {key: value for key, value in content.items() if key not in same}
    return merged | ({"moe": content["moe"] | own} if moe and isinstance(own, dict) else {})


def _check(model: MedPLIB, folder: Path) -> None:
    config, text, moe = model.config, model.config.text_config, model.config.moe
    width = text.hidden_size // text.num_attention_heads
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    names = {
        "text_config.model_type": (text.model_type, "llama"),
        "text_config.attention_bias": (getattr(text, "attention_bias", False), False),
        "text_config.mlp_bias": (getattr(text, "mlp_bias", False), False),
        "text_config.head_dim": (getattr(text, "head_dim", None) or width, width),
        "vision.tower": (config.vision.tower.name, "clip"),
        "vision.projector": (config.vision.projector.name, "mlp2x_gelu"),
        "region.pooler": (config.region.pooler.name, "mean"),
        "mask.encoder": (config.mask.encoder.name, "sam_vit"),
        "region.pooler.args.weights": (config.region.pooler.args.get("weights", "binary"), "binary"),
        "mask.decoder": (config.mask.decoder.name, "sam"),
        "mask.encoder.args.adapters": (config.mask.encoder.args.get("adapters", True), True),
    }
    if rope not in ("default", "linear", "dynamic"):
        names["text_config.rope_parameters"] = (rope, "default")
    if moe is not None:
        names |= {
            "moe.gate": (moe.gate, "topk"),
            "moe.score": (moe.score, "softmax"),
            "moe.gate_args": (sorted(moe.gate_args.keys() - _GATE_ARGS), []),
            "moe.renormalize": (moe.renormalize, moe.top_k == 2 and moe.parity is None),
        }
    wrong = [f"{key} is {has!r}, needed {needs!r}" for key, (has, needs) in names.items() if has != needs]
    if wrong:
        raise InputError(f"The published layout cannot hold this model: {'; '.join(wrong)}.")
    if folder.is_file():
        raise InputError(f"{str(folder)!r} is a file; give the path of a folder.")
    if getattr(model, "quantization", None) is not None:
        raise InputError("A quantised model cannot be exported; load it without quantize.")
    if any(value.device.type == "meta" for value in model.state_dict().values()):
        raise InputError("Some weights are offloaded; load the model without device_map to export it.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
