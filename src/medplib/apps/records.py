"""A data set as the command names it: path, format, split and the reader's options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medplib.errors import InputError

if TYPE_CHECKING:
    from medplib.data.recordset import RecordSet

DataPath = Annotated[Path, typer.Argument(metavar="PATH", help="The data set's folder, or one of its files.")]
Format = Annotated[
    str, typer.Option("--format", metavar="NAME", help="What it is; `medplib info` lists the readers.")
]
Split = Annotated[str | None, typer.Option(help="train, val or test; all without.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="An option of the reader, such as lang=en. Repeatable."
    ),
]


def read_records(path: Path, layout: str, split: str | None, options: Sequence[str] | None) -> RecordSet:
    """The records, with options `key=value` whose values are YAML. Raises InputError."""
    import yaml

    from medplib.data.readers import read

    given = {}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--option must be KEY=VALUE, got {text!r}.")
        if key.strip() in ("name", "path", "split"):
            raise InputError(f"--option {text!r}: give PATH, --format and --split instead.")
        try:
            given[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {text!r}: the value is no YAML: {error}") from error
    return read(layout, path, split, **given)


def progress_bar(what: str) -> Callable[[Any], Any]:
    """A bar on standard error where somebody looks at it."""
    from tqdm import tqdm

    return lambda numbers: tqdm(numbers, unit=f" {what}", disable=not sys.stderr.isatty(), leave=False)
