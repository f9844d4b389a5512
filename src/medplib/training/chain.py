"""Stages one after another: each begins with the model of an earlier one and leaves a usable model.

    train(load_recipe("tiny", {"out": "runs/mine"}))     # -> runs/mine/mixture/model

A stage that is finished is not done again, one that was stopped continues from its newest snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medplib.data.record import Record
from medplib.data.recordset import fingerprint
from medplib.lora import merge_lora
from medplib.modeling import MedPLIB
from medplib.parts import PartTable
from medplib.results import versions
from medplib.stages import Stage, set_stage
from medplib.training.batches import Collate, StepBatches, stage_batches
from medplib.training.checks import check_finished, check_run, check_same, loss_config, plain_stage
from medplib.training.frozen import Frozen
from medplib.training.recipe import Recipe, make_recipe
from medplib.training.snapshots import (
    begin,
    check_writable,
    clean,
    newest,
    read_manifest,
    seal,
    writing,
)
from medplib.training.sources import open_sources
from medplib.training.starts import start_model
from medplib.training.trainer import StageTrainer, arguments, whole_state
from medplib.training.watch import Watch


@dataclass
class StageResult:
    """A finished stage: where its model is, what trained, the hashes of what did not (by part), and the
    tokens each expert took ({layer: {expert: tokens}}, of this process' run; None without a mixture)."""

    name: str
    folder: Path
    table: PartTable | None
    frozen: dict[str, str]
    routing: dict[str, dict[str, int]] | None = None


@dataclass
class Prepared:
    """A stage about to be trained."""

    stage: Stage
    model: MedPLIB
    table: PartTable
    frozen: Frozen
    batches: StepBatches
    collate: Collate
    facts: dict[str, Any]


def train(
    recipe: Recipe | Mapping[str, Any],
    *,
    sources: Mapping[str, Any] | None = None,
    validation: Sequence[Record] | None = None,
    progress: Callable[[str], Any] | None = None,
) -> list[StageResult]:
    """Train the recipe's stages in order; returns what became of each.

    sources: {name: records} in place of what the recipe's data of that name would read. validation: records
    for the sample pictures, likewise. progress: called with a line of text now and then.

    Under torchrun or `accelerate launch` every process calls this alike. Raises InputError or MedPLIBError
    before anything is trained for a setting, file or folder that cannot be used.
    """
    recipe = make_recipe(recipe)
    _require_accelerate()
    out = Path(recipe.out).expanduser()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data loader processes are forks
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        check_writable(out)
    finished, opened = check_run(recipe, sources, validation)
    return [_run(recipe, name, out, opened, validation, progress, main, finished) for name in recipe.stages]


def _run(recipe, name, out, sources, validation, progress, main, finished) -> StageResult:
    folder = out / name
    final = folder / "model"
    say = progress if main else None
    if (manifest := finished[name]) is not None:
        intact = [stage for stage, found in finished.items() if found is not None]
        check_finished(recipe, name, manifest, intact)  # again, now that the stages before it are there
        if say:
            say(f"stage {name}: done before, {final}")
        return StageResult(name, final, None, manifest["parts"], manifest.get("routing"))
    if main and folder.is_dir():
        clean(folder)
    resume = newest(folder)
    start = int(resume.name.removeprefix("step-")) if resume else 0
    prepared = prepare_stage(recipe, name, sources, start=start)
    if resume is not None:
        check_same(read_manifest(resume), prepared.facts, resume)
    if say:
        say(str(prepared.table))
        if resume:
            say(f"stage {name}: continues at step {start} of {prepared.batches.steps}")
    records = _validation(recipe, validation)
    watch = Watch(
        folder, start=start, records=records, sample_steps=recipe.sample_steps, progress=say, main=main,
        precision=prepared.stage.precision,
    )  # fmt: skip
    args = arguments(recipe, prepared.stage, prepared.model, prepared.batches, folder)
    trainer = StageTrainer(
        prepared.model, args, prepared.batches, prepared.collate, watch, folder=folder, keep=recipe.keep,
        facts=prepared.facts, workers=recipe.workers,
    )  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        routing = watch.routing_total(trainer.accelerator)
    finally:
        watch.close()
    if routing:
        watch.write({"step": trainer.state.global_step, "stage": name, "routing_total": routing})
    finish_stage(recipe, prepared, trainer, final, routing)
    return StageResult(name, final, prepared.table, prepared.frozen.by_part(), routing)


def prepare_stage(
    recipe: Recipe,
    name: str,
    sources: Mapping[str, Any] | None = None,
    *,
    start: int = 0,
    world: int | None = None,
) -> Prepared:
    """Load the stage's model, open and close its parts, open its data. Changes nothing on disk."""
    stage = recipe.stage(name)
    records = open_sources(recipe.sources(name), sources)
    batches = stage_batches(recipe, name, records, start=start, world=world)
    order = batches.order
    model, origin, table = staged_model(recipe, name)
    frozen = Frozen(model)
    facts = {
        "stage": plain_stage(stage),
        "start": origin,
        "mixture": model.config.moe is not None,
        "order": {"batch_size": stage.batch_size, "grouping": recipe.length_grouping,
                  "samples": order.per_epoch,
                  "weights": order.counts, "augment": recipe.augment},
        "data": {key: fingerprint(r) for key, r in records.items()},
        "frozen": frozen.total,
        "parts": frozen.by_part(),
        "interpolate": recipe.stages[name].interpolate,
        "sharding": _sharding(recipe, batches.world),
        "recipe": recipe.to_dict(),
        "versions": versions(),
    }  # fmt: skip
    return Prepared(stage, model, table, frozen, batches, Collate(model.processor, stage.max_length), facts)


def _sharding(recipe: Recipe, world: int) -> str:
    """Who wrote a snapshot, in whose form it is."""
    if recipe.deepspeed is not None:
        return f"deepspeed on {world}"
    return "fsdp2" if recipe.strategy == "fsdp2" and world > 1 else "none"


def staged_model(recipe: Recipe, name: str) -> tuple[MedPLIB, dict[str, str], PartTable]:
    """The model a stage begins with, its parts opened and closed; where it comes from; and what trains."""
    stage = recipe.stage(name)
    weights = loss_config(stage)
    model, origin = start_model(recipe, name)
    torch.manual_seed(stage.seed)  # of new adapters
    model.config.losses = weights
    if model.config.moe is not None and "balance" in stage.loss_weights:
        model.config.moe.balance_loss_coef = stage.loss_weights["balance"]
    table = set_stage(model, stage)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, origin, table


def finish_stage(
    recipe: Recipe, prepared: Prepared, trainer: StageTrainer, final: Path, routing: Any
) -> None:
    """Merge LoRA and write the model, after closed tensors were found unchanged, in memory and on disk."""
    state = None
    if trainer.is_fsdp_enabled:
        state = whole_state(trainer.model)
    if trainer.args.should_save:
        if state is not None:  # the sharded model stays as it is; the whole one is built once more
            model = staged_model(recipe, prepared.stage.name)[0]
            model.load_state_dict(state, strict=True)
        else:
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        prepared.frozen.check(model)
        merge_lora(model)
        share = recipe.stages[prepared.stage.name].interpolate
        if share is not None:
            interpolate(model, start_model(recipe, prepared.stage.name)[0], share)
        model.to("cpu", getattr(torch, recipe.dtype)).eval()
        model.requires_grad_(True)
        staging = begin(final)
        with writing(final, staging):
            model.save_pretrained(staging)
            prepared.frozen.check_files(staging)
        seal(staging, final, {**prepared.facts, "step": trainer.state.global_step, "routing": routing})
    if trainer.args.world_size > 1:
        torch.distributed.barrier()


@torch.no_grad()
def interpolate(model: MedPLIB, start: MedPLIB, share: float) -> None:
    """Set each number of `model`, in place, `share` of the way from that in `start` to its own."""
    before = start.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            old = before[name].to(value)
            value.copy_(torch.where(old == value, value, torch.lerp(old, value, share)))  # -0.0 stays -0.0


# -- small things --------------------------------------------------------------------------------------------


def _validation(recipe: Recipe, given: Sequence[Record] | None) -> list[Record]:
    """The first records of the validation sources, evenly from each; always the same."""
    if not recipe.sample_steps:
        return []
    if given is not None:
        return list(given)[: recipe.samples]
    opened = list(open_sources(recipe.validation, table="validation").values())
    rows = [
        (source.draw(0, 0, i)[0] if hasattr(source, "draw") else source[i])
        for i in range(recipe.samples) for source in opened if i < len(source)
    ]  # fmt: skip
    return rows[: recipe.samples]


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError('Training needs accelerate and peft: pip install "medplib[train]"') from error
