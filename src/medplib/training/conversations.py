"""Labelled images -> questions about them; and the texts that a language model and a tokenizer start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from medplib.data import everyday
from medplib.data import questions as q
from medplib.data.questions import Question, QuestionMaker
from medplib.processing import MedPLIBProcessor
from medplib.sample import Sample
from medplib.training.labelled import Labelled


class QuestionDraws:
    """Draws questions about labelled images by the shares in `mix` (task: share)."""

    def __init__(self, maker: QuestionMaker, mix: dict[str, float]) -> None:
        self.maker, self.tasks, shares = maker, list(mix), np.array(list(mix.values()))
        self.shares = shares / shares.sum()

    def __call__(self, item: Labelled, rng: np.random.Generator) -> Question:
        """One question about `item`, as people type it."""
        question = self.draw(item, rng)
        return replace(question, question=_as_typed(rng, question.question))

    def draw(self, item: Labelled, rng: np.random.Generator) -> Question:
        """One question about `item`; a task that it cannot serve falls back to the modality or absence."""
        task = self.tasks[rng.choice(len(self.tasks), p=self.shares)]
        own, others = self.maker.absent_names(item.dataset, item.names)
        present = len(item.names)
        if task in everyday.KINDS:
            return self.maker.draw(task, item, rng) or self.maker.modality(rng, item.modality)

        def absent() -> str:
            pool = own if own and (rng.random() < 0.6 or not others) else others
            return pool[rng.integers(len(pool))]

        if task == "absent" or (task in ("grounding", "several", "region", "list") and not present):
            if "modality" in self.tasks and "absent" not in self.tasks:
                return self.maker.modality(rng, item.modality)
            return self.maker.grounding(rng, absent(), None, item.modality)
        if task == "modality":
            return self.maker.modality(rng, item.modality)
        if task == "presence":
            yes = present and rng.random() < 0.5
            return self.maker.presence(rng, item.names[rng.integers(present)] if yes else absent(), bool(yes))
        if task == "list":
            return self.maker.listing(rng, item.names)
        if task == "region":
            prompt, index = q.region_prompt(rng, item.masks, int(rng.integers(present)))
            return self.maker.region(rng, item.names[index], prompt)
        if task == "several" and present + len(own) + len(others) > 1:
            chosen = rng.permutation(present)[: rng.integers(1, 4)]
            extra = {absent()} if rng.random() < 0.35 or len(chosen) < 2 else set()
            return self.maker.several(rng, [(item.names[i], item.masks[i]) for i in chosen], sorted(extra))
        i = int(rng.integers(present))
        return self.maker.grounding(rng, item.names[i], item.masks[i], item.modality)


class TextBatch:
    """Images -> tensors of `per_image` conversations about each, without pictures, regions and masks: for a
    language model that starts from nothing."""

    def __init__(self, processor: MedPLIBProcessor, draws: QuestionDraws, per_image: int) -> None:
        self.processor, self.draws, self.per_image = processor, draws, per_image

    def __call__(self, items: Sequence[Labelled], rng: np.random.Generator) -> dict[str, Tensor]:
        drawn = [self.draws(item, rng) for item in items for _ in range(self.per_image)]
        samples = [Sample([], [(question.question, question.answer)]) for question in drawn]
        return self.processor._pad([self.processor.encode(s, training=True) for s in samples], training=True)


def _as_typed(rng: np.random.Generator, question: str) -> str:
    """The question as people type it: now and then in lower case or without its last mark."""
    if rng.random() < 0.12:
        question = question.lower()
    return question.rstrip(".?") if rng.random() < 0.12 else question


def template_texts(names: Sequence[str], modalities: Sequence[str]) -> list[str]:
    """Every template filled with every name: what a tokenizer is learned from."""
    texts = ["USER: ", " ASSISTANT:", "\n"]
    for name in names:
        texts += [q._fill(t, name, m) for t in q.GROUNDING_QUESTIONS for m in modalities[:1]]
        texts += [q._fill(t, name) for t in q.PRESENCE_QUESTIONS]
        texts += [
            f"Segment the {name} and the {name}.",
            f"This is the {name}.",
            f"Here is the {name}",
            q.absent_answer(name),
        ]
        texts += [f"Yes, there is {name}.", f"This image shows {name}, {name}."] * 3
    for m in modalities:
        texts += [*q.MODALITY_QUESTIONS, f"This is {q.article(m)} {m} image.", f"in this {m} image"] * 3
    texts += [part for t in q.REGION_QUESTIONS for part in t.split("<region>")]
    texts += list(q.LIST_QUESTIONS) * 3
    texts += [t.replace("{list}", "") for t in q.SEVERAL_QUESTIONS] * 3
    return texts + [t.lower() for t in texts]
