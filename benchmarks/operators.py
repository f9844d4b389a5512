"""Time the operators of routing one by one, beside the same done with plain PyTorch calls.

    python benchmarks/operators.py                        # CPU
    python benchmarks/operators.py --device cuda          # compiled kernels, as CUDA graphs

T tokens, D width, H hidden width, E experts, K experts per token.

bytes are those that must be moved once (read and written); TB/s are bytes over time. On CUDA each operator is
captured into a graph of several calls whose inputs and results lie apart and exceed the cache, and a host
sync inside is an error. The answer of each is first compared with plain PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from clock import clock
from torch import Tensor

from medplib import ops

CALLS = 8  # per graph or timing, on inputs of their own
REPLAYS = 8  # of a graph between two waits, so that the waiting itself takes less than a percent


@dataclass
class Case:
    """One operator: what we run, what plain PyTorch runs, and the bytes it must move."""

    name: str
    ours: Callable[[int], object]
    plain: Callable[[int], object] | None
    bytes: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="fp32 or bf16; default fp32 on the CPU, bf16 on CUDA")
    parser.add_argument("--dim", type=int, help="default 1024 on the CPU, 4096 on CUDA")
    parser.add_argument("--hidden", type=int, help="default 2752 on the CPU, 11008 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", help="default 1 1024 on the CPU; 1 to 16384 on CUDA")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.dim = options.dim or (4096 if cuda else 1024)
    options.hidden = options.hidden or (11008 if cuda else 2752)
    options.tokens = options.tokens or ([1, 600, 1024, 4096, 8192, 16384] if cuda else [1, 1024])
    options.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        options.dtype or ("bf16" if cuda else "fp32")
    ]
    return options


def plain_gate(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (x.float() @ weight.T).softmax(dim=-1).topk(k, dim=-1)


def plain_stack(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """What a mixture's author writes: softmax, top-k, sort, gather, weigh, add by index."""
    weights, experts = plain_gate(x, weight, k)
    order = experts.reshape(-1).argsort(stable=True)
    rows = x.index_select(0, order // k)
    scaled = rows * weights.reshape(-1).index_select(0, order)[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // k, scaled)


def our_stack(x: Tensor, weight: Tensor, k: int) -> Tensor:
    gated = ops.gate(ops.gate_logits(x, weight), k, statistics=False)
    plan = ops.plan(gated.experts, len(weight))
    rows = ops.permute(x, plan.order, k, plan.position)
    return ops.combine(rows, plan.order, gated.weights, plan.position)


def cases(options: argparse.Namespace, count: int) -> list[Case]:
    """All operators at one number of tokens."""
    torch.manual_seed(0)
    dim, hidden, experts, k = options.dim, options.hidden, options.experts, options.top_k
    make = dict(device=options.device, dtype=options.dtype)
    size = torch.empty((), dtype=options.dtype).element_size()
    xs = [torch.randn(count, dim, **make) for _ in range(CALLS)]
    weight = torch.randn(experts, dim, device=options.device) * dim**-0.5
    logits = [ops.gate_logits(x, weight) for x in xs]
    gated = [ops.gate(one, k, statistics=False) for one in logits]
    plans = [ops.plan(one.experts, experts) for one in gated]
    rows = [ops.permute(x, p.order, k, p.position) for x, p in zip(xs, plans, strict=True)]
    row_bytes = count * dim * size
    moved = row_bytes * (1 + k)

    def plain_permute(i: int) -> Tensor:
        return xs[i].index_select(0, plans[i].order // k)

    def plain_combine(i: int) -> Tensor:
        scale = gated[i].weights.reshape(-1).index_select(0, plans[i].order)[:, None].to(options.dtype)
        return torch.zeros_like(xs[i]).index_add(0, plans[i].order // k, rows[i] * scale)

    found = [
        Case(
            "gate_logits",
            lambda i: ops.gate_logits(xs[i], weight),
            lambda i: xs[i].float() @ weight.T,
            row_bytes,
        ),
        Case(
            "gate",
            lambda i: ops.gate(logits[i], k),
            lambda i: logits[i].softmax(-1).topk(k),
            count * experts * 8,
        ),
        Case(
            "plan",
            lambda i: ops.plan(gated[i].experts, experts),
            lambda i: gated[i].experts.reshape(-1).argsort(stable=True),
            count * k * 24,
        ),
        Case(
            "permute",
            lambda i: ops.permute(xs[i], plans[i].order, k, plans[i].position),
            plain_permute,
            moved,
        ),
        Case(
            "combine",
            lambda i: ops.combine(rows[i], plans[i].order, gated[i].weights, plans[i].position),
            plain_combine,
            moved,
        ),
        Case(
            "whole stack",
            lambda i: our_stack(xs[i], weight, k),
            lambda i: plain_stack(xs[i], weight, k),
            row_bytes + 2 * moved,
        ),
    ]
    gate_up = [torch.randn(count * k, 2 * hidden, **make) for _ in range(CALLS)]
    found.append(
        Case(
            "swiglu",
            lambda i: ops.swiglu(gate_up[i]),
            lambda i: F.silu(gate_up[i][:, :hidden]) * gate_up[i][:, hidden:],
            3 * count * k * hidden * size,
        )
    )
    if count * k <= 16:
        up = torch.randn(experts, 2 * hidden, dim, **make) * dim**-0.5
        down = torch.randn(experts, dim, hidden, **make) * hidden**-0.5

        def dense(i: int) -> Tensor:
            both = F.linear(xs[i], up[0])
            return F.linear(F.silu(both[:, :hidden]) * both[:, hidden:], down[0])

        touched = len(torch.unique(gated[0].experts))
        weights_bytes = touched * 3 * dim * hidden * size
        found.append(
            Case(
                "decode_ffn",
                lambda i: ops.decode_ffn(xs[i], gated[i].experts, gated[i].weights, up, down),
                dense,
                weights_bytes,
            )
        )
    return found


def check(case: Case) -> float | None:
    """Largest difference from plain PyTorch, relative to its largest number; None where the two differ by
    design (`plain` of decode_ffn is one dense expert, the others of gate and plan return more)."""
    if case.name in ("decode_ffn", "gate", "plan"):
        return None
    ours, plain = case.ours(0).float(), case.plain(0).float()
    return float((ours - plain).abs().max() / plain.abs().max())


def prepare(run: Callable[[int], object], device: str) -> Callable[[], float]:
    """What gives the seconds of a call: of CALLS in turn, on a GPU as a CUDA graph."""
    if device == "cpu":
        return lambda: clock(lambda: [run(i) for i in range(CALLS)], device) / CALLS
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            kept = [run(i) for i in range(CALLS)]  # else one result would take the place of another
    finally:
        torch.cuda.set_sync_debug_mode("default")
    del kept

    def timed() -> float:
        return clock(lambda: [graph.replay() for _ in range(REPLAYS)], device) / (CALLS * REPLAYS)

    return timed


@torch.no_grad()
def measure(options: argparse.Namespace, count: int) -> list[dict]:
    lines = []
    for case in cases(options, count):
        error = check(case)
        runs = {}
        for name, run in (("ours", case.ours), ("plain", case.plain)):
            try:
                runs[name] = prepare(run, options.device)
            except Exception as refusal:  # a plain chain that cannot be captured
                print(f"  {case.name}: {name} cannot be captured: {str(refusal)[:80]}")
        if "ours" not in runs:
            lines.append({"operator": case.name, "tokens": count, "error": error})
            continue
        for run in runs.values():
            run()
        rounds = [{name: run() for name, run in runs.items()} for _ in range(options.rounds)]
        ours = statistics.median(one["ours"] for one in rounds)
        line = {
            "operator": case.name,
            "tokens": count,
            "us": 1e6 * ours,
            "TB_s": case.bytes / ours / 1e12,
            "error": error,
        }
        if "plain" in runs:
            line["plain_over_ours"] = statistics.median(one["plain"] / one["ours"] for one in rounds)
        lines.append(line)
    return lines


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{options.threads} thread(s)"
    ops.swiglu(torch.ones(1, 2, device=options.device))  # loads what is loaded at first use
    setting = {
        "device": f"{options.device} ({name})",
        "dtype": str(options.dtype),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "D": options.dim,
        "H": options.hidden,
        "E": options.experts,
        "K": options.top_k,
        "kernels": ops.status()[options.device.split(":")[0]],
    }
    print("  ".join(f"{key} {value}" for key, value in setting.items()))
    lines: list[dict] = []
    write(options.json, setting, lines)
    for count in options.tokens:
        for line in measure(options, count):
            lines.append(line)
            if "us" not in line:
                continue
            ratio = f"{line['plain_over_ours']:.2f}x" if "plain_over_ours" in line else "-"
            error = "" if line["error"] is None else f"  differs by {line['error']:.0e}"
            speed = f"{line['us']:>10.1f} us  {line['TB_s']:>7.3f} TB/s"
            name = f"{count:>6} tokens  {line['operator']:<12}"
            print(f"{name} {speed}  plain PyTorch takes {ratio}{error}", flush=True)
        write(options.json, setting, lines)


def write(path: Path | None, setting: dict, lines: list[dict]) -> None:
    """As it goes: a limit of time may end this."""
    if path is not None:
        path.write_text(json.dumps({"setting": setting, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
