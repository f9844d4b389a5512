"""Training stages: what a run leaves behind, resume to the bit, logs, pictures, errors."""

import errno
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_run
from safetensors.torch import load_file
from training_run import recipe, records

from medplib import MedPLIB
from medplib.data.record import Record
from medplib.errors import CheckpointError, InputError, MedPLIBError
from medplib.training import chain, checks, snapshots, trainer, watch
from medplib.training.batches import augmentation
from medplib.training.chain import train
from medplib.training.recipe import Source, load_recipe, make_recipe

NOISY = {"experts": ["grounding", "vqa"], "gate_args": {"noise": "gumbel", "bias_rate": 0.01, "seed": 3}}


@pytest.fixture(scope="module")
def noisy_folder(new_model, tmp_path_factory):
    """A mixture whose gates draw random numbers and move a bias."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    new_model(moe=NOISY).save_pretrained(folder)
    return folder


@pytest.fixture
def stopped(monkeypatch):
    """`stopped(3, call)`: the call's training ends, as if killed, after three optimiser steps."""

    def run_it(after, call):
        original, done = trainer.StageTrainer.get_batch_samples, [0]

        def get(self, *args):
            if done[0] == after:
                raise KeyboardInterrupt
            done[0] += 1
            return original(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(trainer.StageTrainer, "get_batch_samples", get)
            with pytest.raises(KeyboardInterrupt):
                call()

    return run_it


def run(model, out, **changes):
    return train(recipe(model, out, **changes), sources={"some": records()})


def newest_state(out):
    folder = snapshots.newest(out / "mixture")
    state = load_file(folder / trainer.TRAINED)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for number, row in optimizer.items():
        state |= {f"{number}.{name}": value for name, value in row.items()}
    return state | {"rng": torch.load(folder / "rng_state.pth", weights_only=False)["cpu"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(noisy_folder, tmp_path, stopped, workers):
    settings = {"workers": workers, "stage": {"steps": 5}, "gradient_checkpointing": workers == 0}
    run(noisy_folder, tmp_path / "whole", **settings)
    stopped(3, lambda: run(noisy_folder, tmp_path / "cut", **settings))
    torch.manual_seed(1234)  # whatever happened in between
    assert snapshots.newest(tmp_path / "cut" / "mixture").name == "step-00000002"
    run(noisy_folder, tmp_path / "cut", **settings)

    whole, cut = newest_state(tmp_path / "whole"), newest_state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert any(key.endswith("draws.state") for key in whole)
    assert any(key.endswith("bias.steps") for key in whole)
    for key in whole:
        assert torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(cut[key])), key
    logs = [[line for line in log_lines(tmp_path / name) if "loss" in line] for name in ("whole", "cut")]
    timed = {"tokens_per_s", "s_per_step", "eta_s"}
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in log] for log in logs]
    assert plain[0] == plain[1]
    assert [line["step"] for line in plain[1]] == [1, 2, 3, 4, 5]
    finals = [
        load_file(tmp_path / name / "mixture" / "model" / "model.safetensors") for name in ("whole", "cut")
    ]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_decays_as_the_stage_says(tiny_folder, tmp_path, decay):
    run(
        tiny_folder,
        tmp_path,
        stage={"steps": 8, "warmup": 1.0, "decay": decay, "batch_size": 6},
        micro_batch=6,
    )
    rates = [line["learning_rate"] for line in log_lines(tmp_path) if "learning_rate" in line]
    warm, left = 2, 6  # 12 records, 6 at a time: an epoch has two steps
    fall = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        "constant": lambda x: 1.0,
    }[decay]
    wanted = [1e-2 * (i / warm if i < warm else fall((i - warm) / left)) for i in range(8)]
    assert rates == pytest.approx(wanted)


def test_an_interpolated_model_lies_between_the_start_and_what_was_trained(tiny_folder, tmp_path):
    (whole,) = run(tiny_folder, tmp_path / "whole")
    (part,) = run(tiny_folder, tmp_path / "part", stage={"interpolate": 0.25})
    start = MedPLIB.from_pretrained(tiny_folder).state_dict()
    end, between = (MedPLIB.from_pretrained(r.folder).state_dict() for r in (whole, part))
    moved = [k for k in start if not torch.equal(start[k], end[k])]
    assert any("q_proj" in k for k in moved)  # where LoRA was merged
    assert "seg_projector.0.weight" in moved
    for k, before in start.items():
        if k in moved:
            torch.testing.assert_close(between[k], before + 0.25 * (end[k] - before))
        else:
            assert torch.equal(between[k], before)
    with pytest.raises(CheckpointError, match="another interpolate"):
        run(tiny_folder, tmp_path / "part", stage={"interpolate": 0.5})


