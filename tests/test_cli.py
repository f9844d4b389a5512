"""The command line: what it prints, what it refuses and how, with a stand-in for the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import medplib
from medplib.apps.cli import app
from medplib.errors import CheckpointError, UnknownNameError
from medplib.model_folder import EMBEDDED
from medplib.prompts.types import Box, Mask, Point
from medplib.results import NOTICE, Answer, Finding


class FakeModel:
    """Answers with one finding per prompt, and keeps what it was asked."""

    asked: dict
    fails: Exception | None = None
    quantization = "int4: half of it"
    loaded = 0

    @classmethod
    def from_pretrained(cls, name, **options):
        FakeModel.loaded += 1
        FakeModel.options = options
        if name == "unknown":
            raise UnknownNameError("No model named 'unknown'.\nKnown: medplib-tiny.")
        if name == "damaged":
            raise CheckpointError("The weights are damaged.")
        if name == "no torchao":
            raise ImportError('pip install "medplib[quant]"')
        if name == "gone":
            raise FileNotFoundError(2, "No such file or directory", "gone")
        return cls()

    def to(self, device):
        self.device = device
        return self

    def ask(self, images, question, prompts=(), *, seed=0, max_new_tokens=64):
        FakeModel.asked = {"images": images, "question": question, "prompts": prompts, "seed": seed}
        FakeModel.asked |= {"max_new_tokens": max_new_tokens, "device": getattr(self, "device", None)}
        if FakeModel.fails:
            raise FakeModel.fails
        pictures = images if isinstance(images, list) else [images]
        masks = [prompt.to_mask(pictures[0].shape[:2]) for prompt in prompts]
        findings = [Finding(f"[bold]thing {i}", mask, 0.75) for i, mask in enumerate(masks)]
        return Answer("It is a \x1b[31mlung.", findings, pictures, question, prompts, {"name": "fake"}, seed)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command in a folder with two images and a mask; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(medplib), "MedPLIB", FakeModel)  # not setattr, which would import the real one
    monkeypatch.setattr(FakeModel, "loaded", 0)
    monkeypatch.setattr(FakeModel, "fails", None)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((50, 80), 90, np.uint8)).save(name)
    mask = np.zeros((50, 80), np.uint8)
    mask[10:20, 30:50] = 255
    Image.fromarray(mask).save("m.png")
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def test_ask_prints_the_answer_and_the_notice(run, tmp_path):
    status, out, err = run("ask", "a.png", "What is this?")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith("It is a")
    assert "\x1b" not in out
    assert out.splitlines()[-1] == NOTICE
    assert FakeModel.asked["images"].shape == (50, 80, 3)
    assert FakeModel.asked["prompts"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "m.png"]


def test_ask_takes_a_dicom_file(run, tmp_path):
    pydicom = pytest.importorskip("pydicom.data")
    scan = pydicom.get_testdata_file("MR_small.dcm", download=False)
    (tmp_path / "scan.dcm").write_bytes(Path(scan).read_bytes())
    status, out, err = run("ask", "scan.dcm", "What is this?", "--box", 10, 5, 30, 20, "--out", "answer")
    assert (status, err) == (0, "")
    assert out.startswith("It is a")
    assert FakeModel.asked["images"].shape == (64, 64, 3)
    assert Image.open(tmp_path / "answer" / "overlay.png").size[0] >= 64
    brightness = {}
    for high in (2000, 4000):
        assert run("ask", "scan.dcm", "What?", "--window", 0, high)[0] == 0
        brightness[high] = FakeModel.asked["images"].mean()
    assert brightness[2000] > 1.5 * brightness[4000]
    status, out, err = run("ask", "scan.dcm", "What is this?", "--slice", 1)
    assert status == 2
    assert "has no frame 1" in err
    (tmp_path / "cut.dcm").write_bytes(Path(scan).read_bytes()[:5000])
    status, out, err = run("ask", "cut.dcm", "What is this?")
    assert (status, out) == (2, "")
    assert "cut.dcm" in err
    assert "is cut short" in err
    assert len(err.splitlines()) == 1


def test_ask_writes_files_and_says_where(run, tmp_path):
    status, out, _ = run("ask", "a.png", "Where?", "--box", 10, 5, 30, 20, "--out", "answer/")
    assert status == 0
    names = sorted(path.name for path in (tmp_path / "answer").iterdir())
    assert names == ["answer.json", "mask_0_bold_thing_0.png", "overlay.png"]
    assert all(name in out for name in names)
    for cell in ("[bold]thing 0", "0.750", "300", "10 5 30 20"):
        assert cell in out
    record = json.loads((tmp_path / "answer" / "answer.json").read_text())
    assert record["prompts"] == [{"type": "box", "x0": 10.0, "y0": 5.0, "x1": 30.0, "y1": 20.0}]


def test_prompts_keep_the_order_of_the_command_line(run):
    words = ["--point", 5, 6, "--mask", "m.png", "--box", 1, 2, 30, 40, "--background-point", 7, 8.5]
    status, _, err = run("ask", *words, "--point=9,10", "a.png", "b.png", "What?", "--box=3", 4, 5, 6)
    assert (status, err) == (0, "")
    prompts = FakeModel.asked["prompts"]
    assert prompts[0] == Point(5, 6, 1)
    assert isinstance(prompts[1], Mask)
    assert prompts[1].to_mask((50, 80)).sum() == 200
    assert prompts[2:] == [Box(1, 2, 30, 40), Point(7, 8.5, 0), Point(9, 10, 1), Box(3, 4, 5, 6)]
    assert len(FakeModel.asked["images"]) == 2
    assert FakeModel.asked["question"] == "What?"


def test_settings_reach_the_model(run):
    assert run("ask", "a.png", "Q?", "--seed", 7, "--device", "cpu", "--max-new-tokens", 5)[0] == 0
    asked = FakeModel.asked
    assert (asked["seed"], asked["device"], asked["max_new_tokens"]) == (7, "cpu", 5)


def test_dtype_bits_and_places_reach_the_loader(run, monkeypatch):
    assert run("ask", "a.png", "Q?", "--dtype", "bfloat16", "--device-map", "auto")[0] == 0
    assert FakeModel.options == {"dtype": "bfloat16", "device_map": "auto"}
    status, out, err = run("ask", "a.png", "Q?", "--quantize", "int4", "--json")
    assert (status, err) == (0, "int4: half of it\n")
    assert json.loads(out)["text"]
    assert FakeModel.options == {"quantize": "int4"}
    assert run("ask", "a.png", "Q?")[0] == 0
    assert FakeModel.options == {}
    monkeypatch.setattr("medplib.apps.models._check_device", lambda device: None)
    assert run("ask", "a.png", "Q?", "--device", "cuda", "--quantize", "int8")[0] == 0
    assert FakeModel.options == {"quantize": "int8", "device_map": "cuda"}
    assert FakeModel.asked["device"] is None  # it was put there while loading


def test_a_missing_extra_is_one_line(run):
    status, out, err = run("ask", "a.png", "Q?", "--model", "no torchao")
    assert (status, out) == (2, "")
    assert err == 'error: pip install "medplib[quant]"\n'


def test_json_is_printed_alone(run):
    status, out, _ = run("ask", "a.png", "Q?", "--box", 1, 2, 30, 40, "--json", "--out", "o")
    assert status == 0
    record = json.loads(out)
    assert record["findings"][0]["area"] == 29 * 38
    assert record["notice"] == NOTICE


def test_words_after_two_dashes_are_not_options(run):
    assert run("ask", "--", "a.png", "--box")[0] == 0
    assert FakeModel.asked["question"] == "--box"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.png", "Q?"], "absent.png"),
        (["a.png", "Segment", "the", "right", "lung."], "no image 'Segment'. Check the path, and put the"),
        (["empty.png", "Q?"], "is empty"),
        (["pixel.png", "Q?"], "1 x 1"),
        (["a.png", "Q?", "--box", "1", "2", "81", "4"], "reaches outside"),
        (["a.png", "Q?", "--point", "-5", "4"], "outside the image"),
        (["a.png", "Q?", "--point", "nan", "4"], "finite"),
        (["a.png", "Q?", "--point", "-inf", "4"], "finite"),
        (["a.png", "Q?", "--box", "1", "2", "3"], "--box needs 4 numbers"),
        (["--box", "1", "2", "a.png", "Q?"], "--box needs 4 numbers"),
        (["a.png", "Q?", "--box", "--seed", "3"], "--box needs 4 numbers"),
        (["a.png", "Q?", "--mask"], "--mask needs"),
        (["a.png", "Q?", "--mask", "absent.png"], "absent.png"),
        (["a.png", "Q?", "--mask", "small.png"], "small.png"),
        (["a.png", "Q?", "--mask", "black.png"], "is empty"),
        (["a.png", " "], "question is empty"),
        (["a.png", "b.png"], "must be the question"),
        (["a.png", "Q?", "--out", "a.png"], "is a file"),
        (["a.png", "Q?", "--device", "gpu"], "--device must be"),
        (["a.png", "Q?", "--dtype", "half"], "--dtype must be one of auto, float32"),
        (["a.png", "Q?", "--quantize", "int3"], "--quantize must be int8 or int4"),
        (["a.png", "Q?", "--device-map", "cuda"], "--device-map must be auto"),
        (["a.png", "Q?", "--device-map", "auto", "--device", "cpu"], "either --device or --device-map"),
        (["a.png"], "Give one or more images and a question"),
        ([], "Give one or more images and a question"),
        (["a.png", "Q?", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--box", "1", "2", "3", "4", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--slice", "1", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--axis", "coronal", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--window", "1", "2", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--series", "1", "--batch", "jobs.jsonl"], "With --batch the images"),
        (["--batch", "absent.jsonl"], "absent.jsonl"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_before_the_model_loads(run, tmp_path, words, message):
    (tmp_path / "empty.png").touch()
    Image.new("L", (1, 1)).save("pixel.png")
    Image.new("L", (9, 9), 1).save("small.png")
    Image.new("L", (80, 50)).save("black.png")
    if "--out" not in words:
        words = [*words, "--out", "answer"]
    status, out, err = run("ask", *words)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert FakeModel.loaded == 0
    assert not (tmp_path / "answer").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "unknown"], "No model named 'unknown'. Known: medplib-tiny."),
        (["--model", "damaged"], "The weights are damaged."),
        (["--model", "gone"], "No such file or directory"),
        (["--device", "cuda:99"], "cuda:99 cannot be used here: "),
    ],
)
def test_model_errors_are_one_line_too(run, tmp_path, words, message):
    status, out, err = run("ask", "a.png", "Q?", *words, "--out", "answer")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "answer").exists()


def test_a_mistake_in_the_program_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(FakeModel, "fails", KeyError("bug"))
    with pytest.raises(KeyError):
        run("ask", "a.png", "Q?")


def test_a_warning_is_one_line_without_a_place_in_the_program(run):
    picture = Image.open("a.png")
    picture.save("pages.tif", save_all=True, append_images=[picture])
    status, out, err = run("ask", "pages.tif", "Q?")
    assert status == 0
    assert out.startswith("It is a")
    assert err == (
        "warning: The image file 'pages.tif' has several pages; the first is read. Save the page you want.\n"
    )


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(run, monkeypatch):
    Path("closed").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    for words in (["ask", "a.png", "Q?"], ["segment", "a.png", "lung"], ["chat", "a.png"]):
        status, out, err = run(*words, "--out", "closed/new/answer")
        assert (status, out, FakeModel.loaded) == (2, "", 0)
        assert err == "error: --out 'closed/new/answer': 'closed' cannot be written. Give another folder.\n"
    assert not any(Path("closed").iterdir())


def test_wrong_usage_exits_with_2(run):
    for words in (["ask", "a.png", "Q?", "--seed", "x"], ["ask", "--batch-size", "0"], ["nonsense"]):
        assert run(*words)[0] == 2


def test_info_shows_versions_devices_models_and_parts(run, tmp_path, monkeypatch):
    status, out, _ = run("info")
    assert status == 0
    for word in ("medplib", "torch", "transformers", "timm", "python", "cpu (", "operators", "models"):
        assert word in out
    for name in ("EXPERTS", "swiglu", "VISION_TOWERS", "sam_vit", NOTICE, *EMBEDDED):
        assert name in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['medplib', '--help']\n"
        "from medplib.apps.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    places = [
        done.stdout.index(f" {name} ") for name in ("ask", "segment", "chat", "evaluate", "train", "info")
    ]
    assert places == sorted(places)
    assert NOTICE in " ".join(done.stdout.split())


def test_paragraphs_of_help_fill_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for words, sentence in (
        (
            ["ask"],
            "stands for the next of them, in the order of the command line. They lie on the first",
        ),
        (
            ["data", "check"],
            "Exit status 0: fit, perhaps with warnings; 1: not fit; 2: it could not be",
        ),
    ):
        assert sentence in run(*words, "--help")[1]


def test_the_version_is_shown(run):
    assert run("--version") == (0, f"medplib {medplib.__version__}\n", "")


def test_python_m_medplib_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "medplib", "ask", "absent.png", "Q?"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: The image file 'absent.png' does not exist. Check the path.\n"
