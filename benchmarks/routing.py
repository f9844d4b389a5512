"""Time a mixture of experts against one dense FFN and against other implementations, side by side.

    python benchmarks/routing.py                         # the CPU table of this project
    python benchmarks/routing.py --device cuda           # bf16, LLaMA-7B sizes, eager and CUDA graph
    python benchmarks/routing.py --tokens 1 1024 --only medplib deepspeed --json out.json

T tokens, D width, H hidden width, E experts, K experts per token.

Every peer's answer is first checked against a float32 reference, and a wrong one is not timed. Then come
rounds: in each, every peer runs once (on a GPU QUEUED times without waiting in between, as a model's layers
do), in turn with the dense FFN of one expert's weights; what is printed is the median over rounds of the
ratio to the dense FFN of the same round. With few tokens the weights' place in
memory alone moves a time by a tenth, so all peers are built anew several times. Rows given to experts are
counted, not computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import Absent, Weights, build_peers, reference
from torch import Tensor, nn

from medplib.experts import dispatch

FEW, BUILDS = 64, 9  # below so many tokens, so many builds
QUEUED = 8
SPLITS = ("balanced", "80/20", "99/1", "all-one")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="fp32 or bf16; default fp32 on the CPU, bf16 on CUDA")
    parser.add_argument("--dim", type=int, help="default 1024 on the CPU, 4096 on CUDA")
    parser.add_argument("--hidden", type=int, help="default 2752 on the CPU, 11008 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--split", choices=SPLITS, default="balanced", help="how the gate spreads tokens")
    parser.add_argument("--passes", nargs="+", help="forward, train, frozen, compiled, graph (CUDA)")
    parser.add_argument("--only", nargs="+", help="words that a peer's name must hold")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--builds", type=int, help=f"sets of weights; default {BUILDS} below {FEW} tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grouped", type=int, help="GROUPED of experts/dispatch.py instead of its own")
    parser.add_argument("--streamed", type=int, help="STREAMED of experts/dispatch.py instead of its own")
    parser.add_argument("--deepspeed-pin", type=Path, help="folder of an unpacked deepspeed 0.13.1")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.dim = options.dim or (4096 if cuda else 1024)
    options.hidden = options.hidden or (11008 if cuda else 2752)
    options.tokens = options.tokens or ([1, 16, 600, 1024, 2048, 4096, 8192] if cuda else [1, 16, 1024])
    options.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        options.dtype or ("bf16" if cuda else "fp32")
    ]
    options.passes = options.passes or ["forward", "train", "frozen", *(["graph"] if cuda else [])]
    return options


def tokens_for(w: Weights, count: int, split: str, dtype: torch.dtype) -> Tensor:
    """Random input (T, D) of which the gate sends this share to expert 0 (the others share the rest)."""
    x = torch.randn(count, w.sizes[0], device=w.gate.device)
    if split == "balanced":
        return x.to(dtype)
    first = {"80/20": 0.8, "99/1": 0.99, "all-one": 1.0}[split]
    away = w.gate[0] - w.gate[1:].mean(0)  # along it the first expert's logit rises above the others'
    side = torch.where(torch.arange(count, device=x.device) < round(first * count), 1.0, -1.0)
    side = side[torch.randperm(count, device=x.device)]
    x = x - (x @ away)[:, None] * away / away.square().sum()
    return (x + side[:, None] * 3 * away).to(dtype)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Seconds of one run, averaged over as many as fill `least` seconds."""
    at_once = QUEUED if device.type == "cuda" else 1
    synchronize(device)
    start = time.perf_counter()
    count = 0
    while True:
        for _ in range(at_once):
            run()
        count += at_once
        synchronize(device)
        spent = time.perf_counter() - start
        if spent >= least:
            return spent / count


def relative_error(got: Tensor, wanted: Tensor, served: Tensor) -> float:
    """|got - wanted| / |wanted| over the tokens that were served (a capacity drops some in training)."""
    return float((got.float() - wanted)[served].norm() / wanted[served].norm().clamp_min(1e-20))


