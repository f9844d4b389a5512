"""Two processes on one machine (gloo): DDP and FSDP2 learn what one process learns."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import recipe, records

from medplib.training.chain import train

SCRIPT = Path(__file__).with_name("training_run.py")
STAGE = {
    "lora": {"language_model": {"rank": 2, "alpha": 4, "targets": ["q_proj", "up_proj"], "dropout": 0.0}},
    "train": ["gates", "mask_decoder", "seg_projector", "embeddings"],
    "freeze": ["experts.vqa"],  # its layers get no adapter, the other expert's do
    "steps": 3,
}


def launch(arguments, processes=2, script=SCRIPT):
    """As torchrun starts them, without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        running.append(
            subprocess.Popen(
                [sys.executable, script, json.dumps(arguments)],
                env={**os.environ, **{k: str(v) for k, v in env.items()}},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [p.returncode for p in running] == [0] * processes, "\n".join(outputs)[-6000:]
    return outputs


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """What one process makes of the same batches."""
    out = tmp_path_factory.mktemp("alone")
    (result,) = train(recipe(tiny_folder, out, micro_batch=4, stage=STAGE), sources={"some": records()})
    return out, result


def losses(out):
    lines = [json.loads(line) for line in (out / "mixture" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(tiny_folder, tmp_path, alone, strategy):
    arguments = {
        "model": str(tiny_folder),
        "out": str(tmp_path),
        "micro_batch": 1,
        "stage": STAGE,
        "strategy": strategy,
    }
    launch(arguments)
    one, two = losses(alone[0]), losses(tmp_path)
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], rel=1e-4)
    for name in ("ce_vqa", "ce_region", "ce_grounding", "loss_dice"):
        assert [a.get(name, 0) for a in one] == pytest.approx([b.get(name, 0) for b in two], rel=1e-3)
    assert one[0]["routing"] == two[0]["routing"]
    start = load_file(tiny_folder / "model.safetensors")
    expected = load_file(alone[1].folder / "model.safetensors")
    found = load_file(tmp_path / "mixture" / "model" / "model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], found[key])}
    assert any("experts.grounding.up_proj" in key for key in moved)
    assert not any("experts.vqa" in key for key in moved)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, atol=2e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}"
        )
    if strategy == "fsdp2":  # stopped after step 2, continued from its shards
        again = tmp_path / "again"
        shutil.copytree(tmp_path, again, ignore=shutil.ignore_patterns("model", "step-00000003"))
        launch({**arguments, "out": str(again)})
        assert [line["step"] for line in losses(again)] == [1, 2, 3]
        resumed = load_file(again / "mixture" / "model" / "model.safetensors")
        assert all(torch.equal(value, resumed[key]) for key, value in found.items())
