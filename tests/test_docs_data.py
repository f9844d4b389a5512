"""docs/data.md: its code runs, its tables name what there is."""

import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medplib.apps.cli import app
from medplib.data import READERS
from medplib.data.check import KINDS
from medplib.data.readers.columns import COLUMNS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_code_and_commands_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for code in blocks("python"):
            exec(code, names)
    assert names["mine"][0].regions[0].x1 == 136.0
    assert (tmp_path / "sheet.png").is_file()
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert all(words[:2] == ["medplib", "data"] for words in commands)
    for words in commands:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output)
    assert {"samples.png", "preview.png", "converted"} <= {path.name for path in tmp_path.iterdir()}


def test_the_table_of_readers_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", TEXT, re.MULTILINE))
    assert set(rows) == set(READERS.names())
    for name, options in rows.items():
        parameters = inspect.signature(READERS.get(name)).parameters.values()
        known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        assert set(re.findall(r"`(\w+)`", options)) == known, name


@pytest.mark.parametrize("level", ["error", "warning"])
def test_every_kind_of_problem_stands_in_its_column(level):
    table = TEXT.split("| error | warning |\n")[1].split("\n\n")[0]
    column = [line.split("|")[1 if level == "error" else 2] for line in table.splitlines()[1:]]
    named = set(re.findall(r"`([\w ]+)`", " ".join(column)))
    assert named == {kind for kind, (found, _) in KINDS.items() if found == level}


def test_every_column_is_named():
    for column in COLUMNS:
        assert f"`{column}`" in TEXT