def check(name: str, peer: nn.Module, w: Weights, x: Tensor, training: bool) -> str | None:
    """Why a peer is not timed: what its answer has wrong; None if it is right."""
    if name == "dense":
        return None
    copied = len(x) * w.top_k * (w.gate_up[0].numel() + w.down[0].numel()) * x.element_size()
    if "batched_mm" in name and copied > 4e9:
        return f"it would copy {copied / 1e9:.0f} GB of weights, one expert per token"
    peer.train(training)
    try:
        with torch.no_grad():
            got = peer(x)
    except Absent as error:
        return str(error)
    except Exception as error:  # a peer of another package may fail in any way
        return f"fails: {type(error).__name__}: {str(error)[:120]}"
    served = (
        got.abs().sum(-1) > 0 if training and "deepspeed" in name else torch.ones(len(x), dtype=torch.bool)
    )
    limit = 1e-4 if x.dtype == torch.float32 else 2e-2
    error = relative_error(got, reference(w, x), served.to(x.device))
    return None if error < limit else f"wrong: relative error {error:.1e}"


def runner(peer: nn.Module, x: Tensor, kind: str) -> Callable[[], object]:
    """What one round of a pass does: forward without gradients, or forward and backward."""
    if kind == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return peer(x)

        return forward
    grad = torch.randn_like(x)

    def train() -> None:
        out = peer(x.detach().requires_grad_())
        out.backward(grad)
        peer.zero_grad(set_to_none=True)

    return train


def compiled(peer: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward as one graph of torch.compile; a peer that breaks it raises."""
    torch._dynamo.config.recompile_limit = 1000  # every peer of every build is one
    run = runner(torch.compile(peer, fullgraph=True, dynamic=False), x, "forward")
    run()
    return run


def graphed(peer: nn.Module, x: Tensor) -> Callable[[], object]:
    """The forward as a CUDA graph; a peer that cannot be captured raises."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                peer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")  # a host sync inside is an error, and named
        try:
            with torch.cuda.graph(graph):
                peer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return graph.replay


def freeze_half(peers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Ours with one of the experts frozen, ours with all trained, and the dense FFN."""
    from peers import MedPLIBRouter

    router = peers["medplib"]
    assert isinstance(router, MedPLIBRouter)
    import copy

    half = copy.deepcopy(router)
    half.freeze(*half.names[1::2])
    return {"dense": peers["dense"], "medplib": router, "medplib, every other expert frozen": half}


def count_rows(peer: nn.Module, x: Tensor, training: bool) -> int | None:
    """Rows given to expert modules in one forward; None where the experts are no modules."""
    from medplib.experts import SwiGLU

    rows = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
        for module in peer.modules()
        if isinstance(module, SwiGLU)
    ]
    with torch.no_grad():
        peer.train(training)(x)
    for hook in hooks:
        hook.remove()
    return sum(rows) if hooks else None


@dataclass
class Built:
    """The peers of one set of weights: what a round runs, rows given to experts, who is absent and why."""

    runs: dict[str, Callable[[], object]]
    rows: dict[str, int | None]
    absent: dict[str, str]


def build(options: argparse.Namespace, count: int, kind: str) -> Built:
    """Peers that give the right answer, ready to run."""
    device = torch.device(options.device)
    w = Weights.draw(options.dim, options.hidden, options.experts, options.top_k, device, options.dtype)
    peers, absent = build_peers(w, options.deepspeed_pin, options.only)
    x = tokens_for(w, count, options.split, options.dtype)
    training = kind in ("train", "frozen")
    for name, peer in list(peers.items()):
        if why := check(name, peer, w, x, training):
            absent[name] = why
            del peers[name]
    rows = {name: count_rows(peer, x, training) for name, peer in peers.items()}
    if kind == "frozen" and "medplib" in peers:
        peers = freeze_half(peers)
    runs: dict[str, Callable[[], object]] = {}
    for name, peer in peers.items():
        peer.train(training)
        if kind not in ("compiled", "graph"):
            runs[name] = runner(peer, x, "train" if training else "forward")
            continue
        try:
            runs[name] = compiled(peer, x) if kind == "compiled" else graphed(peer, x)
        except Exception as error:  # not traceable or not capturable, as several say of themselves
            absent[name] = f"not {kind}: {str(error)[:100]}"
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as error:  # such as a backward that a peer does not have
            absent[name] = f"fails: {type(error).__name__}: {str(error)[:120]}"
            del runs[name]
    if "dense" not in runs:
        raise RuntimeError(f"the dense FFN itself could not be run: {absent['dense']}")
    return Built(runs, rows, absent)


def time_rounds(built: Built, rounds: int, count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each peer in each round."""
    least = 0.02 if count < FEW else 0.0
    names = list(built.runs)
    for name in names:
        timed(built.runs[name], device, least)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)  # none of them always comes first
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(built.runs[name], device, least))
    return seconds


