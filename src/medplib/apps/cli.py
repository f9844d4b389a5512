"""The command `medplib`: ask about images, and see what is installed. Only running a model needs torch."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medplib.apps.chat import chat
from medplib.apps.data_cli import data
from medplib.apps.demo import demo
from medplib.apps.evaluate_cli import compare, evaluate
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
from medplib.apps.prompts import PromptCommand, make_prompts
from medplib.apps.terminal import (
    NOTICE,
    errors_in_one_line,
    printable,
    reflow_help,
    show_answer,
    show_volume_answer,
)
from medplib.apps.train_cli import train
from medplib.apps.volumes import (
    Axis,
    Series,
    Slice,
    Window,
    check_source,
    is_volume,
    parse_slices,
    picture_of,
    progress_of,
)
from medplib.errors import InputError

app = typer.Typer(
    name="medplib",
    help="Ask questions about biomedical images and see the answer drawn on them. " + NOTICE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to fail
    app()


def _show_version(asked: bool) -> None:
    if asked:
        from medplib import __version__

        typer.echo(f"medplib {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    del version  # its callback has shown it


_Batch = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Answer the jobs of a file instead: JSON lines, see the README."),
]
_BatchSize = Annotated[int, typer.Option(min=1, help="How many jobs are answered together.")]
_Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write overlay, masks and answer.json into this folder.")
]
_Box = Annotated[
    list[str] | None,
    typer.Option(metavar="X0 Y0 X1 Y1", help="Ask about a box, in pixels of the first image. Repeatable."),
]
_Point = Annotated[
    list[str] | None, typer.Option(metavar="X Y", help="Ask about the place at this point. Repeatable.")
]
_BackgroundPoint = Annotated[
    list[str] | None,
    typer.Option(metavar="X Y", help="A point that does not belong to the region. Repeatable."),
]
_Mask = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Ask about the non-zero pixels of this image. Repeatable."),
]
_Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON and nothing else.")]


@app.command(cls=PromptCommand)
def ask(
    ctx: typer.Context,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="One or more image files.")
    ] = None,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help='In quotes, e.g. "Segment the right lung."')
    ] = None,
    model: ModelName = "medplib-tiny",
    out: _Out = None,
    box: _Box = None,
    point: _Point = None,
    background_point: _BackgroundPoint = None,
    mask: _Mask = None,
    batch: _Batch = None,
    batch_size: _BatchSize = 4,
    slice_: Slice = None,
    axis: Axis = "axial",
    window: Window = None,
    series: Series = None,
    seed: _Seed = 0,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Ask a question about one or more images, or with --batch the questions of a file.

    The prompts --box, --point, --background-point and --mask may be mixed. Each <region> in the question
    stands for the next of them, in the order of the command line. They lie on the first image.
    """
    del box, point, background_point, mask  # declared for the help page; the context has them in their order
    prompts = ctx.meta["medplib.prompts"]
    options = {"seed": seed} | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
    with errors_in_one_line():
        check_out(out)
        check_model_options(device, dtype, quantize, device_map)
        load = functools.partial(load_model, model, device, dtype, quantize, device_map)
        if batch is not None:
            if images or question or prompts or axis != "axial" or (slice_, window, series) != (None,) * 3:
                raise InputError("With --batch the images, questions, prompts and slices are its file's.")
            raise typer.Exit(_ask_batch(load, batch, out, batch_size, options))
        if not images or question is None:
            raise InputError("Give one or more images and a question, or --batch FILE.")
        _check_words(images, question)
        pictures = [picture_of(file, axis, slice_, window, series) for file in images]
        made = make_prompts(prompts, pictures[0].shape[:2])
        asked = pictures if len(pictures) > 1 else pictures[0]
        answer = load().ask(asked, question, prompts=made, **options)
        written = answer.save(out) if out is not None else []
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), ensure_ascii=True))
    else:
        show_answer(answer, out, written)


def _ask_batch(
    load: Callable[[], Any], file: Path, out: Path | None, batch_size: int, options: dict[str, Any]
) -> int:
    """The exit status: 0 when every job has an answer, 1 when some failed."""
    from medplib.apps.batch import run_batch

    out = None if out is None else out.expanduser()
    answered, failed, before = run_batch(load, file, out, batch_size=batch_size, show=typer.echo, **options)
    summary = f"{answered} answered, {failed} failed, {before} were there before."
    if out is not None:
        summary += f" Written to {printable(str(out))}.\n{NOTICE}"
    typer.echo(summary, err=out is None)
    return int(failed > 0)


