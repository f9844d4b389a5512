"""Time a training step with mixtures beside the same model with dense blocks; the loader; memory.

    python benchmarks/training.py                    # tiny and mid size on the CPU
    python benchmarks/training.py --device cuda --dtype bf16 --size 1b

Both models learn the same batch of the mini set (questions, regions and masks; as in its recipe, four
questions about each image), in turn, round by round: forward, backward, clip, AdamW. What is printed is the
median of the rounds' ratios.

    step      a mixture of two experts, all of it training, against dense blocks
    frozen    the same mixture with one expert frozen, against the mixture that trains whole
    loader    samples per second that one worker prepares, against those that the tiny model consumes
    memory    the peak of a process that trains whole, and of one that trains with an expert frozen
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import clock
from torch.utils.data import DataLoader

from medplib.model_folder import read_config, resolve_model
from medplib.modeling import MedPLIB
from medplib.processing import MedPLIBProcessor
from medplib.stages import Stage, set_stage
from medplib.training.batches import Collate, StepBatches, TrainingData
from medplib.training.sources import MiniQuestions, Order

SIZES = {  # hidden, FFN, layers, heads of the language model; the rest is that of medplib-tiny
    "tiny": (128, 352, 4, 4),
    "mid": (768, 2048, 12, 12),
    "1b": (2048, 5504, 16, 16),
}
PER_IMAGE = 4  # as in the recipe "tiny"
WHOLE = ("language_model", "gates", "projector", "region_adapter", "mask_decoder", "seg_projector")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="fp32", choices=("fp32", "bf16"), help="of the products (autocast)"
    )
    parser.add_argument("--size", nargs="+", default=["tiny", "mid"], choices=SIZES)
    parser.add_argument("--batch", type=int, default=8, help="images per step; the mid size takes a quarter")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-memory", choices=("whole", "frozen"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(size: str, mixture: bool, device: str) -> MedPLIB:
    """A model of this size with random weights, in training."""
    folder = resolve_model("medplib-tiny")
    config = read_config(folder)
    hidden, ffn, layers, heads = SIZES[size]
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, ffn, layers
    text.num_attention_heads = text.num_key_value_heads = heads
    text.head_dim = hidden // heads
    moe = config.moe if mixture else None
    if moe is not None:
        moe.layers = None
    config.moe = moe
    torch.manual_seed(0)
    model = MedPLIB(copy.deepcopy(config)).to(device)
    model.processor = MedPLIBProcessor.for_model(folder, model)
    return model


def stage(mixture: bool, frozen: str | None = None) -> Stage:
    train = [part for part in WHOLE if mixture or part != "gates"]
    return Stage("benchmark", train=tuple(train), freeze=(f"experts.{frozen}",) if frozen else ())


def data(batch: int, steps: int, processor: MedPLIBProcessor) -> tuple[StepBatches, Collate]:
    """Batches of the mini set: questions of every task, as many about each image as in its recipe."""
    source = MiniQuestions(per_image=PER_IMAGE, per_epoch=4096)
    order = Order({"mini": len(source)}, {"mini": 1.0}, seed=0)
    training = TrainingData({"mini": source}, 0)
    batches = StepBatches(training, order, batch_size=batch, micro_batch=batch, steps=steps, grouping=False)
    return batches, Collate(processor, 512)


def one_batch(model: MedPLIB, count: int, device: str) -> dict[str, Any]:
    batches, collate = data(count, 1, model.processor)
    batch = collate([batches.data[place] for place in next(iter(batches))])
    for name in ("tasks", "origins"):
        batch.pop(name)
    return {name: value.to(device) for name, value in batch.items()}


def stepper(model: MedPLIB, batch: dict[str, Any], dtype: torch.dtype) -> Callable[[], None]:
    """One optimiser step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kind = next(iter(batch.values())).device.type

    def step() -> None:
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepared(size: str, mixture: bool, frozen: str | None, options: argparse.Namespace) -> Callable[[], None]:
    model = build(size, mixture, options.device)
    set_stage(model, stage(mixture, frozen))
    model.train()
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    images = options.batch if size == "tiny" else max(1, options.batch // 4)
    return stepper(model, one_batch(model, images, options.device), dtype)


def steps(size: str, options: argparse.Namespace) -> tuple[list[dict], float]:
    """The lines about a step, and the seconds of a mixture's step."""
    runs = {
        "dense": prepared(size, False, None, options),
        "mixture": prepared(size, True, None, options),
        "one expert frozen": prepared(size, True, "vqa", options),
    }
    for run in runs.values():
        run()
    rounds = []
    for turn in range(options.rounds):
        names = list(runs)[turn % 3 :] + list(runs)[: turn % 3]  # none of them always comes first
        rounds.append({name: clock(runs[name], options.device) for name in names})
    seconds = {name: statistics.median(one[name] for one in rounds) for name in runs}
    lines = []
    for what, ours, base in (
        ("step", "mixture", "dense"),
        ("frozen", "one expert frozen", "mixture"),
    ):
        ratios = sorted(one[ours] / one[base] for one in rounds)
        lines.append(
            {
                "what": what, "size": size, "of": f"{ours} / {base}", "ms": 1e3 * seconds[ours],
                "base_ms": 1e3 * seconds[base], "ratio": statistics.median(ratios),
                "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4],
            }
        )  # fmt: skip
    return lines, seconds["mixture"]


def loader(options: argparse.Namespace, step_seconds: float) -> dict:
    """What one worker prepares against what the tiny model's step consumes."""
    count = 24
    model = build("tiny", True, "cpu")
    batches, collate = data(options.batch, count, model.processor)
    loading = iter(DataLoader(batches.data, batch_sampler=batches, collate_fn=collate, num_workers=1))
    for _ in range(4):  # the worker is up, its queue is being filled
        next(loading)
    seconds = clock(lambda: [next(loading) for _ in range(count - 4)], "cpu") / (count - 4)
    return {
        "what": "loader", "size": "tiny", "samples_per_second": options.batch * PER_IMAGE / seconds,
        "consumed_per_second": options.batch * PER_IMAGE / step_seconds, "ratio": step_seconds / seconds,
    }  # fmt: skip


def memory(size: str, options: argparse.Namespace) -> dict:
    """Peak resident memory of a process that takes three steps, training whole or with an expert frozen."""
    found = {}
    for what in ("whole", "frozen"):
        words = [
            "--only-memory",
            what,
            "--size",
            size,
            "--batch",
            str(options.batch),
            "--dtype",
            options.dtype,
        ]
        command = [sys.executable, __file__, *words, "--device", options.device]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        found[what] = float(done.stdout.split()[-1])
    return {"what": "memory", "size": size, **found, "ratio": found["frozen"] / found["whole"]}


def resident_peak() -> float:
    """MB of this process at its largest so far (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_of_three_steps(options: argparse.Namespace) -> float:
    """MB: on CUDA what torch allocated, else by how much the process grew beyond its imports."""
    before = resident_peak()
    step = prepared(options.size[0], True, "vqa" if options.only_memory == "frozen" else None, options)
    for _ in range(3):
        step()
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return resident_peak() - before


def show(line: dict) -> None:
    if line["what"] in ("step", "frozen"):
        times = f"{line['ms']:>9.1f} / {line['base_ms']:>9.1f} ms"
        ratio = f"{line['ratio']:.2f}x  ({line['low']:.2f} to {line['high']:.2f})"
        print(f"{line['size']:<5} {line['what']:<7} {line['of']:<28} {times}  {ratio}", flush=True)
    elif line["what"] == "loader":
        made, used = (f"{line[k]:.0f} samples/s" for k in ("samples_per_second", "consumed_per_second"))
        print(
            f"{line['size']:<5} loader  one worker: {made}, the model: {used}, {line['ratio']:.1f}x",
            flush=True,
        )
    else:
        whole, frozen = (f"{line[k]:.0f} MB" for k in ("whole", "frozen"))
        print(
            f"{line['size']:<5} memory  whole {whole}, one expert frozen {frozen}: {line['ratio']:.2f}x",
            flush=True,
        )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.only_memory:
        print(peak_of_three_steps(options))
        return
    import transformers

    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.threads} thread(s)"
    setting = {
        "device": f"{options.device} ({name})", "dtype": options.dtype, "batch": options.batch,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in setting.items()))
    lines: list[dict] = []

    def add(line: dict) -> None:
        lines.append(line)
        show(line)

    for size in options.size:
        of_step, seconds = steps(size, options)
        for line in of_step:
            add(line)
        if size == "tiny":
            add(loader(options, seconds))
        add(memory(size, options))
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
