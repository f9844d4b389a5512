"""`medplib train`: a recipe's stages, or what they would do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from medplib.apps.models import quieten
from medplib.apps.terminal import errors_in_one_line, printable


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting, e.g. stages.vqa.steps=20. Repeatable."
        ),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these stages, in this order, e.g. align,vqa.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show parts, memory, steps and the first batch; train nothing.")
    ] = False,
) -> None:
    """Train a model stage by stage; the same command continues a run that was stopped."""
    with errors_in_one_line():
        quieten()
        from medplib.training.recipe import load_recipe, read_setting

        settings = dict(read_setting(text) for text in changes or ())
        loaded = load_recipe(recipe, settings, stages)
        if dry_run:
            _rehearse(loaded)
            return
        from medplib.training.chain import train as run

        for result in run(loaded, progress=lambda line: typer.echo(printable(line), err=True)):
            if os.environ.get("RANK", "0") == "0":
                hashes = " ".join(f"{part}={digest}" for part, digest in result.frozen.items())
                typer.echo(f"{result.name}: {printable(str(result.folder))}")
                typer.echo(f"  closed and bit-identical: {hashes or 'nothing'}")
    sys.stdout.flush()


def _rehearse(recipe) -> None:
    from medplib.training.dry_run import rehearse
    from medplib.training.snapshots import check_writable, writing

    folder = Path(recipe.out).expanduser() / "dry-run"
    for page in rehearse(recipe):
        typer.echo(printable(str(page)))
        check_writable(folder)
        path = folder / f"{page.stage.name}.png"
        with writing(path):
            page.picture.save(path)
        typer.echo(f"Picture: {printable(str(path))}\n")
