"""Complex pairs: the question types of the paper, each answered from the masks alone.

modality, organ (what is there, is it there), position (by thirds), size, count, relation, abnormality. "What
is there" means what the data set labels; no answer says that a list is complete or that an organ is healthy.
"""

from __future__ import annotations

from collections.abc import Callable

from medplib.data.builder.facts import place, relation
from medplib.data.builder.pairs import Context, Pair
from medplib.data.builder.words import ABNORMAL, about, fill, indefinite, is_abnormal, is_plural, listed
from medplib.data.questions import MODALITY_QUESTIONS, article

MODALITY = (
    "This is {a_m} {m} image.",
    "The image was taken by {m}.",
    "It is {a_m} {m} image.",
    "The modality is {m}.",
)
WORDS = {
    "fundus": "fundus photography",
    "MR": "magnetic resonance imaging (MR)",
    "CT": "computed tomography (CT)",
    "PET": "positron emission tomography (PET)",
    "histopathology": "microscopy of a stained slide",
}
ORGANS = (
    "What structures can be seen in this image?",
    "Which structures does this {m} image show?",
    "Name the structures that you recognize in this image.",
    "What can you see in this {m} image?",
    "List the anatomy and findings in this image.",
)
SHOWN = (
    "The image shows {list}.",
    "I can see {list}.",
    "It shows {list}.",
    "This {m} image shows {list}.",
)
PRESENT = (
    "{exists} in this image?",
    "{exists} in this {m} image?",
    "Does this image show {any}?",
    "Can you see {any} here?",
)
THERE = ("Yes, {any} {is} visible.", "Yes, the image shows {any}.")
NOT_THERE = {
    True: ("No, there {is} no {s} in this image.", "No, no {s} {is} visible."),
    False: ("No, {the} {is} not visible in this image.", "No, this image does not show {the}."),
}
POSITION = (
    "Where in the image {is} {the}?",
    "In which part of the image {is} {the}?",
    "Describe where {the} {lies} in this {m} image.",
    "What is the position of {the}?",
    "Where {is} {the} located?",
)
PLACED = ("{The} {lies} in {place}.", "{The} {is} in {place}.", "{It} {lies} in {place}.")
SIZE = (
    "How large {is} {the}?",
    "How much of the image {covers_q} {the} cover?",
    "What share of the image {covers_q} {the} take up?",
    "What is the size of {the} in this {m} image?",
    "Estimate the area of {the}.",
)
SIZED = ("{The} {covers} {size}.", "{It} {covers} {size}.", "{The} {takes} up {size}.")
COUNT = (
    "How many separate areas of {s} are there in this image?",
    "Into how many separate parts {covers_q} {the} fall in this image?",
    "Count the separate areas of {s}.",
    "How many separate areas are marked as {s}?",
)
COUNTED_ONE = ("There is one.", "{The} {forms} a single area.", "One.")
COUNTED_OBJECTS = ("There are {n}.", "I count {n}.", "The image shows {n}.")
COUNTED = ("There are {n}.", "{The} {forms} {n} separate areas.", "I count {n}.")
OBJECTS = (
    "How many {s} are there in this image?",
    "How many {s} does this {m} image show?",
    "Count the {s} in this image.",
)
RELATION = (
    "Where {is} {a} relative to {b}?",
    "How {lies_q} {a} lie with respect to {b}?",
    "What is the spatial relation between {a} and {b}?",
    "Describe the position of {a} relative to {b}.",
)
ABNORMALITY = (
    "Is there anything abnormal in this image?",
    "Does this {m} image show a finding?",
    "Are there any signs of disease in this image?",
    "Is anything abnormal visible?",
)
SUSPECTED = (
    "Is there any sign of {a} in this image?",
    "Does this {m} image show {a}?",
    "Can {a} be seen here?",
    "Is the image free of {a}?",
)
NO_FINDING = ("no {s} {is} visible.", "there {is} no {s} in this image.", "it shows no {s}.")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def complex_pairs(context: Context, turns: int) -> list[Pair]:
    """Up to `turns` questions of different types about the image."""
    pairs: list[Pair] = []
    makers = [MAKERS[i] for i in context.rng.permutation(len(MAKERS))]
    for make in makers:
        if len(pairs) == turns:
            break
        pair = make(context)
        if pair is not None and context.new(pair.kind, pair.names):
            pairs.append(pair)
    return pairs


def modality(context: Context) -> Pair:
    m = context.facts.sample.modality
    answer = context.pick(MODALITY)
    words = m if "image." in answer else WORDS.get(m, m)
    return Pair("modality", context.pick(MODALITY_QUESTIONS), answer.format(m=words, a_m=article(m)))


