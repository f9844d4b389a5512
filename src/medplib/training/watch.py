"""Watching a run: log.jsonl, the time left, pictures of answers, the batch that broke it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from medplib.data.record import Record
from medplib.errors import MedPLIBError
from medplib.experts.context import named_routers
from medplib.experts.statistics import ModelStatistics, count_routing
from medplib.sample import Sample
from medplib.training.pictures import Tile, draw_tiles
from medplib.training.snapshots import newest, writing

LOG = "log.jsonl"


class Watch(TrainerCallback):
    """What is to be seen of one stage.

    folder           gets log.jsonl, and samples/ with a picture each `sample_steps` steps
    start            the step it begins after: later lines of an earlier log are taken out
    records          what the model is asked for the pictures
    progress         called with a line of text now and then (tqdm.write, print, ...), or None
    main             whether this process writes
    precision        of the stage, in which the model answers
    """

    def __init__(
        self, folder: Path, *, start: int = 0, records: Sequence[Record] = (), sample_steps: int = 0,
        progress: Any = None, main: bool = True, precision: str = "fp32",
    ) -> None:  # fmt: skip
        self.folder, self.records, self.sample_steps, self.main = folder, list(records), sample_steps, main
        self.progress, self.precision = progress, precision
        self.start, self.begun, self.last = start, time.monotonic(), (start, time.monotonic())
        self.statistics: ModelStatistics | None = None
        self._counted: Tensor | None = None
        self._stack = contextlib.ExitStack()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self._forget_after(start)

    def _forget_after(self, step: int) -> None:
        """Take the lines of steps that will be done again out of the log."""
        path = self.folder / LOG
        if path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            new = path.with_suffix(".new")
            new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(new, path)

    def write(self, row: dict[str, Any]) -> None:
        """Add a line to log.jsonl, and tell `progress`."""
        if not self.main:
            return
        with writing(self.folder / LOG), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        if self.progress is not None and "loss" in row:
            self.progress(_line(row))

    def pace(self, state: Any, tokens: float) -> dict[str, float]:
        """tokens/s since the last line, seconds per step, and the seconds left."""
        now, step = time.monotonic(), state.global_step
        since, (last_step, last_time) = now - self.begun, self.last
        self.last = (step, now)
        each = since / max(step - self.start, 1)
        return {
            "tokens_per_s": tokens / max(now - last_time, 1e-9),
            "s_per_step": (now - last_time) / max(step - last_step, 1),
            "eta_s": each * (state.max_steps - step),
            "max_steps": state.max_steps,
        }

    # -- routing -------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun, self.last = time.monotonic(), (state.global_step, time.monotonic())
        self.start = state.global_step
        if model is not None and named_routers(model):
            self.statistics = self._stack.enter_context(count_routing(model))

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop counting."""
        self._stack.close()

    def routing_since_last(self, accelerator: Any) -> dict[str, dict[str, int]] | None:
        """{layer: {expert: tokens}} since the last call, over all processes."""
        counts = self._all_counts(accelerator)
        if counts is None:
            return None
        new = counts - (0 if self._counted is None else self._counted)
        self._counted = counts
        return self._named(new)

    def routing_total(self, accelerator: Any) -> dict[str, dict[str, int]] | None:
        """The same since the stage began (or was continued)."""
        counts = self._all_counts(accelerator)
        return None if counts is None else self._named(counts)

    def _all_counts(self, accelerator: Any) -> Tensor | None:
        if self.statistics is None:
            return None
        counts = torch.cat([layer.counts for layer in self.statistics.layers.values()])
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts, "sum")
        return counts.cpu()

    def _named(self, counts: Tensor) -> dict[str, dict[str, int]]:
        rest, table = counts.tolist(), {}
        for name, layer in self.statistics.layers.items():
            own, rest = rest[: len(layer.names)], rest[len(layer.names) :]
            table[name] = dict(zip(layer.names, own, strict=True))
        return table

    # -- pictures ------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps, too, however few they are
        if self.records and self.sample_steps and state.global_step % self.sample_steps == 0:
            answers = ask_all(model, self.records, self.precision)
            if self.main:
                rows = [_row(record, answer) for record, answer in zip(self.records, answers, strict=True)]
                with writing(self.folder / "samples"):
                    path = self.folder / "samples" / f"step-{state.global_step:08d}.png"
                    path.parent.mkdir(exist_ok=True)
                    answer_sheet(self.records, answers).save(path)
                self.write({"step": state.global_step, "samples": rows, "picture": path.name})


