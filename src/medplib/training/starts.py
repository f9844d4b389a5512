"""The model a stage begins with: a folder, an earlier stage, a mixture of earlier stages, a dense start."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Container, Mapping
from pathlib import Path

import torch

from medplib.checkpoints import holds_official, load_sam, official_config
from medplib.configuration import MedPLIBConfig
from medplib.errors import InputError
from medplib.experts.context import named_routers
from medplib.experts.upcycle import assemble_mixture
from medplib.language import decoder_layers
from medplib.model_folder import HUB_ARGUMENTS, local_folder, read_config
from medplib.modeling import MedPLIB
from medplib.training.recipe import Recipe
from medplib.training.snapshots import MANIFEST, read_manifest
from medplib.weight_files import weights_sha256

_WITHOUT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")
MASK_SIDE = ("seg_projector", "mask_decoder", "prompt_encoder")


def start_model(recipe: Recipe, name: str) -> tuple[MedPLIB, dict[str, str]]:
    """The model a stage begins with, and where it comes from, {place: sha256 of its weights}."""
    folders, experts = start_folders(recipe, name), recipe.experts(name)
    if experts and folders.keys() == experts.keys():
        return make_mixture(recipe, name, folders), recorded_origin(folders)
    dtype = getattr(torch, recipe.dtype)
    for folder in folders.values():
        return MedPLIB.from_pretrained(folder, dtype=dtype), recorded_origin(folders)
    source = recipe.stages[name].start or recipe.model
    model = MedPLIB.from_pretrained(source, **recipe.load, dtype=dtype)
    origin = {str(source): weights_sha256(model.source)}
    if recipe.dense is not None and model.config.moe is not None:
        model = as_dense(model, recipe.dense)
    if recipe.mask_weights is not None:
        load_sam(model, Path(recipe.mask_weights).expanduser())
    return model, origin


def start_folders(recipe: Recipe, name: str, intact: Container[str] = ()) -> dict[str, Path]:
    """{expert or stage: its finished model} of the stages that a stage begins with; none of them: {}.

    intact: stages that are not looked at: their files were compared with their manifests before, or they are
    trained first. Raises InputError for one that is not finished, CheckpointError for one that is damaged.
    """
    out, changes, before = Path(recipe.out).expanduser(), recipe.stages[name], recipe.before(name)
    experts = recipe.experts(name)
    if experts:
        folders = {expert: _stage_model(out, stage, intact) for expert, stage in experts.items()}
        lacking = [stage for expert, stage in experts.items() if folders[expert] is None]
        if not lacking:
            return {expert: folder for expert, folder in folders.items() if folder is not None}
        if changes.experts is not None or before:
            raise InputError(
                f"Stage '{name}' makes its experts from {', '.join(experts.values())}, but "
                f"{', '.join(lacking)} is neither before it nor finished in {str(out)!r}; train it first, or "
                f"give stages.{name}.start a mixture."
            )
    source = changes.start or (before[-1] if before else None)
    folder = None if source is None else _stage_model(out, source, intact)
    if folder is not None:
        return {str(source): folder}
    if source is not None and source in (*recipe.stages, *recipe.chain):
        raise InputError(
            f"Stage '{name}' starts from '{source}', which is not finished in {str(out)!r}; train it first, "
            f"or name another model in stages.{name}.start, such as {recipe.model}."
        )
    return {}


def start_config(recipe: Recipe, source: str) -> tuple[Path, MedPLIBConfig]:
    """(folder, configuration) of a model as `load` changes it; from the Hub all but its weights is fetched.

    Raises UnknownNameError, CheckpointError or InputError as loading it would.
    """
    hub = {k: recipe.load[k] for k in (*HUB_ARGUMENTS, "subfolder") if recipe.load.get(k) is not None}
    folder = local_folder(source, _WITHOUT_WEIGHTS, **hub)
    if holds_official(folder):
        return folder, official_config(folder, recipe.load.get("overrides"))
    if foreign := [key for key in ("overrides", "clip", "adapter") if key in recipe.load]:
        raise InputError(f"load: {', '.join(foreign)} is for published layouts; {str(source)!r} is ours.")
    return folder, read_config(folder)


def recorded_origin(folders: Mapping[str, Path]) -> dict[str, str]:
    """{place: sha256 of its weights} of finished models."""
    return {place: recorded_weights(folder) for place, folder in folders.items()}


def _stage_model(out: Path, stage: str, intact: Container[str]) -> Path | None:
    """The finished model of a stage of this run. Raises CheckpointError for one that is damaged."""
    folder = out / stage / "model"
    if stage in intact:
        return folder
    if not folder.is_dir() or Path(stage).name != stage:
        return None
    read_manifest(folder)
    return folder


def recorded_weights(folder: Path) -> str:
    """One hash over those of the weight files, from a manifest that was checked before."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    hashes = "".join(f"{name}{files[name]}" for name in sorted(files) if name.endswith(".safetensors"))
    return hashlib.sha256(hashes.encode()).hexdigest()


def make_mixture(recipe: Recipe, name: str, folders: Mapping[str, Path]) -> MedPLIB:
    """Experts from the models of their names, the mask side from that of "grounding", the rest from "vqa"."""
    dtype = getattr(torch, recipe.dtype)
    sources = {expert: MedPLIB.from_pretrained(folder, dtype=dtype) for expert, folder in folders.items()}
    rest = "vqa" if "vqa" in sources else list(sources)[-1]
    base = sources[rest]
    settings = {**recipe.moe, "experts": list(folders)}
    content = {**base.config.to_dict(), "moe": settings}
    config = MedPLIBConfig.from_dict(content)
    torch.manual_seed(recipe.stage(name).seed)  # of the gates
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        mixture = MedPLIB(config)
    finally:
        torch.set_default_dtype(before)
    overrides = dict.fromkeys(MASK_SIDE, "grounding") if "grounding" in sources else {}
    assemble_mixture(mixture, sources, rest=rest, overrides=overrides)
    mixture.processor = _processor_for(base, config)
    return mixture.eval()


def as_dense(model: MedPLIB, expert: str) -> MedPLIB:
    """A mixture becomes, in place, the dense model of one expert's feed-forward blocks. UnknownNameError."""
    routers = named_routers(model)
    for router in routers.values():
        router.index_of(expert)
    for layer in decoder_layers(model.language_model):
        if layer.mlp in routers.values():
            layer.mlp = copy.deepcopy(layer.mlp.experts[expert])
    model.config = MedPLIBConfig.from_dict({**model.config.to_dict(), "moe": None})
    model.processor = _processor_for(model, model.config)
    return model


def _processor_for(model: MedPLIB, config: MedPLIBConfig):
    old = model.processor
    return type(old)(old.tokenizer, config, old.num_image_tokens, old.grid)
