"""Questions as people ask them who were not told any wording, and their answers about a labelled image.

The plain kinds of `medplib.data.questions` in many more words, and kinds beside them: is it a CT, what part
of the body, describe it, both lungs, everything, what is marked, a structure that was never learned, and what
no model of this kind can tell. A question after a size or a place is answered by drawing, because the mask
says it exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from medplib.data import wordings
from medplib.data.builder.words import indefinite, listed, plural
from medplib.data.questions import (
    UNLABELLED,
    Question,
    QuestionMaker,
    absent_answer,
    article,
    pick,
    present_answer,
    region_prompt,
)

UNKNOWN = "I have not learned to find that."
CANNOT = "I cannot tell. Ask me for the modality, or for a structure to draw."


class EverydayMaker(QuestionMaker):
    """Draws the plain kinds in everyday words, and the kinds beside them (KINDS).

    vocabulary  {structure: the data sets that label it}, as of `QuestionMaker`
    heard       True: the wordings that a model is trained on; False: those that it is measured on
    """

    def __init__(self, vocabulary: Mapping[str, set[str]], heard: bool = True) -> None:
        super().__init__(vocabulary)
        self.heard = heard
        self.wordings = wordings.HEARD if heard else wordings.UNHEARD
        rights = {name.removeprefix("right ") for name in vocabulary if name.startswith("right ")}
        self.pairs = sorted(rights & {n.removeprefix("left ") for n in vocabulary if n.startswith("left ")})
        self.tumors = sorted(n for n in vocabulary if n.endswith(" tumor"))

    def words(self, rng: np.random.Generator, kind: str) -> str:
        """One of the wordings of a kind, as a template; for training, some of its words replaced."""
        return self._reworded(rng, super().words(rng, kind))

    def _reworded(self, rng: np.random.Generator, words: str) -> str:
        if not self.heard:
            return words
        if rng.random() < 0.12:
            words = pick(rng, wordings.BEFORE) + words[0].lower() + words[1:]
        found = re.split(r"([A-Za-z]+)(?![^{]*})", words)
        for i, word in enumerate(found):
            others = wordings.ALIKE.get(word.lower(), ())
            if others and rng.random() < 0.3:
                other = pick(rng, others)
                found[i] = other.capitalize() if word[0].isupper() else other
        return "".join(found)

    def fill(
        self, rng: np.random.Generator, template: str, name: str, modality: str = "", the: str = "the "
    ) -> str:
        """A template with what is asked about, now and then by another of its names."""
        if name in wordings.CALLED and rng.random() < 0.15:
            name = pick(rng, wordings.CALLED[name])
        return template.format(s=name, m=modality, the=the, a=indefinite(name))

    def draw(self, kind: str, item, rng: np.random.Generator) -> Question | None:
        """A question of a kind of KINDS about `item` (names, masks, modality, dataset); None where it has no
        answer."""
        return KINDS[kind](self, item, rng)

    def modality_check(self, item, rng: np.random.Generator) -> Question:
        others = ("CT", "MR", "PET", "X-ray", "ultrasound", "fundus", "microscopy", "dermoscopy")
        m = item.modality if rng.random() < 0.5 else pick(rng, others)
        right = m == item.modality
        spoken = {"MR": ("MR", "MRI"), "X-ray": ("X-ray", "x-ray")}.get(m, (m,))
        said = pick(rng, spoken)
        question = self.words(rng, "modality_check").format(m=said, a=f"{article(said)} {said}")
        answer = f"{'Yes' if right else 'No'}, this is {article(item.modality)} {item.modality} image."
        return Question("modality_check", question, answer)

    def shown(self, item, rng: np.random.Generator) -> Question | None:
        if item.dataset not in wordings.BODY_PARTS:
            return None
        return Question("shown", self.words(rng, "shown"), _of(item))

    def description(self, item, rng: np.random.Generator) -> Question:
        shows = f" It shows {listed(sorted(item.names))}." if item.names else ""
        return Question("description", self.words(rng, "description"), _of(item) + shows)

    def group(self, item, rng: np.random.Generator) -> Question | None:
        """All of a kind: lungs, hemispheres; whether there is one at all, tumors too; how many."""
        form = pick(rng, ("all of a kind", "all of a kind", "any of a kind", "how many of a kind"))
        labelled = any(item.dataset in self.vocabulary[n] for n in self.tumors)
        kinds = [*self.pairs, *(["tumor"] if labelled and not form.startswith("how many") else [])]
        if not kinds:
            return None
        at_hand = [k for k in kinds if any(n in item.names for n in self._members(k))]
        one = pick(rng, at_hand if at_hand and rng.random() < 0.7 else kinds)
        members = self._members(one)
        there = [n for n in members if n in item.names]
        if not there and any(n in UNLABELLED.get(item.dataset, ()) for n in members):
            return None
        many = plural(one) or one
        question = self.words(rng, form).format(one=one, many=many, a=indefinite(one))
        masks: tuple[np.ndarray, ...] = ()
        if form == "how many of a kind":
            number = (f"is no {one}", f"is one {one}", f"are two {many}")[len(there)]
            answer = f"There {number} in this image."
        elif form == "any of a kind":
            answer = f"Yes, there is {listed(there)}." if there else f"No, there is no {one} in this image."
        else:
            answer = present_answer(there) if there else absent_answer(one)
            masks = tuple(item.masks[item.names.index(n)] for n in there)
        return Question(form, question, answer, masks, names=tuple(there))

    def everything(self, item, rng: np.random.Generator) -> Question | None:
        names = sorted(item.names)
        if not names:
            return None
        masks = tuple(item.masks[item.names.index(n)] for n in names)
        words = self.words(rng, "everything")
        return Question("everything", words, present_answer(names), masks, names=tuple(names))

    def marked(self, item, rng: np.random.Generator) -> Question | None:
        """The structure that a prompt means, drawn."""
        if not item.names:
            return None
        prompt, index = region_prompt(rng, item.masks, int(rng.integers(len(item.names))), mask_share=0.3)
        name = item.names[index]
        answer = present_answer([name])
        words = self.words(rng, "marked")
        return Question("marked", words, answer, (item.masks[index],), (prompt,), names=(name,))

    def unknown(self, item, rng: np.random.Generator) -> Question:
        """A structure that was never learned, half of the words made up; perhaps with a known one."""
        if self.heard:
            made_up = "".join(pick(rng, wordings.SYLLABLES) for _ in range(rng.integers(2, 5)))
            name = made_up if rng.random() < 0.5 else pick(rng, wordings.UNKNOWN)
        else:
            name = pick(rng, wordings.UNHEARD_UNKNOWN)
        if item.names and rng.random() < 0.2:
            i = int(rng.integers(len(item.names)))
            both = self.several_words(rng, [item.names[i], name])
            answer = f"{present_answer([item.names[i]])} {UNKNOWN}"
            return Question("unknown", both, answer, (item.masks[i],), names=(item.names[i], name))
        if rng.random() < 0.3:
            question = self.fill(rng, self.words(rng, "presence"), name)
        else:
            question = self.grounding_words(rng, name, item.modality)
        return Question("unknown", question, UNKNOWN, names=(name,))

    def beyond(self, item, rng: np.random.Generator) -> Question:
        questions = wordings.BEYOND if self.heard else wordings.UNHEARD_BEYOND
        return Question("beyond", self._reworded(rng, pick(rng, questions)), CANNOT)

    def _members(self, kind: str) -> list[str]:
        return self.tumors if kind == "tumor" else [f"left {kind}", f"right {kind}"]


KINDS = {
    "modality_check": EverydayMaker.modality_check,
    "shown": EverydayMaker.shown,
    "description": EverydayMaker.description,
    "group": EverydayMaker.group,
    "everything": EverydayMaker.everything,
    "marked": EverydayMaker.marked,
    "unknown": EverydayMaker.unknown,
    "beyond": EverydayMaker.beyond,
}


def _of(item) -> str:
    """ "This is a CT image of the chest." """
    of = f" of {wordings.BODY_PARTS[item.dataset]}" if item.dataset in wordings.BODY_PARTS else ""
    return f"This is {article(item.modality)} {item.modality} image{of}."
