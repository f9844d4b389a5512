"""Everyday questions: their answers against the labels, and how a model's answers are judged."""

import re
from collections import Counter

import numpy as np
import pytest

from medplib.data import wordings
from medplib.data.everyday import CANNOT, KINDS, UNKNOWN, EverydayMaker
from medplib.data.questions import PLAIN, UNLABELLED
from medplib.data.samples import ImageSample, Structure
from medplib.data.wordings import HEARD, UNHEARD
from medplib.errors import InputError
from medplib.evaluation.everyday import measure_everyday
from medplib.results import Answer, Finding
from medplib.training.labelled import Labelled
from medplib.training.recipe import Source
from medplib.training.sources import MiniQuestions, open_source

VOCABULARY = {
    "body": {"ChestCT"}, "left lung": {"ChestCT"}, "right lung": {"ChestCT"}, "lung tumor": {"ChestCT"},
    "brain tumor": {"BrainT1c"}, "head": {"BrainT1c"}, "fovea": {"RetinaCC0"}, "left hemisphere": {"MNI152"},
    "right hemisphere": {"MNI152"},
}  # fmt: skip


def item(*names, dataset="ChestCT", modality="CT"):
    masks = np.zeros((len(names), 16, 16), bool)
    for i in range(len(names)):
        masks[i, i : i + 6, 2:9] = True
    return Labelled(np.zeros((16, 16, 3), np.uint8), masks, names, modality, dataset, "real")


def draws(kind, about, count=80, heard=True):
    maker, rng = EverydayMaker(VOCABULARY, heard), np.random.default_rng(3)
    return [q for q in (maker.draw(kind, about, rng) for _ in range(count)) if q is not None]


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_draws_the_structures_that_it_names(kind, heard):
    about = item("body", "left lung", "right lung")
    for question in draws(kind, about, heard=heard):
        drawn = re.findall(r"<ref>(.*?)</ref> <SEG>", question.answer)
        assert len(drawn) == question.answer.count("<SEG>") == len(question.masks)
        for name, mask in zip(drawn, question.masks, strict=True):
            assert np.array_equal(mask, about.masks[about.names.index(name)])
        assert question.question.count("<region>") == len(question.prompts)
        assert "{" not in question.question + question.answer


def test_wordings_to_measure_with_are_not_trained_on():
    assert set(UNHEARD) == set(HEARD)
    for kind, unheard in UNHEARD.items():
        assert not set(unheard) & {wording for each in HEARD.values() for wording in each}, kind
        assert set(PLAIN.get(kind, ())) <= set(HEARD[kind])
    assert not set(wordings.UNHEARD_UNKNOWN) & set(wordings.UNKNOWN)
    assert not set(wordings.UNHEARD_BEYOND) & set(wordings.BEYOND)


def _meaning(words):
    """A wording without "please" and without what may be replaced in it: equal for all it may become."""
    alike = {}
    for word, others in wordings.ALIKE.items():
        group = set().union(*(alike.get(other, {other}) for other in (word, *others)))
        alike |= dict.fromkeys(group, group)
    text = words.lower()
    for phrase in sorted((p for p in alike if " " in p), key=len, reverse=True):
        text = text.replace(phrase, min(alike[phrase], key=len))
    found = re.findall(r"[a-z]+|[{}<>]", text)
    return " ".join(
        min(sorted(alike.get(word, {word}))) for word in found if word not in ("please", "kindly")
    )


def test_replaced_words_do_not_make_a_wording_to_measure_with():
    trained = {_meaning(w) for each in (*HEARD.values(), wordings.BEYOND) for w in each}
    for wording in [w for each in (*UNHEARD.values(), wordings.UNHEARD_BEYOND) for w in each]:
        assert _meaning(wording) not in trained, wording
    rng, maker = np.random.default_rng(0), EverydayMaker(VOCABULARY)
    made = {maker.words(rng, "description") for _ in range(300)}
    assert len(made) > 2 * len(HEARD["description"])
    asked = EverydayMaker(VOCABULARY, heard=False)
    assert {asked.words(rng, "description") for _ in range(300)} == set(UNHEARD["description"])
    kept = {maker.words(rng, "grounding") for _ in range(300)}
    assert all("{s}" in words for words in kept)


def test_what_was_never_learned_is_no_structure_of_the_mini_set():
    known = set(MiniQuestions().questions.maker.vocabulary)
    others = {name for names in wordings.CALLED.values() for name in names}
    assert set(wordings.CALLED) <= known
    assert not (known | others) & {*wordings.UNKNOWN, *wordings.UNHEARD_UNKNOWN}


def test_the_modality_is_confirmed_or_put_right():
    answers = {q.question: q.answer for q in draws("modality_check", item(modality="MR"))}
    assert set(answers.values()) == {"Yes, this is an MR image.", "No, this is an MR image."}
    assert any("MRI" in question for question in answers)
    for question, answer in answers.items():
        assert answer.startswith("Yes") == bool(re.search(r"\bMRI?\b", question)), question


