"""AnswerWriter: who words an answer whose facts are settled; and the check that no writer may escape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

MAX_ANSWER = 1200  # characters
_TOKEN = re.compile(r"</?[A-Za-z_][\w-]*>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NOT = re.compile(r"\b(no|not|none|nothing|neither|without|absent|free)\b|n't\b", re.IGNORECASE)
_ROLE = re.compile(r"\b(USER|ASSISTANT|SYSTEM):")


class AnswerWriter(Protocol):
    """Words answers. `facts` are plain data about the image without anything that says whose it is, `draft`
    is a correct answer; what comes back goes through `check_answer`. A writer may have `concurrency`, the
    number of calls it takes at a time (1 without)."""

    def write(self, facts: Mapping[str, Any], question: str, draft: str) -> str:
        """An answer that says what the draft says."""


class TemplateWriter:
    """The draft as it is: deterministic, free, offline."""

    concurrency = 1

    def write(self, facts: Mapping[str, Any], question: str, draft: str) -> str:
        """The draft."""
        return draft


def check_answer(answer: str, question: str, draft: str) -> str | None:
    """None if the answer may replace the draft, else why not, in a word or two for the report.

    It must hold the draft's control tokens in the draft's order and no other, no numbers that stand in
    neither draft nor question, the draft's "yes" or "no" at its start and its negation, and no turn of a
    conversation.
    """
    if not isinstance(answer, str) or not answer.strip():
        return "empty"
    if len(answer) > MAX_ANSWER:
        return "too long"
    if _TOKEN.findall(answer) != _TOKEN.findall(draft):
        return "control tokens"
    if _labels(answer) != _labels(draft):
        return "names"
    if not set(_NUMBER.findall(answer)) <= set(_NUMBER.findall(draft)) | set(_NUMBER.findall(question)):
        return "invented numbers"
    if set(_NUMBER.findall(draft)) - set(_NUMBER.findall(answer)):
        return "lost numbers"
    start = re.match(r"(yes|no)\b", draft, re.IGNORECASE)
    if start and not re.match(rf"{start[1]}\b", answer.strip(), re.IGNORECASE):
        return "yes or no"
    if _NOT.search(draft) and not _NOT.search(answer):
        return "lost negation"
    if _ROLE.search(answer):
        return "a role"
    return None


def _labels(text: str) -> list[str]:
    return [found.strip().lower() for found in re.findall(r"<ref>(.*?)</ref>", text, re.DOTALL)]
