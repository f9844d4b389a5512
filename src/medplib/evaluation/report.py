"""Report: the rows of an evaluation in figures, with their uncertainty, as tables and plain values.

A figure is a mean over masks or questions. Its interval is a percentile bootstrap over cases (patients,
volumes), since slices of one case are no independent evidence: Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; whole clusters drawn, Davison & Hinkley, Bootstrap Methods, 1997, section 3.8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from medplib.errors import InputError
from medplib.evaluation.official import text_metrics
from medplib.evaluation.published import GROUNDING_DICE
from medplib.results import NOTICE

TASKS = ("grounding", "absent", "region", "vqa")
FIGURES = {
    "dice": "mean Dice over the masks asked for, 0 where none was drawn",
    "iou": "mean IoU, likewise",
    "volume": "mean Dice of a case's structures, over all slices of each that were asked about together",
    "drawn": "share of the masks asked for that were drawn",
    "extra": "masks drawn beyond those asked for, per question",
    "right": "share of right answers: the same yes or no, the choice meant, else the same words",
    "exact": "share of answers in the same words",
    "recall": "share of the reference's words that the answer holds",
    "f1": "F1 of the words of both",
    "silent": "share of the questions to which, rightly, no mask was drawn",
}
_FIGURES_OF = {"closed": ("right",), "choice": ("right",), "open": ("exact", "recall", "f1")}
GROUPS = ("source", "dataset", "split", "modality", "structure", "case")
_DRAWS = 1000


class Estimate(NamedTuple):
    """A mean over n values of `cases` cases, and its 95 % interval (None with a single case)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    cases: int

    def __str__(self) -> str:
        between = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.mean:.3f}{between}"


class Line(NamedTuple):
    """A line of the report: a figure of one task and type of answer, over all rows or a group of them."""

    task: str
    type: str
    figure: str
    group: str
    value: Estimate


