"""Checkpoints of others: published MedPLIB and LLaVA folders, CLIP, SAM and SAM-Med2D files -> our names.

    model = MedPLIB.from_pretrained("folder/of/MedPLIB-7b-2e")   # finds out by itself what the folder is
    start = MedPLIB.from_pretrained("folder/of/llava-v1.5-7b", clip="openai/clip-vit-large-patch14-336")
    load_sam(model, "sam-med2d_b.pth")                           # the mask side alone

Tensors are renamed by the table in `medplib.official.names` and stay unread until they are placed;
transformers' loader then puts each on its device in its dtype, so device_map, dtype and quantization work as
for our own files. Its conversion mapping (`key_mapping`) is not used for the renaming: it would write the
published names back on every later save, it cannot merge adapters, and it needs an index that matches the
shards, which published folders do not always have.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medplib.configuration import MedPLIBConfig
from medplib.errors import CheckpointError, InputError
from medplib.model_folder import local_folder
from medplib.official.configuration import CLIP_REPOSITORY, convert, is_official, is_start
from medplib.official.files import (
    adapter_settings,
    merge_adapters,
    read_files,
    read_pickle,
    weight_files,
)
from medplib.official.names import IGNORED, rename, sam_name
from medplib.weights import check_fit, shape_of

if TYPE_CHECKING:
    from medplib.modeling import MedPLIB

_CLIP_HUB = ("cache_dir", "local_files_only", "token", "force_download")  # of the arguments for the Hub
_CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."


def read_content(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as it is; {} where it cannot be read (`read_config` then says why)."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def holds_official(folder: Path) -> bool:
    """Whether a folder holds a published layout and not ours."""
    return is_official(read_content(folder))


def official_config(
    folder: Path, overrides: Mapping[str, Any] | None = None, **settings: Any
) -> MedPLIBConfig:
    """The configuration of a published folder. `settings` replace whole parts of it. Raises InputError."""
    added = _added_tokens(folder)
    try:
        converted = convert(read_content(folder), overrides, added.get("<SEG>"))
        config = MedPLIBConfig(**{**converted, **settings})
    except InputError as error:
        raise InputError(f"config.json of {str(folder)!r}: {error}") from error
    config.name_or_path = str(folder)
    return config


def published_clip(folder: Path) -> str | None:
    """The repository of the published CLIP tower, where a configuration names that, under whatever path."""
    named = read_content(folder).get("mm_vision_tower")
    last = str(named).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return CLIP_REPOSITORY if last == CLIP_REPOSITORY.rpartition("/")[2] else None


def official_state(
    folder: Path,
    config: MedPLIBConfig,
    clip: str | Path | None = None,
    adapter: str | Path | None = None,
    hub: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{our name: tensor or unread slice} of a published folder.

    clip: folder or Hub id of the CLIP tower, for checkpoints that only name it. adapter: folder of a LoRA
    adapter to merge. hub: arguments for the Hub. Raises CheckpointError.
    """
    state = read_files(weight_files(folder))
    if any("lora_" in name for name in state):
        state = merge_adapters(state, *adapter_settings(folder))
    if adapter is not None:
        state = _with_adapter(state, adapter)
    experts = config.moe.experts if config.moe else []
    table = rename(state, experts)
    found = {ours: state[theirs] for ours, theirs in table.items()}
    if config.vision.tower.name == "clip" and not any(name.startswith("vision_tower.") for name in found):
        found |= _clip_state(folder, clip, {k: v for k, v in (hub or {}).items() if k in _CLIP_HUB})
    if is_start(read_content(folder)):
        found = _started(found, config)
    return found | _noise_state(config)


