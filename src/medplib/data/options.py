"""check_options: options by name, as a recipe or a command line gives them, held against a signature."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

from medplib.errors import InputError

_KINDS = {bool: bool, int: Integral, float: Real, types.NoneType: types.NoneType}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    os.PathLike: "a path",
    types.NoneType: "null",
}


def check_options(function: Callable, options: Mapping[str, Any], what: str) -> None:
    """Hold options against the keyword-only parameters of a function or class, and their annotations.

    what: who takes them, as messages begin. A list may stand for a tuple. Annotations that cannot be read at
    run time are not checked. Raises InputError, naming the option, its value and what would have worked.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # an annotation that only type checkers know
        signature = inspect.signature(function)
    known = {p.name: p.annotation for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{what} has no option {option!r}. Known: {', '.join(known) or 'none'}.")
        if not _fits(value, known[option]):
            raise InputError(f"{what}: {option} must be {_words(known[option])}, got {value!r:.80}.")


def _fits(value: Any, wanted: Any) -> bool:
    origin, inner = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in inner)
    if not isinstance(origin, type) or origin is inspect.Parameter.empty:
        return True
    if origin is tuple:
        same = isinstance(value, list | tuple) and len(value) == len(inner)
        return same and all(map(_fits, value, inner))
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(part, kind) for item in value.items() for part, kind in zip(item, inner, strict=False)
        )
    if issubclass(origin, Collection) and inner:
        many = isinstance(value, origin) and not isinstance(value, str | bytes | Mapping)
        return many and all(_fits(part, inner[0]) for part in value)
    return isinstance(value, _KINDS.get(origin, origin)) and (origin is bool or not isinstance(value, bool))


def _words(wanted: Any) -> str:
    origin, inner = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, inner))
    if origin is tuple:
        return f"a list of {len(inner)} values (each {_words(inner[0])})"
    if issubclass(origin, Mapping):
        return f"a table of names (each with {_words(inner[-1])})" if inner else "a table"
    if issubclass(origin, Collection) and inner:
        return f"a list (each item {_words(inner[0])})"
    return _WORDS.get(origin, origin.__name__)
