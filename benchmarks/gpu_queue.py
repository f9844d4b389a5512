"""Run what waits for a GPU, row after row, within some minutes; gpu_queue.md says what each row is for.

    python benchmarks/gpu_queue.py --out runs/gpu --minutes 9
    python benchmarks/gpu_queue.py --out runs/gpu --only operators routing
    python benchmarks/gpu_queue.py --out runs/rehearsal --device cpu       # tiny sizes, to see that all start

Each row is a process of its own with a time limit. What it prints is in OUT/NAME.txt and its numbers in
OUT/NAME.json while it runs; OUT/table.md is written anew after every row, so that whatever ends the queue
leaves the table of what was run. A row that fails stops no other; one that no longer fits is skipped, which
the table says. The exit status is 1 if a row that was run failed. Uses the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = "time limit"
PACKAGES = ("torch", "transformers", "triton", "numpy", "medplib")


@dataclass(frozen=True)
class Bar:
    """What the worst of some lines of a row's numbers must reach.

    figure   the number's name in a line; it must be at most `limit`, or at least with `least`
    where    what those lines hold; for the tokens, the fewest and the most
    """

    what: str
    figure: str
    limit: float
    where: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    least: bool = False

    def worst(self, lines: Sequence[Mapping[str, Any]]) -> float | None:
        """The number to judge, None where no line has it."""
        found = [line[self.figure] for line in lines if self._is_meant(line) and self.figure in line]
        return (min if self.least else max)(found) if found else None

    def _is_meant(self, line: Mapping[str, Any]) -> bool:
        if any(line.get(key) != value for key, value in self.where.items()):
            return False
        return self.tokens is None or self.tokens[0] <= line["tokens"] <= self.tokens[1]

    def verdict(self, lines: Sequence[Mapping[str, Any]], judged: bool) -> str:
        """One phrase for the table, such as "permute: 3.91 TB_s >= 3.7, met"."""
        worst, sign = self.worst(lines), ">=" if self.least else "<="
        if worst is None:
            return f"{self.what}: not measured ({self.figure} {sign} {self.limit:g})"
        met = worst >= self.limit if self.least else worst <= self.limit
        answer = f", {'met' if met else 'MISSED'}" if judged else ""
        return f"{self.what}: {worst:.3g} {self.figure} {sign} {self.limit:g}{answer}"


@dataclass(frozen=True)
class Row:
    """One command: `program` with the words for a GPU, or with those for a rehearsal on a CPU.

    In the words {out} is the folder of the results. needs: seconds without which it is not begun. limit:
    seconds after which it is ended. numbers: whether it takes --json. gpus: how many it needs.
    """

    name: str
    program: str
    gpu: str
    cpu: str
    needs: float
    limit: float
    bars: tuple[Bar, ...] = ()
    numbers: bool = True
    gpus: int = 1

    def words(self, device: str, out: Path) -> list[str]:
        """The command after `python`."""
        words = shlex.split(f"{self.program} {self.cpu if device == 'cpu' else self.gpu}")
        words = [word.replace("{out}", str(out)) for word in words]
        return [*words, "--json", str(out / f"{self.name}.json")] if self.numbers else words

    def command(self, device: str) -> str:
        """The command as the table shows it."""
        return shlex.join(["python", *self.words(device, Path("OUT"))])


def _routing(name: str, gpu: str, needs: float, limit: float, bars: tuple[Bar, ...] = ()) -> Row:
    cpu = "--dim 32 --hidden 64 --tokens 1 80 --rounds 1 --builds 1 --passes forward --only medplib"
    return Row(name, "benchmarks/routing.py", f"--device cuda {gpu}", cpu, needs, limit, bars)


def _tests(name: str, files: str, needs: float, limit: float) -> Row:
    return Row(name, f"-m pytest -q {files}", "--durations 5", "--collect-only", needs, limit, numbers=False)


def _ratio(what: str, kind: str, limit: float, few: int, most: int) -> Bar:
    return Bar(what, "ratio", limit, {"pass": kind, "peer": "medplib"}, (few, most))


MANY = 1 << 30
OURS = "--only medplib --rounds 11"
ROWS = (
    Row(
        "operators", "benchmarks/operators.py", "--device cuda",
        "--dim 16 --hidden 32 --tokens 1 20 --rounds 1", needs=60, limit=180,
        bars=(
            Bar("permute", "TB_s", 3.7, {"operator": "permute"}, (4096, MANY), least=True),
            Bar("combine", "TB_s", 3.7, {"operator": "combine"}, (4096, MANY), least=True),
            Bar("whole stack at 4096", "us", 55, {"operator": "whole stack"}, (4096, 4096)),
            Bar("decode_ffn at 1", "TB_s", 3.9, {"operator": "decode_ffn"}, (1, 1), least=True),
        ),
    ),
    _routing(
        "routing", f"--tokens 1 600 1024 2048 4096 8192 --builds 3 {OURS}", needs=60, limit=180,
        bars=(
            _ratio("forward at 600", "forward", 1.15, 600, 600),
            _ratio("forward at 1024 to 2048", "forward", 1.10, 1024, 2048),
            _ratio("forward from 4096", "forward", 1.06, 4096, MANY),
            _ratio("forward and backward at 4096", "train", 1.08, 4096, 4096),
            _ratio("graph at 1", "graph", 1.03, 1, 1),
            _ratio("graph at 600", "graph", 1.15, 600, 600),
        ),
    ),
    _tests("cuda-tests", "tests/test_cuda.py tests/test_ops.py", needs=60, limit=200),
    _routing("peers", "--tokens 1 600 4096 --passes forward graph --builds 2", needs=30, limit=90),
    _routing("grouped", f"--tokens 600 1024 2048 4096 --grouped 65536 --passes forward {OURS}", 15, 60),
    _routing("sorted", f"--tokens 600 1024 2048 4096 --grouped 0 --passes forward {OURS}", 15, 60),
    _routing("streamed", f"--tokens 2 8 16 32 64 --streamed 128 --builds 2 --passes graph {OURS}", 15, 60),
    _routing("unstreamed", f"--tokens 2 8 16 32 64 --streamed 0 --builds 2 --passes graph {OURS}", 15, 60),
    Row(
        "generate", "benchmarks/generate.py", "--device cuda --size 7b --dtype bf16",
        "--size tiny --prompt 8 --new 3 --rounds 1", needs=60, limit=180,
        bars=(Bar("a token at 7B", "ratio", 1.05, {"what": "decode, one token"}),),
    ),
    Row(
        "training", "benchmarks/training.py", "--device cuda --dtype bf16 --size 1b",
        "--size tiny --rounds 1 --batch 1", needs=60, limit=150,
        bars=(
            Bar("step of the mixture / dense", "ratio", 1.15, {"what": "step"}),
            Bar("time, one expert frozen / whole", "ratio", 1.0, {"what": "frozen"}),
            Bar("memory, one expert frozen / whole", "ratio", 1.0, {"what": "memory"}),
        ),
    ),
    *(
        _routing(f"split-{split.replace('/', '-')}", f"--tokens 600 4096 --split {split} {OURS}", 20, 60)
        for split in ("80/20", "99/1", "all-one")
    ),
    _routing("experts", f"--tokens 1 600 4096 --experts 8 --top-k 2 --builds 2 {OURS}", 20, 90),
    *(
        Row(
            name, f"-m medplib ask --batch examples/jobs.jsonl --out {{out}}/{name}",
            f"--device cuda --dtype bfloat16 {more}", "--device cpu", needs=20, limit=90, numbers=False,
        )
        for name, more in (("ask", ""), ("ask-int8", "--quantize int8"), ("ask-int4", "--quantize int4"))
    ),
    _tests(
        "mixture-tests",
        "tests/test_router.py tests/test_dispatch.py tests/test_gates.py tests/test_backend.py", 60, 200,
    ),
    Row(
        "tiny", "-m medplib.training.tiny", "--out {out}/tiny --workers 8 --device cuda", "--help",
        needs=400, limit=1200, numbers=False,
    ),
    _tests("suite", "tests", needs=400, limit=2400),
    *(
        Row(
            name, "-m torch.distributed.run --nproc-per-node",
            f"2 -m medplib train tiny --set device=null --set out={{out}}/{name} {more}",
            "1 -m medplib train --help", needs=120, limit=900, numbers=False, gpus=2,
        )
        for name, more in (("ddp", ""), ("fsdp2", "--set strategy=fsdp2"))
    ),
)  # fmt: skip


@dataclass
class Result:
    """What came of a row. status: the exit status, TIME_LIMIT, or why it was not run."""

    row: Row
    status: int | str
    seconds: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ran(self) -> bool:
        return isinstance(self.status, int) or self.status == TIME_LIMIT

    @property
    def failed(self) -> bool:
        return self.ran and self.status != 0


def run_queue(
    rows: Sequence[Row], out: Path, minutes: float, device: str = "cuda", gpus: int = 1
) -> list[Result]:
    """Run the rows in order; the results, which the table in `out` shows too."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    results: list[Result] = []
    environment = _environment()
    heading = describe(device, minutes)
    for row in rows:
        left = end - time.monotonic()
        if row.gpus > gpus and device != "cpu":
            results.append(Result(row, f"skipped: needs {row.gpus} GPUs"))
        elif left < row.needs and device != "cpu":
            results.append(Result(row, f"skipped: {left:.0f} s left, needs {row.needs:g}"))
        elif left <= 0:
            results.append(Result(row, "skipped: no time left"))
        else:
            print(f"{row.name}: {left:.0f} s left", flush=True)
            results.append(run_row(row, device, out, min(row.limit, left), environment))
            if row.name == "operators" and device != "cpu" and not _kernels_run(row, out):
                environment["MEDPLIB_OPS"] = "off"  # or every row would try them again
                heading += "\n\nThe compiled kernels do not run; the rows after operators take PyTorch's."
        table = as_table(results, device)
        (out / "table.md").write_text(f"{heading}\n\n{table}\n", encoding="utf-8")
        print(table.splitlines()[-1], flush=True)
    return results


