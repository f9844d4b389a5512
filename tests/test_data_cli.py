"""`medplib data`: exit status, table and JSON, pictures and words."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medplib.apps.cli import app

MINI = Path(__file__).parents[1] / "examples" / "mini"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words):
        result = CliRunner().invoke(app, ["data", *map(str, words)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture
def folder(tmp_path):
    """Two pictures with masks in train/, the first again in test/, where its mask is empty."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        root = tmp_path / "set" / split
        for part in ("images", "masks/[lung]"):
            (root / part).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(0, 256, (32, 40), np.uint8)
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        mask = (rng.random((32, 40)) > 0.5) & (split == "train")
        Image.fromarray(mask).save(root / "masks" / "[lung]" / f"{number}.png")
    return tmp_path / "set"


def test_check_of_a_sound_set_says_fit_and_draws_samples(run, tmp_path):
    status, out, err = run("check", MINI, "--format", "sa-med2d", "--sheet", "sheet.png")
    assert (status, err) == (0, "")
    assert "868 records, 282 pictures" in out
    assert "Fit to train." in out
    assert "CT 350" in out
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width == 4 * 228 + 4


def test_check_of_a_set_with_errors_exits_with_1(run, folder):
    status, out, _ = run("check", folder, "--format", "folder")
    assert status == 1
    assert "Not fit to train: empty mask, picture in splits." in out
    assert "[lung] 3" in out
    words = ("check", folder, "--format", "folder", "--allow", "empty mask", "--allow", "picture in splits")
    assert run(*words)[0] == 0
    status, out, _ = run(*words[:4], "--json", "--split", "train")
    report = json.loads(out)
    assert (status, report["fit"], report["records"], report["problems"]) == (0, True, 2, [])
    status, out, _ = run(*words[:4], "--json")
    assert {(p["kind"], p["level"], p["count"]) for p in json.loads(out)["problems"]} == {
        ("empty mask", "error", 1),
        ("picture in splits", "error", 1),
        ("duplicate", "warning", 1),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", MINI, "--format", "sa_med"), "Did you mean 'sa_med2d'"),
        (("check", "gone", "--format", "slake"), "There is no 'gone'"),
        (("check", MINI, "--format", "sa_med2d", "--option", "per"), "--option must be KEY=VALUE, got 'per'"),
        (("check", MINI, "--format", "sa_med2d", "--option", "lang=en"), "has no option 'lang'"),
        (("check", MINI, "--format", "sa_med2d", "--option", "per=[1"), "is no YAML"),
        (("check", MINI, "--format", "folder", "--option", "columns=image"), "must be a table of names"),
        (("check", MINI, "--format", "nnunet", "--option", "window=5"), "must be a list of 2 values"),
        (
            ("check", MINI, "--format", "nnunet", "--option", "axis=[1]"),
            "The reader 'nnunet': axis must be a text",
        ),
        (("check", MINI, "--format", "nnunet", "--option", "channel=x"), "a whole number, got 'x'"),
        (("check", MINI, "--format", "sa_med2d", "--option", "exclude=3"), "a list (each item a text)"),
        (("check", MINI, "--format", "sa_med2d", "--option", "index=5"), "a text or a path or null, got 5"),
        (("check", MINI, "--format", "coco", "--option", "modality=5"), "a text or null, got 5"),
        (("check", MINI, "--format", "sa_med2d", "--option", "split=train"), "give PATH, --format"),
        (("check", MINI, "--format", "sa_med2d", "--allow", "blur"), "No kind of problem is called 'blur'"),
        (("convert", MINI, "--format", "sa_med2d", "--out", MINI), "exists already"),
        (("preview", MINI, "--format", "sa_med2d", "--out", "no/where.png"), "cannot be written"),
    ],
)
def test_what_cannot_be_used_exits_with_2_in_one_line(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_convert_then_check_and_preview(run, folder, tmp_path):
    status, out, _ = run("convert", folder, "--format", "folder", "--out", "new", "--option", "modality=CT")
    assert status == 0
    assert "3 records, 3 images, 3 masks in test/MeCoVQA-Grounding.json, train/MeCoVQA-Grounding.json" in out
    status, out, _ = run("preview", "new", "--format", "mecovqa", "-n", 2, "--out", "p.png", "--seed", 3)
    assert status == 0
    assert out.count("Segment the [lung].") == 2
    assert "grounding, CT" in out
    assert "2 of 3 records drawn in p.png" in out
    assert (tmp_path / "p.png").is_file()
    assert run("convert", folder, "--format", "folder", "--out", "lines", "--to", "jsonl")[0] == 0
    assert run("check", "lines", "--format", "jsonl", "--json")[0] == 1
    (folder / "train" / "images" / "1.png").write_bytes(b"no picture")
    status, out, _ = run("convert", folder, "--format", "folder", "--out", "less")
    assert status == 1
    assert "not written" in out


def test_the_command_imports_nothing_heavy():
    code = (
        "import sys; from medplib.apps.cli import app; from medplib.data import read\n"
        f"read('sa_med2d', {str(MINI)!r})[0].load_images()\n"
        "print([n for n in ('torch', 'transformers', 'pyarrow', 'datasets', 'nibabel') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
