"""From an order of records to the tensors of each forward, on each process, from any step on.

B samples per optimiser step over all processes and accumulated forwards, M samples per forward.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from medplib.conversation import REGION, SEG
from medplib.data.options import check_options
from medplib.data.record import TASKS, Record
from medplib.data.transforms import Augmentation
from medplib.errors import InputError
from medplib.processing import MedPLIBProcessor
from medplib.sample import Sample
from medplib.training.recipe import Recipe
from medplib.training.sources import Order

MAX_EPOCH = 1 << 31  # samples
IMAGE_CHARACTERS = 2000  # what an image counts for beside the text, when samples are sorted by length


class Place(NamedTuple):
    """One sample: the `index`-th of its epoch, and the record it is made of."""

    epoch: int
    index: int
    source: str
    position: int


@dataclass(frozen=True)
class Item:
    """A sample with its pixels, and where it comes from."""

    sample: Sample
    task: str
    source: str
    row: int


class TrainingData(Dataset):
    """Place -> the Items made of it (several, if the source asks several questions about one image)."""

    def __init__(self, records: Mapping[str, Any], seed: int, augment: Any = None) -> None:
        self.records, self.seed, self.augment = dict(records), seed, augment

    def __getitem__(self, place: Place) -> list[Item]:
        source = self.records[place.source]
        drawn = hasattr(source, "draw")
        records = source.draw(self.seed, place.epoch, place.index) if drawn else [source[place.position]]
        items = []
        for record in records:
            name, row = (
                (place.source, place.position) if record.source == "unknown" else (record.source, record.row)
            )
            try:
                sample = record.to_sample()
                if self.augment is not None and not drawn:
                    sample = self.augment(
                        sample, seed=self.seed, epoch=place.epoch, index=place.index,
                        modality=record.modality, labels=record.labels,
                    )  # fmt: skip
            except InputError as error:
                raise InputError(f"Row {row} of {name} cannot be used: {error}") from error
            items.append(Item(sample, record.task, name, row))
        return items

    def length(self, place: Place) -> int:
        """About how long the sample is, without its pixels; 0 for one that is drawn."""
        source = self.records[place.source]
        if hasattr(source, "draw"):
            return 0
        record: Record = source[place.position]
        return IMAGE_CHARACTERS * len(record.images) + sum(len(q) + len(a) for q, a in record.turns)


class StepBatches:
    """The batches of one process, as a batch sampler for a DataLoader: lists of Places, step after step.

    start   the optimiser step to begin with; what comes then does not depend on it
    A step takes `batch_size` samples, forward `a` of process `r` the `micro_batch` of them from
    (a * world + r) * micro_batch on: the same samples make a step on any number of processes.
    Raises InputError where the batch cannot be cut that way.
    """

    def __init__(
        self,
        data: TrainingData,
        order: Order,
        *,
        batch_size: int,
        micro_batch: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        grouping: bool = True,
    ) -> None:
        if batch_size % (micro_batch * world):
            raise InputError(
                f"batch_size {batch_size} is no multiple of micro_batch {micro_batch} x {world} processes; "
                f"take {math.ceil(batch_size / (micro_batch * world)) * micro_batch * world}, or change "
                "micro_batch."
            )
        self.data, self.order, self.grouping = data, order, grouping
        self.batch_size, self.micro_batch, self.steps, self.start = batch_size, micro_batch, steps, start
        self.rank, self.world = rank, world
        self.accumulation = batch_size // (micro_batch * world)
        self.steps_per_epoch = order.per_epoch // batch_size

    def __len__(self) -> int:
        """Of the whole stage, whatever `start` is: what a Trainer counts its steps by."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        step = self.start
        while step < self.steps:
            epoch, at = divmod(step, self.steps_per_epoch)
            for batch in self.epoch(epoch, at):
                if step == self.steps:
                    return
                for a in range(self.accumulation):
                    first = (a * self.world + self.rank) * self.micro_batch
                    yield batch[first : first + self.micro_batch]
                step += 1

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Place]]:
        """The batches of all processes of an epoch, from its `first` step on.

        Grouping sorts the samples within a step: forwards with little padding, and the same steps.
        """
        places = [Place(epoch, i, *pair) for i, pair in enumerate(self.order.epoch(epoch))]
        for begin in range(first * self.batch_size, len(places), self.batch_size):
            batch = places[begin : begin + self.batch_size]
            yield sorted(batch, key=self.data.length) if self.grouping else batch


