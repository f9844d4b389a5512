"""Train medplib-tiny from nothing: foundations, then the stages of the recipe "tiny-whole".

    python -m medplib.training.tiny --out runs/tiny-whole

Every step's data are keyed by (seed, run, step) and every run keeps its state on disk: the command continues
where it was stopped. About 190 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medplib.configuration import MedPLIBConfig
from medplib.data import samples
from medplib.data.mini import load_mini
from medplib.data.questions import UNLABELLED, QuestionMaker
from medplib.modeling import MedPLIB
from medplib.processing import PROCESSOR_FILE, MedPLIBProcessor
from medplib.training.chain import train
from medplib.training.conversations import QuestionDraws, TextBatch, template_texts
from medplib.training.labelled import SHARES, LabelledImages, vocabulary_of
from medplib.training.recipe import load_recipe
from medplib.training.tokenizer import build_tokenizer
from medplib.training.towers import TowerBatch, TowerTrainer

log = logging.getLogger(__name__)

MODALITIES = sorted(samples.MODALITIES)
SEED = 42


@dataclass
class Run:
    """One loop that lays the foundations: how long, how fast, and the chance of another patient table."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    table: float = 0.5


FOUNDATIONS = (
    Run("towers", 2200, 8, 2e-3, table=0.0),
    Run("tables", 500, 8, 8e-4),  # the towers with other patient tables: one training CT shows one table only
    Run("words", 250, 16, 3e-3),
)
TOWER_LOSSES = {"dice": 1.0, "bce": 1.0, "iou": 0.1, "cells": 2.0, "modality": 0.2}
LOSSES = {"ce": 1.0, "dice": 1.0, "bce": 1.0, "iou": 0.1}
STAND_INS = "stand_ins.safetensors"


def shortened(steps: int, scale: float) -> int:
    """Steps of a run, all of them shortened alike for a rehearsal."""
    return max(2, round(steps * scale))


def _pyramid(channels: list[int], skips: list[int]) -> dict:
    """A small ResNet, its levels merged, told where each pixel lies; `skips`: channels of the finer maps."""
    network = dict(channels=channels, stem_width=8, stem_type="deep_tiered")
    return dict(
        name="timm_pyramid",
        args=dict(
            model="resnet18d",
            dim=128,
            model_args=network,
            coordinates=True,
            top_stride=16,
            skip_strides=[8, 4, 2][: len(skips)],
            skip_channels=skips,
        ),
    )


