"""Kill a training run with signal 9, again and again, and look at what it leaves behind.

    python benchmarks/kill_during_save.py --kills 200
    python benchmarks/kill_during_save.py --kills 60 --processes 2    # sharded by FSDP2, all killed at once

Each attempt continues the same run (a snapshot after every step) and is killed: every other one at a random
moment of its life, the others a random time after a snapshot or the final model began to be written. After
each kill every snapshot folder is read in full. A run that reaches its end is compared, to the bit, with one
that was never killed, and the next one begins. Attempts are forks of this process: none waits for imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must not inherit another thread's locks
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from safetensors.torch import load_file
from training_run import recipe, records

from medplib import MedPLIB
from medplib.errors import CheckpointError
from medplib.training import snapshots
from medplib.training.chain import train

STEPS = 8


def fork(out: Path, processes: int) -> list[int]:
    """Child processes that train together until they are done or dead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            quiet = os.open(f"{out}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = 1
            try:
                if processes > 1:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in place.items()}}
                train(make(out), sources={"some": records()})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> bool:
    """Whether any of them is no longer running (its status stays to be read)."""
    return any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def make(out: Path):
    """A mixture stage of medplib-tiny with LoRA, all of its snapshots' files small enough to write often."""
    stage = {"steps": STEPS, "batch_size": 2}
    return recipe(
        "medplib-tiny", out, micro_batch=1, save_steps=1, log_steps=1000, stage=stage, strategy="fsdp2"
    )  # fmt: skip


def staging(out: Path) -> bool:
    """Whether something is being written just now."""
    return any(out.glob("mixture/.incoming-*"))


def inspect(out: Path, before: int) -> tuple[int, list[str]]:
    """The newest complete step, and what is wrong with what a kill left behind."""
    wrong = []
    for folder in [*snapshots.steps(out / "mixture"), *out.glob("mixture/model")]:
        try:
            manifest = snapshots.read_manifest(folder)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if folder.name != "model":
            state = json.loads((folder / "trainer_state.json").read_text())
            step = int(folder.name[5:])
            if not manifest["step"] == state["global_step"] == step:
                wrong.append(f"{folder.name} mixes steps {manifest['step']} and {state['global_step']}")
    newest = snapshots.newest(out / "mixture")
    step = int(newest.name[5:]) if newest else 0
    if step < before:
        wrong.append(f"step {before} was there and is lost; the newest is {step}")
    return step, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1, help="more than one: sharded by FSDP2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work, rng = Path(tempfile.mkdtemp(prefix="medplib-kill-")), random.Random(options.seed)
    reference = work / "reference"
    begun = time.monotonic()
    children = fork(reference, options.processes)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit("the run that nobody kills failed")
    length = time.monotonic() - begun
    expected = load_file(reference / "mixture" / "model" / "model.safetensors")
    counts = {"kills": 0, "during a save": 0, "runs finished": 0, "bit-identical": 0, "models loaded": 0}
    problems: list[str] = []
    number, before = 0, 0
    while counts["kills"] < options.kills:
        out = work / f"run-{number}"
        children, aimed = fork(out, options.processes), counts["kills"] % 2 == 0
        end = time.monotonic() + rng.uniform(0, length * (0.7 if aimed else 1.0))
        while not ended(children) and not (time.monotonic() > end and (not aimed or staging(out))):
            time.sleep(0.0005)
        by_itself = ended(children)
        if not by_itself:
            time.sleep(rng.uniform(0, 0.03) if aimed else 0)
        patience = time.monotonic() + 60
        while by_itself and time.monotonic() < patience and not all(ended([child]) for child in children):
            time.sleep(0.1)
        for child in children:
            os.kill(child, signal.SIGKILL)  # one that waits for another that failed
        codes = [os.waitpid(child, 0)[1] for child in children]
        if not by_itself:
            counts["kills"] += 1
            counts["during a save"] += staging(out)
        before, wrong = inspect(out, before)
        problems += [f"kill {counts['kills']}: {text}" for text in wrong]
        if snapshots.is_complete(out / "mixture" / "model"):
            counts["runs finished"] += 1
            found = load_file(out / "mixture" / "model" / "model.safetensors")
            counts["bit-identical"] += all(torch.equal(found[k], v) for k, v in expected.items())
            MedPLIB.from_pretrained(out / "mixture" / "model")
            counts["models loaded"] += 1
            shutil.rmtree(out)
            number, before = number + 1, 0
        elif by_itself:
            said = [Path(f"{out}-{rank}.txt").read_text()[-2000:] for rank in range(options.processes)]
            problems += [f"a run ended by itself without a model, codes {codes}", *said]
            break
        print(f"\r{counts}  newest step {before}, problems {len(problems)}", end="", flush=True)
    print()
    for name, value in counts.items():
        print(f"| {name} | {value} |")
    print(f"| folders incomplete, mixed or lost | {len(problems)} |")
    print(*problems, sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({**counts, "problems": problems}, indent=1) + "\n")
    shutil.rmtree(work)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
