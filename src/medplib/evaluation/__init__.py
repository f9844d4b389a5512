"""Measuring a model: `evaluate` on any labelled records, `compare` of two, metrics, the model card.

Names load on first use.
"""

from medplib.lazy import lazily

_WHERE = {
    "Report": "report",
    "compare": "paired",
    "evaluate": "run",
    "load_report": "run",
}

__all__ = list(_WHERE)
__getattr__, __dir__ = lazily(__name__, _WHERE)