@pytest.mark.parametrize(
    ("names", "count", "drawn", "there"),
    [
        (("left lung", "right lung"), "There are two lungs in this image.", ["left lung", "right lung"],
         "Yes, there is left lung and right lung."),
        (("right lung", "body"), "There is one lung in this image.", ["right lung"],
         "Yes, there is right lung."),
        (("body",), "There is no lung in this image.", [], "No, there is no lung in this image."),
    ],
)  # fmt: skip
def test_questions_for_both_lungs(names, count, drawn, there):
    of_lungs = [q for q in draws("group", item(*names), 300) if "lung" in q.question.lower()]
    kinds = Counter(q.task for q in of_lungs)
    assert set(kinds) == {"all of a kind", "any of a kind", "how many of a kind"}
    for question in of_lungs:
        found = re.findall(r"<ref>(.*?)</ref>", question.answer)
        if question.task == "all of a kind":
            assert found == drawn
            assert drawn or question.answer == count
        else:
            assert question.answer == (count if question.task.startswith("how") else there)


def test_nothing_is_said_of_what_a_data_set_does_not_label():
    pet = draws("group", item("body", dataset="SimulatedPET", modality="PET"), 300)
    assert pet
    assert "left lung" in UNLABELLED["SimulatedPET"]
    assert not any("lung" in q.question or "tumor" in q.question for q in pet)
    slide = draws("group", item(dataset="ColonIHC", modality="histopathology"), 300)
    assert not any("tumor" in q.question for q in slide)


def test_a_description_says_modality_body_part_and_structures():
    (told,) = {q.answer for q in draws("description", item("right lung", "body"))}
    assert told == "This is a CT image of the chest. It shows body and right lung."
    (bare,) = {q.answer for q in draws("description", item(dataset="Elsewhere", modality="X-ray"))}
    assert bare == "This is an X-ray image."
    assert draws("shown", item(dataset="Elsewhere")) == []


def test_the_unknown_is_neither_drawn_nor_called_absent():
    for question in draws("unknown", item("body"), 200):
        name = question.names[-1]
        assert name not in VOCABULARY
        assert name in question.question.lower()
        assert question.answer.endswith(UNKNOWN)
        assert len(question.masks) == len(question.names) - 1
    assert {q.answer for q in draws("beyond", item("body"))} == {CANNOT}


def test_the_mini_set_asks_everyday_questions_on_request():
    tasks = {"grounding": 0.5, "unknown": 0.2, "everything": 0.3}
    source = MiniQuestions(everyday=True, tasks=tasks, per_image=4)
    turns = [turn for index in range(12) for record in source.draw(1, 0, index) for turn in record.turns]
    assert turns == [t for index in range(12) for r in source.draw(1, 0, index) for t in r.turns]
    assert any(answer.endswith(UNKNOWN) for _, answer in turns)
    one = {"grounding": 1.0}
    assert MiniQuestions(tasks=one).fingerprint != MiniQuestions(tasks=one, everyday=True).fingerprint
    with pytest.raises(InputError, match=r"data\.x: .*may hold modality.*got \['unknown'\]"):
        open_source("x", Source("mini", options={"tasks": {"unknown": 1.0}}))


class Knowing:
    """Answers every question about one image as `change` makes of the right answer."""

    def __init__(self, sample, change):
        self.sample, self.change = sample, change
        self.asked = []

    def answer(self, samples):
        self.asked += [sample.turns[-1][0] for sample in samples]
        return [self._answer(sample) for sample in samples]

    def _answer(self, sample):
        names = re.findall(r"left lung|right lung|body", sample.turns[-1][0])
        words = " and ".join(f"the {name}" for name in names)
        findings = [Finding(name, self.sample.load_mask(name), 1.0) for name in names]
        text, findings = self.change(f"Here is {words}.", findings)
        return Answer(text, findings, [sample.images[0]], "", (), {}, None)


@pytest.mark.parametrize("heard", [True, False])
def test_an_answer_counts_with_the_right_words_and_all_masks(heard):
    about = item("body", "left lung", "right lung")
    structures = [Structure(n, about.masks[i], "exact") for i, n in enumerate(about.names)]
    sample = ImageSample(about.image, "CT", "ChestCT", "a", "test", "real", tuple(structures))

    def shares(change):
        model = Knowing(sample, change)
        found = measure_everyday(model, [sample] * 30, VOCABULARY, heard=heard)
        assert len(model.asked) == found["all"][1] == 180
        return found

    right = shares(lambda text, findings: (text, findings))
    assert right["grounding"][0] == 1.0
    assert right["beyond"][0] == 0.0
    assert shares(lambda text, findings: (text.lower(), findings))["grounding"][0] == 0.0
    assert shares(lambda text, findings: (text, findings[:-1]))["grounding"][0] == 0.0
    told = shares(lambda text, findings: (CANNOT, []))
    assert told["beyond"] == (1.0, right["beyond"][1])
    assert told["grounding"][0] == 0.0