def ask_all(model: nn.Module, records: Sequence[Record], precision: str = "fp32") -> list[Any]:
    """The model's answer to the first question of each record; its mode and all random numbers stay."""
    modes = {module: module.training for module in model.modules()}
    statistics = {router: router.statistics for router in named_routers(model).values()}
    drawn = [(buffer, buffer.clone()) for router in statistics for buffer in router.buffers()]
    model.eval()
    for router in statistics:
        router.statistics = None  # asking is not training
    cast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.random.fork_rng(enabled=True), cast:
            samples = [first_question(record) for record in records]
            return [model.answer([sample])[0] for sample in samples]
    finally:
        for buffer, before in drawn:
            buffer.copy_(before)  # the published gating draws random numbers when it answers, too
        for router, counter in statistics.items():
            router.statistics = counter
        for module, mode in modes.items():
            module.training = mode


def first_question(record: Record) -> Sample:
    """A record as a question without its answer, with the regions of that question."""
    sample = record.to_sample()
    question = sample.turns[0][0]
    count = question.count("<region>")
    return Sample(
        sample.images,
        [(question, None)],
        sample.prompts[:count],
        list(sample.prompt_images or [])[:count] or None,
    )


def answer_sheet(records: Sequence[Record], answers: Sequence[Any]) -> Any:
    """One picture: for each record what was asked and is right, beside it what was answered."""
    tiles = []
    for record, answer in zip(records, answers, strict=True):
        sample = record.to_sample()
        image = sample.images[-1] if sample.images else None
        question, right = record.turns[0]
        count = right.count("<SEG>")
        tiles.append(Tile(image, f"asked: {question}\nright: {right}", sample.masks[:count], sample.prompts))
        tiles.append(
            Tile(image, f"answered: {answer.text}", [f.mask for f in answer.findings], sample.prompts)
        )
    return draw_tiles(tiles, columns=2)


def _row(record: Record, answer: Any) -> dict[str, Any]:
    return {
        "question": record.turns[0][0],
        "right": record.turns[0][1],
        "answer": answer.text,
        "masks": len(answer.findings),
    }


def save_bad_batch(
    folder: Path,
    step: int,
    window: Sequence[dict[str, Any]],
    what: str,
    values: dict[str, float],
    process: int,
) -> None:
    """Write the forwards of a step as batch-<n>.safetensors and batch.json, and raise MedPLIBError.

    what: which number is not finite, `values` some of them by name. The error says what continues and what
    does not: training from a snapshot comes to the same numbers, and another setting is another stage.
    """
    place = folder / f"not-finite-step-{step:08d}-process-{process}"
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for i, batch in enumerate(window):
            tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
            save_file(tensors, place / f"batch-{i}.safetensors")
        content = {"step": step, "not_finite": what, "values": {k: str(v) for k, v in values.items()},
                   "rows": [batch["origins"] for batch in window]}  # fmt: skip
        (place / "batch.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = ", ".join(f"{k} {v}" for k, v in values.items())
    remedy = "Then run the command again; there is no snapshot, the stage begins anew."
    if (kept := newest(folder)) is not None:
        remedy = (
            f"The newest snapshot, {str(kept)!r}, continues the same settings and data only and would stop "
            f"here again; for others first remove {str(folder)!r}, or choose another out folder."
        )
    raise MedPLIBError(
        f"The {what} is not finite at step {step} ({shown}). Look at the rows of its batch in "
        f"{str(place)!r}, or lower the learning rate. {remedy}"
    )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was being written when the process died


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return value


def _line(row: dict[str, Any]) -> str:
    terms = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k == "loss" or k.startswith(("loss_", "ce_")))
    left = (
        time.strftime("%H:%M:%S", time.gmtime(row["eta_s"]))
        if row["eta_s"] < 86400
        else f"{row['eta_s'] / 86400:.1f} days"
    )
    return (
        f"step {row['step']}/{row['max_steps']}  {terms}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_s']:.0f} tokens/s  {left} left"
    )
