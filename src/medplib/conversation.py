"""The chat templates: question and answer turns become an ordered list of pieces to tokenise."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from medplib.errors import InputError, UnknownNameError

IMAGE, REGION, SEG = "<image>", "<region>", "<SEG>"
CONTROL_TOKENS = (
    *(SEG, "<ref>", "</ref>", REGION, "</region>", "<sr>", "</sr>", "<mask>", "</mask>"),
    *("<im_start>", "<im_end>"),
)
MAX_QUESTION = 4000  # characters in one question; people ask far shorter ones, a longer text is a mistake


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


class Run(NamedTuple):
    """A stretch of a prompt: text, or ids as they are. `control` text may hold control tokens."""

    content: str | list[int]
    control: bool = False
    learned: bool = False


@dataclass(frozen=True)
class Template:
    """How a conversation is written down: system text, then `user` question `assistant` answer `end` per
    turn.

    The Vicuna text is the published one (its training run says "human", its inference "user").
    """

    system: str
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    end: str = "</s>"


_VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions. "
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(_VICUNA.format("user", "user")),
    "llava_v1": Template(_VICUNA.format("human", "human")),
    "brief": Template(""),
}


def get_template(name: str) -> Template:
    """The template of that name. Raises UnknownNameError."""
    if name not in TEMPLATES:
        raise UnknownNameError.among(f"No chat template named {name!r}.", str(name), TEMPLATES)
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
    return pieces


# Fast tokenizers hold "treat control tokens as text" as a state of their own, which threads would share.
_tokenizer_lock = threading.Lock()


def encode_runs(tokenizer: Any, runs: Sequence[Run]) -> tuple[list[int], list[bool]]:
    """The ids of a prompt, and for each whether it is learned: run by run, or in the tokenizer's own way."""
    if hasattr(tokenizer, "encode_runs"):
        return tokenizer.encode_runs(runs)
    ids: list[int] = []
    learned: list[bool] = []
    ends = [
        token for token in tokenizer.all_special_tokens if token not in CONTROL_TOKENS
    ]  # </s>, <pad>, ...
    splitter = re.compile(f"({'|'.join(map(re.escape, ends))})") if ends else None
    for content, control, flag in runs:
        if not isinstance(content, str):
            new = content
        elif control and splitter and splitter.search(content):  # an answer's own "</s>" does not end it
            parts = [Run(part, part not in ends) for part in splitter.split(content) if part]
            new = encode_runs(tokenizer, parts)[0]
        else:
            with _tokenizer_lock:
                new = tokenizer.encode(content, add_special_tokens=False, split_special_tokens=not control)
        ids += new
        learned += [flag] * len(new)
    return ids, learned


def check_turns(
    turns: Sequence[tuple[str, str | None]], limit: int | None = MAX_QUESTION
) -> list[tuple[str, str | None]]:
    """The turns as a list. Raises InputError unless each has a question of at most `limit` characters and an
    answer, which may be None in the last."""
    turns = turns if isinstance(turns, list | tuple) else ()
    pairs = [tuple(turn) if isinstance(turn, list | tuple) else () for turn in turns]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError("A sample needs at least one question; turns are pairs (question, answer).")
    for i, (question, answer) in enumerate(pairs):
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"The question is {question!r}; write at least one word.")
        if limit is not None and len(question) > limit:
            raise InputError(
                f"The question has {len(question)} characters; the limit is {limit}. Shorten it, "
                "or ask several questions."
            )
        if not isinstance(answer, str) and not (answer is None and i == len(pairs) - 1):
            raise InputError(f"The answer to {question!r:.60} is {answer!r:.60}; only the last may be None.")
        for text in (question, answer or ""):
            if re.search("[\ud800-\udfff]", text):
                raise InputError(f"The text {text!r:.60} holds half a character (a surrogate); remove it.")
    return pairs
