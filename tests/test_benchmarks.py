"""The benchmarks run: at tiny sizes, with the table and the JSON they promise. No time is judged."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name: str, words: str, out: Path) -> dict:
    """What a benchmark wrote as JSON."""
    command = [sys.executable, str(FOLDER / name), *shlex.split(words), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") > 3
    return json.loads(out.read_text())


def test_routing_table_has_a_right_answer_of_every_peer_and_counts_their_rows(tmp_path):
    words = "--dim 32 --hidden 64 --tokens 1 80 --experts 2 --rounds 2"
    lines = run("routing.py", words, tmp_path / "out.json")["lines"]
    timed = {(line["pass"], line["tokens"], line["peer"]): line for line in lines if "absent" not in line}
    for peer in ("dense", "medplib", "loop", "transformers eager", "transformers medplib"):
        assert timed["forward", 80, peer]["ratio"] > 0
    assert timed["forward", 80, "medplib"]["rows"] == 80
    assert timed["forward", 1, "medplib"]["rows"] == 1
    assert timed["frozen", 80, "medplib, every other expert frozen"]["ms"] > 0
    wrong = [line for line in lines if "wrong" in line.get("absent", "") or "fails" in line.get("absent", "")]
    assert not wrong


@pytest.mark.parametrize("split", ["80/20", "99/1", "all-one"])
def test_routing_input_is_spread_as_asked(split, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    import peers
    import routing

    torch.manual_seed(0)
    w = peers.Weights.draw(32, 64, 4, 1, torch.device("cpu"), torch.float32)
    experts, _ = w.choose(routing.tokens_for(w, 1000, split, torch.float32))
    share = float((experts == 0).float().mean())
    assert share == pytest.approx({"80/20": 0.8, "99/1": 0.99, "all-one": 1.0}[split], abs=0.02)


def test_rows_are_padded_so_that_every_block_has_one_expert(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    import kernel_peers

    sizes = torch.tensor([5, 0, 16, 1])
    ends = sizes.cumsum(0).to(torch.int32)
    place, owner = kernel_peers.padded_places(ends, int(sizes.sum()), 8)
    experts = torch.arange(4).repeat_interleave(sizes)
    assert torch.equal(owner[place].long(), experts)
    assert (owner >= 0).sum() == sizes.sum()
    for block in owner.view(-1, 8):
        assert len(set(block.tolist()) - {-1}) <= 1


def test_operators_table_has_every_operator(tmp_path):
    lines = run("operators.py", "--dim 16 --hidden 32 --tokens 1 20 --rounds 2", tmp_path / "out.json")
    named = {line["operator"] for line in lines["lines"]}
    assert named == {
        *("gate_logits", "gate", "plan", "permute", "combine", "whole stack", "swiglu", "decode_ffn"),
    }
    assert all(line["error"] is None or line["error"] < 1e-5 for line in lines["lines"])


def test_generation_table_shows_that_a_mask_takes_no_second_pass(tmp_path):
    words = "--size tiny --prompt 12 --new 4 --rounds 2"
    lines = {line["what"]: line for line in run("generate.py", words, tmp_path / "out.json")["lines"]}
    assert lines["prefill, 12 tokens"]["ratio"] > 0
    assert lines["decode, one token"]["ratio"] > 0
    mask = lines["mask"]
    assert mask["masks"] == 1
    assert mask["forwards"] == mask["tokens"]
    assert mask["forwards_of_the_drawing"] == 0
    assert lines["batch of 8"]["ratio"] > 0


def test_training_table_has_step_loader_and_memory(tmp_path):
    lines = run("training.py", "--size tiny --rounds 3 --batch 2", tmp_path / "out.json")["lines"]
    by_name = {line["what"]: line for line in lines}
    assert by_name["step"]["of"] == "mixture / dense"
    assert by_name["frozen"]["ratio"] > 0
    assert by_name["loader"]["samples_per_second"] > 0
    assert 0 < by_name["memory"]["frozen"] < 2 * by_name["memory"]["whole"]
