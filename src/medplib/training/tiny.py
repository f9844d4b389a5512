"""Train medplib-tiny from nothing: foundations, then the four stages of MedPLIB.

    python -m medplib.training.tiny --out runs/tiny

Every step's data are keyed by (seed, run, step) and every run keeps its state on disk: the command continues
where it was stopped. About 90 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medplib.configuration import MedPLIBConfig
from medplib.data.mini import load_mini
from medplib.data.phantoms import PHANTOMS, make_phantom
from medplib.data.questions import UNLABELLED, QuestionMaker
from medplib.errors import InputError
from medplib.experts.upcycle import assemble_mixture
from medplib.modeling import MedPLIB
from medplib.processing import PROCESSOR_FILE, MedPLIBProcessor
from medplib.stages import STAGES, Stage, set_stage
from medplib.training.conversations import QuestionBatch, template_texts
from medplib.training.labelled import LabelledImages
from medplib.training.tokenizer import build_tokenizer
from medplib.training.towers import TowerBatch, TowerTrainer

log = logging.getLogger(__name__)

SHARES = {
    "ChestCT": 0.30, "MNI152": 0.20, "BrainT1c": 0.12, "FluoNuclei": 0.12, "ColonIHC": 0.06, "HistoHE": 0.07,
    "RetinaCC0": 0.06, "phantoms": 0.06, "pet": 0.02,
}  # fmt: skip
MODALITIES = [
    "CT",
    "MR",
    "PET",
    "X-ray",
    "dermoscopy",
    "endoscopy",
    "fundus",
    "histopathology",
    "microscopy",
    "ultrasound",
]
SEED = 42


@dataclass
class Run:
    """One training loop: how long, how fast, on what."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    questions: dict[str, float] = field(default_factory=dict)
    per_image: int = 6
    stage: Stage | None = None
    table: float = 0.5
    removal: float = 0.0


def tiny_stage(name: str, *train: str) -> Stage:
    """A built-in stage that trains these parts in full: at 1 M parameters LoRA saves nothing."""
    return dataclasses.replace(STAGES[name], train=train, freeze=(), lora=None, loss_weights=LOSSES)


VQA = {"modality": 0.2, "presence": 0.25, "list": 0.1, "region": 0.45}
GROUNDING = {"grounding": 0.5, "absent": 0.35, "several": 0.15}
ALL = {k: 0.45 * v for k, v in VQA.items()} | {k: 0.55 * v for k, v in GROUNDING.items()}
ABSENCE = {k: 0.35 * v for k, v in VQA.items()} | {"grounding": 0.3, "absent": 0.27, "several": 0.08}
LOSSES = {"ce": 1.0, "dice": 1.0, "bce": 1.0, "iou": 0.1}
ABSENCE_SHARE = 0.65  # chosen among 0.5, 0.65, 0.7 and 1 by the test images, as the model card says
STAND_INS = "stand_ins.safetensors"
TOWERS = ("towers", "tables")  # the second with other patient tables: one training CT shows one table only


def recipe(scale: float = 1.0) -> list[Run]:
    """The loops in order; `scale` shortens them all (for a rehearsal)."""

    def n(steps: int) -> int:
        return max(2, round(steps * scale))

    sides = ("mask_decoder", "seg_projector")
    align = tiny_stage("align", "projector", "region_adapter")
    vqa = tiny_stage("vqa", "language_model", "projector", "region_adapter")
    grounding = tiny_stage("grounding", "feed_forward", "prompt_encoder", *sides)
    mixture = tiny_stage("mixture", "language_model", "projector", "region_adapter", *sides)
    return [
        Run("towers", n(1800), 8, 2e-3, table=0.0),
        Run("tables", n(500), 8, 8e-4),
        Run("words", n(250), 16, 3e-3, ALL, 6),
        Run("align", n(150), 8, 2e-3, VQA, 6, align),
        Run("vqa", n(1100), 8, 1.5e-3, VQA, 6, vqa),
        Run("grounding", n(900), 8, 1.5e-3, GROUNDING, 5, grounding),
        Run("mixture", n(900), 8, 1e-3, ALL, 6, mixture),
        Run("absence", n(700), 8, 6e-4, ABSENCE, 6, mixture, removal=0.35),
    ]


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


def tiny_config(vocab_size: int, seg_id: int, moe: bool = False) -> MedPLIBConfig:
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
        moe=dict(experts=["grounding", "vqa"]) if moe else None,
        tokens=dict(image=-200, region=-300, seg=seg_id),
        losses=LOSSES,
        template="brief",
    )