def tiny_config(vocab_size: int, seg_id: int) -> MedPLIBConfig:
    """The sizes of medplib-tiny."""
    return MedPLIBConfig(
        text_config=dict(
            model_type="llama",
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        vision=dict(
            tower=_pyramid([24, 48, 96, 128], []),
            projector=dict(name="pooled_mlp", args=dict(factor=2)),
            image_size=192,
        ),
        region=dict(mask_mode="area", pooler=dict(name="mean", args=dict(weights="area"))),
        mask=dict(
            encoder=_pyramid([24, 48, 96, 160], [64, 32, 16]),
            dim=128,
            image_size=256,
            mask_channels=8,
            depth=2,
            num_heads=4,
            mlp_dim=256,
            decoder=dict(
                name="sam", args=dict(num_multimask_outputs=0, iou_head_hidden_dim=64, num_upscales=3)
            ),
        ),
        tokens=dict(image=-200, region=-300, seg=seg_id),
        losses=LOSSES,
        template="brief",
    )


class TinyTraining:
    """The foundations, the stages and the released weights of one output folder."""

    def __init__(self, out: Path, scale: float = 1.0, workers: int = 1, device: str | None = None) -> None:
        self.out, self.scale, self.workers = out, scale, workers
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.samples = load_mini(split="train")
        self.vocabulary = vocabulary_of(self.samples)
        self.names = sorted(self.vocabulary)
        asked = load_recipe("tiny-whole").data["all"].options  # of "words", too
        self.questions = QuestionDraws(QuestionMaker(self.vocabulary), asked["tasks"])
        self.per_image = asked["per_image"]
        torch.manual_seed(SEED)
        self.tokenizer = build_tokenizer(template_texts(self.names, MODALITIES))
        self.seg_id = self.tokenizer.convert_tokens_to_ids("<SEG>")

    def new_model(self) -> MedPLIB:
        """The tiny model with fresh weights and its processor."""
        torch.manual_seed(SEED)
        model = MedPLIB(tiny_config(len(self.tokenizer), self.seg_id))
        grid = model.config.vision.image_size // model.vision_tower.stride
        model.processor = MedPLIBProcessor(self.tokenizer, model.config, model.num_image_tokens, grid)
        return model

    def train(self) -> MedPLIB:
        """Run what is not finished; the result is in the folder "final", in half precision."""
        words = self.lay_foundations()
        recipe = load_recipe("tiny-whole")
        changes = {"model": str(words), "out": str(self.out), "workers": self.workers}
        changes |= {"device": "cpu" if self.device == "cpu" else None}
        for name in recipe.stages:
            changes[f"stages.{name}.steps"] = shortened(recipe.stage(name).steps, self.scale)
        results = train(load_recipe("tiny-whole", changes), progress=log.info)
        MedPLIB.from_pretrained(results[-1].folder, dtype=torch.float16).save_pretrained(self.out / "final")
        return MedPLIB.from_pretrained(self.out / "final")

    def lay_foundations(self) -> Path:
        """What a published model takes from CLIP, SAM-Med2D and LLaMA; returns the folder of its model."""
        model = self.new_model()
        for run in FOUNDATIONS:
            folder = self.out / run.name
            if (folder / PROCESSOR_FILE).is_file():  # written last
                log.info("%s: done before", run.name)
                processor = model.processor
                model = MedPLIB.from_pretrained(folder)
                model.processor = processor
                continue
            start = time.time()
            self.lay(run, model.to(self.device), folder)
            model.to("cpu").save_pretrained(folder)
            (folder / "state.pt").unlink(missing_ok=True)
            log.info("%s: finished in %.0f s", run.name, time.time() - start)
        return self.out / FOUNDATIONS[-1].name

    def lay(self, run: Run, model: MedPLIB, folder: Path) -> None:
        """One loop, continued from its state on disk."""
        towers = None
        if run.name == "words":
            model.requires_grad_(False)
            model.language_model.requires_grad_(True)
            part: nn.Module = model
            make: Callable = TextBatch(model.processor, self.questions, self.per_image)
        else:
            part = towers = TowerTrainer(model, self.names, MODALITIES).to(self.device)
            if run.name == "tables":
                part.load_state_dict(load_file(self.out / STAND_INS), strict=False)
            side = model.config.vision.image_size // model.vision_tower.stride
            make = TowerBatch(model.config, side, self.names, MODALITIES, UNLABELLED)
        data = LabelledImages(
            self.samples,
            SHARES,
            steps=shortened(run.steps, self.scale),
            batch_size=run.batch_size,
            seed=SEED * 1000 + FOUNDATIONS.index(run),
            make=make,
            table=run.table,
        )

        def losses(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return model(**batch).losses if towers is None else towers(batch)

        weights = LOSSES if towers is None else TOWER_LOSSES
        loop(run, part, losses, weights, data, folder, self.device, self.workers)
        if towers is not None:
            save_file(towers.stand_ins(), self.out / STAND_INS)


def loop(
    run: Run,
    module: nn.Module,
    losses: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    weights: dict[str, float],
    data: LabelledImages,
    folder: Path,
    device: str,
    workers: int,
    keep: int = 200,
) -> None:
    """AdamW, warm-up then cosine decay, clip 1.0; the state is kept every `keep` steps and read if there."""
    folder.mkdir(parents=True, exist_ok=True)
    module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        lr=run.learning_rate, betas=(0.9, 0.99),
    )  # fmt: skip
    steps = len(data)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    state_file, first = folder / "state.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        log.info("%s: continues at step %d", run.name, first)
    loader = DataLoader(data, batch_size=None, sampler=range(first, steps), num_workers=workers)
    sums: dict[str, float] = {}
    start = time.time()
    for step, batch in enumerate(loader, first):
        parts = losses({k: v.to(device) for k, v in batch.items()})
        total = sum(weights[k] * v for k, v in parts.items())
        if not torch.isfinite(total):
            raise RuntimeError(f"{run.name}: the loss is not finite at step {step}: {parts}")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        for k, v in parts.items():
            sums[k] = sums.get(k, 0.0) + v.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            count = (step % 50) + 1
            pace = (time.time() - start) / (step + 1 - first)
            text = "  ".join(f"{k} {v / count:.4f}" for k, v in sums.items())
            log.info("%s %d/%d  %s  %.2f s/step", run.name, step + 1, steps, text, pace)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, **{k: v / count for k, v in sums.items()}}) + "\n")
            sums.clear()
        if (step + 1) % keep == 0:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and logs (continued if there)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    parser.add_argument("--workers", type=int, default=1, help="data loader processes")
    parser.add_argument("--device", default=None)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(options.out / "train.log")],
    )  # fmt: skip
    TinyTraining(options.out, options.scale, options.workers, options.device).train()


if __name__ == "__main__":
    main()
