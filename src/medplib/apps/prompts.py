"""The prompts of the command line: options that take several numbers and keep their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from medplib.apps.terminal import errors_in_one_line
from medplib.errors import InputError

# option -> names of its values
_PROMPTS = {
    "--box": ("x0", "y0", "x1", "y1"),
    "--point": ("x", "y"),
    "--background-point": ("x", "y"),
    "--mask": ("file",),
}


class PromptCommand(TyperCommand):
    """A command whose prompts keep their order and take their numbers as separate words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, prompts = _join_prompts(args)
        with errors_in_one_line():  # here: with a number too few the words after it are taken for the prompt
            for option, value in prompts:
                if option != "--mask":
                    _numbers(option, value)
        ctx.meta["medplib.prompts"] = prompts
        return super().parse_args(ctx, joined)


def _join_prompts(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`--box 1 2 3 4` -> `--box=1 2 3 4`, and all (option, value) in their order. Ends at `--`."""
    joined: list[str] = []
    prompts: list[tuple[str, str]] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest], prompts
        option, equals, value = word.partition("=")
        if option not in _PROMPTS:
            joined.append(word)
            continue
        values = [value] if equals else []
        while len(values) < len(_PROMPTS[option]) and rest and not _is_option(rest[0]):
            if equals and re.search(r"[\s,]", value):
                break  # `--box=1,2,3,4` is complete
            values.append(rest.pop(0))
        prompts.append((option, " ".join(values)))
        joined.append(f"{option}={prompts[-1][1]}")
    return joined, prompts


def _is_option(word: str) -> bool:
    return bool(re.match(r"--|-[A-Za-z]", word)) and not re.fullmatch(r"-(inf|nan)\w*", word, re.IGNORECASE)


def make_prompts(given: Sequence[tuple[str, str]], size: tuple[int, int]) -> list[Any]:
    """(option, value) pairs -> checked Point, Box and Mask objects, in the same order."""
    from medplib.prompts.types import Box, Mask, Point

    prompts: list[Any] = []
    for option, value in given:
        if option == "--mask":
            if not value:
                raise InputError("--mask needs the path of an image file.")
            prompt: Any = Mask(value)
            prompts.append(Mask(prompt.to_mask(size)))  # read once, here
            continue
        numbers = _numbers(option, value)
        prompt = Box(*numbers) if option == "--box" else Point(*numbers, label=int(option == "--point"))
        prompt.check(size)
        prompts.append(prompt)
    return prompts


def _numbers(option: str, value: str) -> list[float]:
    names = _PROMPTS[option]
    try:
        numbers = [float(word) for word in re.split(r"[\s,]+", value.strip())]
    except ValueError:
        numbers = []
    if len(numbers) != len(names):
        raise InputError(f"{option} needs {len(names)} numbers, {' '.join(names)} in pixels, got {value!r}.")
    return numbers
