"""A run before it is run: parts, memory, steps, and the first batch read back from its tensors.

for page in rehearse(load_recipe("tiny")):
    print(page)                # words; page.picture is the batch as it will be seen
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from medplib.configuration import MedPLIBConfig
from medplib.data.record import TASKS, Record
from medplib.model_folder import read_config
from medplib.modeling import MedPLIB
from medplib.parts import PartTable
from medplib.processing import MedPLIBProcessor
from medplib.stages import Stage, set_stage
from medplib.training.batches import Collate, stage_batches
from medplib.training.checks import check_run, loss_config
from medplib.training.pictures import Tile, draw_tiles
from medplib.training.recipe import Recipe, make_recipe
from medplib.training.sources import open_sources
from medplib.training.starts import start_config


@dataclass
class Memory:
    """Bytes on each device; see `estimate_memory` for how they are reckoned."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(self).items())
        return f"about {self.total / 2**30:.2f} GiB per device ({parts})"


@dataclass
class Page:
    """What is known of a stage before it runs."""

    stage: Stage
    table: PartTable
    memory: Memory
    steps: int
    steps_per_epoch: int
    samples: dict[str, int]
    rows: list[str]
    picture: Image.Image

    def __str__(self) -> str:
        sources = ", ".join(f"{name} {count}" for name, count in self.samples.items())
        lines = [
            str(self.table),
            f"steps   {self.steps} of {self.stage.batch_size} samples; {self.steps_per_epoch} make an epoch "
            f"({sources})",
            f"memory  {self.memory}",
            "first batch (what is learned stands in [brackets])",
            *(f"  {i}. {row}" for i, row in enumerate(self.rows)),
        ]
        return "\n".join(lines)


def rehearse(
    recipe: Recipe | Mapping[str, Any],
    sources: Mapping[str, Any] | None = None,
    validation: Sequence[Record] | None = None,
) -> list[Page]:
    """A Page per stage. No weights are loaded and nothing is written.

    Raises what the run would raise before it trains, and for a stage that does not fit the model.
    """
    recipe = make_recipe(recipe)
    _, opened = check_run(recipe, sources, validation)
    pages, mixed = [], None  # the experts of the last stage that made a mixture
    folder, loaded = start_config(recipe, recipe.model)
    for name in recipe.stages:
        stage = recipe.stage(name)
        if recipe.experts(name) and recipe.before(name):
            mixed = list(recipe.experts(name))
        config = _config(recipe, name, loaded, mixed)
        config.losses = loss_config(stage)
        with torch.device("meta"):
            model = MedPLIB(config)
        model.processor = MedPLIBProcessor.for_model(folder, model)
        table = set_stage(model, stage)
        opened |= open_sources(recipe.sources(name), opened)
        batches = stage_batches(recipe, name, opened)
        batch = Collate(model.processor, stage.max_length)(
            [batches.data[place] for place in next(iter(batches))]
        )
        words, picture = read_back(batch, model.processor)
        memory = estimate_memory(recipe, stage, model, batch["input_ids"].numel(), batches.world)
        steps, per_epoch, samples = batches.steps, batches.steps_per_epoch, batches.order.counts
        pages.append(Page(stage, table, memory, steps, per_epoch, samples, words, picture))
    return pages


def _config(recipe: Recipe, name: str, loaded: MedPLIBConfig, experts: list[str] | None) -> MedPLIBConfig:
    """The configuration of a stage's model: that of the finished stage before it if the recipe runs from
    there on, else that of the recipe's model as `loaded`, made dense, or made a mixture of `experts`."""
    if name == next(iter(recipe.stages)) and experts is None and recipe.stages[name].start is None:
        for stage in recipe.before(name)[-1:]:
            finished = Path(recipe.out).expanduser() / stage / "model"
            if finished.is_dir():
                return read_config(finished)
    content = loaded.to_dict()
    if experts is not None:
        content["moe"] = {**recipe.moe, "experts": experts}
    elif recipe.dense:
        content["moe"] = None
    return MedPLIBConfig.from_dict(content)