def log_lines(out, stage="mixture"):
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def test_a_stage_leaves_a_model_that_answers_with_lora_merged(tiny_folder, tmp_path, pictures):
    (result,) = run(tiny_folder, tmp_path)
    before, after = MedPLIB.from_pretrained(tiny_folder).state_dict(), MedPLIB.from_pretrained(result.folder)
    assert after.ask(pictures[0], "What is this?").text is not None
    assert set(before) == set(after.state_dict())
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
    assert any("q_proj" in k for k in moved)
    assert not any(
        "down_proj" in k or k.startswith(("vision_tower", "mask_encoder", "projector")) for k in moved
    )
    assert snapshots.read_manifest(result.folder)["step"] == 4
    assert {"vision_tower", "mask_encoder", "projector"} <= set(result.frozen)


def test_a_finished_stage_is_not_done_again(tiny_folder, tmp_path, monkeypatch):
    (first,) = run(tiny_folder, tmp_path)
    monkeypatch.setattr(chain, "prepare_stage", lambda *a, **k: pytest.fail("trained again"))
    (second,) = run(tiny_folder, tmp_path)
    assert (second.folder, second.frozen) == (first.folder, first.frozen)


def test_another_recipe_does_not_continue_a_run(tiny_folder, tmp_path, stopped):
    stopped(2, lambda: run(tiny_folder, tmp_path))
    with pytest.raises(CheckpointError, match=r"another stage \(learning_rate\)"):
        run(tiny_folder, tmp_path, stage={"learning_rate": 1e-3})
    with pytest.raises(CheckpointError, match=r"another data \(some\)"):
        train(recipe(tiny_folder, tmp_path), sources={"some": records(kinds="v")})


def test_the_log_holds_losses_by_task_and_the_routing(tiny_folder, tmp_path):
    (result,) = run(tiny_folder, tmp_path, micro_batch=4, stage={"steps": 3})
    lines = log_lines(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    seen = set().union(*steps)
    assert {
        "loss_ce",
        "loss_dice",
        "loss_bce",
        "ce_vqa",
        "ce_region",
        "ce_grounding",
        "learning_rate",
    } <= seen
    for line in steps:
        terms = 1.0 * line["loss_ce"] + 0.5 * line.get("loss_dice", 0) + 2.0 * line.get("loss_bce", 0)
        assert line["loss"] == pytest.approx(terms, rel=1e-4)
        assert line["tokens_per_s"] > 0
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3], rel=1e-5)
    per_layer = {}
    for line in steps:
        for layer, counts in line["routing"].items():
            per_layer.setdefault(layer, []).append(sum(counts.values()))
    assert len(per_layer) == 2
    assert {tuple(v) for v in per_layer.values()} == {
        tuple(next(iter(per_layer.values())))
    }  # the same tokens
    total = {layer: sum(counts.values()) for layer, counts in result.routing.items()}
    assert total == {layer: sum(v) for layer, v in per_layer.items()}


def test_the_last_steps_are_logged_however_few(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path, log_steps=3)
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [3, 4]


def test_pictures_show_fixed_records_and_change_no_number(noisy_folder, tmp_path):
    run(noisy_folder, tmp_path / "without")
    asked = records(6)
    train(
        recipe(noisy_folder, tmp_path / "with", sample_steps=2, samples=3),
        sources={"some": records()},
        validation=asked,
    )
    found = sorted(p.name for p in (tmp_path / "with" / "mixture" / "samples").iterdir())
    assert found == ["step-00000002.png", "step-00000004.png"]
    rows = [line["samples"] for line in log_lines(tmp_path / "with") if "samples" in line]
    assert [row["question"] for row in rows[0]] == [r.turns[0][0] for r in asked[:3]]
    with_pictures, without = newest_state(tmp_path / "with"), newest_state(tmp_path / "without")
    assert all(torch.equal(torch.as_tensor(with_pictures[k]), torch.as_tensor(without[k])) for k in without)


def test_pictures_without_records_to_ask_are_refused_before_anything(tiny_folder, tmp_path):
    wish = recipe(tiny_folder, tmp_path / "run", sample_steps=2)
    with pytest.raises(InputError, match="validation names no source; name one"):
        train(wish, sources={"some": records()})
    wish.validation = {"held": Source("folder", path=str(tmp_path / "gone"))}
    with pytest.raises(InputError, match=r"validation\.held: there is no .*--set validation\.held\.path="):
        train(wish, sources={"some": records()})
    assert not any((tmp_path / "run").glob("*"))
    run(tiny_folder, tmp_path / "run")
    (done,) = train(wish, sources={"some": records()})  # it is finished: nobody is asked
    assert done.folder.is_dir()


