"""What was built, in numbers: by split, type, kind, modality and class, and how long the answers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from medplib.data.builder.pairs import Pair


class Statistics:
    """Counts rows as they are written; `to_dict` is plain data, `table` is for a terminal."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str]] = Counter()
        self.turns: Counter[tuple[str, str]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.modalities: Counter[tuple[str, str]] = Counter()
        self.classes: Counter[tuple[str, str]] = Counter()
        self.lengths: dict[str, Counter[int]] = {}
        self.questions: Counter[str] = Counter()
        self.answers: set[str] = set()

    def add(
        self, split: str, task: str, modality: str, pairs: Sequence[Pair], answers: Sequence[str]
    ) -> None:
        """One row: its pairs, and their answers as they are written."""
        self.rows[task, split] += 1
        self.modalities[modality, split] += 1
        for pair, answer in zip(pairs, answers, strict=True):
            self.turns[task, split] += 1
            self.kinds[pair.kind] += 1
            self.questions[pair.question] += 1
            self.answers.add(answer)
            self.lengths.setdefault(task, Counter())[len(answer.split())] += 1
            if pair.masks or pair.regions:
                self.classes.update((name, split) for name in pair.names)

    def to_dict(self) -> dict[str, Any]:
        """Everything, sorted, as JSON takes it."""
        return {
            "rows": _nested(self.rows),
            "turns": _nested(self.turns),
            "kinds": dict(sorted(self.kinds.items())),
            "rows by modality": _nested(self.modalities),
            "turns by class drawn or pointed at": _nested(self.classes),
            "answer length in words": {task: _summary(c) for task, c in sorted(self.lengths.items())},
            "different questions": len(self.questions),
            "different answers": len(self.answers),
            "negative share of grounding turns": self._negatives(),
        }

    def _negatives(self) -> float:
        all_turns = sum(n for (task, _), n in self.turns.items() if task == "grounding")
        return round(self.kinds["absent"] / all_turns, 4) if all_turns else 0.0

    def table(self) -> Any:
        """A rich Table: type, modality and class against train and test."""
        from rich.table import Table

        table = Table(
            "", "train", "test", title="turns by type, rows by modality, masks and regions by class"
        )
        for title, counts in (("type", self.turns), ("modality", self.modalities), ("class", self.classes)):
            for name, by_split in _nested(counts).items():
                table.add_row(f"{title}: {name}", *(str(by_split.get(s, 0)) for s in ("train", "test")))
            table.add_section()
        return table


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for (name, split), number in sorted(counts.items()):
        out.setdefault(name, {})[split] = number
    return out


def _summary(lengths: Counter[int]) -> dict[str, float]:
    words = sorted(lengths.elements())
    return {
        "mean": round(sum(words) / len(words), 2),
        "median": words[len(words) // 2],
        "least": words[0],
        "most": words[-1],
    }
