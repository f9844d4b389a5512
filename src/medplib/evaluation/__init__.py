"""Measuring a model: `evaluate` on any labelled records, `compare` of two, metrics, the model card.

Names load on first use.
"""

from importlib import import_module

_WHERE = {
    "Report": "report",
    "compare": "paired",
    "evaluate": "run",
    "load_report": "run",
}

__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
