"""compare: two evaluations of the same questions, figure by figure, the difference with its uncertainty."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from medplib.errors import InputError
from medplib.evaluation.report import Estimate, Report, estimate, in_order


class Difference(NamedTuple):
    """A figure in two evaluations: means over what both answered, and second minus first, each pair taken
    together, with the interval of a bootstrap over cases."""

    task: str
    type: str
    figure: str
    first: float
    second: float
    difference: Estimate


def compare(first: Report, second: Report) -> list[Difference]:
    """All figures of both, in the order of the tasks, over the questions that both answered.

    An interval of the difference without 0 says that more of the same cases would hardly turn it round; with
    many figures looked at, one in twenty does so by chance. Raises InputError for evaluations of different
    records or protocols.
    """
    for name, of in (("records", _fingerprint), ("protocol", lambda r: r.settings.get("protocol"))):
        if of(first) != of(second):
            raise InputError(
                f"The two evaluations have different {name} ({of(first)} and {of(second)}); compare two of "
                "the same data set, read with the same options, and of the same protocol."
            )
    values = [
        {(e["task"], e["type"], e["figure"], e["key"]): e for e in r.entries()} for r in (first, second)
    ]
    pairs: dict[tuple[str, str, str], list[tuple[float, float, Any]]] = defaultdict(list)
    for key in (key for key in values[0] if key in values[1]):
        one, other = (float(found[key]["value"]) for found in values)
        pairs[key[:3]].append((one, other, values[0][key]["cluster"]))
    if not pairs:
        raise InputError("The two evaluations have no question in common; finish both first.")
    out = []
    for key in in_order(pairs):
        ones, others, clusters = zip(*pairs[key], strict=True)
        change = estimate([b - a for a, b in zip(ones, others, strict=True)], clusters)
        out.append(Difference(*key, sum(ones) / len(ones), sum(others) / len(others), change))
    return out


def _fingerprint(report: Report) -> Any:
    return report.settings.get("data", {}).get("fingerprint")
