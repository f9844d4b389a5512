"""Grounding pairs: "segment it" in many phrasings; one structure, several, both of a pair, each instance; and
questions for structures that are surely absent."""

from __future__ import annotations

import numpy as np

from medplib.data.builder.facts import Thing
from medplib.data.builder.pairs import Context, Pair, Target, slug, target
from medplib.data.builder.words import both, fill, indefinite, is_abnormal, listed
from medplib.data.questions import MIN_PIXELS

ONE = (
    "Segment {the}.",
    "Segment {the} in this image.",
    "Please segment {the} in this {m} image.",
    "Can you segment {the}?",
    "Could you outline {the} in this {m} image?",
    "Please outline {the}.",
    "Delineate {the} in this {m} image.",
    "Draw the mask of {the}.",
    "Highlight {the} in this image.",
    "Mark {the}.",
    "Mark every pixel of {the} in this image.",
    "Show me {the} in this {m} image.",
    "Show me where {the} {is}.",
    "Locate {the} in this image.",
    "Find {the} and mark {it}.",
    "Where {is} {the} in this {m} image?",
    "Which pixels belong to {the}?",
    "Trace the outline of {the}.",
    "I need a mask of {the} in this {m} image.",
    "Give me the segmentation of {the}.",
    "Identify and segment {the}.",
    "Separate {the} from the rest of the image.",
    "{exists} in this image? If so, segment {it}.",
    "{exists} in this {m} image? Please mark {it} if so.",
    "If {the} {is} visible here, outline {it}.",
)
NEXT = ("And {the}?", "Now segment {the}.", "Please mark {the} as well.", "What about {the}?", "Also {the}.")
MANY = (
    "Segment {list}.",
    "Please segment {list} in this {m} image.",
    "Outline {list} in this image.",
    "Where are {list}?",
    "Mark {list}, one after the other.",
    "Show me {list} in this {m} image.",
    "Delineate {list}.",
)
EACH = (
    "Segment each {s} separately.",
    "Mark every single {s} with its own mask.",
    "Outline the {s}s one by one.",
)
FOUND = (
    "Here {is} {ref} <SEG>.",
    "Sure, here {is} {ref} <SEG>.",
    "I have marked {ref} <SEG>.",
    "The segmentation of {ref} is <SEG>.",
    "The mask of {ref} is <SEG>.",
    "This shows {ref} <SEG>.",
)
ABSENT_FINDING = (
    "There {is} no {s} in this image.",
    "No {s} {is} visible in this image.",
    "There {is} no {s} to segment in this image.",
    "This image shows no {s}.",
    "I see no {s} in this image, so nothing is marked.",
)
ABSENT = (
    "There {is} no {s} in this image.",
    "{The} {is} not visible in this image.",
    "This image does not show {the}.",
    "I do not see {the} in this image, so nothing is marked.",
)


def grounding_pairs(context: Context) -> list[Pair]:
    """The turns of one conversation; empty when everything about the image has been asked."""
    things = context.facts.things
    if context.absent and context.chance(context.negatives if things else 1.0):
        pair = absent(context, context.pick(context.absent), context.pick(ONE))
        return [pair] if context.new("absent", pair.names) else []
    if not things:
        return []
    form = context.rng.random()
    if form < 0.1:
        pairs = united(context)
    elif form < 0.2:
        pairs = each(context)
    elif form < 0.45 and len(things) > 1:
        pairs = several(context)
    else:
        pairs = []
    return pairs or one(context)


def one(context: Context) -> list[Pair]:
    """A structure that has not been asked for yet."""
    things = context.facts.things
    for number in context.rng.permutation(len(things)):
        thing = things[number]
        if context.new("segment", [thing.name]):
            return [segment(context, thing.name, target(thing), context.pick(ONE))]
    return []


