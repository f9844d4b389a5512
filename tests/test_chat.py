"""A conversation: questions that go on from an answer, in Python and by `medplib chat`."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from medplib import Answer, Box, InputError, Point
from medplib.apps.chat import _lines
from medplib.apps.cli import app
from medplib.processing import Sample

CHEST = str(Path(__file__).parents[1] / "examples/images/chest_ct.png")


def chat(*words, lines):
    return CliRunner().invoke(app, ["chat", CHEST, *words], input="".join(line + "\n" for line in lines))


def test_an_answer_brings_its_image_turns_and_regions(tiny_model, pictures):
    asked = []
    answer = tiny_model.answer
    tiny_model.answer = lambda samples, **options: asked.extend(samples) or answer(samples, **options)
    try:
        first = tiny_model.ask(pictures[:2], "What is in <region>?", Box(1, 2, 20, 30), max_new_tokens=6)
        second = tiny_model.ask(first, "And here?", [Point(3, 4)], max_new_tokens=6)
        third = tiny_model.ask(second, "Sure?", max_new_tokens=6)
    finally:
        del tiny_model.answer
    assert [turn[0] for turn in third.history] == ["What is in <region>?", "And here? <region>", "Sure?"]
    assert third.history[:2] == second.history
    assert third.prompts == (Box(1, 2, 20, 30), Point(3, 4))
    for sample in asked[1:]:
        assert all((a == b).all() for a, b in zip(sample.images, pictures[:2], strict=True))
    assert asked[2].turns == [*second.history, ("Sure?", None)]
    assert first.to_dict()["history"] == [list(turn) for turn in first.history]


def test_the_turns_keep_what_the_model_wrote(tiny_model, pictures):
    """The prompt of the second question equals that of a training conversation with the same answer."""
    processor = tiny_model.processor
    first = Answer("Here is the liver.", [], [pictures[0]], history=[("Segment it.", "Here <SEG>.")])
    sampled = []
    answer = tiny_model.answer
    tiny_model.answer = lambda samples, **options: sampled.extend(samples) or answer(samples, **options)
    try:
        tiny_model.ask(first, "Why?", max_new_tokens=3)
    finally:
        del tiny_model.answer
    ids, _ = processor.encode(sampled[0])
    assert ids.count(tiny_model.config.tokens.seg) == 1


@pytest.mark.parametrize("said", ["Here is the <ref>right lung</ref> <SEG>.", "<SEG> and <SEG>", "No: none."])
def test_what_the_model_wrote_is_read_again_as_the_same_tokens(tiny_model, pictures, said):
    processor = tiny_model.processor
    ids, labels = processor.encode(Sample([pictures[0]], [("Segment it.", said)]), training=True)
    _, written, _ = processor.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    assert processor.encode(Sample([pictures[0]], [("Segment it.", written)]), training=True)[0] == ids


def test_a_region_that_was_only_a_word_stays_one(tiny_model, pictures):
    with pytest.warns(UserWarning, match="read as text"):
        first = tiny_model.ask(pictures[0], "What is a <region>?", max_new_tokens=3)
    assert first.history[0][0] == "What is a region?"
    second = tiny_model.ask(first, "And in <region>?", [Point(3, 4)], max_new_tokens=3)
    assert [q for q, _ in second.history] == ["What is a region?", "And in <region>?"]


def test_an_answer_and_turns_together_are_refused(tiny_model, pictures):
    first = tiny_model.ask(pictures[0], "What?", max_new_tokens=3)
    with pytest.raises(InputError, match="either it or history"):
        tiny_model.ask(first, "Why?", history=[("What?", "That.")])


def test_a_conversation_by_lines(tmp_path):
    done = chat(
        "--out", str(tmp_path / "out"),
        lines=["Segment the right lung.", "", "And the left lung?", "What is in <box 35 66 136 200>?"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    answers = [json.loads((tmp_path / "out" / str(i) / "answer.json").read_text()) for i in (1, 2, 3)]
    assert [a["findings"][0]["label"] for a in answers[:2]] == ["right lung", "left lung"]
    assert answers[2]["text"] == "This is the right lung."
    assert answers[2]["prompts"] == [{"type": "box", "x0": 35, "y0": 66, "x1": 136, "y1": 200}]
    assert len(answers[2]["history"]) == 3
    assert "<SEG>" in answers[2]["history"][0][1]
    assert done.output.count("not a medical device") + done.output.count("Not a medical device") == 1


def test_a_terminal_is_told_how_to_end_and_how_to_point(monkeypatch, capsys):
    typed = iter([" Which modality? ", "And this?", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert list(_lines()) == ["Which modality?", "And this?"]
    assert capsys.readouterr().out.count("\n") == 1
    assert next(typed, "all read") == "all read"


def test_what_cannot_be_asked_is_said_and_forgotten(tmp_path):
    done = chat(
        "--out", str(tmp_path / "out"),
        lines=["What is in <box 1 2 3>?", "What is in <point 9000 1>?", "Which imaging modality is this?"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "box needs 4 numbers" in done.output
    assert "--box" not in done.output
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "answer.json").read_text())["text"] == "This is a CT image."
    assert len(json.loads((folder / "answer.json").read_text())["history"]) == 1


def test_a_picture_that_is_none_ends_it_before_a_question(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    done = CliRunner().invoke(app, ["chat", str(tmp_path / "x.npy")], input="What?\n")
    assert done.exit_code == 2
    assert "x.npy" in done.output
