"""Two processes on one machine (gloo): DDP, FSDP2 and DeepSpeed learn what one process learns."""

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

from medplib.errors import InputError
from medplib.training.chain import train
from medplib.training.recipe import make_recipe
from medplib.training.trainer import check_deepspeed

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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
def test_two_processes_learn_what_one_learns(tiny_folder, tmp_path, alone, strategy, monkeypatch):
    arguments = {"model": str(tiny_folder), "out": str(tmp_path), "micro_batch": 1, "stage": STAGE}
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        arguments["deepspeed"] = str(deepspeed_file(tmp_path, {"stage": 1}))
    else:
        arguments["strategy"] = strategy
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
    if strategy != "ddp":  # stopped after step 2, continued from its shards
        again = tmp_path / "again"
        shutil.copytree(tmp_path, again, ignore=shutil.ignore_patterns("model", "step-00000003"))
        launch({**arguments, "out": str(again)})
        assert [line["step"] for line in losses(again)] == [1, 2, 3]
        resumed = load_file(again / "mixture" / "model" / "model.safetensors")
        assert all(torch.equal(value, resumed[key]) for key, value in found.items())


RECIPE = {
    "out": "runs/none",
    "data": {"some": {"reader": "memory"}},
    "stages": {"mixture": {"precision": "fp32", "data": ["some"]}},
}


def deepspeed_file(folder, zero):
    path = folder / "zero.json"
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    content = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    content |= dict.fromkeys(automatic, "auto")
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("zero", "processes", "refused"),
    [
        ({"stage": 2}, 2, "ZeRO stage 2 with overlap_comm None on 2 processes"),
        ({"stage": 1, "overlap_comm": True}, 2, "stage 1 with overlap_comm True on 2"),
        ({"stage": 3}, 4, "strategy=fsdp2"),
        ({"stage": 2}, 1, None),
        ({"stage": 1}, 2, None),
        ({}, 2, None),
    ],
)
def test_a_zero_stage_that_would_mix_gradients_up_is_refused(tmp_path, zero, processes, refused):
    recipe = make_recipe(RECIPE | {"deepspeed": str(deepspeed_file(tmp_path, zero))})
    if refused is None:
        check_deepspeed(recipe, recipe.stage("mixture"), processes)
    else:
        with pytest.raises(InputError, match=refused):
            check_deepspeed(recipe, recipe.stage("mixture"), processes)


@pytest.mark.parametrize(
    ("precision", "dtype", "fits"),
    [
        ("fp32", "float32", True),
        ("bf16", "bfloat16", True),
        ("bf16", "float32", False),
        ("fp16", "bfloat16", False),
    ],
)
def test_deepspeed_that_would_cast_closed_weights_is_refused(tmp_path, precision, dtype, fits):
    content = RECIPE | {"deepspeed": str(deepspeed_file(tmp_path, {})), "dtype": dtype}
    recipe = make_recipe(content | {"stages": {"mixture": {"precision": precision, "data": ["some"]}}})
    if fits:
        check_deepspeed(recipe, recipe.stage("mixture"), 1)
    else:
        with pytest.raises(
            InputError, match=f"precision={precision} casts all weights, and dtype is {dtype}"
        ):
            check_deepspeed(recipe, recipe.stage("mixture"), 1)


def test_a_deepspeed_file_that_is_none_is_one_clear_error(tmp_path):
    (tmp_path / "zero.json").write_text("{stage: 1")
    for name in ("zero.json", "lost.json"):
        recipe = make_recipe(RECIPE | {"deepspeed": str(tmp_path / name)})
        with pytest.raises(InputError, match=f"{name}.*is no DeepSpeed configuration"):
            check_deepspeed(recipe, recipe.stage("mixture"), 1)
