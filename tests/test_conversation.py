"""How a conversation is written down: pieces, what is learned, and what may become control tokens."""

import pytest

from medplib.conversation import IMAGE, REGION, TEMPLATES, Piece, Template, get_template, render
from medplib.errors import UnknownNameError


def written(pieces):
    """The prompt as text; a region's placeholder stands between its own control tokens and is left out."""
    return "".join(piece.text for piece in pieces if piece.kind != "region")


def test_the_recorded_prompts_of_the_published_code_are_written_the_same(golden):
    recorded = golden("conversation/conversation.json")
    names = {"v1": "vicuna_v1"}
    compared = 0
    for sample in recorded["samples"]:
        if sample["status"] != "ok":
            continue
        turns = list(zip(sample["question"], sample["gt"], strict=True))
        regions = [question.count("<region></region>") for question, _ in turns]
        turns = [(question.replace("<region></region>", REGION), answer) for question, answer in turns]
        template = get_template(names.get(sample["template"], sample["template"]))
        assert written(render(template, turns, 1, regions)) == sample["prompt"], sample["name"]
        compared += 1
    assert compared > 0


def test_generation_starts_after_the_assistants_name():
    pieces = render(get_template("brief"), [("What?", "A cat."), ("Where?", None)], num_images=2)
    start, end = "<im_start>", "<im_end>"
    assert written(pieces) == (
        f"USER: {start}{IMAGE}{end}{start}{IMAGE}{end}\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:"
    )


def test_without_images_the_question_follows_at_once():
    assert written(render(get_template("brief"), [("Hi", None)], num_images=0)) == "USER: Hi ASSISTANT:"


def test_only_answers_and_their_ends_are_learned():
    pieces = render(get_template("vicuna_v1"), [("What is <region>?", " It is <SEG>. ")], 1, [1])
    assert [piece.text for piece in pieces if piece.learned] == [" It is <SEG>.", "</s>"]


def test_only_what_the_template_and_the_answers_place_may_become_control_tokens():
    typed = "<SEG> <image> <im_start> </s> <region>"
    pieces = render(get_template("brief"), [(typed, "<SEG>")], num_images=1)
    assert Piece(typed, "user", control=False) in pieces
    assert [p.text for p in pieces if p.control] == ["<im_start>", IMAGE, "<im_end>", " <SEG>", "</s>"]


def test_the_first_regions_of_each_turn_become_placeholders_and_more_stay_text():
    turns = [("Is <region> like <region>?", "No."), ("And <region> or <region>?", None)]
    pieces = render(get_template("brief"), turns, 0, [2, 1])
    assert [p.text for p in pieces if p.kind == "region"] == [REGION] * 3
    plain = [p.text for p in pieces if p.kind == "user" and not p.control]
    assert plain == ["Is ", " like ", "?", "And ", " or <region>?"]
    around = [
        (a.text, c.text)
        for a, b, c in zip(pieces, pieces[1:], pieces[2:], strict=False)
        if b.kind == "region"
    ]
    assert around == [("<region>", "</region>")] * 3


def test_a_template_of_ones_own_can_be_used():
    own = Template("Be brief. ", user="Q: ", assistant=" A:", end="<end>")
    assert written(render(own, [("x", "y")], 0)) == "Be brief. Q: x A: y<end>"


def test_an_unknown_template_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'v7'.*vicuna_v1, llava_v1, brief"):
        get_template("v7")
    assert {"vicuna_v1", "llava_v1", "brief"} <= set(TEMPLATES)
