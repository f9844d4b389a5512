"""Time MedPLIB beside a plain Llama of one expert's size: prefill, decode, the mask, and batches.

    python benchmarks/generate.py                       # CPU, about 160 M parameters in the plain Llama
    python benchmarks/generate.py --device cuda --size 7b --dtype bf16

Random weights; the same number of layers, heads and words on both sides, attention and embeddings alike. Both
are timed in turn, round by round, on the same token ids; what is printed is the median of the rounds' ratios.

    prefill   one forward over the prompt with a cache, logits of the last position
    decode    a generated token: (time of N tokens - time of 1) / (N - 1), through generate() on both sides;
              MedPLIB also keeps the state behind each token, from which masks are drawn
    mask      an answer with a <SEG>: forwards of the language model with and without the drawing
    batch     tokens per second of 8 rows against 1 row
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from clock import clock
from transformers import LlamaConfig, LlamaForCausalLM

from medplib.configuration import MedPLIBConfig
from medplib.modeling import MedPLIB

SIZES = {  # hidden, FFN, layers, heads, words
    "tiny": (32, 64, 2, 2, 32267),
    "published": (512, 1376, 8, 8, 32267),  # the width at which the published code was measured
    "mid": (768, 2048, 16, 12, 32267),
    "7b": (4096, 11008, 32, 32, 32267),
}
SEG = 32000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--size", default="mid", choices=SIZES)
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def text_config(size: str) -> dict:
    hidden, ffn, layers, heads, words = SIZES[size]
    return dict(
        model_type="llama", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=words, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def build(size: str, device: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, MedPLIB]:
    """The plain Llama and MedPLIB with two experts of its size; towers are small, they are not timed."""
    text = text_config(size)
    torch.manual_seed(0)
    tower = dict(name="timm_pyramid", args=dict(model="resnet18d", dim=64, top_stride=16, coordinates=True))
    mask_args = dict(model="resnet18d", dim=64, top_stride=16, skip_strides=[8, 4], skip_channels=[32, 16])
    mask_tower = dict(name="timm_pyramid", args=mask_args)
    config = MedPLIBConfig(
        text_config=text, vision=dict(tower=tower, image_size=192),
        mask=dict(encoder=mask_tower, dim=64, image_size=256, depth=2, num_heads=4, mlp_dim=128),
        moe=dict(experts=["grounding", "vqa"]), tokens=dict(image=-200, region=-300, seg=SEG),
    )  # fmt: skip
    settings = {k: v for k, v in text.items() if k != "model_type"}
    with torch.device(device):
        plain = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
        ours = MedPLIB(config).to(dtype).eval()
    ours.processor = Ids()
    return plain, ours


class Ids:
    """The two ids that generation asks a processor for; the prompts here are ids already."""

    eos_id, pad_id = 2, 0


class Prompt:
    """A prompt of random ids, as `generate_with_states` takes it."""

    def __init__(self, rows: int, length: int, device: str) -> None:
        ids = torch.randint(3, 31000, (rows, length), device=device)
        self.tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model, prompt: Prompt, new: int) -> None:
    """N greedy tokens, no fewer."""
    if isinstance(model, MedPLIB):
        model.generate_with_states(prompt, max_new_tokens=new, min_new_tokens=new)
    else:
        model.generate(
            **prompt.tensors, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


def rounds(runs: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """What each run gave, in turn; the first turn is not counted."""
    for run in runs.values():
        run()
    return {
        name: list(values)
        for name, values in zip(
            runs, zip(*[[run() for run in runs.values()] for _ in range(count)], strict=True), strict=True
        )
    }


def compare(name: str, runs: dict[str, Callable[[], float]], count: int) -> dict:
    """Medians of both, and the median and quartiles of ours / plain."""
    seconds = rounds(runs, count)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    return {
        "what": name,
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
    }


@torch.no_grad()
def prefill(model, prompt: Prompt, device: str) -> float:
    return clock(lambda: model(**prompt.tensors, use_cache=True, logits_to_keep=1), device)


def per_token(model, prompt: Prompt, new: int, device: str) -> float:
    one = clock(lambda: generate(model, prompt, 1), device)
    return (clock(lambda: generate(model, prompt, new), device) - one) / (new - 1)


@torch.no_grad()
def mask_passes(model: MedPLIB, prompt: Prompt, new: int, device: str) -> dict:
    """Forwards of the decoder during an answer that says <SEG> in the middle, then the drawing's share."""
    calls = []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    processor = ForcedSeg(prompt.tensors["input_ids"].shape[1] + new // 2)
    generated = model.generate_with_states(prompt, max_new_tokens=new, logits_processor=[processor])
    during = len(calls)
    pixels = torch.randn(1, 3, 256, 256, device=device, dtype=model.dtype)
    features = model.mask_encoder(pixels)

    def draw() -> None:
        model.decode_masks(generated.states, features, torch.zeros(len(generated.states), dtype=torch.long))

    draw()
    seconds = statistics.median(clock(draw, device) for _ in range(5))
    hook.remove()
    return {
        "what": "mask",
        "tokens": int(generated.ids.shape[1]),
        "masks": len(generated.states),
        "forwards": during,
        "forwards_of_the_drawing": len(calls) - during,
        "decoder_ms": 1e3 * seconds,
    }


class ForcedSeg:
    """Makes generation say <SEG> at one position."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == self.length:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, SEG] = 0
        return scores


def measure(options: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    device = options.device
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    plain, ours = build(options.size, device, dtype)
    models = {"plain": plain, "ours": ours}
    prompt, eight = Prompt(1, options.prompt, device), Prompt(8, 32, device)
    one = Prompt(1, 32, device)
    lines = [
        compare(
            f"prefill, {options.prompt} tokens",
            {k: lambda m=m: prefill(m, prompt, device) for k, m in models.items()},
            options.rounds,
        ),
        compare(
            "decode, one token",
            {k: lambda m=m: per_token(m, one, options.new, device) for k, m in models.items()},
            options.rounds,
        ),
        mask_passes(ours, one, options.new, device),
    ]
    speed = rounds(
        {
            "one row": lambda: 1 / per_token(ours, one, options.new, device),
            "eight rows": lambda: 8 / per_token(ours, eight, options.new, device),
        },
        max(3, options.rounds // 2),
    )
    gains = sorted(b / a for a, b in zip(speed["one row"], speed["eight rows"], strict=True))
    lines.append(
        {
            "what": "batch of 8",
            "tokens_per_second": {k: statistics.median(v) for k, v in speed.items()},
            "ratio": statistics.median(gains),
        }
    )
    if device != "cpu":
        lines.append({"what": "peak memory, both models", "GB": torch.cuda.max_memory_allocated() / 1e9})
    for line in lines:
        line["dtype"] = str(dtype).removeprefix("torch.")
    sizes = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in models.items()}
    print(
        f"{lines[0]['dtype']}: plain Llama {sizes['plain']:.0f} M parameters, MedPLIB {sizes['ours']:.0f} M"
    )
    return lines


def show(line: dict) -> None:
    if "plain_ms" in line:
        print(
            f"  {line['what']:<22} plain {line['plain_ms']:>9.2f} ms  MedPLIB {line['ours_ms']:>9.2f} ms  "
            f"{line['ratio']:.2f}x  ({line['low']:.2f} to {line['high']:.2f})"
        )
    elif line["what"] == "mask":
        print(
            f"  {line['what']:<22} {line['tokens']} tokens in {line['forwards']} forwards; drawing "
            f"{line['masks']} mask: {line['forwards_of_the_drawing']} more, {line['decoder_ms']:.1f} ms"
        )
    elif "ratio" in line:
        print(f"  {line['what']:<22} {line['ratio']:.2f}x the tokens per second of one row")
    else:
        print(f"  {line['what']:<22} {line['GB']:.1f} GB")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    import transformers

    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.threads} thread(s)"
    setting = {
        "device": f"{options.device} ({name})", "size": options.size, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": sys.version.split()[0],
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in setting.items()))
    lines = []
    for word in options.dtype:
        new = measure(options, {"fp32": torch.float32, "bf16": torch.bfloat16}[word])
        lines += new
        for line in new:
            show(line)
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
