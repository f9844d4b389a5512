"""`medplib chat`: one question after another about the same images, each with the turns before it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from medplib.apps.models import (
    Device,
    DeviceMap,
    DType,
    ModelName,
    Quantize,
    check_model_options,
    check_out,
    load_model,
)
from medplib.apps.prompts import make_prompts
from medplib.apps.terminal import NOTICE, errors_in_one_line, printable, show_answer
from medplib.apps.volumes import Axis, Series, Slice, Window, picture_of
from medplib.errors import InputError, MedPLIBError

_PLACE = re.compile(r"<(box|point|background-point|mask)\s+([^<>]+)>")


def chat(
    images: Annotated[list[str], typer.Argument(metavar="FILE...", help="One or more images.")],
    model: ModelName = "medplib-tiny",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each answer into a folder of its number here.")
    ] = None,
    slice_: Slice = None,
    axis: Axis = "axial",
    window: Window = None,
    series: Series = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
) -> None:
    """Ask one question after another, a line each, until an empty line.

    A place in the first image stands in the question: "What is in <box 35 66 136 200>?", also <point X Y>,
    <background-point X Y> and <mask FILE>. What cannot be asked is said and forgotten. Questions may come
    through a pipe; then the exit status is 1 if one of them could not be asked.
    """
    failed = False
    with errors_in_one_line():
        check_out(out)
        check_model_options(device, dtype, quantize, device_map)
        pictures = [picture_of(file, axis, slice_, window, series) for file in images]
        loaded = load_model(model, device, dtype, quantize, device_map)
        before: Any = pictures
        number = 0
        for line in _lines():
            try:
                question, prompts = _read(line, pictures[0].shape[:2])
                answer = loaded.ask(before, question, prompts, seed=seed)
                folder = None if out is None else out / str(number + 1)
                written = [] if folder is None else answer.save(folder)
            except MedPLIBError as error:
                typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
                failed = True
                continue
            before, number = answer, number + 1
            show_answer(answer, folder, written, notice=False)
        typer.echo(NOTICE)
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """The questions: typed, until an empty line; or all lines of a pipe that are not empty."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    typer.echo("A question a line; an empty line ends. A place: What is in <box 35 66 136 200>?")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets input() be edited and called back
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def _read(line: str, size: tuple[int, int]) -> tuple[str, list[Any]]:
    """ "What is in <point 3 4>?" -> "What is in <region>?" and its checked prompts. Raises InputError."""
    places = [(f"--{kind}", value.strip()) for kind, value in _PLACE.findall(line)]
    try:
        return _PLACE.sub("<region>", line), make_prompts(places, size)
    except InputError as error:
        raise InputError(str(error).removeprefix("--")) from error  # here it is no option
