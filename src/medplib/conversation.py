"""The chat templates: question and answer turns become an ordered list of pieces for the processor to tokenise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medplib.errors import UnknownNameError

IMAGE, REGION, SEG = "<image>", "<region>", "<SEG>"


@dataclass(frozen=True)
class Piece:
    """A run of the prompt. `control` text may become control tokens; other text never does."""

    text: str
    kind: Literal["system", "user", "image", "region", "assistant", "end"]
    control: bool = False

    @property
    def learned(self) -> bool:
        """Whether the model is trained to write this piece."""
        return self.kind in ("assistant", "end")


@dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    The Vicuna text is the published one (its training run says "human", its inference "user").
    """

    system: str
    user: str
    assistant: str
    turn_sep: str
    end: str = "</s>"


_VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions. "
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(_VICUNA.format("user", "user"), "USER: ", " ASSISTANT:", " "),
    "llava_v1": Template(_VICUNA.format("human", "human"), "USER: ", " ASSISTANT:", " "),
    "brief": Template("", "USER: ", " ASSISTANT:", " "),
}


def get_template(name: str) -> Template:
    """The template of that name. Raises UnknownNameError."""
    if name not in TEMPLATES:
        raise UnknownNameError(f"No chat template named {name!r}. Known: {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def render(
    template: Template,
    turns: Sequence[tuple[str, str | None]],
    num_images: int = 1,
    num_regions: Sequence[int] = (),
) -> list[Piece]:
    """Turns -> pieces; the last answer may be None (generation starts there).

    The images come before the first question, each between <im_start> and <im_end>. In turn i the first
    `num_regions[i]` places written "<region>" become region placeholders; with 0 the word stays text, as does
    every other control token in a question. Answers come from the data set or the model and keep theirs.
    """
    pieces = [Piece(template.system, "system")] if template.system else []
    for turn, (question, answer) in enumerate(turns):
        pieces.append(Piece(template.user, "system"))
        if turn == 0:
            for _ in range(num_images):
                pieces += [Piece("<im_start>", "image", True), Piece(IMAGE, "image", True)]
                pieces += [Piece("<im_end>", "image", True)]
            if num_images:
                pieces.append(Piece("\n", "user"))
        regions = num_regions[turn] if turn < len(num_regions) else 0
        texts = question.split(REGION, regions) if regions else [question]
        for i, text in enumerate(texts):
            if i:
                pieces += [Piece("<region>", "user", True), Piece(REGION, "region", True)]
                pieces += [Piece("</region>", "user", True)]
            if text:
                pieces.append(Piece(text, "user"))
        pieces.append(Piece(template.assistant, "system"))
        if answer is not None:
            pieces += [Piece(" " + answer.strip(), "assistant", True), Piece(template.end, "end", True)]
            if turn + 1 < len(turns) and template.turn_sep.strip():
                pieces.append(Piece(template.turn_sep, "system"))
    return pieces
