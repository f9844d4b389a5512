"""The compatible metrics equal the published evaluation's, per item and in total, to 1e-9."""

import re

import pytest
import torch

from medplib.evaluation import official

EXACT = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def text(golden):
    return golden("metrics/text_metrics.json")


@pytest.fixture(scope="module")
def seg(golden):
    return golden("metrics/seg_metrics.json"), golden("metrics/seg_cases.safetensors")


def test_words_are_normalized_as_published(text):
    for given, wanted in text["normalize_word"].items():
        assert official.normalize(given) == wanted
    for item in text["items"]:
        assert official.normalize(item["gt"].lower()) == item["normalized_gt"]
        assert official.normalize(item["text"].lower()) == item["normalized_text"]


def test_every_item_scores_as_published(text):
    assert text["items"]
    for item in text["items"]:
        ours = official.text_metrics([item])
        for name, wanted in item["metrics_percent"].items():
            assert ours[name] == pytest.approx(wanted, **EXACT), (item["question_id"], name)


def test_functions_score_as_published(text):
    for case in text["function_level"]:
        answer, reference = case["cand"], case["ref"]
        assert official.exact_match(answer, reference) == pytest.approx(case["exactmatch"], **EXACT)
        assert official.f1_precision_recall(answer, reference) == pytest.approx(case["f1_p_r"], **EXACT)


@pytest.mark.parametrize(("use", "name"), [(False, "all_no_candidates"), (True, "all_with_candidate_set")])
def test_totals_are_the_published_ones(text, use, name):
    ours = official.text_metrics(text["items"], use_candidates=use)
    assert ours.keys() == text[name].keys()
    for key, wanted in text[name].items():
        assert ours[key] == pytest.approx(wanted, **EXACT), key


def masks(seg):
    facts, tensors = seg
    cases = facts["validate_seg"]["cases"]
    cut = facts["validate_seg"]["threshold"]
    drawn = [(tensors[f"{case['case']}.logits"].sigmoid() > cut).numpy() for case in cases]
    return cases, drawn, [tensors[f"{case['case']}.gt"].numpy() != 0 for case in cases]


def test_grounding_scores_are_the_published_ones(seg):
    facts = seg[0]["validate_seg"]
    cases, drawn, targets = masks(seg)
    given = [None if case["pred_missing"] else mask for case, mask in zip(cases, drawn, strict=True)]
    for case, mask, target in zip(cases, given, targets, strict=True):
        assert official.mask_iou(mask, target) == pytest.approx(case["iou"], **EXACT)
        assert official.mask_metrics([mask], [target])["mDice"] == pytest.approx(case["dice"], **EXACT)
    ours = official.mask_metrics(given, targets, [case["modality"] for case in cases])
    assert ours["miou"] == pytest.approx(facts["miou"], **EXACT)
    assert ours["mDice"] == pytest.approx(facts["mDice"], **EXACT)
    printed = re.findall(r"'(\w+)': \{'iou': ([\d.]+), 'dice': ([\d.]+)\}", " ".join(facts["printed"]))
    assert {name for name, *_ in printed} == ours["by_group"].keys()
    for name, iou, dice in printed:
        assert ours["by_group"][name] == pytest.approx({"iou": float(iou), "dice": float(dice)}, abs=1e-6)


def test_the_training_log_is_the_published_one(seg):
    _, drawn, targets = masks(seg)
    ours = official.training_metrics(drawn, targets)
    for name in ("giou", "ciou"):
        assert ours[name] == pytest.approx(seg[0]["train_validate"][name], **EXACT)


def test_two_empty_masks_score_zero():
    empty = torch.zeros(3, 3, dtype=torch.bool).numpy()
    assert official.mask_iou(empty, empty) == 0.0
