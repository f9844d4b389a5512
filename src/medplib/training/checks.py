"""What a run is refused for, asked before it begins: `train` and `rehearse` ask the same.

finished, records = check_run(recipe)     # {stage: manifest or None}, {source: its records}
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import get_reporting_integration_callbacks

from medplib.configuration import LossConfig, MedPLIBConfig
from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.experts.context import unknown_expert
from medplib.model_folder import HUB_ARGUMENTS
from medplib.plain_values import MAX_EXPERTS
from medplib.quantization import loading_options
from medplib.stages import Stage
from medplib.training.batches import stage_batches
from medplib.training.recipe import Recipe
from medplib.training.snapshots import manifest_of, newest, read_manifest
from medplib.training.sources import open_sources
from medplib.training.starts import recorded_origin, start_config, start_folders
from medplib.training.trainer import check_deepspeed

# What a snapshot must share with its run, and a finished model with the recipe that would make it.
_SAME_RUN = ("stage", "data", "start", "mixture", "order", "frozen", "interpolate", "sharding")
_SAME_RECIPE = ("model", "load", "dense", "mask_weights", "moe", "dtype", "samples_per_epoch", "augment")
# What `load` may hold: arguments of MedPLIB.from_pretrained, parts of the configuration among them. `dtype`
# is a setting of the recipe.
_LOAD = (
    *HUB_ARGUMENTS, "subfolder", "overrides", "clip", "adapter", "quantize", "variant", "attn_implementation",
    "device_map", "max_memory", "offload_folder",
    "text_config", "vision", "region", "mask", "moe", "tokens", "losses", "template",
)  # fmt: skip


def check_run(
    recipe: Recipe, sources: Mapping[str, Any] | None = None, validation: Sequence[Any] | None = None
) -> tuple[dict[str, dict[str, Any] | None], dict[str, Any]]:
    """({stage: manifest of its finished model, or None}, {source: records}, the given `sources` among them).

    Raises InputError, UnknownNameError or CheckpointError, nothing written, for a setting, file or folder
    that some stage cannot use. A stage to be trained before another counts as finished for that one.
    validation: records in place of those that the recipe names.
    """
    _check_report_to(recipe.report_to)
    _check_load(recipe.load)
    _check_moe(recipe)
    out = Path(recipe.out).expanduser()
    finished = {name: manifest_of(out / name / "model") for name in recipe.stages}  # it hashes the weights
    intact = [name for name, manifest in finished.items() if manifest is not None]
    if len(intact) < len(finished) and recipe.sample_steps and validation is None:
        _check_validation(recipe)
    coming: list[str] = []
    opened = dict(sources or {})
    for name, manifest in finished.items():
        if manifest is not None:
            check_finished(recipe, name, manifest, intact, coming)
            continue
        _check_start(recipe, name, [*intact, *coming])
        opened |= open_sources(recipe.sources(name), opened)
        _check_stage(recipe, name, opened)
        if (snapshot := newest(out / name)) is not None:
            check_same(read_manifest(snapshot), _stage_facts(recipe, name), snapshot)
        coming.append(name)
    return finished, opened


# -- settings ------------------------------------------------------------------------------------------------


def _check_report_to(names: Sequence[str]) -> None:
    """Raise InputError for a logger that transformers does not know, or that is not installed."""
    try:
        get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise InputError(f"report_to: {error}") from error
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a mere folder, such as the one that wandb writes into
            raise InputError(f"report_to names {name!r}, which is not installed: pip install {name}")


def _check_load(arguments: Mapping[str, Any]) -> None:
    """Raise UnknownNameError for what is no argument of MedPLIB.from_pretrained."""
    for key in arguments:
        if key not in _LOAD:
            raise UnknownNameError.among(f"load has no argument '{key}'.", key, _LOAD)


def _check_moe(recipe: Recipe) -> None:
    """Raise InputError for settings of a mixture that cannot be; `layers` needs the model's own sizes."""
    settings = {key: value for key, value in recipe.moe.items() if key != "layers"}
    made = [list(recipe.experts(name)) for name in recipe.stages if recipe.before(name)]
    elsewhere = [str(i) for i in range(MAX_EXPERTS)]  # of a stage that is not run now, as many as may be
    for experts in list(filter(None, made)) or [elsewhere]:
        MedPLIBConfig.from_dict({"moe": {**settings, "experts": experts}})


def _check_validation(recipe: Recipe) -> None:
    """Raise InputError for sample pictures without records to ask about."""
    if not recipe.validation:
        raise InputError(
            "sample_steps asks for pictures of answers, but validation names no source; name one as in "
            "data, or set sample_steps=0."
        )
    open_sources(recipe.validation, table="validation")