def load_sam(model: MedPLIB, path: str | Path) -> None:
    """Fill the mask side from a SAM or SAM-Med2D file (.pth, .safetensors), all of it.

    Raises CheckpointError, listing what is missing, unexpected or of another shape, and for NaN or infinity;
    nothing is changed then.
    """
    path = Path(path)
    state = read_files([path]) if path.suffix == ".safetensors" else read_pickle(path)
    parts = ("mask_encoder", "prompt_encoder", "mask_decoder")
    given = {
        sam_name(name): value for name, value in state.items() if not IGNORED.search(f"visual_model.{name}")
    }
    wanted = {
        f"{part}.{name}": value for part in parts for name, value in getattr(model, part).state_dict().items()
    }
    check_fit(given, wanted, f"The weights of {str(path)!r}")
    given = {name: value[...] for name, value in given.items()}
    for name, value in given.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{name!r} of {str(path)!r} holds NaN or infinity; the file is damaged.")
    for part in parts:
        prefix = f"{part}."
        getattr(model, part).load_state_dict(
            {k.removeprefix(prefix): value for k, value in given.items() if k.startswith(prefix)}
        )


def _started(found: dict[str, Any], config: MedPLIBConfig) -> dict[str, Any]:
    """A LLaVA checkpoint made whole: fresh parts where it has none, and rows for the control tokens.

    A new row is the mean of the others, as LLaVA starts its own new tokens.
    """
    from medplib.modeling import MedPLIB

    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers = 1
    small.text_config.vocab_size = config.tokens.seg + 1
    small.moe = None
    whole = MedPLIB(small)
    for part in ("region_adapter", "seg_projector", "mask_encoder", "prompt_encoder", "mask_decoder"):
        if not any(name.startswith(f"{part}.") for name in found):
            state = getattr(whole, part).state_dict()
            found |= {f"{part}.{name}": value for name, value in state.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in found and shape_of(found[name])[0] < config.text_config.vocab_size:
            rows = found[name][...]
            new = rows.float().mean(0, keepdim=True).to(rows.dtype)
            found[name] = torch.cat([rows, new.expand(config.text_config.vocab_size - len(rows), -1)])
    return found


def _noise_state(config: MedPLIBConfig) -> dict[str, Any]:
    """The keys of the random numbers of the published gating, which its checkpoints do not hold."""
    moe = config.moe
    if moe is None or moe.parity is None or (moe.top_k == 1 and not moe.gate_args.get("use_rts", True)):
        return {}
    name = "language_model.model.layers.{}.mlp.gate.noise.state"
    return {name.format(layer): torch.tensor([layer, 0]) for layer in config.moe_layers}


def _added_tokens(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}); copy it again.") from error
    if not isinstance(content, dict) or not all(type(number) is int for number in content.values()):
        raise CheckpointError(f"{str(path)!r} must give a number for each added token; copy it again.")
    return content


def _with_adapter(state: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """The state with an adapter folder (peft's layout) merged into it."""
    if not isinstance(folder, str | Path):
        raise InputError(f"adapter must be the path of a folder, got {folder!r:.80}.")
    folder = Path(folder)
    scaling, rank = adapter_settings(folder)
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    files = [path for path in files if path.is_file()][:1]
    if scaling is None or not files:
        raise CheckpointError(
            f"{str(folder)!r} is no adapter: it needs adapter_config.json and adapter_model.safetensors."
        )
    extra = folder / "non_lora_trainables.bin"  # what LLaVA's training saves beside an adapter
    added = read_files([*files, extra] if extra.is_file() else files)
    plain = {name.removeprefix("base_model.model."): value for name, value in added.items()}
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()} | plain
    return merge_adapters(state, scaling, rank)


def _clip_state(folder: Path, clip: str | Path | None, hub: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP's vision tower under our names. What a file names is never fetched; see `published_clip`."""

    if clip is None:
        named = read_content(folder).get("mm_vision_tower")
        raise CheckpointError(
            f"The CLIP tower is not in {str(folder)!r}; its configuration names {str(named)[:120]!r}. Take "
            "it from the repository it was published in, with from_pretrained(..., "
            f"clip={CLIP_REPOSITORY!r}), or give a folder that holds it."
        )
    warnings.warn(f"The CLIP tower is not in the checkpoint; it is taken from {str(clip)!r}.", stacklevel=6)
    source = local_folder(clip, ("config.json", "model.safetensors"), **hub)
    if not any(source.glob("*.safetensors")):
        source = local_folder(clip, ("config.json", "pytorch_model.bin"), **hub)
    state = read_files(weight_files(source))
    start = "vision_model."
    tower = {_CLIP_PREFIX + k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    return {ours: tower[theirs] for ours, theirs in rename(tower).items()}
