"""Region pairs: what is in a mask, box or point; how large, where, and whether it is a finding.

The format knows masks only, so a box is written as its filled rectangle and a point as a square around it, as
the published demo does. A point means the smallest structure under it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medplib.data.augment import UNORIENTED
from medplib.data.builder.facts import Thing, place
from medplib.data.builder.pairs import Context, Pair, Target, target
from medplib.data.builder.words import about, fill, indefinite
from medplib.data.questions import region_prompt
from medplib.prompts.types import Box, Mask, Point

NAME = (
    "What is in <region>?",
    "What structure is in <region>?",
    "Which structure is marked by <region>?",
    "What does <region> show?",
    "Name the structure in <region>.",
    "Identify what is marked in <region>.",
    "What is shown in the region <region> of this {m} image?",
    "Which organ, tissue or finding is in <region>?",
    "Look at <region>: what is it?",
    "What am I pointing at with <region>?",
)
NAMED = (
    "{This_is} {the}.",
    "The region shows {the}.",
    "The marked area belongs to {the}.",
    "{The} {is} in this region.",
)
NAMED_FINDING = (
    "{This_is} {a}.",
    "The region shows {a}.",
    "{A} {is} marked here.",
    "The marked area belongs to {a}.",
)
SIZE = (
    "How large is the structure in <region>?",
    "How much of the image does <region> cover?",
    "What share of the image belongs to <region>?",
)
PLACE = (
    "Where in the image is <region>?",
    "In which part of the image does <region> lie?",
    "Describe the position of <region>.",
)
FINDING = (
    "Does <region> show a finding or anatomy?",
    "Is <region> a part of the anatomy or a finding?",
)


def region_pairs(context: Context) -> list[Pair]:
    """A conversation about one structure: its name, and sometimes one thing more about its mask."""
    things = context.facts.things
    if not things:
        return []
    masks = np.stack([thing.mask for thing in things])
    for number in context.rng.permutation(len(things)):
        prompt, index = region_prompt(context.rng, masks, int(number))
        thing = things[index]
        if not _clear(prompt, index, things, context.point_size):
            thing, prompt = things[number], Mask(masks[number])
        form = type(prompt).__name__.lower()
        if not context.new("region", [thing.name, form]):
            continue
        region = _target(thing, prompt, context.point_size)
        modality = context.facts.sample.modality
        named = NAMED_FINDING if thing.abnormal else NAMED
        pairs = [
            Pair(
                "name",
                fill(context.pick(NAME), thing.name, m=modality),
                fill(context.pick(named), thing.name),
                (thing.name,),
                regions=(region,),
            )
        ]
        if isinstance(prompt, Mask) and context.chance(0.5):
            pairs.append(_more(context, thing, region))
        return pairs
    return []


def _clear(prompt: Point | Box | Mask, index: int, things: Sequence[Thing], point_size: int) -> bool:
    """Whether the drawn box or square can mean nothing but the structure `index`.

    A box may neither be most of the image nor nearly another structure's box; two fifths of a point's square
    must be the structure.
    """
    if isinstance(prompt, Mask):
        return True
    drawn = prompt.to_mask(things[index].mask.shape, point_size=point_size)
    if isinstance(prompt, Point):
        return bool((drawn & things[index].mask).sum() >= 0.4 * drawn.sum())
    others = [thing.box.to_mask(drawn.shape) for i, thing in enumerate(things) if i != index]
    twins = [(drawn & other).sum() > 0.7 * (drawn | other).sum() for other in others]
    return bool(drawn.mean() <= 0.7 and not any(twins))


def _target(thing: Thing, prompt, point_size: int) -> Target:
    if isinstance(prompt, Mask):
        return target(thing)
    mask = prompt.to_mask(thing.mask.shape, point_size=point_size)
    if isinstance(prompt, Box):
        numbers = (prompt.x0, prompt.y0, prompt.x1, prompt.y1)
    else:
        numbers = (prompt.x, prompt.y, point_size)
    return Target("_".join([type(prompt).__name__.lower(), *(f"{n:.0f}" for n in numbers)]), mask)


def _more(context: Context, thing: Thing, region: Target) -> Pair:
    """A second turn about the same mask."""
    kinds = ["region size"]
    kinds += ["region position"] if thing.compact else []
    kinds += ["region finding"] if context.facts.sample.modality not in UNORIENTED else []  # no slides
    kind = context.pick(kinds)
    if kind == "region size":
        question, answer = context.pick(SIZE), f"It covers {about(thing.size)}."
    elif kind == "region position":
        question = context.pick(PLACE)
        answer = f"It lies in {place(thing, context.facts.radiological)}."
    else:  # an organ may be sick: that it is healthy is never said
        question = context.pick(FINDING)
        answer = f"A finding: {indefinite(thing.name)}." if thing.abnormal else f"Anatomy: the {thing.name}."
    return Pair(kind, question, answer, (thing.name,), regions=(region,))
