"""`medplib data check`, `convert`, `preview`, `build`: data sets on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medplib.apps.data_build import build
from medplib.apps.records import DataPath, Format, Options, Split, progress_bar, read_records
from medplib.apps.terminal import errors_in_one_line, printable
from medplib.errors import InputError

if TYPE_CHECKING:
    from medplib.data.check import CheckReport
    from medplib.data.recordset import RecordSet

data = typer.Typer(
    help="Look at data sets, write them in another layout, and build them.", no_args_is_help=True
)
data.command()(build)

_MOST = 12  # values of a kind that the table shows


@data.command()
def check(
    path: DataPath,
    layout: Format,
    split: Split = None,
    option: Options = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Count this kind of error as a warning. Repeatable."),
    ] = None,
    distance: Annotated[int, typer.Option(help="Bits of 64 in which near duplicates may differ.")] = 3,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of samples, as PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say whether a data set is fit to train on.

    Reads every picture and mask once. Exit status 0: fit, perhaps with warnings; 1: not fit; 2: it could not
    be read at all.
    """

    with errors_in_one_line():
        from medplib.data.check import check_records

        records = read_records(path, layout, split, option)
        report = check_records(
            records, allow=allow or (), distance=distance, progress=progress_bar("pictures")
        )
        if sheet is not None:
            _sheet(records, report.samples, sheet)
        if as_json:
            about = {"path": str(path), "format": layout, "fingerprint": records.fingerprint()}
            typer.echo(json.dumps(about | report.as_dict(), indent=1, ensure_ascii=False))
        else:
            _show(report)
            if sheet is not None:
                typer.echo(f"Samples drawn in {printable(str(sheet))}")
    if not report.fit:
        raise typer.Exit(1)


@data.command()
def convert(
    path: DataPath,
    layout: Format,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder to write.")],
    to: Annotated[
        str, typer.Option(help="mecovqa: MeCoVQA's layout; jsonl: our own, nothing lost.")
    ] = "mecovqa",
    split: Split = None,
    option: Options = None,
) -> None:
    """Write a data set in another layout. Exit status 1: some records were left out."""

    with errors_in_one_line():
        from medplib.data.convert import convert as write

        records = read_records(path, layout, split, option)
        done = write(records, out, to, progress=progress_bar("records"))
        typer.echo(
            f"Written to {printable(str(out))}: {done.records} records, {done.images} images, "
            f"{done.masks} masks in {', '.join(done.files)}"
        )
        report = records.report.merged(done.report)
        if report:
            typer.echo(printable(str(report)))
    if done.records < len(records):
        raise typer.Exit(1)


@data.command()
def preview(
    path: DataPath,
    layout: Format,
    split: Split = None,
    option: Options = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many records.")] = 8,
    seed: Annotated[
        int | None, typer.Option(help="Draw them at random; without, evenly from first to last.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path("preview.png"),
) -> None:
    """Show some records: their pictures with masks and regions in one file, their words here."""

    with errors_in_one_line():
        import numpy as np

        from medplib.data.samples import keyed_rng

        records = read_records(path, layout, split, option)
        number = min(number, len(records))
        if seed is None:
            chosen = np.linspace(0, len(records) - 1, number).round().astype(int)
        else:
            chosen = np.sort(keyed_rng("preview", seed).choice(len(records), number, replace=False))
        _sheet(records, chosen.tolist(), out)
        for index in chosen.tolist():
            typer.echo(printable(_words(index, records[index])))
        typer.echo(f"{number} of {len(records)} records drawn in {printable(str(out))}")


def _sheet(records: RecordSet, numbers: Sequence[int], path: Path) -> None:
    from medplib.data.sheet import contact_sheet

    shown = []
    for number in numbers:
        try:
            shown.append(records[number])
        except InputError:
            continue  # told under its kind by the check
    contact_sheet(shown, path)


def _words(index: int, record: Any) -> str:
    """A record in words."""
    about = [record.task, record.modality, record.answer_type, record.split, record.case]
    lines = [f"{index}  {record.source} {record.row}: {', '.join(str(fact) for fact in about if fact)}"]
    lines += [f"    image   {image}" for image in record.images]
    for question, answer in record.turns:
        lines += [f"    ask     {question}", f"    answer  {answer}"]
    lines += [f"    region  {region}" for region in record.regions]
    lines += [f"    mask    {mask}" for mask in record.masks]
    return "\n".join(lines)


def _show(report: CheckReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False, markup=False)
    counts = Table("of", "records", title=f"{report.records} records, {report.images} pictures", box=None)
    for name, counter in report.counts.items():
        listed = [f"{value} {count}" for value, count in list(counter.items())[:_MOST]]
        more = len(counter) - _MOST
        counts.add_row(name, ", ".join(listed) + (f", and {more} more" if more > 0 else "") or "none")
    console.print(counts)
    if report.problems:
        found = Table("", "kind", "count", "what it means, and the first")
        for problem in report.problems:
            text = f"{problem.meaning}\n{problem.examples[0]}"
            found.add_row(problem.level, problem.kind, str(problem.count), text)
        console.print(found)
    errors = [problem.kind for problem in report.problems if problem.level == "error"]
    console.print(f"Not fit to train: {', '.join(errors)}." if errors else "Fit to train.")
