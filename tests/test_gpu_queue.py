"""The queue for a GPU: it goes on after rows that fail or take too long, and leaves one table of them all."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = import_module("gpu_queue")
    monkeypatch.setattr(
        module, "devices", lambda: ["a GPU, driver 1"]
    )  # where torch tells, that takes a second
    return module


def row(queue, name: str, code: str, needs: float = 0, limit: float = 60, bars: tuple = (), gpus: int = 1):
    """A row that runs this Python code."""
    return queue.Row(name, "-c", shlex.quote(code), "", needs, limit, bars, numbers=False, gpus=gpus)


def cells(table: str) -> dict[str, list[str]]:
    """Row by name: command, exit status, seconds, figures."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): [one.strip() for one in rest] for name, *rest in lines[1:]}


def test_queue_goes_on_after_a_failure_and_a_time_limit_and_skips_what_does_not_fit(queue, tmp_path):
    numbers = {"lines": [{"operator": "permute", "tokens": 4096, "TB_s": 3.9}]}
    write = f"import json; open({str(tmp_path / 'good.json')!r}, 'w').write(json.dumps({numbers}))"
    child = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    bar = queue.Bar("permute", "TB_s", 3.7, {"operator": "permute"}, least=True)
    rows = [
        row(queue, "bad", "print('a reason'); raise SystemExit(3)", bars=(bar,)),
        row(queue, "long", f"{child}; print(p.pid, flush=True); p.wait()", limit=3),
        row(queue, "two", "", gpus=2),
        row(queue, "late", "", needs=1000),
        row(queue, "good", write, bars=(bar,)),
    ]
    results = queue.run_queue(rows, tmp_path, minutes=1)
    assert [one.status for one in results][:3] == [3, "time limit", "skipped: needs 2 GPUs"]
    assert [one.failed for one in results] == [True, True, False, False, False]
    table = cells((tmp_path / "table.md").read_text())
    assert list(table) == ["bad", "long", "two", "late", "good"]
    assert re.fullmatch(r"skipped: \d+ s left, needs 1000", table["late"][1])
    assert (table["bad"][1], table["bad"][3]) == ("3", "permute: not measured (TB_s >= 3.7)")
    assert table["good"][3] == "permute: 3.9 TB_s >= 3.7, met"
    assert table["two"][2:] == ["-", "-"]
    assert (tmp_path / "bad.txt").read_text() == "a reason\n"
    pid = int((tmp_path / "long.txt").read_text())
    for _ in range(50):  # what the row had started ends with it
        if not is_running(pid):
            break
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_rows_after_kernels_that_do_not_run_take_those_of_torch(queue, tmp_path, monkeypatch):
    monkeypatch.delenv("MEDPLIB_OPS", raising=False)
    told = "import os; print(os.environ.get('MEDPLIB_OPS'))"
    for kernels, wanted in (("PyTorch (no nvcc)", "off"), ("compiled on this machine", "None")):
        setting = {"setting": {"kernels": kernels}, "lines": []}
        write = f"import json; open({str(tmp_path / 'operators.json')!r}, 'w').write(json.dumps({setting}))"
        queue.run_queue([row(queue, "operators", write), row(queue, "next", told)], tmp_path, minutes=1)
        assert (tmp_path / "next.txt").read_text().strip() == wanted
        assert ("compiled kernels do not run" in (tmp_path / "table.md").read_text()) == (wanted == "off")


def test_numbers_of_an_earlier_queue_are_not_taken_for_new_ones(queue, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"lines": [{"ratio": 1.0}]}))
    results = queue.run_queue(
        [row(queue, "old", "", bars=(queue.Bar("a", "ratio", 2),))], tmp_path, minutes=1
    )
    assert results[0].lines == []


def test_devices_are_those_that_nvidia_smi_lists(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1'\necho 'NVIDIA H200, 570.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert import_module("gpu_queue").devices() == ["NVIDIA H200, driver 570.1"] * 2


def test_bar_judges_the_worst_of_the_lines_it_means(queue):
    lines = [
        {"pass": "forward", "peer": "medplib", "tokens": 600, "ratio": 1.3},
        {"pass": "forward", "peer": "medplib", "tokens": 1024, "ratio": 1.02},
        {"pass": "forward", "peer": "medplib", "tokens": 2048, "ratio": 1.11},
        {"pass": "forward", "peer": "loop", "tokens": 2048, "ratio": 9.0},
        {"pass": "train", "peer": "medplib", "tokens": 2048, "absent": "fails"},
    ]
    where = {"pass": "forward", "peer": "medplib"}
    bar = queue.Bar("forward", "ratio", 1.1, where, (1024, 2048))
    assert bar.verdict(lines, judged=True) == "forward: 1.11 ratio <= 1.1, MISSED"
    assert bar.verdict(lines[:2], judged=True) == "forward: 1.02 ratio <= 1.1, met"
    assert bar.verdict(lines, judged=False) == "forward: 1.11 ratio <= 1.1"
    train = queue.Bar("train", "ratio", 1.1, {"pass": "train", "peer": "medplib"})
    assert train.verdict(lines, judged=True) == "train: not measured (ratio <= 1.1)"


def test_rehearsal_on_the_cpu_leaves_a_table(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu_queue.py"), "--device", "cpu", "--only", "operators"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, encoding="utf-8", cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("# GPU queue, a rehearsal on the CPU")
    assert "torch" in text.splitlines()[2]
    assert str(tmp_path) not in text
    command, status, _, figures = cells(text)["operators"]
    assert command.startswith("`python benchmarks/operators.py")
    assert status == "0"
    assert re.search(r"decode_ffn at 1: \S+ TB_s >= 3.9($|;)", figures)
    lines = json.loads((tmp_path / "out" / "operators.json").read_text())["lines"]
    assert {line["tokens"] for line in lines} == {1, 20}


def test_every_row_names_a_program_that_takes_its_words(queue, tmp_path, monkeypatch):
    for one in queue.ROWS:
        for device in ("cuda", "cpu"):
            program, *words = one.words(device, tmp_path)
            if program.startswith("benchmarks/"):
                monkeypatch.setattr(sys, "argv", [program, *words])
                options = import_module(Path(program).stem).parse()
                assert options.device == device
                assert options.json == tmp_path / f"{one.name}.json"
            elif words[0] == "pytest":
                files = [word for word in words if word.startswith("tests")]
                assert files
                assert all((FOLDER.parent / file).exists() for file in files)
            elif words[:2] == ["medplib", "ask"]:
                from typer.main import get_command

                from medplib.apps.cli import app

                ask = get_command(app).commands["ask"]
                ask.make_context("ask", words[2:])


def test_page_explains_the_rows_of_the_script_in_their_order_and_gives_none_of_their_commands(queue):
    text = (FOLDER / "gpu_queue.md").read_text(encoding="utf-8")
    explained = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert [name for cell in explained for name in cell.split(", ")] == [one.name for one in queue.ROWS]
    assert text.count("python ") == 1
