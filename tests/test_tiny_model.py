"""The embedded model answers as it was trained to: a floor under its weights, on a patient it never saw."""

from pathlib import Path

import numpy as np
import pytest

from medplib import Box, MedPLIB
from medplib.data import load_mini
from medplib.data.everyday import CANNOT, UNKNOWN

CHEST_CT = Path(__file__).parents[1] / "examples" / "images" / "chest_ct.png"


@pytest.fixture(scope="module")
def model():
    return MedPLIB.from_pretrained("medplib-tiny")


def test_tiny_model_outlines_the_right_lung_says_what_is_absent_and_names_the_modality(model):
    answer = model.segment(CHEST_CT, "the right lung")
    assert [finding.label for finding in answer.findings] == ["right lung"], answer.text
    pixels = CHEST_CT.read_bytes()
    sample = next(sample for sample in load_mini(split="test") if sample.image.read_bytes() == pixels)
    drawn, truth = answer.findings[0].mask, sample.load_mask("right lung")
    assert 2 * (drawn & truth).sum() / (drawn.sum() + truth.sum()) > 0.8

    absent = model.segment(CHEST_CT, "the optic disc")
    assert absent.findings == [], absent.text

    assert "CT" in model.ask(CHEST_CT, "What is the modality of this image?").text


@pytest.mark.parametrize(
    "names", [("right lung", "left lung"), ("left lung", "right lung"), ("body", "bone", "left lung")]
)
def test_structures_asked_for_together_are_all_drawn(model, names):
    answer = model.segment(CHEST_CT, names)
    assert [finding.label for finding in answer.findings] == list(names), answer.text


def test_a_conversation_goes_on(model):
    asked = [
        ("Is there a bone in this image?", "Yes, there is bone."),
        ("Segment the optic disc.", "There is no optic disc in this image."),
        ("And the body?", "Here is the body."),
        ("Which imaging modality is this?", "This is a CT image."),
    ]
    before = CHEST_CT
    for question, expected in asked:
        before = model.ask(before, question)
        assert before.text == expected
    assert len(before.history) == 4


@pytest.mark.parametrize(
    ("question", "said", "drawn"),
    [
        ("What am I looking at?", "This is a CT image.", []),
        ("Is this an MRI?", "No, this is a CT image.", []),
        ("Describe this image.", "This is a CT image of the chest. It shows body, bone, left lung and right "
         "lung.", []),
        ("Outline the lungs.", "Here is the left lung and the right lung.", ["left lung", "right lung"]),
        ("How many lungs can you see?", "There are two lungs in this image.", []),
        ("Is there a lung in the image?", "Yes, there is left lung and right lung.", []),
        ("right lung", "Here is the right lung.", ["right lung"]),
        ("How large is the left lung?", "Here is the left lung.", ["left lung"]),
        ("Segment the spleen.", UNKNOWN, []),
        ("What is the diagnosis?", CANNOT, []),
    ],
)  # fmt: skip
def test_everyday_questions(model, question, said, drawn):
    answer = model.ask(CHEST_CT, question)
    assert answer.text == said
    assert [finding.label for finding in answer.findings] == drawn


def test_what_a_box_marks_is_drawn(model):
    answer = model.ask(CHEST_CT, "Segment what is in <region>.", prompts=[Box(35, 66, 136, 200)])
    assert [finding.label for finding in answer.findings] == ["right lung"]
    assert np.abs(np.array(answer.findings[0].box) - (35, 66, 136, 200)).max() <= 8