def estimate_memory(recipe: Recipe, stage: Stage, model: nn.Module, tokens: int, world: int = 1) -> Memory:
    """Bytes per device for a forward of `tokens` tokens (padding included).

    weights      frozen ones in the recipe's dtype, trained ones in 4 bytes
    gradients    4 bytes per trained number, optimizer 8 (the two averages of AdamW)
    activations  of the language model: per layer 34 bytes per token and width (Korthikanti et al., 2022,
                 without the attention scores, which fused attention does not keep) in 16 bits, twice that in
                 32 bits; with checkpointing 2 (or 4) bytes per layer, and one layer in full; and 12 bytes per
                 token and word of the vocabulary for logits, probabilities and their gradient
    FSDP2 divides the first three by the number of processes. The towers and the mask side, whose activations
    are those of single images, and the memory that allocators waste, are not in it.
    """
    frozen_bytes = 2 if recipe.dtype == "bfloat16" else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    text = model.config.text_config
    size = 1 if stage.precision != "fp32" else 2
    layer = 34 * size * tokens * text.hidden_size
    if recipe.gradient_checkpointing:
        layers = 2 * size * tokens * text.hidden_size * text.num_hidden_layers + layer
    else:
        layers = layer * text.num_hidden_layers
    shards = world if recipe.strategy == "fsdp2" else 1
    return Memory(
        (frozen * frozen_bytes + trained * 4) // shards, 4 * trained // shards, 8 * trained // shards,
        layers + 12 * tokens * text.vocab_size,
    )  # fmt: skip


def read_back(batch: Mapping[str, Any], processor: MedPLIBProcessor) -> tuple[list[str], Image.Image]:
    """The rows of a batch as words, and as a picture with targets and regions drawn, from tensors alone."""
    tokens, words, tiles = processor.config.tokens, [], []
    pictures = _pictures(batch, processor)
    images, masks, regions = (
        iter(batch.get("image_index", ())),
        iter(batch.get("masks", ())),
        iter(batch.get("region_masks", ())),
    )
    for i, (ids, labels, kept) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        ids, labels = ids[kept.bool()], labels[kept.bool()]
        text = _words(ids.tolist(), labels.tolist(), processor)
        words.append(f"{TASKS[int(batch['tasks'][i])]}: {text}")
        own = [next(images) for _ in range(int((ids == tokens.image).sum()) // processor.num_image_tokens)]
        drawn = [next(masks) for _ in range(int((ids == tokens.seg).sum()))] if "masks" in batch else []
        asked = [next(regions) for _ in range(int((ids == tokens.region).sum()))]
        image = pictures[int(own[-1])] if own else None
        size = None if image is None else image.shape[:2]
        regions_drawn = [_Region(_resize(mask, size)) for mask in asked]
        tiles.append(Tile(image, words[-1], [m.bool().numpy() for m in drawn], regions_drawn))
    return words, draw_tiles(tiles)


@dataclass
class _Region:
    """A region as the overlay draws one."""

    mask: Any

    def to_mask(self, size: tuple[int, int]) -> Any:
        return self.mask


def _words(ids: list[int], labels: list[int], processor: MedPLIBProcessor) -> str:
    tokens, text, i = processor.config.tokens, "", 0
    while i < len(ids):
        kind, end = (ids[i] if ids[i] < 0 else 0, labels[i] != -100), i
        while end < len(ids) and ((ids[end] if ids[end] < 0 else 0), labels[end] != -100) == kind:
            end += 1
        if kind[0] == tokens.image:
            text += f"<image: {end - i} tokens>"
        elif kind[0] == tokens.region:
            text += "(region)"
        else:
            part = processor.tokenizer.decode(ids[i:end], skip_special_tokens=False)
            text += f"[{part}]" if kind[1] else part
        i = end
    return " ".join(text.split())


def _pictures(batch: Mapping[str, Any], processor: MedPLIBProcessor) -> list[Any]:
    """The images as the mask side gets them, its normalisation undone: uint8 (H', W', 3) each."""
    if "mask_pixel_values" not in batch:
        return []
    mask = processor.config.mask
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mask.mean, mask.std))
    pixels: Tensor = batch["mask_pixel_values"].float() * std + mean
    return list(pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _resize(mask: Tensor, size: tuple[int, int]) -> Any:
    return nn.functional.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].bool().numpy()