def measure(options: argparse.Namespace, count: int, kind: str) -> list[dict]:
    """One line per peer of one pass at one number of tokens, over all its builds."""
    builds = options.builds or (BUILDS if count < FEW else 1)
    seconds: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(builds):
        built = build(options, count, kind)
        rounds = max(1, -(-options.rounds // builds))
        found = time_rounds(built, rounds, count, torch.device(options.device))
        for name, values in found.items():
            seconds.setdefault(name, []).extend(values)
            ratios = [value / dense for value, dense in zip(values, found["dense"], strict=True)]
            shares.setdefault(name, []).extend(ratios)
    lines = []
    for name, values in seconds.items():
        ratios = sorted(shares[name])
        lines.append(
            {
                "pass": kind, "tokens": count, "peer": name, "rows": built.rows.get(name),
                "ms": 1e3 * statistics.median(values), "ratio": statistics.median(ratios),
                "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4],
            }
        )  # fmt: skip
    absent = built.absent.items()
    return lines + [{"pass": kind, "tokens": count, "peer": name, "absent": why} for name, why in absent]


def show(line: dict) -> None:
    if "absent" in line:
        print(f"{line['pass']:<8} {line['tokens']:>6}  {line['peer']:<36} not timed: {line['absent']}")
        return
    rows = "" if line["rows"] is None else f"{line['rows'] / line['tokens']:.2f} T"
    print(
        f"{line['pass']:<8} {line['tokens']:>6}  {line['peer']:<36} {line['ms']:>9.3f} ms  "
        f"{line['ratio']:>5.2f}x dense  ({line['low']:.2f} to {line['high']:.2f})  rows {rows or '-'}",
        flush=True,
    )


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    name = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{options.threads} thread(s)"
    )
    import transformers

    if options.grouped is not None:
        dispatch.GROUPED = options.grouped
    if options.streamed is not None:
        dispatch.STREAMED = options.streamed
    setting = {
        "device": f"{options.device} ({name})", "dtype": str(options.dtype), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": sys.version.split()[0], "D": options.dim,
        "H": options.hidden, "E": options.experts, "K": options.top_k, "split": options.split,
        "rounds": options.rounds, "GROUPED": dispatch.GROUPED, "STREAMED": dispatch.STREAMED,
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in setting.items()))
    print("ratio: median over rounds of time / time of one expert's dense FFN in that round (quartiles)")
    print("with 2 to about 300 tokens and all E experts hit, E times the weights are read: up to 2x at E 2")
    lines = []
    for kind in options.passes:
        for count in options.tokens:
            if kind in ("train", "frozen") and count < 64:
                continue
            try:
                new = measure(options, count, kind)
            except RuntimeError as error:  # such as want of memory; the other sizes may run
                why = f"fails: {str(error)[:120]}"
                new = [{"pass": kind, "tokens": count, "peer": "all", "absent": why}]
            lines += new
            for line in new:
                show(line)
            if options.json:  # as it goes: a limit of time may end this
                options.json.write_text(json.dumps({"setting": setting, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
