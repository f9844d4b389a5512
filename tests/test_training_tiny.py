"""The recipe of medplib-tiny at a few steps: keyed data, resume, stages, and the mixture put together."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medplib.data.mini import load_mini
from medplib.data.questions import UNLABELLED, QuestionMaker
from medplib.data.removal import crop_away, fill_lungs, take_out
from medplib.errors import InputError
from medplib.training import load_recipe, tiny
from medplib.training.conversations import TextBatch
from medplib.training.labelled import SHARES, LabelledImages


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return tiny.TinyTraining(tmp_path_factory.mktemp("tiny"), scale=0.0, workers=0, device="cpu")


def images(training, **changes):
    settings = {"steps": 3, "batch_size": 3, "seed": 7, "table": 0.5, "removal": 0.5} | changes
    return LabelledImages(training.samples, SHARES, **settings)


def test_a_step_draws_the_same_images_whatever_was_drawn_before(training):
    first, second = images(training), images(training)
    second[0]
    for a, b in zip(first[1], second[1], strict=True):
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.masks, b.masks)
        assert a.names == b.names


def test_unknown_data_set_is_refused_with_the_known_ones(training):
    with pytest.raises(InputError, match=r"Atlantis.*Known: .*ChestCT"):
        LabelledImages(training.samples, {"Atlantis": 1.0}, steps=1, batch_size=1, seed=0)


def test_questions_never_call_an_unlabelled_structure_absent(training):
    maker = QuestionMaker(training.vocabulary)
    for dataset, unsure in UNLABELLED.items():
        own, others = maker.absent_names(dataset, ["left lung"])
        assert not (set(own) | set(others)) & (unsure | {"left lung"})


def test_every_answer_has_as_many_masks_as_seg_tokens(training):
    rng = np.random.default_rng(0)
    for item in images(training, batch_size=12)[0]:
        for _ in range(12):
            question = training.questions(item, rng)
            assert len(question.masks) == question.answer.count("<SEG>")
            assert all(m.any() for m in question.masks)
            if question.task in ("grounding", "presence") and not question.answer.startswith(("No", "There")):
                assert question.names[0] in item.names


def test_a_filled_lung_is_gone_from_the_picture_and_the_names():
    item = next(s for s in load_mini(split="train") if {"left lung", "right lung"} <= set(s.names))
    image, masks, names = item.load_image(), item.load_masks(), item.names
    lung = masks[names.index("left lung")]
    out, left, kept = fill_lungs(image, masks, names, ["left lung"], np.random.default_rng(1))
    assert "left lung" not in kept
    assert len(left) == len(kept)
    assert np.median(out[lung]) > np.median(image[lung]) + 50  # air became tissue
    far = masks[names.index("right lung")]
    assert np.array_equal(out[far], image[far])


def test_cropping_away_leaves_nothing_of_the_structure():
    rng = np.random.default_rng(0)
    image, masks = np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 64), bool)
    masks[0, 2:6, 2:6], masks[1] = True, True
    cut_image, cut = crop_away(image, masks, 0, rng)
    assert cut_image.shape == image.shape
    assert not cut[0].any()
    assert cut[1].all()
    full = np.ones((1, 64, 64), bool)
    same, unchanged, names = take_out(image, full, ["body"], rng)
    assert same is image
    assert unchanged is full
    assert names == ["body"]


def test_a_stopped_run_continues_to_the_same_weights(training, tmp_path):
    def run(folder, steps):
        torch.manual_seed(0)
        model = training.new_model()
        settings = tiny.Run("words", steps, 2, 1e-3)
        model.requires_grad_(False)
        model.language_model.requires_grad_(True)
        make = TextBatch(model.processor, training.questions, 2)
        data = images(training, steps=steps, batch_size=2, make=make)
        tiny.loop(settings, model, lambda b: model(**b).losses, tiny.LOSSES, data, folder, "cpu", 0, keep=2)
        return model.state_dict()

    whole = run(tmp_path / "whole", 4)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        _interrupted_after(2, lambda: run(stopped, 4))
    assert torch.load(stopped / "state.pt", weights_only=True)["step"] == 2
    resumed = run(stopped, 4)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert [json.loads(line)["step"] for line in (stopped / "log.jsonl").read_text().splitlines()] == [4]


def _interrupted_after(steps, call):
    """Stop at the optimiser step after `steps`."""
    original, count = torch.optim.AdamW.step, 0

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count > steps:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step
    try:
        call()
    finally:
        torch.optim.AdamW.step = original


@pytest.fixture
def rehearsal(training, monkeypatch):
    """Every run is one step on one image."""
    runs = [dataclasses.replace(run, batch_size=1) for run in tiny.FOUNDATIONS]
    monkeypatch.setattr(tiny, "FOUNDATIONS", tuple(runs))
    monkeypatch.setattr(training, "per_image", 1)
    monkeypatch.setattr(tiny, "shortened", lambda steps, scale: 1)

    def load(name, changes=None):
        recipe = load_recipe(name, changes)
        small = {f"stages.{stage}.batch_size": 1 for stage in recipe.stages}
        small |= {f"stages.{stage}.warmup": 0 for stage in recipe.stages}  # it begins with a rate of 0
        return load_recipe(name, {**(changes or {}), **small, "micro_batch": 1, "sample_steps": 0})

    monkeypatch.setattr(tiny, "load_recipe", load)
    return training


def test_the_whole_recipe_runs_and_keeps_closed_parts_bit_identical(rehearsal):
    model = rehearsal.train()
    out = rehearsal.out
    assert model.config.moe.experts == ["grounding", "vqa"]
    stages = (
        "align",
        "vqa",
        "grounding",
        "mixture",
        "absence",
        "settle",
        "several",
        "conversations",
        "balance",
        "everyday",
        "everyday_balance",
    )
    weights = {name: load_file(out / name / "model" / "model.safetensors") for name in stages}
    weights["words"] = load_file(out / "words" / "model.safetensors")

    def moved(before, after, prefix):
        keys = [k for k in weights[after] if k.startswith(prefix)]
        assert keys
        return any(not torch.equal(weights[before][k], weights[after][k]) for k in keys)

    for before, after in [("words", "align"), ("align", "vqa"), ("vqa", "grounding"), ("mixture", "absence")]:
        for tower in ("vision_tower.", "mask_encoder."):
            assert not moved(before, after, tower)
    assert moved("words", "align", "projector.")
    assert not moved("words", "align", "language_model.")
    assert not moved("vqa", "grounding", "language_model.model.embed_tokens.")
    assert not moved("vqa", "grounding", "projector.")
    assert moved("mixture", "absence", "language_model.model.layers.0.mlp.gate.")
    assert moved("absence", "settle", "mask_encoder.")
    for closed in ("language_model.", "projector.", "vision_tower.", "prompt_encoder."):
        assert not moved("absence", "settle", closed)
    for before, after in itertools.pairwise(stages[stages.index("settle") :]):
        assert moved(before, after, "language_model.")
        for closed in ("mask_encoder.", "mask_decoder.", "seg_projector.", "projector.", "vision_tower."):
            assert not moved(before, after, closed)
    released = load_file(out / "final" / "model.safetensors")
    assert {t.dtype for t in released.values() if t.is_floating_point()} == {torch.float16}
    assert all(
        torch.equal(released[k], v.to(released[k].dtype)) for k, v in weights["everyday_balance"].items()
    )

    times = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    again = rehearsal.train()  # what is finished is not done again
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert [path for path in times if times[path] != kept[path]] == [out / "final" / "model.safetensors"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
