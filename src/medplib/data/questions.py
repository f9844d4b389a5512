"""Questions with known answers about a labelled image: grounding, regions, presence, modality, absence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medplib.prompts.types import Box, Mask, Point

MODALITY_QUESTIONS = (
    "What is the modality of this image?",
    "Which imaging modality is this?",
    "What imaging modality was used?",
    "What kind of medical image is this?",
    "What modality is used to take this image?",
    "Which modality is this image?",
    "How was this image taken?",
    "What type of image is this?",
)
GROUNDING_QUESTIONS = (
    "Segment {the}{s}.",
    "Segment {the}{s}.",
    "Please segment {the}{s}.",
    "Segment {s}.",
    "Can you segment {the}{s} in this image?",
    "Please segment {the}{s} in this {m} image.",
    "Segment {the}{s} in the image.",
    "Where is {the}{s}?",
    "Outline {the}{s}.",
    "Please outline {the}{s} in the image.",
    "Show me {the}{s}.",
    "Delineate {the}{s} in this {m} image.",
    "Draw a mask of {the}{s}.",
    "Find {the}{s}.",
    "Highlight {the}{s}.",
    "Mark {the}{s} in this image.",
    "Locate {the}{s}.",
    "Could you show where {the}{s} is?",
    "Is there a {s} in this image? If so, segment it.",
)
SEVERAL_QUESTIONS = (
    "Segment {list}.",
    "Please segment {list}.",
    "Segment {list} in this image.",
    "Outline {list}.",
    "Where are {list}?",
    "Show me {list}.",
)
FOLLOW_UP_QUESTIONS = (  # after a question of these kinds
    "And the {s}?",
    "Now the {s}.",
    "Now segment the {s}.",
    "What about the {s}?",
    "Also the {s}.",
    "Please mark the {s} as well.",
)
PRESENCE_QUESTIONS = (
    "Is {the}{s} visible in this image?",
    "Is there a {s} in this image?",
    "Can you see {the}{s}?",
    "Does this image show {the}{s}?",
    "Is {the}{s} present?",
)
LIST_QUESTIONS = (
    "What structures are visible?",
    "Which structures can you see in this image?",
    "What can be seen in this image?",
    "List the structures in this image.",
)
REGION_QUESTIONS = (
    "What is in <region>?",
    "What is in <region>?",
    "What structure is in <region>?",
    "Which structure is marked by <region>?",
    "What does <region> show?",
    "Name the structure in <region>.",
    "Identify the structure in <region>.",
    "What is this region <region>?",
    "What is shown in the region <region>?",
    "Which organ or tissue is in <region>?",
)
PLAIN: Mapping[str, Sequence[str]] = {
    "modality": MODALITY_QUESTIONS,
    "grounding": GROUNDING_QUESTIONS,
    "several": SEVERAL_QUESTIONS,
    "presence": PRESENCE_QUESTIONS,
    "list": LIST_QUESTIONS,
    "region": REGION_QUESTIONS,
}

# Structures that an image of the data set may show although nobody labelled them: never called absent.
UNLABELLED: Mapping[str, frozenset[str]] = {
    "BrainT1c": frozenset(
        {"brain", "gray matter", "white matter", "left hemisphere", "right hemisphere", "bone", "body"}
    ),
    "MNI152": frozenset({"head", "body"}),
    "ChestCT": frozenset({"head"}),
    "BreastMR": frozenset({"body", "left lung", "right lung", "bone", "lung tumor", "head"}),
    "SimulatedPET": frozenset({"left lung", "right lung", "bone", "head", "lung tumor"}),
    "HistoHE": frozenset({"largest nucleus"}),
    "ColonIHC": frozenset({"largest nucleus"}),
}
MIN_PIXELS = 12  # a structure smaller than this after augmentation is neither asked for nor called absent


@dataclass(frozen=True)
class Question:
    """One question, its answer, the masks of the answer's `<SEG>` tokens and the regions asked about."""

    task: str  # "modality", "presence", "list", "region", "grounding", "absent", "several" or an everyday one
    question: str
    answer: str
    masks: tuple[np.ndarray, ...] = ()
    prompts: tuple[Point | Box | Mask, ...] = ()
    names: tuple[str, ...] = field(default=())


def article(noun: str) -> str:
    """ "a" or "an"."""
    return "an" if noun[0].lower() in "aeiou" or noun[:2] in ("MR", "X-") else "a"


