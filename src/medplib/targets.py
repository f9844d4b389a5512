"""Names of structures, and plain requests for them in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medplib.errors import InputError


def named(target: str | Sequence[str]) -> list[str]:
    """Names of structures, each with its article. Raises InputError for anything else."""
    names = [target] if isinstance(target, str) else target
    if (
        not isinstance(names, list | tuple)
        or not names
        or not all(isinstance(n, str) and n.strip() for n in names)
    ):
        raise InputError(f"Name what to segment, for example 'the right lung'; got {target!r}.")
    names = [n.strip().rstrip(".") for n in names]
    return [n if n.lower().startswith(("the ", "a ", "an ", "all ")) else f"the {n}" for n in names]


def without_article(name: str) -> str:
    """ "the right lung" -> "right lung"."""
    return re.sub(r"^(the|an?)\s+(?=\S)", "", name, flags=re.IGNORECASE)


def request(names: Sequence[str]) -> str:
    """ "Segment the right lung and the left lung." """
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return f"Segment {listed}."


def target_of(question: str) -> str:
    """What a plain request asks for: "Please segment the right lung." -> "right lung"; "" when it is none."""
    words = question.strip().rstrip(".?!")
    for verb in ("segment", "outline", "delineate", "draw", "mark"):
        found = re.search(rf"\b{verb}\s+(.{{1,60}})$", words, re.IGNORECASE)
        if found:
            return without_article(found[1].strip())
    return ""
