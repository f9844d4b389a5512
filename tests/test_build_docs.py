"""docs/build.md: every command and every Python block works, and what it promises is there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_openai_writer import Server
from typer.testing import CliRunner

from medplib.apps.cli import app
from medplib.data.builder.grounding import ONE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "build.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder where the page's paths exist and what it writes does no harm."""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    for i in range(4):
        mask = np.zeros((60, 60), np.uint8)
        mask[10 : 30 + i, 20:40] = 255
        for folder in ("images", "masks/lesion"):
            (tmp_path / "my_data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(tmp_path / "my_data" / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def test_commands_run(here):
    server = Server()
    try:
        for words in (shlex.split(line) for block in blocks("bash") for line in block.splitlines()):
            assert words[0] == "medplib"
            done = CliRunner().invoke(
                app, [w.replace("http://localhost:8000/v1", server.url) for w in words[1:]]
            )
            assert done.exit_code == 0, done.output
    finally:
        server.close()
    for name in re.findall(r"MeCoVQA-\w+\.json", blocks("text")[0]):
        assert (here / "mecovqa" / "train" / name).is_file()
        assert (here / "mecovqa" / "test" / name).is_file()
    for name in ("sheet.png", "statistics.json", "build.json", "images", "masks"):
        assert (here / "mecovqa" / name).exists()
    assert server.seen
    assert any((here / "worded.answers").iterdir())


def test_python_blocks_run_in_order(here):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "build.md", "exec"), names)
    assert names["report"].to_dict()["rows"].keys() == {"grounding", "complex"}
    assert (here / "terse" / "build.json").is_file()


def test_facts_of_the_page(here):
    assert f"in {len(ONE)} phrasings" in TEXT
    page = CliRunner().invoke(app, ["data", "build", "--help"], env={"COLUMNS": "250"}).output
    for option in set(re.findall(r"--[a-z]+(?:-[a-z]+)*", TEXT)):
        assert option in page, option
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
