"""The four stages in one call, from a dense start to a mixture; and what a run shows before it begins."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_run import LORA, records
from typer.testing import CliRunner

from medplib import MedPLIB
from medplib.apps.cli import app
from medplib.errors import CheckpointError, InputError, MedPLIBError, UnknownNameError
from medplib.training.chain import interpolate, train
from medplib.training.dry_run import rehearse
from medplib.training.recipe import load_recipe, make_recipe
from medplib.training.starts import start_folders

SHORT = {"steps": 2, "batch_size": 2, "precision": "fp32", "max_length": 512, "learning_rate": 1e-2}
STAGES = {
    "align": {**SHORT, "data": ["words"]},
    "vqa": {**SHORT, "data": ["words"], "lora": LORA},
    "grounding": {**SHORT, "data": ["masks"], "lora": LORA},
    "mixture": {**SHORT, "data": ["words", "masks"], "lora": LORA},
}
SOURCES = {"words": records(8, "vr"), "masks": records(8, "g", seed=1)}


@pytest.fixture(scope="module")
def dense_folder(new_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    new_model(moe=None).save_pretrained(folder)
    return folder


def four(model, out, **changes):
    content = {
        "model": str(model), "out": str(out), "device": "cpu", "save_steps": 2, "log_steps": 1,
        "stages": STAGES,
        "data": {"words": {"reader": "memory"}, "masks": {"reader": "memory"}},
    }  # fmt: skip
    return make_recipe(content | changes)


@pytest.fixture(scope="module")
def trained(dense_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    results = train(four(dense_folder, out), sources=SOURCES)
    return out, {result.name: result for result in results}


def weights(results, name):
    return load_file(results[name].folder / "model.safetensors")


def changed(before, after):
    return {key for key in after if key in before and not torch.equal(before[key], after[key])}


def test_each_stage_moves_its_parts_and_no_others(trained, dense_folder):
    _, results = trained
    start = load_file(dense_folder / "model.safetensors")
    align, vqa, grounding = (weights(results, name) for name in ("align", "vqa", "grounding"))
    assert {key.split(".")[0] for key in changed(start, align)} == {"projector"}
    moved = changed(align, vqa)
    assert {key.split(".")[0] for key in moved} == {"projector", "region_adapter", "language_model"}
    assert any("q_proj" in key for key in moved)
    assert not any("down_proj" in key for key in moved)
    assert {key.split(".")[0] for key in changed(vqa, grounding)} == {
        "mask_decoder",
        "seg_projector",
        "language_model",
    }


def test_the_mixture_is_made_of_its_stages(trained):
    out, results = trained
    mixture, vqa, grounding = (weights(results, name) for name in ("mixture", "vqa", "grounding"))
    layer = "language_model.model.layers.0.mlp"
    for expert, source in (("vqa", vqa), ("grounding", grounding)):  # down_proj got no adapter anywhere
        assert torch.equal(
            mixture[f"{layer}.experts.{expert}.down_proj.weight"], source[f"{layer}.down_proj.weight"]
        )
    shared = [key for key in mixture if key.startswith(("projector.", "vision_tower."))]
    assert shared
    assert all(torch.equal(mixture[key], vqa[key]) for key in shared)
    key = f"{layer}.experts.grounding.up_proj.weight"
    assert not torch.equal(mixture[key], grounding[f"{layer}.up_proj.weight"])  # its adapter learned on
    assert results["mixture"].routing.keys() == {layer, layer.replace("0", "1")}
    manifest = json.loads((out / "mixture" / "model" / "manifest.json").read_text())
    assert set(manifest["start"]) == {"vqa", "grounding"}


@pytest.mark.parametrize("name", list(STAGES))
def test_the_model_of_every_stage_answers(trained, name, pictures):
    model = MedPLIB.from_pretrained(trained[1][name].folder)
    assert (model.config.moe is not None) == (name == "mixture")
    assert model.ask(pictures[0], "What is this?").images[0].shape == pictures[0].shape


def test_closed_parts_have_the_same_hash_from_stage_to_stage(trained):
    hashes = [result.frozen for result in trained[1].values()]
    for part in ("vision_tower", "mask_encoder", "prompt_encoder"):
        assert len({table[part] for table in hashes}) == 1
    assert hashes[0]["mask_decoder"] == hashes[1]["mask_decoder"]
    assert "mask_decoder" not in hashes[2]


def test_a_closed_tensor_that_moves_is_found_before_the_model_is_written(dense_folder, tmp_path, monkeypatch):
    original = MedPLIB._losses

    def moving(self, *args):
        self.vision_tower.get_parameter(next(n for n, _ in self.vision_tower.named_parameters())).data += 1e-6
        return original(self, *args)

    monkeypatch.setattr(MedPLIB, "_losses", moving)
    with pytest.raises(CheckpointError, match=r"1 closed tensors are not what they were.*vision_tower"):
        train(four(dense_folder, tmp_path, stages={"align": STAGES["align"]}), sources=SOURCES)
    assert not (tmp_path / "align" / "model").exists()


def test_a_mixture_alone_takes_the_stages_that_are_there(trained, dense_folder, tmp_path):
    out, _ = trained
    lone = {"mixture": {**STAGES["mixture"], "experts": {"vqa": "vqa", "grounding": "grounding"}}}
    with pytest.raises(InputError, match=r"vqa, grounding is neither before it nor finished"):
        train(four(dense_folder, tmp_path, stages=lone), sources=SOURCES)
    (result,) = train(four(dense_folder, out, stages=lone), sources=SOURCES)  # finished before
    assert result.folder == out / "mixture" / "model"


def test_a_stage_run_alone_begins_with_the_one_before_it_in_the_file(trained, dense_folder, tmp_path):
    out, _ = trained
    alone = {"stages": {"vqa": STAGES["vqa"]}, "chain": list(STAGES)}
    assert start_folders(four(dense_folder, out, **alone), "vqa") == {"align": out / "align" / "model"}
    with pytest.raises(InputError, match=r"starts from 'align', which is not finished.*stages\.vqa\.start"):
        train(four(dense_folder, tmp_path, **alone), sources=SOURCES)
    first = four(dense_folder, tmp_path, stages={"align": STAGES["align"]}, chain=list(STAGES))
    assert start_folders(first, "align") == {}
    chosen = load_recipe("tiny", stages="vqa,mixture")
    assert chosen.before("vqa") == ["align"]
    assert chosen.before("mixture") == ["vqa"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "elsewhere"}, r"another model \('.*', now 'elsewhere'\)"),
        ({"samples_per_epoch": 3}, r"another samples_per_epoch \('None', now '3'\)"),
        (
            {"data": {"words": {"reader": "memory", "path": "b"}, "masks": {"reader": "memory"}}},
            r"data\.words",
        ),
        ({"augment": {}}, "another augment"),
    ],
)
def test_a_finished_stage_is_taken_by_the_recipe_that_made_it_alone(trained, dense_folder, changes, message):
    out, _ = trained
    again = train(four(dense_folder, out, workers=1, log_steps=5), sources=SOURCES)  # what changes nothing
    assert [result.name for result in again] == list(STAGES)
    with pytest.raises(CheckpointError, match=message):
        train(make_recipe(four(dense_folder, out).to_dict() | changes), sources=SOURCES)


def test_a_stage_built_on_one_that_was_trained_again_is_not_taken(dense_folder, tmp_path):
    two = {name: STAGES[name] for name in ("align", "vqa")}
    train(four(dense_folder, tmp_path, stages=two), sources=SOURCES)
    shutil.rmtree(tmp_path / "align")
    train(
        four(dense_folder, tmp_path, stages={"align": two["align"]}),
        sources=dict(SOURCES, words=records(8, "r")),
    )
    with pytest.raises(CheckpointError, match=r"another start \(align\)"):
        train(four(dense_folder, tmp_path, stages=two), sources=SOURCES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 3}, "batch_size 3 is no multiple of micro_batch 2"),
        ({"loss_weights": {"ce": 1.0, "dise": 1.0}}, "weighs dise"),
    ],
)
def test_what_is_wrong_with_the_last_stage_is_said_before_the_first_trains(
    dense_folder, tmp_path, wrong, message
):
    stages = {**STAGES, "mixture": {**STAGES["mixture"], **wrong}}
    with pytest.raises(InputError, match=message):
        train(four(dense_folder, tmp_path, stages=stages, micro_batch=2), sources=SOURCES)
    with pytest.raises(InputError, match="has no records"):
        train(four(dense_folder, tmp_path, micro_batch=2), sources={**SOURCES, "masks": []})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": "foo"}, r"no expert named 'foo'; it has grounding, vqa"),
        ({"load": {"foo": 1}}, r"load has no argument 'foo'\. Known: revision"),
        ({"load": {"clip": "folder"}}, "load: clip is for published layouts"),
        ({"load": {"quantize": "int5"}}, "quantize must be one of int8, int4, got 'int5'"),
        ({"load": {"quantize": "int4"}}, "int4 computes in bfloat16; leave dtype='float32' out"),
        ({"report_to": ["foo"]}, "report_to: foo is not supported"),
        ({"report_to": ["neptune"]}, r"report_to.*neptune.* is not"),
        ({"sample_steps": 2}, "validation names no source; name one"),
        ({"mask_weights": "nope.pth"}, r"mask_weights: there is no file 'nope\.pth'"),
        ({"moe": {"capacity_factor": "x"}}, r"moe: .*capacity_factor"),
        ({"stages": {"mine": {**STAGES["vqa"], "base": "vqa", "start": "nope"}}}, "No model named 'nope'"),
        ({"stages": {"vqa": STAGES["vqa"]}, "chain": list(STAGES)}, "'align', which is not finished"),
        ({"stages": {"mixture": STAGES["mixture"]}, "chain": list(STAGES)}, "makes its experts from"),
    ],
)
@pytest.mark.parametrize("begin", [rehearse, train])
def test_a_rehearsal_refuses_what_the_run_refuses(tiny_folder, tmp_path, begin, changes, message):
    recipe = four(tiny_folder, tmp_path, **{"stages": {"align": STAGES["align"]}} | changes)
    with pytest.raises(MedPLIBError, match=message):
        begin(recipe, sources=SOURCES)
    assert not any(tmp_path.iterdir())


def test_a_rehearsal_compares_with_finished_stages(trained, dense_folder, tmp_path):
    out, _ = trained
    longer = {**STAGES, "align": {**STAGES["align"], "steps": 3}}
    with pytest.raises(CheckpointError, match=r"align/model' was made with another stage \(steps\)"):
        rehearse(four(dense_folder, out, stages=longer), SOURCES)
    shutil.copytree(out / "vqa", tmp_path / "vqa")  # and the stage before it will be trained first
    pages = rehearse(four(dense_folder, tmp_path), SOURCES)
    assert [page.stage.name for page in pages] == list(STAGES)
    shutil.rmtree(tmp_path / "vqa" / "model")  # its snapshot stays
    with pytest.raises(CheckpointError, match=r"step-00000002' was made with another stage \(steps\)"):
        rehearse(
            four(dense_folder, tmp_path, stages={**STAGES, "vqa": {**STAGES["vqa"], "steps": 3}}), SOURCES
        )


def test_rehearsal_of_a_stage_after_the_mixture(trained, dense_folder):
    out, _ = trained
    after = {**STAGES, "more": {**STAGES["mixture"], "base": "mixture", "start": "mixture"}}
    table = rehearse(four(dense_folder, out, stages=after), SOURCES)[-1].table
    assert table.parameters == rehearse(four(dense_folder, out), SOURCES)[-1].table.parameters
    alone = four(dense_folder, out, stages={"more": {**after["more"], "start": None}}, chain=list(after))
    assert rehearse(alone, SOURCES)[0].table.parameters == table.parameters


def test_interpolation_leaves_what_is_equal_as_it_is():
    start, end = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for module in (start, end):
        module.weight.data = torch.tensor([[-0.0, 1.0]])
    end.bias.data, start.bias.data = torch.tensor([3.0]), torch.tensor([1.0])
    interpolate(end, start, 0.25)
    assert torch.signbit(end.weight).tolist() == [[True, False]]
    assert end.bias.item() == 1.5


def test_a_damaged_stage_is_not_built_upon(dense_folder, tmp_path):
    two = {name: STAGES[name] for name in ("align", "vqa")}
    train(four(dense_folder, tmp_path, stages={"align": two["align"]}), sources=SOURCES)
    weights_file = tmp_path / "align" / "model" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    later = {"vqa": {**two["vqa"], "start": "align"}, "align": two["align"]}
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        train(four(dense_folder, tmp_path, stages=later), sources=SOURCES)


def test_a_mixture_can_be_a_dense_start(tiny_folder, tmp_path):
    stages = {"align": STAGES["align"]}
    (result,) = train(four(tiny_folder, tmp_path, stages=stages, dense="vqa"), sources=SOURCES)
    found, start = (
        load_file(result.folder / "model.safetensors"),
        load_file(tiny_folder / "model.safetensors"),
    )
    name = "language_model.model.layers.1.mlp"
    assert torch.equal(found[f"{name}.up_proj.weight"], start[f"{name}.experts.vqa.up_proj.weight"])
    with pytest.raises(UnknownNameError, match="grunding"):
        train(four(tiny_folder, tmp_path / "other", stages=stages, dense="grunding"), sources=SOURCES)


def test_rehearsal_counts_what_the_run_will_train(trained, dense_folder):
    out, results = trained
    pages = {page.stage.name: page for page in rehearse(four(dense_folder, out, micro_batch=2), SOURCES)}
    for name, page in pages.items():
        counted = {row.part: (row.parameters, row.trainable) for row in page.table.rows}
        if results[name].table is not None:
            assert counted == {row.part: (row.parameters, row.trainable) for row in results[name].table.rows}
        assert page.steps == 2
        assert page.memory.total > page.memory.weights > 0
    grounding = pages["grounding"]
    assert grounding.rows[0].startswith("grounding: ")
    assert "[ Here is the <ref>liver</ref> <SEG>." in grounding.rows[0]
    assert "Segment the liver. ASSISTANT:[" in grounding.rows[0]
    assert "(region)" in " ".join(pages["vqa"].rows + pages["align"].rows)
    picture = np.array(grounding.picture)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_memory_is_reckoned_as_documented(dense_folder, tmp_path):
    (page,) = rehearse(four(dense_folder, tmp_path, stages={"align": STAGES["align"]}), SOURCES)
    trained, frozen = page.table.trainable, page.table.parameters - page.table.trainable
    assert page.memory.weights == 4 * (trained + frozen)
    assert (page.memory.gradients, page.memory.optimizer) == (4 * trained, 8 * trained)


def test_command_line_rehearses_and_writes_the_batch_as_a_picture(tmp_path):
    words = ["train", "tiny", "--stages", "align", "--dry-run", "--set", f"out={tmp_path}",
             "--set", "data.mini_vqa.options.per_image=1", "--set", "stages.align.batch_size=2",
             "--set", "micro_batch=2"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "steps   50 of 2 samples" in result.output
    assert "projector" in result.output
    assert Image.open(tmp_path / "dry-run" / "align.png").size[0] > 256
    assert [p.name for p in tmp_path.iterdir()] == ["dry-run"]


def test_command_line_names_a_misspelt_setting_in_one_line():
    result = CliRunner().invoke(app, ["train", "tiny", "--set", "stages.vqa.step=3"])
    assert result.exit_code == 2
    assert "stages.vqa.step" in result.output
    assert "Did you mean 'steps'" in result.output
    assert load_recipe("tiny").stage("vqa").steps


def test_command_line_trains(dense_folder, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
out: {tmp_path / "run"}
model: {dense_folder}
device: cpu
data: {{mini: {{reader: mini, options: {{tasks: [vqa], weights: {{FluoNuclei: 1.0}}}}}}}}
stages:
  align: {{data: [mini], steps: 1, batch_size: 1, precision: fp32}}
""")
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output
    assert "align: " in result.output
    assert "vision_tower=" in result.output
    again = CliRunner().invoke(app, ["train", str(recipe)])
    assert "done before" in again.output