class QuestionMaker:
    """Draws questions about a labelled image from a keyed random generator.

    `vocabulary` are all structure names that may be asked about as absent, by data set: {name: data sets}.
    """

    wordings = PLAIN

    def __init__(self, vocabulary: Mapping[str, set[str]]) -> None:
        self.vocabulary = dict(vocabulary)

    def words(self, rng: np.random.Generator, kind: str) -> str:
        """One of the wordings of a kind, as a template."""
        return pick(rng, self.wordings[kind])

    def fill(
        self, rng: np.random.Generator, template: str, name: str, modality: str = "", the: str = "the "
    ) -> str:
        """A template with what is asked about in it."""
        return _fill(template, name, modality, the)

    def absent_names(self, dataset: str, labelled: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names surely not in the image: those of its own data set (the hard ones), and all others."""
        unsure = UNLABELLED.get(dataset, frozenset()) | set(labelled)
        names = [n for n in sorted(self.vocabulary) if n not in unsure]
        own = [n for n in names if dataset in self.vocabulary[n]]
        return own, [n for n in names if n not in own]

    def modality(self, rng: np.random.Generator, modality: str) -> Question:
        answer = f"This is {article(modality)} {modality} image."
        return Question("modality", self.words(rng, "modality"), answer)

    def presence(self, rng: np.random.Generator, name: str, present: bool) -> Question:
        question = self.fill(rng, self.words(rng, "presence"), name)
        answer = f"Yes, there is {name}." if present else f"No, there is no {name} in this image."
        return Question("presence", question, answer, names=(name,))

    def listing(self, rng: np.random.Generator, names: Sequence[str]) -> Question:
        return Question("list", self.words(rng, "list"), f"This image shows {', '.join(sorted(names))}.")

    def region(self, rng: np.random.Generator, name: str, prompt: Point | Box | Mask) -> Question:
        question = self.words(rng, "region")
        return Question("region", question, f"This is the {name}.", prompts=(prompt,), names=(name,))

    def grounding(
        self, rng: np.random.Generator, name: str, mask: np.ndarray | None, modality: str
    ) -> Question:
        """mask None: the structure is absent and the answer says so without a `<SEG>`."""
        question = self.grounding_words(rng, name, modality)
        if mask is None:
            return Question("absent", question, absent_answer(name), names=(name,))
        return Question("grounding", question, present_answer([name]), (mask,), names=(name,))

    def grounding_words(self, rng: np.random.Generator, name: str, modality: str) -> str:
        """The question for one structure, now and then without its article."""
        template = self.words(rng, "grounding")
        return self.fill(rng, template, name, modality, the="" if rng.random() < 0.1 else "the ")

    def follow_up(self, rng: np.random.Generator, question: Question, before: Question) -> Question:
        """A question for one structure, in fewer words where the question before it asked to draw, too."""
        kinds = ("grounding", "absent", "several")
        if question.task not in kinds[:2] or before.task not in kinds:
            return question
        return replace(question, question=_fill(pick(rng, FOLLOW_UP_QUESTIONS), question.names[0]))

    def several(
        self, rng: np.random.Generator, present: Sequence[tuple[str, np.ndarray]], absent: Sequence[str]
    ) -> Question:
        """Two or three structures at once, in the order asked; the absent ones are said to be absent."""
        wanted = [(n, m) for n, m in present] + [(n, None) for n in absent]
        order = rng.permutation(len(wanted))
        wanted = [wanted[i] for i in order]
        drawn = [n for n, m in wanted if m is not None]
        answers = [present_answer(drawn)] if drawn else []
        answers += [absent_answer(n) for n, m in wanted if m is None]
        masks = tuple(m for _, m in wanted if m is not None)
        question = self.several_words(rng, [n for n, _ in wanted])
        return Question("several", question, " ".join(answers), masks, names=tuple(n for n, _ in wanted))

    def several_words(self, rng: np.random.Generator, names: Sequence[str]) -> str:
        """The question for several structures, in this order."""
        the = [f"the {n}" for n in names]
        first = ", ".join(the[:-1])
        template = self.words(rng, "several")
        return template.format(list=f"{first} and {the[-1]}", either=f"{first} or {the[-1]}")


def present_answer(names: Sequence[str]) -> str:
    """The answer that draws: one `<SEG>` after each name."""
    return "Here is " + " and ".join(f"the <ref>{n}</ref> <SEG>" for n in names) + "."


def absent_answer(name: str) -> str:
    """The answer that draws nothing."""
    return f"There is no {name} in this image."


def region_prompt(
    rng: np.random.Generator, masks: np.ndarray, index: int, mask_share: float = 0.6
) -> tuple[Point | Box | Mask, int]:
    """A prompt for structure `index` of masks (M, H, W): its mask, its box, or a point in it.

    Returns the prompt and the index it means: a point means the smallest structure under it.
    """
    mask = masks[index]
    draw = rng.random()
    box = Box.around(mask)
    width, height = box.x1 - box.x0, box.y1 - box.y0
    fills = mask.sum() / (width * height) > 0.5
    if mask_share <= draw < mask_share + 0.3 and fills and width > 2 and height > 2:
        return box, index
    if draw >= mask_share + 0.3:
        ys, xs = np.nonzero(mask)
        at = rng.integers(len(ys))
        y, x = ys[at], xs[at]
        under = [i for i in range(len(masks)) if masks[i, y, x]]
        return Point(float(x), float(y)), min(under, key=lambda i: masks[i].sum())
    return Mask(mask), index


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options."""
    return options[rng.integers(len(options))]


def _fill(template: str, name: str, modality: str = "", the: str = "the ") -> str:
    return template.format(s=name, m=modality, the=the)
