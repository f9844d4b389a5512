"""What a configuration may hold: plain values that load no code and fetch nothing, numbers of real models."""

from __future__ import annotations

import math
import re
from typing import Any

from medplib.errors import InputError

# A configuration beyond these limits is damaged or hostile; building it would take minutes or all memory.
MAX_SIDE = 4096  # pixels of a network square
MAX_COUNT = 1024  # layers, blocks, stages, experts
MAX_EXPERTS = 256
MAX_SIZE = 1 << 24  # any other number: a width, a vocabulary, a context length

_COUNT_NAMES = re.compile(r"layers|depth|blocks|stages|upscales|experts")
_WORD = re.compile(r"[A-Za-z0-9_]{1,40}")


def check_plain(where: str, value: Any, limit: int | None = MAX_SIZE, depth: int = 0) -> None:
    """Refuse what could load code or fetch something, and numbers that no model has. Raises InputError."""
    name = where.rsplit(".", 1)[-1]
    is_count = bool(_COUNT_NAMES.search(name))
    if depth > 8:
        raise InputError(f"{where:.80} is nested too deeply.")
    if name == "auto_map" or (name.endswith("_implementation") and not _is_word(value)):
        raise InputError(f"{where} may not name code from elsewhere, got {value!r:.80}; remove it.")
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(f"{where}.{key}", item, limit, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(where, item, limit, depth + 1)
        if is_count and limit and sum(item for item in value if isinstance(item, int)) > MAX_COUNT:
            raise InputError(f"{where} adds up to more than {MAX_COUNT}: {value!r:.80}.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = MAX_COUNT if is_count else limit
        if most is not None and not -most <= value <= most:  # NaN, too
            raise InputError(f"{where} must be a number between {-most} and {most}, got {value!r:.80}.")


def _is_word(value: Any) -> bool:
    words = value.values() if isinstance(value, dict) else [value]
    return all(word is None or (isinstance(word, str) and _WORD.fullmatch(word)) for word in words)


def check_square(where: str, part: Any) -> None:
    """Refuse a side, a mean or a std that no picture can be brought to. Raises InputError."""
    if not 8 <= part.image_size <= MAX_SIDE:
        raise InputError(
            f"{where}.image_size must be between 8 and {MAX_SIDE} pixels, got {part.image_size}."
        )
    for name in ("mean", "std"):
        values = getattr(part, name)
        if len(values) != 3 or not all(math.isfinite(v) and (name == "mean" or v > 0) for v in values):
            raise InputError(f"{where}.{name} must be three finite numbers (std above 0), got {values}.")


def check_weight(where: str, value: float) -> None:
    """Refuse a weight of a loss that is negative, NaN or infinite. Raises InputError."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{where} must be a finite number of at least 0, got {value}.")