class Collate:
    """Items -> what the model takes, and beside it `tasks` (rows,) and `origins`, a dict per row."""

    def __init__(self, processor: MedPLIBProcessor, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, batch: Sequence[Sequence[Item]]) -> dict[str, Any]:
        items = [item for items in batch for item in items]
        samples = [self._fit(item) for item in items]
        out: dict[str, Any] = dict(self.processor(samples, training=True, check_length=False).tensors)
        out["tasks"] = torch.tensor([TASKS.index(item.task) for item in items])
        out["origins"] = [
            {"source": item.source, "row": item.row, "turns": [list(turn) for turn in sample.turns]}
            for item, sample in zip(items, samples, strict=True)
        ]
        return out

    def _fit(self, item: Item) -> Sample:
        """The sample within max_length tokens: later turns go first, then the end of the last answer."""
        sample = item.sample
        characters = sum(len(q.encode()) + len(a.encode()) for q, a in sample.turns)
        if characters + len(sample.images) * self.processor.num_image_tokens + 400 <= self.max_length:
            return sample  # a token is at least a byte
        while (excess := len(self.processor.encode(sample)[0]) - self.max_length) > 0:
            question, answer = sample.turns[-1]
            words = answer.split()
            if len(sample.turns) > 1:
                masks = len(sample.masks) - answer.count(SEG)
                prompts = len(sample.prompts) - question.count(REGION)
                sample = replace(
                    sample, turns=sample.turns[:-1], masks=sample.masks[:masks],
                    prompts=sample.prompts[:prompts],
                    prompt_images=None if sample.prompt_images is None else sample.prompt_images[:prompts],
                    seg_images=None if sample.seg_images is None else sample.seg_images[:masks],
                )  # fmt: skip
            elif SEG not in answer and len(words) > 1:
                kept = " ".join(words[: max(1, len(words) - max(1, excess // 4))])
                sample = replace(sample, turns=[(question, kept)])
            else:
                raise InputError(
                    f"Row {item.row} of {item.source} takes {excess + self.max_length} tokens, which cannot "
                    f"be shortened to max_length {self.max_length}; raise max_length or leave the row out."
                )
        return sample


def steps_of(records: int, batch_size: int, epochs: float, steps: int | None) -> tuple[int, int]:
    """(optimiser steps in all, steps per epoch); an epoch's last step is filled up with further records."""
    per_epoch = math.ceil(records / batch_size)
    return (steps or max(1, round(epochs * per_epoch))), per_epoch


def order_for(
    records: Mapping[str, Any], weights: Mapping[str, float | None], key: str, seed: int, per_epoch: int
):
    """The Order of a stage over opened sources. Raises InputError for an epoch too long to be shuffled."""
    if per_epoch > MAX_EPOCH:
        raise InputError(
            f"An epoch may have {MAX_EPOCH} samples, got {per_epoch}; lower samples_per_epoch or batch_size."
        )
    lengths = {name: len(source) for name, source in records.items()}
    return Order(lengths, weights, seed=seed, per_epoch=per_epoch, key=key)


def stage_batches(
    recipe: Recipe, name: str, records: Mapping[str, Any], *, start: int = 0, world: int | None = None
) -> StepBatches:
    """The batches of a stage over its opened sources, from step `start` on, for this process."""
    stage, named = recipe.stage(name), recipe.sources(name)
    records = {key: records[key] for key in named}
    count = recipe.samples_per_epoch or sum(len(r) for r in records.values())
    steps, per_epoch = steps_of(count, stage.batch_size, stage.epochs, stage.steps)
    weights = {key: source.weight for key, source in named.items()}
    return StepBatches(
        TrainingData(records, stage.seed, augmentation(recipe)),
        order_for(records, weights, name, stage.seed, per_epoch * stage.batch_size),
        batch_size=stage.batch_size, micro_batch=recipe.micro_batch, steps=steps, start=start,
        rank=int(os.environ.get("RANK", "0")), world=world or int(os.environ.get("WORLD_SIZE", "1")),
        grouping=recipe.length_grouping,
    )  # fmt: skip


def augmentation(recipe: Recipe) -> Augmentation | None:
    """The recipe's augmentation, None without one. Raises InputError, naming the argument."""
    if recipe.augment is None:
        return None
    settings = dict(recipe.augment)
    if (named := settings.get("transform")) is not None:
        if not isinstance(named, Mapping) or not named:
            raise InputError(
                "augment: transform must be a table such as {RandomRotation: {degrees: 10}}, "
                f"got {named!r:.80}."
            )
        from medplib.data.tv_transforms import named_transforms

        settings["transform"] = named_transforms(named)
    check_options(Augmentation, settings, "augment")
    return Augmentation(**settings)
