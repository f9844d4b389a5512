"""Everyday questions about labelled images, in wordings that a model was trained on and in others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from medplib.data.everyday import KINDS, EverydayMaker
from medplib.data.questions import MIN_PIXELS, Question
from medplib.data.samples import ImageSample, keyed_rng
from medplib.sample import Sample
from medplib.training.conversations import QuestionDraws
from medplib.training.labelled import Labelled

PLAIN_KINDS = ("modality", "presence", "list", "region", "grounding", "absent", "several")


def measure_everyday(
    model,
    images: Sequence[ImageSample],
    vocabulary: Mapping[str, set[str]],
    *,
    heard: bool,
    per_image: int = 6,
    batch_size: int = 12,
) -> dict[str, tuple[float, int]]:
    """{kind of question: (share answered right, questions)}; "all" are all of them.

    Right is an answer that says word for word what it should, with as many masks as it should draw.
    `per_image` kinds are drawn for each image, keyed by it; heard False asks in wordings that
    nothing is trained on.
    """
    maker = EverydayMaker(vocabulary, heard)
    asked: list[tuple[Sample, Question]] = []
    for number, sample in enumerate(images):
        rng = keyed_rng("everyday", sample.dataset, sample.case, number)
        item = _labelled(sample)
        kinds = [*PLAIN_KINDS, *KINDS]
        for at in rng.permutation(len(kinds))[:per_image]:
            question = QuestionDraws(maker, {kinds[at]: 1.0}).draw(item, rng)
            asked.append((Sample([item.image], [(question.question, None)], question.prompts), question))
    right = defaultdict(list)
    for start in range(0, len(asked), batch_size):
        chunk = asked[start : start + batch_size]
        for (_, question), answer in zip(chunk, model.answer([s for s, _ in chunk]), strict=True):
            told = re.sub(r"</?ref>| <SEG>", "", question.answer)
            good = answer.text == told and len(answer.findings) == len(question.masks)
            for kind in (question.task, "all"):
                right[kind].append(good)
    return {kind: (float(np.mean(found)), len(found)) for kind, found in sorted(right.items())}


def _labelled(sample: ImageSample) -> Labelled:
    masks = sample.load_masks()
    keep = [i for i in range(len(masks)) if masks[i].sum() >= MIN_PIXELS]
    names = tuple(sample.names[i] for i in keep)
    return Labelled(sample.load_image(), masks[keep], names, sample.modality, sample.dataset, sample.tier)
