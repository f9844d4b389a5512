"""The README: every code block works. Python and commands are run, what would take too long is checked."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medplib.registry import PLUGIN_GROUP

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FIRST_SCREEN = TEXT.split("\n## ")[0]


def blocks(language: str) -> list[tuple[int, str]]:
    """(line number of its first line, text) of each block in this language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT[: block.start(1)].count("\n") + 1, block[1]) for block in found]


def commands() -> list[list[str]]:
    """The words of every command in the bash blocks; `a && b` are two."""
    found = []
    for _, block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            ends = [i for i, word in enumerate(words) if word == "&&"]
            found += [words[a:b] for a, b in zip([0, *(i + 1 for i in ends)], [*ends, None], strict=True)]
    return [words for words in found if words]


MEDPLIB = [words[1:] for words in commands() if words[0] == "medplib"]
PIP = [words for words in commands() if words[:2] == ["pip", "install"]]
LONG = [words for words in commands() if words[:2] == ["python", "-m"]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder where the README's paths exist and what its commands write does no harm."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    return folder


def run(script: str, folder: Path) -> str:
    """Run Python in a fresh interpreter, offline; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def printed(checkout):
    """What each `medplib` command printed, in order. One interpreter runs them all; each must end with 0."""
    script = f"""
import sys
from medplib.apps.cli import main
for words in {MEDPLIB!r}:
    sys.argv = ["medplib", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    print("\\0", flush=True)
"""
    return run(script, checkout).split("\0")[:-1]


def test_first_screen_says_what_it_is_shows_it_and_warns():
    assert PROJECT["description"] in FIRST_SCREEN
    assert "Research use only, not a medical device." in FIRST_SCREEN
    assert re.search(r'<img src="docs/answer_chest_ct\.png"', FIRST_SCREEN)
    assert [len(block.splitlines()) for _, block in blocks("bash")[:1]] == [2]
    assert [len(block.splitlines()) for _, block in blocks("python")[:2]] == [5, 4]


def test_every_block_is_of_a_kind_that_is_checked():
    fences = re.findall(r"^```(.*)$", TEXT, re.MULTILINE)
    assert set(fences[0::2]) == {"bash", "python", "toml", "text"}
    assert set(fences[1::2]) == {""}
    assert len(MEDPLIB) + len(PIP) + len(LONG) + commands().count(["pytest"]) == len(commands())


def test_python_blocks_run_in_order(checkout):
    padded = ["\n" * (line - 1) + block for line, block in blocks("python")]  # true numbers in tracebacks
    script = f"names = {{}}\nfor code in {padded!r}: exec(compile(code, 'README.md', 'exec'), names)"
    run(script, checkout)
    assert (checkout / "out" / "answer.json").is_file()
    assert (checkout / "overlay.png").is_file()


def test_medplib_commands_run(printed, checkout):
    assert len(printed) == len(MEDPLIB)
    assert all(text.strip() for text in printed)
    assert (checkout / "answer" / "answer.json").is_file()


def test_main_job_runs_as_a_program(checkout, tmp_path):
    words = MEDPLIB[0]
    assert words[:1] == ["ask"]
    assert "--out" in words
    out = tmp_path / "answer"
    words = [*words[: words.index("--out")], "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "medplib", *words], cwd=checkout, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {"answer.json", "overlay.png"} <= {path.name for path in out.iterdir()}
    with Image.open(out / "overlay.png") as drawn, Image.open(ROOT / "docs/answer_chest_ct.png") as shown:
        assert drawn.size == shown.size
        differs = (np.asarray(drawn) != np.asarray(shown)).any(axis=-1)
    assert differs.mean() < 0.01, "the picture in the README is not what its command draws; make it again"


def test_options_of_the_table_exist(printed):
    table = TEXT.split("| option | |")[1].split("\n\n")[0]
    options = set(re.findall(r"`(--[a-z-]+)", table)) | set(re.findall(r", `(--[a-z-]+)", table))
    help_page = subprocess.run(
        [sys.executable, "-m", "medplib", "ask", "--help"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
    ).stdout
    assert options == set(re.findall(r"^\W*(--[a-z-]+)", help_page, re.MULTILINE)) - {"--help"}


@pytest.mark.parametrize("words", PIP, ids=" ".join)
def test_pip_installs_this_project_with_extras_that_exist(words):
    target = words[-1]
    assert words[2:-1] in ([], ["-e"])
    name, _, extras = target.partition("[")
    assert name == "."
    assert set(extras.removesuffix("]").split(",")) - {""} <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("words", LONG, ids=" ".join)
def test_long_commands_take_these_options(words, checkout):
    done = subprocess.run(
        [sys.executable, *words[1:3], "--help"], cwd=checkout, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    for word in words[3:]:
        assert not word.startswith("--") or f"  {word} " in done.stdout


def test_ci_runs_the_commands_of_the_readme():
    done = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    shown = [shlex.split(line) for line in done.stdout.splitlines()]
    assert shown == [PIP[1], ["pytest"], ["medplib", *MEDPLIB[0]]]


def test_plugin_settings_name_the_group_that_is_read():
    (_, block), *others = blocks("toml")
    assert not others
    assert list(tomllib.loads(block)["project"]["entry-points"]) == [PLUGIN_GROUP]
