"""AnswerWriter: who words an answer whose facts are settled; and the check that no writer may escape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

MAX_ANSWER = 1200  # characters
_TOKEN = re.compile(r"</?[A-Za-z_][\w-]*>")
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COUNTED = {"single": "1"} | {word: str(number) for number, word in enumerate(_COUNTS, 1)}
_NUMBER = re.compile(rf"\d+(?:\.\d+)?|\b(?:{'|'.join(_COUNTED)})\b", re.IGNORECASE)
_NOT = re.compile(
    r"\b(no|not|none|nothing|neither|nor|never|cannot|without|absent|free|lacks?|lacking|missing)\b|n['’]t\b",
    re.IGNORECASE,
)
_KEPT = re.compile(  # words that decide where something is, or whether it is a finding
    r"\b(left|right|upper|lower|middle|center|centre|central|above|below|inside|outside|top|bottom|less|more"
    r"|superior|inferior|anterior|posterior|finding|anatomy|normal|abnormal|healthy)\b",
    re.IGNORECASE,
)
_START = re.compile(r"^(yes|no)\b")
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


def check_answer(
    answer: str, question: str, draft: str, names: Iterable[str], others: Iterable[str] = ()
) -> str | None:
    """None if the answer may replace the draft, else why not, in a word or two for the report.

    names   what the question is about: those in the draft must stand in the answer, in the same order
    others  further names, such as the data set's other structures: only those in the draft may stand in it

    It must hold the draft's control tokens and its words of place and finding (_KEPT) in the draft's order
    and no other, its numbers (in digits or words) and none that stand in neither draft nor question, its
    "yes" or "no" at the start, negation only where the draft has it, and no turn of a conversation.
    """
    if not isinstance(answer, str) or not answer.strip():
        return "empty"
    if len(answer) > MAX_ANSWER:
        return "too long"
    if _TOKEN.findall(answer) != _TOKEN.findall(draft):
        return "control tokens"
    about = {_plain(name) for name in names}
    named = _any_of(about.union(map(_plain, others)))
    if _labels(answer) != _labels(draft) or not _same_names(answer, draft, named, about):
        return "names"
    said, right = (_START.findall(_plain(text)) for text in (answer, draft))
    if said != right and (right or said == ["no"]):
        return "yes or no"
    if _ROLE.search(answer):
        return "a role"
    return _compare(*(named.sub(" ", _START.sub("", _plain(text))) for text in (answer, question, draft)))


def _compare(answer: str, question: str, draft: str) -> str | None:
    """What is wrong with an answer, all three without names and without a "yes" or "no" at the start."""
    said, asked, right = (_numbers(text) for text in (answer, question, draft))
    if said - right - asked:
        return "invented numbers"
    if right - said:
        return "lost numbers"
    if _KEPT.findall(answer) != _KEPT.findall(draft):
        return "place or finding"
    if bool(_NOT.search(answer)) != bool(_NOT.search(draft)):
        return "lost negation" if _NOT.search(draft) else "added negation"
    return None


def _same_names(answer: str, draft: str, named: re.Pattern[str], about: set[str]) -> bool:
    """Whether the draft's names stand in the answer in the order of the draft, and no more but of `about`."""
    said, right = (list(dict.fromkeys(named.findall(_plain(text)))) for text in (answer, draft))
    return [name for name in said if name in right] == right and about.issuperset(set(said) - set(right))


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds whole names and their plurals, of several that begin alike the longest."""
    longest_first = "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True)))
    return re.compile(rf"(?<!\w)(?:{longest_first})s?(?!\w)" if longest_first else r"(?!)")


def _plain(text: str) -> str:
    """In lower case, with single spaces."""
    return " ".join(text.lower().split())


def _numbers(text: str) -> set[str]:
    return {_COUNTED.get(number.lower(), number) for number in _NUMBER.findall(text)}


def _labels(text: str) -> list[str]:
    return [found.strip().lower() for found in re.findall(r"<ref>(.*?)</ref>", text, re.DOTALL)]