class Report:
    """The rows of an evaluation (see `scoring.score`), and the settings they were made with.

    rows: one per question; one that could not be answered has "error" in place of figures.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        self.settings = dict(settings)
        self.errors = [row for row in rows if "error" in row]
        self.rows = [row for row in rows if "error" not in row]
        self._lines: dict[str | None, list[Line]] = {}

    def lines(self, by: str | None = None) -> list[Line]:
        """All figures there are, in the order of the tasks; `by` one of GROUPS, a line per value of it.

        Raises InputError for another group.
        """
        if by is not None and by not in GROUPS:
            raise InputError(f"by must be one of {', '.join(GROUPS)}, or None; got {by!r}.")
        if by not in self._lines:
            self._lines[by] = self._estimates(by)
        return list(self._lines[by])

    def _estimates(self, by: str | None) -> list[Line]:
        found: dict[tuple, list[tuple[float, Any]]] = defaultdict(list)
        for entry in self.entries():
            group = "all" if by is None else entry[by] or "unknown"
            found[entry["task"], entry["type"], entry["figure"], group].append(
                (entry["value"], entry["cluster"])
            )
        return [Line(*key, estimate(*zip(*found[key], strict=True))) for key in in_order(found)]

    def official_text(self) -> dict[str, float]:
        """The published table of text metrics in percent, over the answers in words; see official.py."""
        said = [row for row in self.rows if row["task"] in ("region", "vqa")]
        return text_metrics(
            [{"gt": r["reference"], "text": r["answer"], "answer_type": r["type"]} for r in said]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        lines = [("all", line) for line in self.lines()]
        for by in ("modality", "structure", "dataset"):
            lines += [(by, line) for line in self.lines(by)]
        figures = [{"by": by, **dict(zip(Line._fields[:-1], line, strict=False)), **line.value._asdict()}
                   for by, line in lines]  # fmt: skip
        official = {"official_text": self.official_text()} if self._official else {}
        counts = {"questions": len(self.rows) + len(self.errors), "errors": len(self.errors)}
        return {"notice": NOTICE, "settings": self.settings, **counts, "figures": figures, **official}

    def markdown(self) -> str:
        """The report as a page."""
        model, data = self.settings["model"], self.settings["data"]
        about = [["model", model["name"]], ["weights sha256", model.get("weights_sha256", "")]]
        about += [[name, value] for name, value in data.items()]
        about.append(["protocol", self.settings["protocol"]])
        for name in ("options", "versions"):
            told = ", ".join(f"{key} {value}" for key, value in self.settings[name].items())
            about.append([name, told or "none"])
        pages = [f"# Evaluation\n\n{NOTICE}", _table(["", ""], about)]
        if self.errors:
            first = self.errors[0]
            pages.append(
                f"**{len(self.errors)} questions could not be asked and are in no figure.** "
                f"The first, {first['id']}: {first['error']}"
            )
        pages += _tables(self.lines(), "all")
        for by in ("modality", "dataset", "structure"):
            lines = self.lines(by)
            if len({line.group for line in lines}) > 1:
                pages += _tables(lines, by)
        if self._official:
            pages += self._published()
        shown = {line.figure for line in self.lines()}
        pages.append("\n".join(f"- {name}: {told}" for name, told in FIGURES.items() if name in shown))
        pages.append(
            "In brackets: 95 %, percentile bootstrap over cases, drawn whole; a row whose case is not known "
            "counts as one. A single case gives no interval."
        )
        return "\n\n".join(pages) + "\n"

    @property
    def _official(self) -> bool:
        return self.settings.get("protocol") == "official"

    def _published(self) -> Iterator[str]:
        """Our figures under the published protocol beside the published ones."""
        if any(row["task"] in ("region", "vqa") for row in self.rows):
            text = self.official_text()
            yield "## The published text metrics, in percent"
            yield _table(["metric", "here"], [[name, f"{value:.2f}"] for name, value in text.items()])
        for split, table in GROUNDING_DICE.items():
            rows = [r for r in self.rows if r["source"] == "mecovqa" and r["split"] == split and "masks" in r]
            if rows:
                part = Report(rows, self.settings)
                ours = {line.group: line.value for line in part.lines("modality") if line.figure == "dice"}
                ours["all"] = next(line.value for line in part.lines() if line.figure == "dice")
                names = [*(set(ours) - set(table)), *table]
                yield f"## mDice on MeCoVQA's {split} images, beside the paper's"
                yield _table(
                    ["modality", "here", "n", "paper"],
                    [
                        [n, *((f"{100 * ours[n].mean:.2f}", ours[n].n) if n in ours else ("", "")),
                         f"{table[n]:.2f}" if n in table else ""]
                        for n in names
                    ],
                )  # fmt: skip

    def entries(self) -> Iterator[dict[str, Any]]:
        """A dict per value: its figure, whose it is ("key", the same in another evaluation of the same
        questions), its case ("cluster"), and what it can be grouped by."""
        volumes: dict[tuple, list[tuple[dict[str, Any], list[int]]]] = defaultdict(list)
        for row in self.rows:
            about = {name: row.get(name) for name in ("source", "dataset", "split", "modality", "case")}
            about |= {"task": row["task"], "type": "", "structure": "", "key": row["id"]}
            about["cluster"] = (row["source"], row["case"]) if row["case"] else row["id"]
            if row["task"] == "grounding":
                for i, mask in enumerate(row["masks"]):
                    of_mask = about | {"structure": mask["name"], "key": f"{row['id']}/{i}"}
                    yield from (of_mask | {"figure": f, "value": mask[f]} for f in ("dice", "iou", "drawn"))
                    if row["case"] and mask["name"] and "pixels" in mask:
                        volumes[row["source"], row["case"], mask["name"]].append((of_mask, mask["pixels"]))
                yield about | {"figure": "extra", "value": max(0, row["drawn"] - len(row["masks"]))}
                continue
            if row["task"] != "absent":
                about["type"] = row["type"]
                yield from (about | {"figure": f, "value": row[f]} for f in _FIGURES_OF[row["type"]])
            yield about | {"figure": "silent", "value": not row["drawn"]}
        for key, slices in volumes.items():
            if len({of_mask["key"].partition("/")[0] for of_mask, _ in slices}) > 1:
                both, drawn, right = np.sum([pixels for _, pixels in slices], axis=0).tolist()
                value = 2 * both / (drawn + right) if drawn + right else 1.0
                yield slices[0][0] | {"figure": "volume", "key": "/".join(key), "value": value}

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} questions, {len(self.errors)} errors)"

    def __str__(self) -> str:
        lines = [
            f"{' '.join(filter(None, line[:3])):<24} {line.value}  n={line.value.n}" for line in self.lines()
        ]
        if self.errors:
            first = self.errors[0]
            lines.append(
                f"{len(self.errors)} questions could not be asked. The first, {first['id']}: {first['error']}"
            )
        return "\n".join(lines)


def in_order(keys: Iterable[tuple]) -> list[tuple]:
    """(task, type, figure, ...) keys by task and type, the figures as they are listed above."""
    figures = list(FIGURES)
    return sorted(keys, key=lambda k: (TASKS.index(k[0]), k[1], figures.index(k[2]), k[3:]))


def estimate(values: Sequence[float], clusters: Sequence[Any], seed: int = 0) -> Estimate:
    """The mean of `values` with the 95 % interval of a percentile bootstrap over `clusters`, drawn whole."""
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    at = np.array([numbers[cluster] for cluster in clusters])
    sums = np.bincount(at, np.asarray(values, float), len(numbers))
    counts = np.bincount(at, minlength=len(numbers))
    mean = float(sums.sum() / counts.sum())
    if len(numbers) == 1:
        return Estimate(mean, None, None, len(values), 1)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(numbers), size=len(numbers)) for _ in range(_DRAWS))
    means = [sums[chosen].sum() / counts[chosen].sum() for chosen in drawn]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, float(low), float(high), len(values), len(numbers))


def _tables(lines: Sequence[Line], by: str) -> Iterator[str]:
    """A table per task and type of answer: a row per group, a column per figure; n is that of the first."""
    kinds: dict[str, dict[str, dict[str, Estimate]]] = {}
    for line in lines:
        if by != "structure" or (line.task == "grounding" and line.figure != "extra"):
            kind = kinds.setdefault(f"{line.task} {line.type}".strip(), {})
            kind.setdefault(line.group, {})[line.figure] = line.value
    for kind, groups in kinds.items():
        figures = [name for name in FIGURES if any(name in found for found in groups.values())]
        rows = []
        for group, found in groups.items():
            first = found[figures[0]]
            rows.append([group, *(found.get(name, "") for name in figures), first.n, first.cases])
        yield f"## {kind[0].upper()}{kind[1:]}".replace("Vqa", "VQA") + ("" if by == "all" else f", by {by}")
        yield _table([by, *figures, "n", "cases"], rows)


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