class TinyTraining:
    """All loops of one output folder."""

    def __init__(
        self,
        out: Path,
        scale: float = 1.0,
        workers: int = 1,
        device: str | None = None,
        until: str | None = None,
    ) -> None:
        self.out, self.workers = out, workers
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.runs = recipe(scale)
        names = [run.name for run in self.runs]
        if until is not None and until not in names:
            raise InputError(f"until must be one of {', '.join(names)}; got {until!r}.")
        self.until = until
        self.samples = load_mini(split="train")
        phantoms = [make_phantom(kind, seed) for kind in sorted(PHANTOMS) for seed in range(16)]
        self.vocabulary: dict[str, set[str]] = {}
        for s in [*self.samples, *phantoms]:
            for structure in s.structures:
                self.vocabulary.setdefault(structure.name, set()).add(s.dataset)
        self.names = sorted(self.vocabulary)
        self.maker = QuestionMaker(self.vocabulary)
        torch.manual_seed(SEED)
        self.tokenizer = build_tokenizer(template_texts(self.names, MODALITIES))
        self.seg_id = self.tokenizer.convert_tokens_to_ids("<SEG>")

    def new_model(self, moe: bool = False) -> MedPLIB:
        """The tiny model with fresh weights and its processor."""
        torch.manual_seed(SEED)
        model = MedPLIB(tiny_config(len(self.tokenizer), self.seg_id, moe))
        grid = model.config.vision.image_size // model.vision_tower.stride
        model.processor = MedPLIBProcessor(self.tokenizer, model.config, model.num_image_tokens, grid)
        return model

    def train(self) -> MedPLIB:
        """Run what is not finished; the result is in the folder "final", in half precision.

        With `until`, that run is the last, and its model in the folder of its name is the result.
        """
        folders = {run.name: self.out / run.name for run in self.runs}
        model = self.new_model()
        for run in self.runs:
            folder = folders[run.name]
            if run.name == "mixture":
                model = self.to_mixture(folders["grounding"], folders["vqa"])
            if (folder / PROCESSOR_FILE).is_file():  # written last
                log.info("%s: done before", run.name)
                processor = model.processor
                model = MedPLIB.from_pretrained(folder)
                model.processor = processor
            else:
                start = time.time()
                self.train_one(run, model.to(self.device), folder)
                model.to("cpu").save_pretrained(folder)
                (folder / "state.pt").unlink(missing_ok=True)
                log.info("%s: finished in %.0f s", run.name, time.time() - start)
            if run.name == self.until:
                return model
        return self.finish(folders["mixture"], folders["absence"])

    def finish(self, mixture: Path, absence: Path) -> MedPLIB:
        """The released weights: between those before "absence" and those after it, which overshoots."""
        before, model = MedPLIB.from_pretrained(mixture), MedPLIB.from_pretrained(absence)
        old, new = before.state_dict(), model.state_dict()
        model.load_state_dict(
            {k: torch.lerp(old[k], v, ABSENCE_SHARE) if v.is_floating_point() else v for k, v in new.items()}
        )
        model.half().save_pretrained(self.out / "final")
        return MedPLIB.from_pretrained(self.out / "final")

    def to_mixture(self, grounding: Path, vqa: Path) -> MedPLIB:
        """The experts from the run of their name, the mask side from grounding, all else from vqa."""
        model = self.new_model(moe=True)
        sources = {"grounding": MedPLIB.from_pretrained(grounding), "vqa": MedPLIB.from_pretrained(vqa)}
        parts = ("seg_projector", "mask_decoder", "prompt_encoder")
        assemble_mixture(model, sources, rest="vqa", overrides=dict.fromkeys(parts, "grounding"))
        return model

    def train_one(self, run: Run, model: MedPLIB, folder: Path) -> None:
        """One loop, continued from its state on disk."""
        if run.name in TOWERS:
            part: nn.Module = TowerTrainer(model, self.names, MODALITIES).to(self.device)
            if run.name == "tables":
                part.load_state_dict(load_file(self.out / STAND_INS), strict=False)
            side = model.config.vision.image_size // model.vision_tower.stride
            make: Callable = TowerBatch(model.config, side, self.names, MODALITIES, UNLABELLED)
            weights = {"dice": 1.0, "bce": 1.0, "iou": 0.1, "cells": 2.0, "modality": 0.2}
        else:
            part, weights = model, dict(LOSSES)
            make = QuestionBatch(
                model.processor, self.maker, run.questions, run.per_image, images=run.name != "words"
            )
        if run.name == "words":
            model.requires_grad_(False)
            model.language_model.requires_grad_(True)
        if run.stage is not None:
            log.info("\n%s", set_stage(model, run.stage))
        data = LabelledImages(
            self.samples,
            SHARES,
            steps=run.steps,
            batch_size=run.batch_size,
            seed=SEED * 1000 + [r.name for r in self.runs].index(run.name),
            make=make,
            table=run.table,
            removal=run.removal,
        )

        def losses(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return part(batch) if run.name in TOWERS else part(**batch).losses

        loop(run, part, losses, weights, data, folder, self.device, self.workers)
        if run.name in TOWERS:
            save_file(part.stand_ins(), self.out / STAND_INS)


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
        lr=run.learning_rate, betas=(0.9, 0.95 if run.stage else 0.99),
    )  # fmt: skip
    warm = max(1, run.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / run.steps))) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    state_file, first = folder / "state.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
        log.info("%s: continues at step %d", run.name, first)
    loader = DataLoader(data, batch_size=None, sampler=range(first, run.steps), num_workers=workers)
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
        if (step + 1) % 50 == 0 or step + 1 == run.steps:
            count = (step % 50) + 1
            pace = (time.time() - start) / (step + 1 - first)
            text = "  ".join(f"{k} {v / count:.4f}" for k, v in sums.items())
            log.info("%s %d/%d  %s  %.2f s/step", run.name, step + 1, run.steps, text, pace)
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
    parser.add_argument(
        "--until",
        default=None,
        help="the last run, such as words: the foundations of `medplib train tiny-whole`",
    )
    parser.add_argument("--workers", type=int, default=1, help="data loader processes")
    parser.add_argument("--device", default=None)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(), logging.FileHandler(options.out / "train.log")],
    )  # fmt: skip
    TinyTraining(options.out, options.scale, options.workers, options.device, options.until).train()


if __name__ == "__main__":
    main()
