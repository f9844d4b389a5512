"""Answers in words against what is right: exact, by shared words, yes or no, which choice.

These are this package's own; the published ones, flaws included, are in `official.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def normalize(text: str) -> str:
    """Lower case, no control tokens, punctuation or articles, number words up to ten as digits, one space
    between words. A point or comma between digits stays, an apostrophe is left out."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"</?(seg|ref|region|mask|sr)>", " ", text)
    text = re.sub(r"['’]", "", text)
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_", " ", text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of words, each counted at most as often as in both; as in SQuAD.

    Two texts without words agree. Rajpurkar et al., 2016, with `normalize`.
    """
    ours, theirs = (Counter(normalize(text).split()) for text in (answer, reference))
    if not ours or not theirs:
        return (float(ours == theirs),) * 3
    shared = (ours & theirs).total()
    precision, recall = shared / ours.total(), shared / theirs.total()
    return precision, recall, 2 * precision * recall / (precision + recall) if shared else 0.0


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no" as the answer begins, or as the only one of the two in it; None for neither or both."""
    words = normalize(text).split()
    said = [word for word in words if word in ("yes", "no")]
    if said and (words[0] == said[0] or len(set(said)) == 1):
        return said[0]
    return None


def agrees(answer: str, reference: str) -> bool:
    """Whether an answer to a closed question is right: the same yes or no, where the reference begins with
    one, else the same words."""
    wanted = normalize(reference)
    if wanted.split()[:1] in (["yes"], ["no"]):
        return yes_or_no(answer) == wanted.split()[0]
    return normalize(answer) == wanted


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer means; None where it names none, or several.

    By equal words, else by its letter ("B", "(B)", "B: the liver"), else by the only choice whose words stand
    in the answer; a choice that is part of a longer one that stands there does not count.
    """
    words, options = normalize(answer), [normalize(choice) for choice in choices]
    for said, offered in ((answer.strip().lower(), [c.strip().lower() for c in choices]), (words, options)):
        if said and said in offered:
            return offered.index(said) if offered.count(said) == 1 else None
    letter = re.match(r"\s*\(?([A-Za-z])(?:[).:]|\s*$)", answer)
    if letter and (number := ord(letter[1].upper()) - ord("A")) < len(choices):
        return number
    inside = [i for i, option in enumerate(options) if option and _within(option, words)]
    longest = [i for i in inside if not any(j != i and _within(options[i], options[j]) for j in inside)]
    return longest[0] if len(longest) == 1 else None


def _within(words: str, text: str) -> bool:
    return f" {words} " in f" {text} "
