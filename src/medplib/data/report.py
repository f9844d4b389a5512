"""ReadReport: what a reader repaired, dropped or did not know, counted, with the first examples."""

from __future__ import annotations

from typing import Any

ACTIONS = ("repaired", "dropped", "unknown")
EXAMPLES = 5


class ReadReport:
    """Counts by action and kind: `report.counts["dropped"]["mask missing"]`; the first examples beside them.

    repaired  the record is there, and right
    dropped   the row gives no record
    unknown   the record is there, with something left out that was not understood
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {action: {} for action in ACTIONS}
        self.examples: dict[tuple[str, str], list[str]] = {}

    def add(self, action: str, kind: str, example: str, count: int = 1) -> None:
        """Count something that happened."""
        self.counts[action][kind] = self.counts[action].get(kind, 0) + count
        shown = self.examples.setdefault((action, kind), [])
        if len(shown) < EXAMPLES:
            shown.append(example[:200])

    def total(self, action: str) -> int:
        """How many, of all kinds."""
        return sum(self.counts[action].values())

    def merged(self, other: ReadReport) -> ReadReport:
        """This and the other, as a new report."""
        both = ReadReport()
        for report in (self, other):
            for (action, kind), examples in report.examples.items():
                for example in examples:
                    both.add(action, kind, example, 0)
                both.counts[action][kind] += report.counts[action][kind]
        return both

    def as_dict(self) -> dict[str, Any]:
        """{action: {kind: {"count": n, "examples": [...]}}}, ready for JSON."""
        return {
            action: {
                kind: {"count": count, "examples": self.examples[action, kind]}
                for kind, count in kinds.items()
            }
            for action, kinds in self.counts.items()
        }

    def __bool__(self) -> bool:
        return bool(self.examples)

    def __str__(self) -> str:
        lines = [
            f"{action} {count:>8}  {kind}, as in {self.examples[action, kind][0]}"
            for action, kinds in self.counts.items()
            for kind, count in kinds.items()
        ]
        return "\n".join(lines) or "nothing to repair"