def _check_start(recipe: Recipe, name: str, there: Container[str]) -> None:
    """Raise what `start_model` would for a stage, folder, file or expert that is not there."""
    if start_folders(recipe, name, there):
        return
    _, config = start_config(recipe, recipe.stages[name].start or recipe.model)
    if (kind := recipe.load.get("quantize")) is not None:
        loading_options(kind, config, recipe.load.get("device_map"), recipe.dtype)
    if recipe.dense is not None and config.moe is not None and recipe.dense not in config.moe.experts:
        raise unknown_expert(recipe.dense, tuple(config.moe.experts))
    if recipe.mask_weights is not None and not Path(recipe.mask_weights).expanduser().is_file():
        raise InputError(f"mask_weights: there is no file {recipe.mask_weights!r}.")


def _check_stage(recipe: Recipe, name: str, records: Mapping[str, Any]) -> None:
    """Raise InputError for a stage whose losses, batches or DeepSpeed file cannot be used."""
    loss_config(recipe.stage(name))
    batches = stage_batches(recipe, name, records)
    if recipe.deepspeed is not None:
        check_deepspeed(recipe, recipe.stage(name), batches.world)


def loss_config(stage: Stage) -> LossConfig:
    """The stage's weights of the losses, 0 for those it does not name. Raises InputError."""
    known = {f.name for f in dataclasses.fields(LossConfig)}
    given = {k: v for k, v in stage.loss_weights.items() if k in known}
    unknown = set(stage.loss_weights) - known - {"balance"}
    if unknown:
        raise InputError(
            f"Stage '{stage.name}' weighs {', '.join(sorted(map(str, unknown)))}; the losses are "
            f"{', '.join(known)}, balance."
        )
    return LossConfig(**{**dict.fromkeys(known, 0.0), **given})


# -- what another recipe made --------------------------------------------------------------------------------


def check_finished(
    recipe: Recipe, name: str, manifest: Mapping[str, Any], intact: Sequence[str], coming: Sequence[str] = ()
) -> None:
    """Raise CheckpointError where the recipe would make another model than the finished one.

    intact: finished stages whose files were compared with their manifests before. coming: stages that will be
    trained first; whether the model was made from what they will leave cannot be known yet.
    """
    final, named = Path(recipe.out).expanduser() / name / "model", recipe.sources(name)
    facts = _stage_facts(recipe, name)
    with contextlib.suppress(InputError):  # the stages before it may be gone since
        folders = start_folders(recipe, name, [*intact, *coming])
        if folders and not {folder.parent.name for folder in folders.values()} & set(coming):
            facts["start"] = recorded_origin(folders)
    check_same(manifest, facts, final)
    made, wanted = manifest["recipe"], recipe.to_dict()
    told = {key: (made[key], wanted[key]) for key in _SAME_RECIPE}
    told |= {f"data.{key}": (made["data"].get(key), wanted["data"][key]) for key in named}
    for key, (old, new) in told.items():
        if json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
            raise CheckpointError(
                f"{str(final)!r} was made with another {key}{_told(old, new)}. {_remedy(final)}"
            )


def _stage_facts(recipe: Recipe, name: str) -> dict[str, Any]:
    """What of `check_same` is known of a stage without its model and data."""
    return {"stage": plain_stage(recipe.stage(name)), "interpolate": recipe.stages[name].interpolate}


def plain_stage(stage: Stage) -> dict[str, Any]:
    """The stage as JSON has it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(stage)))


def check_same(manifest: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError, naming the difference, if a folder was made by another run."""
    plain = json.loads(json.dumps({k: v for k, v in facts.items() if k in _SAME_RUN}))
    for key, value in plain.items():
        if manifest.get(key) != value:
            names = (
                [k for k in value if manifest[key].get(k) != value[k]]
                if isinstance(value, dict) and isinstance(manifest.get(key), dict) else []
            )  # fmt: skip
            which = f" ({', '.join(map(str, names))})" if names else ""
            raise CheckpointError(
                f"{str(folder)!r} was made with another {key}{which}{_told(manifest.get(key), value)}. "
                f"{_remedy(folder)}"
            )


def _remedy(folder: Path) -> str:
    """What to do about a snapshot or a finished model of another recipe."""
    return f"Set it back, choose another out folder, or remove {str(folder.parent)!r} to start it anew."


def _told(old: Any, new: Any) -> str:
    """Two short values, for an error."""
    short = all(value is None or isinstance(value, str | int | float | bool) for value in (old, new))
    return f" ({str(old)[:80]!r}, now {str(new)[:80]!r})" if short else ""