def test_nan_stops_the_run_and_the_batch_is_kept(tiny_folder, tmp_path, monkeypatch):
    original, calls = MedPLIB._losses, [0]

    def losses(self, *args):
        calls[0] += 1
        return {k: v * float("nan") if calls[0] == 6 else v for k, v in original(self, *args).items()}

    monkeypatch.setattr(MedPLIB, "_losses", losses)
    with pytest.raises(MedPLIBError, match=r"loss is not finite at step 3 \(ce nan"):
        run(tiny_folder, tmp_path)
    (place,) = (tmp_path / "mixture").glob("not-finite-step-00000003*")
    tensors = load_file(place / "batch-1.safetensors")
    assert tensors["input_ids"].shape == tensors["labels"].shape
    content = json.loads((place / "batch.json").read_text())
    assert len(content["rows"]) == 2
    assert content["rows"][0][0]["source"] == "some"
    assert snapshots.newest(tmp_path / "mixture").name == "step-00000002"


def test_what_the_stop_at_a_loss_that_is_not_finite_advises_works(tiny_folder, tmp_path):
    settings = {"save_steps": 1, "stage": {"learning_rate": 1e30}}
    folder, snapshot = tmp_path / "mixture", tmp_path / "mixture" / "step-00000001"
    for _ in range(2):  # the same command comes to the same stop, as the message says
        with pytest.raises(MedPLIBError, match="at step 2") as raised:
            run(tiny_folder, tmp_path, **settings)
        assert f"{str(snapshot)!r}, continues the same settings" in str(raised.value)
        assert f"first remove {str(folder)!r}" in str(raised.value)
    settings["stage"] = {"learning_rate": 1e-4}
    with pytest.raises(CheckpointError, match=rf"learning_rate.*or remove '{folder}'"):
        run(tiny_folder, tmp_path, **settings)
    shutil.rmtree(folder)
    (result,) = run(tiny_folder, tmp_path, **settings)
    assert snapshots.is_complete(result.folder)


def test_weights_that_are_not_finite_are_not_saved(tiny_folder, tmp_path, monkeypatch):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")

    monkeypatch.setattr(watch.Watch, "on_step_end", spoil)
    with pytest.raises(MedPLIBError, match=r"weight is not finite at step 4 \(.* nan\).*step-00000002"):
        run(tiny_folder, tmp_path)
    assert [p.name for p in snapshots.steps(tmp_path / "mixture")] == ["step-00000002"]
    assert not (tmp_path / "mixture" / "model").exists()


def test_a_gradient_that_is_not_finite_moves_no_weight(tiny_folder, tmp_path, monkeypatch):
    models = []

    def infinite(self, model):
        models.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return torch.tensor(float("inf"))

    monkeypatch.setattr(trainer.Trainer, "_clip_grad_norm", infinite)
    with pytest.raises(MedPLIBError, match="gradient is not finite at step 1"):
        run(tiny_folder, tmp_path)
    ((model, before),) = models
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", ["weights", "optimizer", "manifest"])
def test_a_full_or_read_only_disk_loses_no_snapshot(tiny_folder, tmp_path, monkeypatch, code, where):
    fail = OSError(code, "No space left on device" if code == errno.ENOSPC else "Read-only file system")

    def broken(original, when):
        def call(*args, **kwargs):
            if when(*args):
                raise fail
            return original(*args, **kwargs)

        return call

    late = lambda *args: any("00000004" in str(a) for a in args)  # noqa: E731
    if where == "weights":
        monkeypatch.setattr(trainer, "save_file", broken(trainer.save_file, late))
    elif where == "optimizer":
        monkeypatch.setattr(torch, "save", broken(torch.save, late))
    else:
        monkeypatch.setattr(snapshots, "_sync", broken(snapshots._sync, late))
    with pytest.raises(
        MedPLIBError, match=rf"{fail.strerror}.*Nothing that was there is lost.*step-00000002"
    ):
        run(tiny_folder, tmp_path)
    monkeypatch.undo()
    kept = snapshots.newest(tmp_path / "mixture")
    assert kept.name == "step-00000002"
    assert not list((tmp_path / "mixture").glob(".incoming-*"))
    (result,) = run(tiny_folder, tmp_path)  # once there is room the same command goes on
    assert snapshots.is_complete(result.folder)


def test_an_out_folder_that_cannot_be_written_is_refused_at_once(tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MedPLIBError, match="could not be written"):
        run(tiny_folder, tmp_path / "file" / "run")


