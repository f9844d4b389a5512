"""The examples: each script runs from any folder, and the notebook runs and keeps its pictures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "explore.ipynb"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_script_is_short_and_runs_from_any_folder(script, tmp_path):
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MEDPLIB_STEPS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def notebook():
    """The notebook as it is kept, with its outputs."""
    return pytest.importorskip("nbformat").read(NOTEBOOK, 4)


def outputs(notebook) -> list:
    """All outputs of all code cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_notebook_keeps_its_pictures(notebook):
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 5
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_notebook_was_kept_after_one_clean_run(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert not re.search(r"site-packages|/home/|/root/|/Users/", NOTEBOOK.read_text(encoding="utf-8"))


def test_notebook_runs(notebook, monkeypatch):
    pytest.importorskip("ipykernel", reason="the notebook needs ipykernel: pip install -e '.[dev]'")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fresh = notebook.copy()
    client = nbclient.NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()  # raises at the first cell that fails
    assert any("image/png" in output.get("data", {}) for output in outputs(fresh))