@app.command()
def segment(
    image: Annotated[
        str, typer.Argument(metavar="FILE", help="An image, a NIfTI volume, or the folder of a DICOM series.")
    ],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help='What to draw, "right lung".')],
    model: ModelName = "medplib-tiny",
    out: _Out = None,
    axis: Axis = "axial",
    slices: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="These slices of a volume alone, both included.")
    ] = None,
    window: Window = None,
    series: Series = None,
    dicom_seg: Annotated[
        bool,
        typer.Option(
            "--dicom-seg",
            help="Write a DICOM segmentation into the folder of --out too. By design of the standard it, and "
            "it alone, repeats the patient's identity from the images.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="How many slices are looked at together.")] = 4,
    seed: _Seed = 0,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    as_json: _AsJson = False,
) -> None:
    """Draw what is named in an image, or in every slice of a volume.

    Of a volume --out gets one .nii.gz per name, which lies on the volume voxel by voxel.
    """
    with errors_in_one_line():
        check_out(out)
        if dicom_seg and out is None:
            raise InputError("--dicom-seg writes into the folder of --out. Give --out DIR too.")
        check_model_options(device, dtype, quantize, device_map)
        if not is_volume(image):
            if slices is not None:
                raise InputError("--slices is for volumes: NIfTI, or the folder of a DICOM series.")
            picture = picture_of(image, axis, None, window, series)
            if dicom_seg:
                check_source(image)
            loaded = load_model(model, device, dtype, quantize, device_map)
            answer = loaded.segment(picture, names, seed=seed)
        else:
            from medplib.io.volume import load_volume
            from medplib.volumetric import segment_volume

            opened = load_volume(image, window, series)
            chosen = opened.numbers(axis, parse_slices(slices))
            if dicom_seg:
                check_source(opened)
            loaded = load_model(model, device, dtype, quantize, device_map)
            with progress_of(len(chosen)) as progress:
                answer = segment_volume(
                    loaded, opened, names, axis=axis, slices=chosen, batch_size=batch_size,
                    progress=progress, seed=seed,
                )  # fmt: skip
        asked = {"dicom_seg": True if is_volume(image) else image} if dicom_seg else {}
        written = answer.save(out, **asked) if out is not None else []
    if dicom_seg and not any(path.suffix == ".dcm" for path in written):
        typer.echo("No DICOM segmentation was written: nothing was drawn.", err=as_json)
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), ensure_ascii=True))
    elif is_volume(image):
        show_volume_answer(answer, out, written)
    else:
        show_answer(answer, out, written)


for _command in (chat, demo, evaluate, compare, train):  # in this order on the help page
    app.command()(_command)


def _check_words(files: Sequence[str], question: str) -> None:
    if not question.strip():
        raise InputError("The question is empty. Write one after the images, in quotes.")
    if "\n" not in question and len(question) < 256 and Path(question).is_file():
        raise InputError(f"The last word must be the question, but {question!r} is a file. Add a question.")
    words = [file for file in files if not os.path.splitext(file)[1] and not os.path.exists(file)]
    if words:
        raise InputError(f"There is no image {words[0]!r}. Check the path, and put the question in quotes.")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A known model, a folder or a Hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.")],
    layout: Annotated[
        str, typer.Option("--format", help="official: the published layout; medplib: our own.")
    ] = "official",
) -> None:
    """Write a model's weights, configuration and tokenizer in another layout."""
    with errors_in_one_line():
        if layout not in ("official", "medplib"):
            raise InputError(f"--format must be official or medplib, got {layout!r}.")
        loaded = load_model(model, dtype="auto")
        from medplib.official.export import export_official

        if layout == "official":
            export_official(loaded, folder)
        else:
            loaded.save_pretrained(folder)
        typer.echo(f"Written to {printable(str(folder))}")


@app.command()
def info() -> None:
    """Show versions, devices, compiled operators, known models and the names of all parts."""
    with errors_in_one_line():
        for title, lines in _facts():
            typer.echo(f"{title:<20} {lines[0] if lines else 'none'}")
            for line in lines[1:]:
                typer.echo(f"{'':<20} {line}")


def _facts() -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of everything `info` shows."""
    from medplib import ops, registry
    from medplib.model_folder import EMBEDDED
    from medplib.results import versions

    for package, number in versions().items():
        yield package, [number or "not installed"]
    yield "devices", _devices()
    yield "operators", [f"{device}: {kernels}" for device, kernels in ops.status().items()]
    yield "models", list(EMBEDDED)
    for name, kind in sorted(vars(registry).items()):
        if isinstance(kind, registry.Registry):
            yield name, [", ".join(kind.names())]
    yield "notice", [NOTICE]


def _devices() -> list[str]:
    import torch

    lines = [f"cpu ({torch.get_num_threads()} threads)"]
    lines += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return lines if len(lines) > 1 else [*lines, "no cuda device"]


reflow_help(app)
reflow_help(data)
