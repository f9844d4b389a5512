"""The command `medplib`: ask about images, and see what is installed. Only running a model needs torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from medplib.apps.train_cli import train
from medplib.errors import InputError, MedPLIBError

if TYPE_CHECKING:
    import numpy as np

    from medplib.results import Answer

NOTICE = "Research use only. Not a medical device."

# Options that take several numbers or keep their place among each other: option -> names of its values
_PROMPTS = {
    "--box": ("x0", "y0", "x1", "y1"),
    "--point": ("x", "y"),
    "--background-point": ("x", "y"),
    "--mask": ("file",),
}

app = typer.Typer(
    name="medplib",
    help="Ask questions about biomedical images and see the answer drawn on them. " + NOTICE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to fail
    app()


class PromptCommand(TyperCommand):
    """A command whose prompts keep their order and take their numbers as separate words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, prompts = _join_prompts(args)
        with (
            _errors_in_one_line()
        ):  # here, because a number too few makes the words after it part of the prompt
            for option, value in prompts:
                if option != "--mask":
                    _numbers(option, value)
        ctx.meta["medplib.prompts"] = prompts
        return super().parse_args(ctx, joined)


def _join_prompts(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`--box 1 2 3 4` -> `--box=1 2 3 4`, and all (option, value) in their order. Ends at `--`."""
    joined: list[str] = []
    prompts: list[tuple[str, str]] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest], prompts
        option, equals, value = word.partition("=")
        if option not in _PROMPTS:
            joined.append(word)
            continue
        values = [value] if equals else []
        while len(values) < len(_PROMPTS[option]) and rest and not _is_option(rest[0]):
            if equals and re.search(r"[\s,]", value):
                break  # `--box=1,2,3,4` is complete
            values.append(rest.pop(0))
        prompts.append((option, " ".join(values)))
        joined.append(f"{option}={prompts[-1][1]}")
    return joined, prompts


def _is_option(word: str) -> bool:
    return bool(re.match(r"--|-[A-Za-z]", word)) and not re.fullmatch(r"-(inf|nan)\w*", word, re.IGNORECASE)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the user can mend: one line on standard error and exit status 2, no traceback."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it becomes an error
            yield
    except (MedPLIBError, OSError) as error:
        typer.echo(f"error: {_printable(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(2) from None


@app.command(cls=PromptCommand)
def ask(
    ctx: typer.Context,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="One or more image files.")],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help='In quotes, e.g. "Segment the right lung."')
    ],
    model: Annotated[
        str, typer.Option(help="A known model, a folder with a saved one, or a Hub id.")
    ] = "medplib-tiny",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the overlay, the masks and answer.json into this folder."),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0 Y0 X1 Y1", help="Ask about a box, in pixels of the first image. Repeatable."
        ),
    ] = None,
    point: Annotated[
        list[str] | None, typer.Option(metavar="X Y", help="Ask about the place at this point. Repeatable.")
    ] = None,
    background_point: Annotated[
        list[str] | None,
        typer.Option(metavar="X Y", help="A point that does not belong to the region. Repeatable."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Ask about the non-zero pixels of this image. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... By default where the model is loaded.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole answer as JSON and nothing else.")
    ] = False,
) -> None:
    """Ask a question about one or more images.

    The prompts --box, --point, --background-point and --mask may be mixed. Each <region> in the question
    stands for the next of them, in the order of the command line. They lie on the first image.
    """
    del box, point, background_point, mask  # declared for the help page; `prompts` has them in their order
    with _errors_in_one_line():
        pictures = _load_images(images, question)
        prompts = _make_prompts(ctx.meta["medplib.prompts"], pictures[0].shape[:2])
        _check_settings(out, device)
        answer = _run(model, device, pictures, question, prompts, seed, max_new_tokens)
        written = answer.save(out) if out is not None else []
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), ensure_ascii=True))
    else:
        _show(answer, out, written)


def _load_images(files: Sequence[str], question: str) -> list[np.ndarray]:
    from medplib.io.images import load_image

    if not question.strip():
        raise InputError("The question is empty. Write one after the images, in quotes.")
    if "\n" not in question and len(question) < 256 and Path(question).is_file():
        raise InputError(f"The last word must be the question, but {question!r} is a file. Add a question.")
    return [load_image(file) for file in files]


def _make_prompts(given: Sequence[tuple[str, str]], size: tuple[int, int]) -> list[Any]:
    """(option, value) pairs -> checked Point, Box and Mask objects, in the same order."""
    from medplib.prompts.types import Box, Mask, Point

    prompts: list[Any] = []
    for option, value in given:
        if option == "--mask":
            if not value:
                raise InputError("--mask needs the path of an image file.")
            prompt: Any = Mask(value)
            prompts.append(Mask(prompt.to_mask(size)))  # read once, here
            continue
        numbers = _numbers(option, value)
        prompt = Box(*numbers) if option == "--box" else Point(*numbers, label=int(option == "--point"))
        prompt.check(size)
        prompts.append(prompt)
    return prompts


def _numbers(option: str, value: str) -> list[float]:
    names = _PROMPTS[option]
    try:
        numbers = [float(word) for word in re.split(r"[\s,]+", value.strip())]
    except ValueError:
        numbers = []
    if len(numbers) != len(names):
        raise InputError(f"{option} needs {len(names)} numbers, {' '.join(names)} in pixels, got {value!r}.")
    return numbers


def _check_settings(out: Path | None, device: str | None) -> None:
    """What can be refused before a model is loaded."""
    if out is not None and out.expanduser().exists() and not out.expanduser().is_dir():
        raise InputError(f"--out {str(out)!r} is a file. Give the path of a folder.")
    if device is not None and not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", device):
        raise InputError(f"--device must be cpu, cuda, cuda:1, xpu or mps, got {device!r}.")


def _run(
    name: str,
    device: str | None,
    pictures: list[np.ndarray],
    question: str,
    prompts: list[Any],
    seed: int,
    max_new_tokens: int | None,
) -> Answer:
    _quieten()
    from medplib import MedPLIB

    loaded = MedPLIB.from_pretrained(name)
    if device is not None:
        try:
            loaded = loaded.to(device)
        except (RuntimeError, AssertionError) as error:  # torch's two ways to say that a device is missing
            reason = str(error).splitlines()[0] if str(error) else "not available"
            raise InputError(f"--device {device} cannot be used here: {reason}") from error
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    asked = pictures if len(pictures) > 1 else pictures[0]
    return loaded.ask(asked, question, prompts=prompts, seed=seed, **limit)


def _quieten() -> None:
    """No progress bars and no usage statistics, unless the user's environment says otherwise."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _show(answer: Answer, out: Path | None, written: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    typer.echo(_printable(answer.text))
    if answer.findings:
        table = Table("label", "score", "area (pixels)", "box (x0 y0 x1 y1)", highlight=False)
        several = len(answer.images) > 1
        if several:
            table.add_column("image")
        for finding in answer.findings:
            box = " ".join(str(side) for side in finding.box) if finding.box else "empty"
            cells = [
                _printable(finding.label).replace("[", r"\["),
                f"{finding.score:.3f}",
                str(finding.area),
                box,
            ]
            table.add_row(*cells, *([str(finding.image)] if several else []))
        Console(emoji=False, soft_wrap=False).print(table)
    if out is not None:
        typer.echo(f"Written to {_printable(str(out))}: {', '.join(path.name for path in written)}")
    typer.echo(NOTICE)


def _printable(text: str) -> str:
    """Without control characters, which could steer a terminal; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A known model, a folder or a Hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write.")],
    layout: Annotated[
        str, typer.Option("--format", help="official: the published layout; medplib: our own.")
    ] = "official",
) -> None:
    """Write a model's weights, configuration and tokenizer in another layout."""
    with _errors_in_one_line():
        if layout not in ("official", "medplib"):
            raise InputError(f"--format must be official or medplib, got {layout!r}.")
        _quieten()
        from medplib import MedPLIB
        from medplib.official.export import export_official

        loaded = MedPLIB.from_pretrained(model, dtype="auto")
        if layout == "official":
            export_official(loaded, folder)
        else:
            loaded.save_pretrained(folder)
        typer.echo(f"Written to {_printable(str(folder))}")


@app.command()
def info() -> None:
    """Show versions, devices, compiled operators, known models and the names of all parts."""
    with _errors_in_one_line():
        for title, lines in _facts():
            typer.echo(f"{title:<20} {lines[0] if lines else 'none'}")
            for line in lines[1:]:
                typer.echo(f"{'':<20} {line}")


def _facts() -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of everything `info` shows."""
    from medplib import registry
    from medplib.results import versions

    for package, number in versions().items():
        yield package, [number or "not installed"]
    yield "devices", _devices()
    yield "operators", _operators()
    yield "models", known_models()
    for name, kind in sorted(vars(registry).items()):
        if isinstance(kind, registry.Registry):
            yield name, [", ".join(kind.names())]
    yield "notice", [NOTICE]


def _devices() -> list[str]:
    import torch

    lines = [f"cpu ({torch.get_num_threads()} threads)"]
    lines += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return lines if len(lines) > 1 else [*lines, "no cuda device"]


def _operators() -> list[str]:
    """What `medplib.ops.status()` says, if there are operators."""
    try:
        from medplib import ops
    except ImportError:
        return ["PyTorch reference (nothing compiled)"]
    if not hasattr(ops, "status"):
        return ["PyTorch reference (nothing compiled)"]
    status = ops.status()
    return [f"{k}: {v}" for k, v in status.items()] if isinstance(status, dict) else str(status).splitlines()


def known_models() -> list[str]:
    """Names of the models that come with the package: the folders in its assets that hold a configuration."""
    from importlib.resources import files

    assets = files("medplib") / "assets"
    if not assets.is_dir():
        return []
    return sorted(folder.name for folder in assets.iterdir() if (folder / "config.json").is_file())