def test_bf16_weights_train_in_fp32_and_are_saved_as_bf16(tiny_folder, tmp_path):
    (result,) = run(tiny_folder, tmp_path, dtype="bfloat16", stage={"precision": "bf16", "steps": 2})
    assert {
        v.dtype for v in load_file(result.folder / "model.safetensors").values() if v.is_floating_point()
    } == {torch.bfloat16}
    trained = load_file(snapshots.newest(tmp_path / "mixture") / trainer.TRAINED)
    assert trained["seg_projector.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_one_clear_line(tiny_folder, tmp_path, workers):
    class Broken:
        def load(self):
            raise InputError("The image 'scan.png': it is cut off.")

    rows = [*records(11), Record((("What?", "That."),), (Broken(),), row=11)]
    with pytest.raises(
        InputError, match=r"^Row 11 of some cannot be used: The image 'scan.png': it is cut off.$"
    ):
        train(recipe(tiny_folder, tmp_path, workers=workers), sources={"some": rows})


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"chance": "x"}, r"augment: chance must be a number, got 'x'"),
        ({"tries": 2.5}, r"augment: tries must be a whole number, got 2\.5"),
        ({"chanse": 1}, r"augment has no option 'chanse'\. Known: chance, keep"),
        ({"chance": 3}, "chance must be between 0 and 1, got 3"),
        ({"transform": "RandomRotation"}, r"transform must be a table such as .*, got 'RandomRotation'"),
        ({"transform": {"RandomRotatio": {}}}, r"v2 has no 'RandomRotatio'\. Did you mean 'RandomRotation'"),
        (
            {"transform": {"RandomRotation": {}}},
            r"augment\.transform\.RandomRotation cannot be made: .*degrees",
        ),
        ({"transform": {"RandomRotation": 10}}, r"RandomRotation must be a mapping of arguments, got 10"),
        ({"transform": {"ColorJitter": None}, "intensity": False}, "leave out what changes colours"),
    ],
)
def test_an_argument_of_the_augmentation_that_cannot_be_is_named(tmp_path, augment, message):
    with pytest.raises(MedPLIBError, match=message):
        augmentation(recipe("model", tmp_path, augment=augment))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": {1: 2}}, "load has no argument '1'"),
        ({"augment": {"transform": {}}}, "transform must be a table"),
        ({"augment": {"transform": {1: 2}}}, "has no '1'"),
        ({"stages.align.loss_weights": {1: 2}}, "weighs 1; the losses are"),
        ({"stages.align.batch_size": 10**30}, "An epoch may have 2147483648 samples"),
        ({"samples_per_epoch": 10**30}, "An epoch may have 2147483648 samples"),
    ],
)
def test_a_setting_of_no_use_is_an_error_of_ours(tmp_path, changes, message):
    recipe = load_recipe("tiny", {"out": str(tmp_path / "run"), "sample_steps": 0, **changes}, stages="align")
    with pytest.raises(MedPLIBError, match=message):
        checks.check_run(recipe)
    assert not list(tmp_path.iterdir())


def test_batch_sizes_that_do_not_divide_are_refused_with_one_that_does(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="take 6"):
        run(tiny_folder, tmp_path, micro_batch=2, stage={"batch_size": 5})


def test_the_batch_counts_not_how_it_is_cut(tiny_folder, tmp_path):
    quiet = {"language_model": {"rank": 2, "alpha": 4, "targets": ["q_proj"], "dropout": 0.0}}
    losses = []
    for micro in (1, 4):
        run(tiny_folder, tmp_path / str(micro), micro_batch=micro, stage={"lora": quiet, "steps": 3})
        losses.append([line["loss"] for line in log_lines(tmp_path / str(micro)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_killed_with_signal_9_ends_as_if_nothing_had_happened(tiny_folder, tmp_path):
    settings = {"stage": {"steps": 12}, "save_steps": 1, "log_steps": 100}
    arguments = {"model": str(tiny_folder), "out": str(tmp_path / "killed"), **settings}
    script = Path(training_run.__file__)
    process = subprocess.Popen([sys.executable, script, json.dumps(arguments)], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "mixture" / "step-00000003").is_dir():
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(tiny_folder, tmp_path / "killed", **settings)
    run(tiny_folder, tmp_path / "whole", **settings)
    models = [load_file(tmp_path / name / "mixture/model/model.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_snapshot_is_continued_in_the_form_it_was_written_only(tmp_path):
    with pytest.raises(CheckpointError, match=r"another sharding \('fsdp2', now 'none'\)"):
        checks.check_same({"sharding": "fsdp2"}, {"sharding": "none"}, tmp_path)
    content = recipe("model", tmp_path).to_dict()
    kinds = [
        chain._sharding(make_recipe(content | changes), world)
        for changes, world in (
            ({}, 2), ({"strategy": "fsdp2"}, 1), ({"strategy": "fsdp2"}, 2), ({"deepspeed": "z.json"}, 2),
        )
    ]  # fmt: skip
    assert kinds == ["none", "none", "fsdp2", "deepspeed on 2"]


def test_one_process_trains_on_one_gpu_and_says_so(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainer.TrainingArguments, "n_gpu", property(lambda self: vars(self).get("_n_gpu", 2) or 2)
    )
    with pytest.warns(UserWarning, match=r"2 are here.*torchrun --nproc-per-node 2"):
        run(tiny_folder, tmp_path, stage={"steps": 1})