def organ(context: Context) -> Pair | None:
    """What is there, or whether one structure is."""
    facts = context.facts
    m = facts.sample.modality
    if facts.things and context.chance(0.5):
        names = [indefinite(t.name) if t.abnormal else f"the {t.name}" for t in facts.things]
        answer = context.pick(SHOWN).format(list=listed(names), m=m)
        return Pair("organ", context.pick(ORGANS).format(m=m), answer, tuple(facts.names))
    missing = bool(context.absent) and context.chance(context.negatives if facts.things else 1.0)
    if not missing and not facts.things:
        return None
    name = context.pick(context.absent) if missing else context.pick(facts.things).name
    any_of = indefinite(name) if is_abnormal(name) else f"the {name}"
    question = fill(context.pick(PRESENT), name, any=any_of, m=m)
    if missing:
        answer = fill(context.pick(NOT_THERE[is_abnormal(name)]), name)
    else:
        answer = fill(context.pick(THERE), name, any=any_of)
    return Pair("presence", question, answer, (name,), closed=True)


def position(context: Context) -> Pair | None:
    things = [thing for thing in context.facts.things if thing.compact]
    if not things:
        return None
    thing = context.pick(things)
    where = place(thing, context.facts.radiological)
    question = fill(context.pick(POSITION), thing.name, m=context.facts.sample.modality)
    return Pair("position", question, _told(context.pick(PLACED), thing.name, place=where), (thing.name,))


def size(context: Context) -> Pair | None:
    if not context.facts.things:
        return None
    thing = context.pick(context.facts.things)
    question = _told(context.pick(SIZE), thing.name, m=context.facts.sample.modality)
    answer = _told(context.pick(SIZED), thing.name, size=about(thing.size))
    return Pair("size", question, answer, (thing.name,))


def count(context: Context) -> Pair | None:
    """Objects where somebody counted them; else separate areas of a finding, or of listed instances."""
    sample = context.facts.sample
    objects = [thing for thing in context.facts.things if is_plural(thing.name)]
    if sample.count is not None and objects:
        thing = max(objects, key=lambda thing: thing.pixels)
        question = fill(context.pick(OBJECTS), thing.name, m=sample.modality)
        return Pair("count", question, f"There are {sample.count}.", (thing.name,))
    things = [t for t in context.facts.things if t.countable and t.count]
    if not things:
        return None
    thing = context.pick(things)
    n = NUMBERS[thing.count] if thing.count < len(NUMBERS) else str(thing.count)
    if thing.name != thing.single:  # "polyps"
        question = fill(context.pick(OBJECTS), thing.name, m=sample.modality)
        return Pair("count", question, context.pick(COUNTED_OBJECTS).format(n=n), (thing.name,))
    answer = _told(context.pick(COUNTED_ONE if thing.count == 1 else COUNTED), thing.name, n=n)
    return Pair("count", _told(context.pick(COUNT), thing.name), answer, (thing.name,))


def relate(context: Context) -> Pair | None:
    things = context.facts.things
    order = context.rng.permutation(len(things))
    for i in order:
        for j in order:
            how = relation(things[i], things[j]) if i != j else None
            if how is None:
                continue
            a, b = f"the {things[i].name}", f"the {things[j].name}"
            question = _told(context.pick(RELATION), things[i].name, a=a, b=b)
            told = "{The} {lies} inside {b}." if how == "inside" else "{The} {lies} {how} {b} in the image."
            if how == "inside" and is_plural(things[j].name):
                told = "{The} {is} part of {b}."
            answer = fill(told, things[i].name, how=how, b=b)
            return Pair("relation", question, answer, (things[i].name, things[j].name))
    return None


def abnormality(context: Context) -> Pair | None:
    """Yes with the names of what is labelled; no only for a finding that is surely absent."""
    m = context.facts.sample.modality
    found = [thing.name for thing in context.facts.things if thing.abnormal]
    if found:
        answer = f"Yes, the image shows {listed([indefinite(name) for name in found])}."
        return Pair("abnormality", context.pick(ABNORMALITY).format(m=m), answer, tuple(found), closed=True)
    missing = [name for name in context.absent if ABNORMAL.search(name)]
    if not missing:
        return None
    name = context.pick(missing)
    question = fill(context.pick(SUSPECTED), name, m=m)
    start = "Yes" if "free of" in question else "No"
    answer = fill(f"{start}, {context.pick(NO_FINDING)}", name)
    return Pair("abnormality", question, answer, (name,), closed=True)


MAKERS: tuple[Callable[[Context], Pair | None], ...] = (
    modality,
    organ,
    position,
    size,
    count,
    relate,
    abnormality,
)


def _told(template: str, name: str, **more: str) -> str:
    """`fill` with the verbs that these templates need beside."""
    many = fill("{is}", name) == "are"
    do, s = ("do", "") if many else ("does", "s")
    verbs = {"covers_q": do, "lies_q": do, "takes": f"take{s}", "forms": f"form{s}"}
    return fill(template, name, **(verbs | more))
