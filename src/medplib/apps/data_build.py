"""`medplib data build`: images with masks, of any reader -> conversations in MeCoVQA's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medplib.apps.records import read_records
from medplib.apps.terminal import errors_in_one_line, printable
from medplib.errors import InputError

Types = Annotated[str, typer.Option(metavar="A,B", help="Of grounding, region, complex.")]
NegativesFrom = Annotated[
    str,
    typer.Option(help="dataset: what the data set labels; case: only what the same case shows elsewhere."),
]
Unsure = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON: for a data set the list of names never called absent."),
]
CasePattern = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Its first group is the patient in a case's name.")
]
Several = Annotated[
    str, typer.Option(help="Several structures as several 'turns' (as published) or in one 'answer'.")
]
Radiological = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SET", help="Data set with the patient's right on the image's left, or all. Repeatable."
    ),
]
Spacing = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="JSON: for a data set, set--case or image file its row and column in mm."
    ),
]
BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Of an OpenAI-compatible server, up to /v1.")
]
ApiKeyEnv = Annotated[str, typer.Option(metavar="NAME", help="Environment variable that holds the key.")]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where answers are kept, to go on with. Default: DIR.answers."),
]
Source = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="A folder in SA-Med2D-20M's layout, or what --format says."),
]
Layout = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="What SRC is: a reader, as `medplib info` lists them."),
]
Split = Annotated[str | None, typer.Option(help="Of SRC, with --format; all without.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Of the reader, such as modality=CT. Repeatable."),
]
Negatives = Annotated[float, typer.Option(min=0, max=1, help="Share of questions about absent structures.")]


def build(
    source: Source,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    layout: Layout = None,
    split: Split = None,
    option: Options = None,
    seed: Annotated[int, typer.Option(help="Seed of questions and split.")] = 0,
    per_image: Annotated[int, typer.Option(min=1, help="Conversations per image and type.")] = 2,
    types: Types = "grounding,region,complex",
    negatives: Negatives = 0.3,
    negatives_from: NegativesFrom = "dataset",
    unsure: Unsure = None,
    test_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the cases in test/.")] = 0.2,
    case_pattern: CasePattern = None,
    max_turns: Annotated[int, typer.Option(min=1, help="Turns of a complex conversation.")] = 3,
    several: Several = "turns",
    refs: Annotated[bool, typer.Option(help="Write names between <ref> and </ref> before <SEG>.")] = True,
    radiological: Radiological = None,
    spacing: Spacing = None,
    writer: Annotated[str, typer.Option(help="Who words the answers: template or openai.")] = "template",
    base_url: BaseUrl = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The server's model.")] = None,
    api_key_env: ApiKeyEnv = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    cache: Cache = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files instead of hard-linking them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier build.")] = False,
) -> None:
    """Make grounding, region and complex conversations from images with masks, in MeCoVQA's format.

    SRC holds images/, masks/, SAMed2D_v1.json and SAMed2D_v1_class_mapping_id.json, or is in another --format
    whose masks have names. Train and test are split by case. The folder appears complete or not at all.
    """
    from medplib.data.builder import BuildSettings, build_mecovqa

    with errors_in_one_line():
        settings = BuildSettings(
            seed=seed,
            types=tuple(name.strip() for name in types.split(",") if name.strip()),
            per_image=per_image,
            negatives=negatives,
            negatives_from=negatives_from,
            unsure=_table("--unsure", unsure),
            test_share=test_share,
            case_pattern=case_pattern,
            max_turns=max_turns,
            several=several,
            refs=refs,
            radiological=tuple(radiological or ()),
            spacing=_table("--spacing", spacing),
        )
        chosen = _writer(
            writer, base_url, model, api_key_env, concurrency, cache or Path(f"{out.resolve()}.answers")
        )
        samples = _samples(source, layout, split, option)
        report = build_mecovqa(samples, out, settings, writer=chosen, link=not copy, overwrite=overwrite)
    _show(report)
    typer.echo(f"Written to {printable(str(out))}: look at sheet.png and statistics.json there.")


def _samples(source: Path, layout: str | None, split: str | None, option: list[str] | None) -> Any:
    from medplib.data.builder import RecordSamples, SAMed2DFolder

    if layout is not None:
        return RecordSamples(read_records(source, layout, split, option))
    if split is not None or option:
        raise InputError("--split and --option are for the reader that --format names.")
    return SAMed2DFolder(source)


def _writer(
    name: str, base_url: str | None, model: str | None, api_key_env: str, concurrency: int, cache: Path
) -> Any:
    from medplib.data.builder import OpenAIWriter, TemplateWriter

    if name == "template":
        if base_url or model:
            raise InputError("--base-url and --model are for --writer openai.")
        return TemplateWriter()
    if name != "openai":
        raise InputError(f"--writer must be template or openai, got {name!r}.")
    if not base_url or not model:
        raise InputError(
            "--writer openai needs --base-url and --model, e.g. --base-url http://localhost:8000/v1."
        )
    return OpenAIWriter(base_url, model, api_key_env=api_key_env, concurrency=concurrency, cache=cache)


def _table(option: str, path: Path | None) -> dict[str, Any]:
    """A JSON object of lists in a file, {} without one. Raises InputError."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(value, list) for value in content.values()):
        raise InputError(f'{option} {str(path)!r} must hold an object of lists, as {{"ChestCT": [...]}}.')
    return content


def _show(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False, markup=False)
    table = Table("data set", "train cases (images)", "test cases (images)", title="split by case")
    for stratum, by_split in report.split.items():
        table.add_row(stratum, *(f"{s['cases']} ({s['images']})" for s in by_split.values()))
    console.print(table)
    console.print(report.statistics.table())
    for split in ("train", "test"):
        if not any(by_split[split]["cases"] for by_split in report.split.values()):
            console.print(f"{split}/ is empty: with so few cases try another --seed or --test-share.")
    for title, counts in (
        ("left out", report.skipped),
        ("answers replaced by their draft", report.fallbacks),
    ):
        for why, number in sorted(counts.items()):
            console.print(f"{title}: {number} x {why}")
