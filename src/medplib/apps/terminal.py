"""What the commands print: an answer, one line for an error, and nothing that could steer a terminal."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from medplib.errors import MedPLIBError

if TYPE_CHECKING:
    from medplib.results import Answer
    from medplib.volumetric import VolumeAnswer

NOTICE = "Research use only. Not a medical device."


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What the user can mend: one line on standard error and exit status 2, no traceback; a warning is a line
    there too."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it becomes an error
            warnings.showwarning = _show_warning  # put back by catch_warnings
            yield
    except (MedPLIBError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and "pip install" not in str(error):
            raise  # a mistake in a package, not an extra that is needed
        typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(2) from None


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    typer.echo(f"warning: {printable(' '.join(str(message).split()))}", err=True)


def reflow_help(app: typer.Typer) -> None:
    """Let the paragraphs of the help pages end where the terminal does, not where lines of our code do."""
    for command in app.registered_commands:
        paragraphs = inspect.cleandoc(command.callback.__doc__ or "").split("\n\n")
        command.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def show_answer(answer: Answer, out: Path | None, written: Sequence[Path], notice: bool = True) -> None:
    from rich.console import Console
    from rich.table import Table

    typer.echo(printable(answer.text))
    if answer.findings:
        table = Table("label", "score", "area (pixels)", "box (x0 y0 x1 y1)", highlight=False)
        several = len(answer.images) > 1
        if several:
            table.add_column("image")
        for finding in answer.findings:
            box = " ".join(str(side) for side in finding.box) if finding.box else "empty"
            cells = [
                printable(finding.label).replace("[", r"\["),
                f"{finding.score:.3f}",
                str(finding.area),
                box,
            ]
            table.add_row(*cells, *([str(finding.image)] if several else []))
        Console(emoji=False, soft_wrap=False).print(table)
    _show_files(out, written, notice)


def show_volume_answer(answer: VolumeAnswer, out: Path | None, written: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "millilitres", "voxels", f"{answer.axis} slices", "score", highlight=False)
    for number, finding in enumerate(answer.findings):
        found = sorted(finding.scores)
        where = f"{len(found)} ({found[0]} to {found[-1]})" if found else "none"
        score = f"{sum(finding.scores.values()) / len(found):.3f}" if found else ""
        label = printable(finding.label).replace("[", r"\[")
        table.add_row(label, f"{answer.millilitres(number):.1f}", str(finding.voxels), where, score)
    Console(emoji=False, soft_wrap=False).print(table)
    _show_files(out, written)


def _show_files(out: Path | None, written: Sequence[Path], notice: bool = True) -> None:
    if out is not None:
        typer.echo(f"Written to {printable(str(out))}: {', '.join(path.name for path in written)}")
    if notice:
        typer.echo(NOTICE)


def printable(text: str) -> str:
    """Without control characters, which could steer a terminal; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