def run_row(row: Row, device: str, out: Path, limit: float, environment: Mapping[str, str]) -> Result:
    """Run one row for `limit` seconds at most; it ends with all that it started."""
    begin = time.monotonic()
    (out / f"{row.name}.json").unlink(missing_ok=True)  # of an earlier queue
    with (out / f"{row.name}.txt").open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *row.words(device, out)], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        status: int | str = TIME_LIMIT
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(row, status, time.monotonic() - begin, _numbers(row, out).get("lines", []))


def _numbers(row: Row, out: Path) -> dict[str, Any]:
    """What a row has written so far: its setting and lines."""
    try:
        return json.loads((out / f"{row.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _environment() -> dict[str, str]:
    """That of the rows: this checkout's package first, and nothing held back that a row prints."""
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _kernels_run(row: Row, out: Path) -> bool:
    """Whether the row ran with compiled kernels."""
    return _numbers(row, out).get("setting", {}).get("kernels", "").startswith("compiled")


def as_table(results: Sequence[Result], device: str) -> str:
    """One Markdown table."""
    rows = ["| row | command | exit status | seconds | figures |", "|---|---|---|---|---|"]
    for one in results:
        figures = [bar.verdict(one.lines, device != "cpu") for bar in one.row.bars] if one.ran else []
        seconds = f"{one.seconds:.0f}" if one.ran else "-"
        command = f"`{one.row.command(device)}`"
        cells = (one.row.name, command, str(one.status), seconds, "; ".join(figures) or "-")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def describe(device: str, minutes: float) -> str:
    """Title, date, device, driver and versions."""
    title = "GPU queue" if device != "cpu" else "GPU queue, a rehearsal on the CPU with tiny sizes"
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    places = devices() if device != "cpu" else []
    where = "; ".join(places) or f"no GPU ({platform.machine()}, {os.cpu_count()} CPU cores)"
    now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    return f"# {title}, {now}\n\n{where}. {', '.join(versions)}. At most {minutes:g} minutes."


def devices() -> list[str]:
    """Name and driver of each GPU, as nvidia-smi gives them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return _devices_by_torch()
    return [line.replace(", ", ", driver ", 1) for line in done.stdout.strip().splitlines()]


def _devices_by_torch() -> list[str]:
    """The same where there is no nvidia-smi, without the driver."""
    asked = "import torch; [print(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all rows together; default 9")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the row under way ends, too
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    found = len(devices()) if options.device == "cuda" else 0
    if options.device == "cuda" and not found:
        print("There is no GPU here; --device cpu rehearses the rows.", file=sys.stderr)
        return 2
    results = run_queue(rows, options.out.resolve(), options.minutes, options.device, found)
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return int(any(one.failed for one in results))


if __name__ == "__main__":
    sys.exit(main())
