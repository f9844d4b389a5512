"""The recipe of medplib-tiny at a few steps: keyed data, resume, stages, and the mixture put together."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medplib.data.mini import load_mini
from medplib.data.questions import UNLABELLED, QuestionMaker
from medplib.data.removal import crop_away, fill_lungs, take_out
from medplib.errors import InputError
from medplib.training import tiny
from medplib.training.conversations import QuestionBatch
from medplib.training.labelled import LabelledImages


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return tiny.TinyTraining(tmp_path_factory.mktemp("tiny"), scale=0.0, workers=0, device="cpu")


def images(training, **changes):
    settings = {"steps": 3, "batch_size": 3, "seed": 7, "table": 0.5, "removal": 0.5} | changes
    return LabelledImages(training.samples, tiny.SHARES, **settings)


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
    make = QuestionBatch(None, training.maker, tiny.ALL, 6)
    rng = np.random.default_rng(0)
    for item in images(training, batch_size=12)[0]:
        for _ in range(12):
            question = make.draw(item, rng)
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
        settings = tiny.Run("words", steps, 2, 1e-3, tiny.ALL, 2)
        model.requires_grad_(False)
        model.language_model.requires_grad_(True)
        make = QuestionBatch(model.processor, training.maker, tiny.ALL, 2, images=False)
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


def test_the_whole_recipe_runs_and_keeps_closed_parts_bit_identical(training):
    training.runs = [tiny.dataclasses.replace(r, steps=1, batch_size=1, per_image=1) for r in training.runs]
    model = training.train()
    assert model.config.moe.experts == ["grounding", "vqa"]
    weights = {r.name: load_file(training.out / r.name / "model.safetensors") for r in training.runs}

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
    name = "seg_projector.0.weight"
    middle = torch.lerp(weights["mixture"][name], weights["absence"][name], tiny.ABSENCE_SHARE)
    torch.testing.assert_close(model.state_dict()[name], middle, atol=1e-3, rtol=1e-3)


def test_until_ends_with_foundations_on_which_the_recipe_trains_its_stages(training, tmp_path, monkeypatch):
    from medplib.training import load_recipe, train

    runs = [tiny.dataclasses.replace(r, steps=1, batch_size=1, per_image=1) for r in training.runs]
    for name, value in {"runs": runs, "until": "words", "out": tmp_path / "foundations"}.items():
        monkeypatch.setattr(training, name, value)
    training.out.mkdir()
    training.train()
    assert not (training.out / "align").exists()
    changes = {"model": str(training.out / "words"), "out": str(tmp_path / "stages"), "sample_steps": 0}
    changes |= {"workers": 0, "micro_batch": 1}
    for stage in load_recipe("tiny-whole").stages:
        changes |= {f"stages.{stage}.steps": 1, f"stages.{stage}.batch_size": 1}
    results = train(load_recipe("tiny-whole", changes))
    assert [result.name for result in results] == ["align", "vqa", "grounding", "mixture", "absence"]
    for result in results:
        assert {"vision_tower", "mask_encoder"} <= set(result.frozen)


def test_the_recipe_and_the_loops_agree():
    from medplib.training import load_recipe

    recipe = load_recipe("tiny-whole")
    for run in (run for run in tiny.recipe() if run.stage is not None):
        stage = recipe.stage(run.name)
        assert (stage.steps, stage.batch_size) == (run.steps, run.batch_size)
        assert stage.learning_rate == run.learning_rate
        assert set(stage.train) == set(run.stage.train)
        (source,) = recipe.sources(run.name).values()
        assert source.options["tasks"] == pytest.approx(run.questions)
        assert source.options["per_image"] == run.per_image
        assert source.options.get("removal", 0.0) == run.removal


def test_a_run_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="until must be one of towers, tables, words"):
        tiny.TinyTraining(tmp_path, until="wrods")
