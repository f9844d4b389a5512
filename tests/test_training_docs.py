"""docs/training.md: its Python runs, and its table is what the formulas give."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from medplib.apps.cli import app
from medplib.configuration import MedPLIBConfig
from medplib.data import read
from medplib.modeling import MedPLIB
from medplib.stages import STAGES, set_stage
from medplib.training import train
from medplib.training.dry_run import estimate_memory
from medplib.training.recipe import load_recipe

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def my_data(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks/lesion"):
        (tmp_path / "my_data" / folder).mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((64, 64), np.uint8)
        mask[10 : 30 + i, 20:40] = 255
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"my_data/images/{i}.png"
        )
        Image.fromarray(mask).save(tmp_path / f"my_data/masks/lesion/{i}.png")
    monkeypatch.chdir(tmp_path)


def test_the_python_of_the_page_runs(my_data, capsys):
    short = {"stages.mixture.steps": 30}, {"stages.mixture.steps": 1, "stages.mixture.batch_size": 4}
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        exec(
            block.replace(f'"stages.mixture.steps": {short[0]["stages.mixture.steps"]}', str(short[1])[1:-1]),
            {},
        )
    assert "{1: 20.7, 4: 5.2, 8: 2.6}" in capsys.readouterr().out
    assert Path("runs/lesion/mixture/model/model.safetensors").is_file()


def test_the_yaml_of_the_page_trains(my_data):
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    changes = {"out": "runs/augmented", "stages.mixture.steps": 1, "stages.mixture.batch_size": 4}
    mine = read("folder", "my_data", split=None)
    (stage,) = train(load_recipe("lora", changes | yaml.safe_load(block)), sources={"mine": mine})
    assert (stage.folder / "model.safetensors").is_file()


def test_the_commands_for_images_of_ones_own_run(my_data):
    (block,) = re.findall(r"^```bash\n(medplib data check my_data .*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (more,) = re.findall(r"`(--set data\.qa\.reader=.*?)`", TEXT)
    rows = [
        {"image": f"my_data/images/{i}.png", "question": "Is it large?", "answer": "No."} for i in range(4)
    ]
    Path("my_questions.json").write_text(json.dumps(rows))
    for line in block.splitlines():
        words = shlex.split(line.replace("steps=40", "steps=1"))[1:]
        if words[0] == "train":
            words += [*shlex.split(more), "--set", "stages.mixture.batch_size=4"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output)
    log = [json.loads(line) for line in Path("runs/spots/mixture/log.jsonl").read_text().splitlines()]
    assert {"ce_vqa", "ce_grounding"} <= set(log[0])


@pytest.mark.parametrize("name", ["grounding", "mixture"])
def test_the_table_is_what_the_formulas_give(name):
    config = MedPLIBConfig(moe={"experts": ["grounding", "vqa"]} if name == "mixture" else None)
    with torch.device("meta"):
        model = MedPLIB(config)
    table = set_stage(model, STAGES[name])
    recipe = load_recipe("published-7b")
    sizes = [estimate_memory(recipe, STAGES[name], model, 4096).total]
    recipe.strategy = "fsdp2"
    sizes += [estimate_memory(recipe, STAGES[name], model, 4096, n).total for n in (4, 8)]
    row = re.search(rf"^\| {name} \| (.*) \|$", TEXT, re.MULTILINE)[1].split(" | ")
    assert row[:2] == [f"{table.parameters / 1e9:.2f} B", f"{table.trainable / 1e6:.1f} M"]
    assert row[2:] == [f"{size / 2**30:.1f}" for size in sizes]
