"""`medplib evaluate` and `medplib compare`: figures of a model on labelled data, and of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medplib.apps.models import Device, DeviceMap, DType, ModelName, Quantize, check_model_options, load_model
from medplib.apps.records import DataPath, Format, Options, Split, progress_bar, read_records
from medplib.apps.terminal import NOTICE, errors_in_one_line, printable

if TYPE_CHECKING:
    from medplib.evaluation.paired import Difference
    from medplib.evaluation.report import Report


def evaluate(
    path: DataPath,
    layout: Format,
    model: ModelName = "medplib-tiny",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep answers and report here; the same command goes on there."),
    ] = None,
    split: Split = None,
    option: Options = None,
    protocol: Annotated[
        str, typer.Option(help="medplib, or official: drawn and scored as the published evaluation does.")
    ] = "medplib",
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many records, evenly from first to last; all without.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many questions are answered together.")] = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer, in tokens (64).")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Ask a model every question of a data set, and say how well it answers and draws.

    Exit status 0: every question was asked; 1: some could not be, and are in no figure.
    """
    with errors_in_one_line():
        check_model_options(device, dtype, quantize, device_map)
        from medplib.evaluation import evaluate as run
        from medplib.evaluation.scoring import check_protocol

        check_protocol(protocol)
        records = read_records(path, layout, split, option)
        report = run(
            load_model(model, device, dtype, quantize, device_map), records, out, protocol=protocol,
            limit=limit, batch_size=batch_size, progress=progress_bar("records"),
            **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(report.to_dict()))
        else:
            _show(report, out)
    if report.errors:
        raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of an evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="That of another of the same data set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Hold two evaluations of the same questions against each other, figure by figure."""
    with errors_in_one_line():
        from medplib.evaluation import compare as hold
        from medplib.evaluation import load_report

        differences = hold(load_report(first), load_report(second))
        if as_json:
            typer.echo(json.dumps([_plain(difference) for difference in differences]))
        else:
            _show_differences(differences)


def _show(report: Report, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "figure", "mean", "95 %", "n", "cases", box=None)
    for line in report.lines():
        value = line.value
        between = "" if value.low is None else f"{value.low:.3f} to {value.high:.3f}"
        kind = f"{line.task} {line.type}".strip()
        table.add_row(kind, line.figure, f"{value.mean:.3f}", between, str(value.n), str(value.cases))
    Console(emoji=False, soft_wrap=False).print(table)
    if report.errors:
        first = report.errors[0]
        said = printable(" ".join(first["error"].split()))
        typer.echo(f"{len(report.errors)} questions could not be asked. The first, {first['id']}: {said}")
    if out is not None:
        typer.echo(f"Written to {printable(str(out))}: report.md, report.json, results.jsonl, settings.json")
    typer.echo(NOTICE)


def _show_differences(differences: list[Difference]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("question", "figure", "first", "second", "difference", "95 %", "n", box=None)
    for one in differences:
        change = one.difference
        between = "" if change.low is None else f"{change.low:+.4f} to {change.high:+.4f}"
        kind = f"{one.task} {one.type}".strip()
        means = (f"{one.first:.3f}", f"{one.second:.3f}", f"{change.mean:+.4f}")
        table.add_row(kind, one.figure, *means, between, str(change.n))
    Console(emoji=False, soft_wrap=False).print(table)


def _plain(difference: Difference) -> dict[str, Any]:
    return difference._asdict() | {"difference": difference.difference._asdict()}
