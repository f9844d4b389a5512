"""evaluate: ask a model every question of a data set, score the answers, keep them, go on where it stopped.

In the folder of an evaluation: settings.json (what is evaluated), results.jsonl (a row per question, see
`scoring.score`), and at the end report.json and report.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medplib.data.record import Record
from medplib.data.recordset import fingerprint
from medplib.errors import InputError, check_whole
from medplib.evaluation.report import Report
from medplib.evaluation.scoring import Question, check_protocol, questions_of, score
from medplib.io.folder import write_together
from medplib.io.json_lines import append_line, read_lines
from medplib.results import versions

SETTINGS, RESULTS = "settings.json", "results.jsonl"
REPORTS = ("report.json", "report.md")


def evaluate(
    model: Any,
    records: Sequence[Record],
    out: str | os.PathLike | None = None,
    *,
    protocol: str = "medplib",
    limit: int | None = None,
    batch_size: int = 4,
    progress: Callable[[Any], Any] = iter,
    **options: Any,
) -> Report:
    """The figures of a model on labelled records: every turn is a question, after the turns before it with
    their right answers.

        report = evaluate(model, read("mecovqa", "MeCoVQA", split="test"), "evaluation/")
        print(report)

    model     a MedPLIB, or anything with `answer(samples, **options) -> [Answer]`
    out       a folder to keep the answers in; the same call goes on there where it was stopped
    protocol  "medplib", or "official": drawn and scored as the published evaluation does, see
              docs/official_quirks.md
    limit     so many records, evenly from first to last; None takes all
    options   for `MedPLIB.answer`, such as max_new_tokens

    A question whose files cannot be read, or that the model refuses, becomes a row with "error", which is
    counted and in no figure; take its line out of results.jsonl to have it asked again. Raises InputError
    for a setting that cannot be used, for no records, and for an `out` that holds another evaluation.
    """
    check_protocol(protocol)
    check_whole(batch_size=batch_size, **({} if limit is None else {"limit": limit}))
    if not len(records):
        raise InputError("There are no records to evaluate on.")
    from medplib.answering import AnsweringMixin

    if not hasattr(model, "answer"):
        raise InputError(f"{str(model)[:80]!r} cannot answer; give a model, MedPLIB.from_pretrained(...).")
    if isinstance(model, AnsweringMixin) and model.training:
        raise InputError("The model is in training mode; call model.eval() before evaluating it.")
    if protocol == "official":
        options = {"compat": "official"} | options
    settings = _settings(model, records, protocol, limit, options)
    folder = None if out is None else Path(out).expanduser()
    done = {} if folder is None else _open(folder, settings)
    numbers = range(len(records)) if limit is None else _evenly(len(records), limit)
    rows = list(done.values())
    for row in _asked(model, records, progress(numbers), done, protocol, batch_size, options):
        rows.append(row)
        if folder is not None:
            append_line(folder / RESULTS, json.dumps(row))
    report = Report(sorted(rows, key=_place), settings)
    if folder is not None:
        write_report(report, folder)
    return report


def load_report(folder: str | os.PathLike) -> Report:
    """The report of the answers that an `evaluate` left in a folder, finished or not. Raises InputError."""
    path = Path(folder).expanduser()
    settings = _read_settings(path)
    return Report(sorted(read_lines(path / RESULTS).values(), key=_place), settings)


def write_report(report: Report, folder: Path) -> None:
    """report.json and report.md, both or neither. Raises MedPLIBError where that cannot be."""
    text = json.dumps(report.to_dict(), indent=1) + "\n"
    pages = (text.encode(), report.markdown().encode())
    write_together(folder, dict(zip(REPORTS, pages, strict=True)), lambda path: path.name in REPORTS)


def _settings(
    model: Any, records: Sequence[Record], protocol: str, limit: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    identity = getattr(model, "identity", dict)()
    data = {"records": len(records), "limit": limit, "fingerprint": fingerprint(records)}
    settings = {
        "model": {"name": type(model).__name__} | identity,
        "data": data,
        "protocol": protocol,
        "options": {name: repr(value) for name, value in sorted(options.items())},
        "versions": versions(),
    }
    dtype = getattr(model, "dtype", None)
    return settings if dtype is None else settings | {"dtype": str(dtype)}


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder)!r} holds no evaluation ({error}); give the --out of one.") from error


def _open(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{id: row} of what the folder holds of this very evaluation. Raises InputError for another one."""
    path = folder / SETTINGS
    if path.exists() or (folder / RESULTS).exists():
        there = _read_settings(folder)
        for name in settings.keys() - {"versions"}:
            if there.get(name) != settings[name]:
                raise InputError(
                    f"{str(folder)!r} holds an evaluation whose {name} is {there.get(name)!r}, not "
                    f"{settings[name]!r}; give another --out."
                )
        return read_lines(folder / RESULTS)
    write_together(folder, {SETTINGS: (json.dumps(settings, indent=1) + "\n").encode()}, lambda path: False)
    return {}


def _asked(
    model: Any,
    records: Sequence[Record],
    numbers: Any,
    done: dict[str, Any],
    protocol: str,
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """A row for every question that is not done; questions of a record share its pictures."""
    waiting: list[tuple[str, Question, Any]] = []
    for number in numbers:
        questions = questions_of(records[number])
        left = [(f"{number}.{q.turn}", q) for q in questions if f"{number}.{q.turn}" not in done]
        images: Any = None
        for name, question in left:
            try:
                images = question.record.load_images() if images is None else images
                waiting.append((name, question, question.sample(images)))
            except InputError as error:
                yield {"id": name, "error": str(error)}
            if len(waiting) == batch_size:
                yield from _rows(model, waiting, protocol, options)
                waiting = []
    yield from _rows(model, waiting, protocol, options)


def _rows(
    model: Any, waiting: list[tuple[str, Question, Any]], protocol: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of questions that are answered together."""
    from medplib.answering import answer_each

    answers = answer_each(model, [sample for _, _, sample in waiting], InputError, **options)
    for (name, question, _), answer in zip(waiting, answers, strict=True):
        try:
            if isinstance(answer, InputError):
                raise answer
            yield {"id": name, **score(question, answer, protocol)}
        except InputError as error:
            yield {"id": name, "error": str(error)}


def _evenly(count: int, limit: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """ "12.0" -> (12, 0), to sort by."""
    return tuple(int(part) for part in row["id"].split("."))