def united(context: Context) -> list[Pair]:
    """ "Segment both lungs": one mask, the union of left and right."""
    by_name = {thing.name: thing for thing in context.facts.things}
    for name, thing in by_name.items():
        other = by_name.get("right" + name.removeprefix("left"))
        union = both(name)
        if name.startswith("left ") and other and union and context.new("segment", [union]):
            mask = Target(slug(union), thing.mask | other.mask)
            return [segment(context, union, mask, context.pick(ONE))]
    return []


def each(context: Context) -> list[Pair]:
    """Two to five instances that the data set lists one by one: from left to right, a mask for each."""
    for thing in context.facts.things:
        countable = indefinite(thing.single) != thing.single and thing.single[-1].isalpha()
        large = all(part.sum() >= MIN_PIXELS for part in thing.parts)
        if not (countable and large and 2 <= len(thing.parts) <= 5 and context.new("each", [thing.single])):
            continue
        rows = sorted(
            zip(thing.parts, thing.files, strict=True), key=lambda row: np.nonzero(row[0])[1].mean()
        )
        masks = [Target(f"{slug(thing.single)}_{i}", part, file) for i, (part, file) in enumerate(rows)]
        ref = f"<ref>{thing.single}</ref>" if context.refs else thing.single
        if context.several == "answer":
            answer = "From left to right: " + listed([f"{ref} <SEG>"] * len(masks)) + "."
            return [
                Pair("each", fill(context.pick(EACH), thing.single), answer, (thing.single,), tuple(masks))
            ]
        first = f"Segment the {thing.single} that is furthest to the left in the image."
        return [
            Pair("each", "Now the next one to the right." if i else first, f"Here is the {ref} <SEG>.",
                 (thing.single,), (mask,))
            for i, mask in enumerate(masks)
        ]  # fmt: skip
    return []


def several(context: Context) -> list[Pair]:
    """Two or three structures, perhaps an absent one among them."""
    things = context.facts.things
    order = context.rng.permutation(len(things))[: int(context.rng.integers(2, 4))]
    wanted: list[tuple[str, Thing | None]] = [(things[i].name, things[i]) for i in order]
    if context.absent and len(wanted) < 3 and context.chance(context.negatives):
        wanted.insert(int(context.rng.integers(len(wanted) + 1)), (context.pick(context.absent), None))
    names = [name for name, _ in wanted]
    if not context.new("several", sorted(names)):
        return []
    if context.several == "turns":
        return [
            absent(context, name, context.pick(NEXT if i else ONE))
            if thing is None
            else segment(context, name, target(thing), context.pick(NEXT if i else ONE))
            for i, (name, thing) in enumerate(wanted)
        ]
    question = fill(
        context.pick(MANY), list=listed([f"the {n}" for n in names]), m=context.facts.sample.modality
    )
    drawn = [(name, thing) for name, thing in wanted if thing is not None]
    refs = [f"{_ref(context, name)} <SEG>" for name, _ in drawn]
    answers = ["Here " + ("is " if len(refs) == 1 else "are ") + listed(refs) + "."]
    answers += [fill(_absent(context, name), name) for name, thing in wanted if thing is None]
    return [
        Pair("several", question, " ".join(answers), tuple(names), tuple(target(thing) for _, thing in drawn))
    ]


def segment(context: Context, name: str, mask: Target, question: str) -> Pair:
    """Asked and drawn."""
    modality = context.facts.sample.modality
    answer = fill(context.pick(FOUND), name, ref=_ref(context, name))
    return Pair("segment", fill(question, name, m=modality), answer, (name,), (mask,))


def absent(context: Context, name: str, question: str) -> Pair:
    """Asked and not there: words, no `<SEG>`."""
    modality = context.facts.sample.modality
    return Pair("absent", fill(question, name, m=modality), fill(_absent(context, name), name), (name,))


def _absent(context: Context, name: str) -> str:
    return context.pick(ABSENT_FINDING if is_abnormal(name) else ABSENT)


def _ref(context: Context, name: str) -> str:
    """ "the <ref>left lung</ref>", or without the tags."""
    the = "" if name.startswith("both ") else "the "
    return f"{the}<ref>{name}</ref>" if context.refs else f"{the}{name}"
