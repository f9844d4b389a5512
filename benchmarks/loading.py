"""Memory and time to load a model: `python benchmarks/loading.py` prints a table. Linux only.

Random models with weights of 1 to 2 GB are saved in both layouts, in one file and in shards, and loaded on
the CPU by a fresh process for each row. Memory is the peak while loading less what the process held before,
as a multiple of the weight files: "own" is memory of the process alone (RssAnon, sampled), "resident" also
counts pages of the mapped files (VmHWM), which the kernel takes back when it needs them. The files are in the
page cache, as just written.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

OVERRIDES = {
    "clip": {"hidden": 512, "inter": 2048, "layers": 6, "heads": 8},
    "sam": {"embed_dim": 384, "depth": 6, "heads": 6, "global_attn": [2, 5]},
}
WORDS, WIDTH, HIDDEN, HEADS = 32267, 1024, 2752, 8
LAYERS = {"float32": 14, "bfloat16": 30, "float16": 30}  # 1.6 GB each
CASES = {  # dtype of the weights: dtypes asked for ("" is the default: that of the file, float32 for float16)
    "float32": ("", "bfloat16"),
    "bfloat16": ("", "float32"),
    "float16": ("", "float16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--dtype", choices=list(CASES), nargs="+", default=list(CASES), help="of the weights")
    parser.add_argument("--quantize", nargs="*", default=["int8", "int4"], help="with the bfloat16 weights")
    parser.add_argument("--one", nargs=3, metavar=("DIR", "DTYPE", "QUANTIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    packages = ("torch", "transformers", "safetensors", "torchao")
    print(f"{platform.machine()} CPU, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="\n\n")
    print("| layout | files | weights | loaded as | GB | own | resident | own / model | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            for (layout, shards), path in save_all(Path(folder), dtype).items():
                quantized = args.quantize if dtype == "bfloat16" and shards else []
                for asked, quantize in [*((d, "") for d in CASES[dtype]), *(("", q) for q in quantized)]:
                    rows.append(
                        {"layout": layout, "files": "shards" if shards else "one", "weights": dtype}
                        | run_alone(path, asked, quantize)
                    )
                    print(
                        "| {layout} | {files} | {weights} | {loaded_as} | {checkpoint_gb:.2f} | {own:.2f} x "
                        "| {resident:.2f} x | {own_of_model:.2f} | {seconds:.1f} |".format(**rows[-1]),
                        flush=True,
                    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def save_all(folder: Path, dtype: str) -> dict[tuple[str, bool], Path]:
    """A random model in every layout: {(layout, in shards): its folder}."""
    import torch

    from medplib import MedPLIB, MedPLIBConfig, MedPLIBProcessor
    from medplib.official.configuration import convert
    from medplib.official.export import export_official
    from medplib.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(["What is in the region? Here is the liver."] * 3, vocab_size=320)
    content = {
        "model_type": "medplib_moe_llama", "vocab_size": WORDS, "hidden_size": WIDTH,
        "intermediate_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS[dtype],
        "moe": {"num_experts": [2], "moe_layers_idx": list(range(LAYERS[dtype])), "top_k_experts": 1},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096,
    }  # fmt: skip
    seg = tokenizer.convert_tokens_to_ids("<SEG>")
    torch.manual_seed(0)
    model = MedPLIB(MedPLIBConfig(**convert(content, OVERRIDES, seg))).to(getattr(torch, dtype)).eval()
    model.processor = MedPLIBProcessor(tokenizer, model.config, model.num_image_tokens, 24)
    folders = {}
    for shards in (False, True):
        size = "300MB" if shards else "10GB"
        folders["medplib", shards], folders["official", shards] = ours, theirs = [
            folder / f"{layout}-{shards}" for layout in ("medplib", "official")
        ]
        model.save_pretrained(ours, max_shard_size=size)
        export_official(model, theirs, max_shard_size=size)
        (theirs / "added_tokens.json").write_text(json.dumps({"<SEG>": seg}))
    return folders


def run_alone(folder: Path, dtype: str, quantize: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--one", str(folder), dtype, quantize]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, dtype: str, quantize: str) -> dict[str, float | str]:
    """Load one folder and return what it took."""
    from medplib import MedPLIB
    from medplib.checkpoints import holds_official
    from medplib.quantization import stored

    MedPLIB.from_pretrained("medplib-tiny", **({"quantize": quantize} if quantize else {}))  # imports
    options = {"overrides": OVERRIDES} if holds_official(Path(folder)) else {}
    options |= {"dtype": dtype} if dtype else {}
    options |= {"quantize": quantize} if quantize else {}
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    peak, done = [before["RssAnon"]], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = MedPLIB.from_pretrained(folder, **options)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    checkpoint = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    size = sum(part.nbytes for value in model.state_dict().values() for part in stored(value))
    own = peak[0] - before["RssAnon"]
    return {
        "loaded_as": quantize or str(model.dtype).removeprefix("torch."), "checkpoint_gb": checkpoint / 1e9,
        "own": own / checkpoint, "resident": (memory()["VmHWM"] - before["VmRSS"]) / checkpoint,
        "own_of_model": own / size, "seconds": seconds,
    }  # fmt: skip


def memory() -> dict[str, int]:
    """VmRSS, VmHWM and RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


if __name__ == "__main__":
    main()
