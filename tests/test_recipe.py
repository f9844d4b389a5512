"""Recipes: read, checked, changed by dotted keys; the shipped ones say what the stages say."""

import math

import pytest
import yaml

from medplib.errors import InputError, UnknownNameError
from medplib.stages import STAGES
from medplib.training.recipe import Recipe, load_recipe, make_recipe, read_setting, shipped_recipes

CONTENT = {"out": "runs/x", "data": {"some": {"reader": "mini"}}, "stages": {"vqa": {"data": ["some"]}}}


def changed(**changes):
    return {**CONTENT, **changes}


def test_published_recipe_has_the_published_stages():
    recipe = load_recipe("published-7b")
    assert list(recipe.stages) == list(STAGES)
    for name, stage in STAGES.items():
        assert recipe.stage(name) == stage
        assert set(recipe.sources(name)) == set(stage.data)  # each data set is read from somewhere
    assert recipe.experts("mixture") == {"grounding": "grounding", "vqa": "vqa"}
    assert recipe.experts("vqa") == {}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe(**yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    for stage in recipe.stages:
        recipe.sources(stage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(micro_bach=2), r"no setting 'micro_bach'.*Did you mean 'micro_batch'"),
        (changed(micro_batch="two"), r"micro_batch"),
        (changed(micro_batch=0), r"micro_batch must be at least 1, got 0"),
        (changed(stages={"vqa": {"learning_rat": 1}}), r"vqa\.learning_rat.*Did you mean 'learning_rate'"),
        (changed(stages={"vqa": {"learning_rate": "fast"}}), r"vqa\.learning_rate must be.*'fast'"),
        (changed(stages={"vqa": {"learning_rate": "nan"}}), r"vqa\.learning_rate must be a finite number"),
        (changed(stages={"vqa": {"epochs": math.inf}}), r"vqa\.epochs must be a finite number, got inf"),
        (changed(stages={"vqa": {"learning_rate": -1.0}}), r"learning_rate must be a finite number above 0"),
        (changed(stages={"mine": {}}), r"stages\.mine is no published stage"),
        (changed(stages={"vqa": {"data": ["sme"]}}), r"'sme', a source that data lacks. Did you mean 'some'"),
        (changed(stages={"vqa": {"lora": {"language_model": {"rnk": 2}}}}), r"lora\.language_model\.rnk"),
        (changed(stages={}), r"stages is empty"),
        (changed(data={"some": {"path": "x"}}), r"data\.some needs reader"),
        (changed(data={"some": {"reader": "mini", "weight": 0}}), r"data\.some: weight must be above 0"),
        (changed(strategy="zero"), r"strategy"),
        (changed(augment=True), r"augment"),
        ({"out": "x"}, r"needs stages, data"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_place(content, message):
    with pytest.raises((InputError, UnknownNameError), match=message):
        make_recipe(content)


def test_a_stage_without_a_source_says_what_it_wants():
    with pytest.raises(InputError, match=r"'vqa' learns from mecovqa_complex.*data has only some"):
        make_recipe(changed(stages={"vqa": {}})).sources("vqa")


def test_settings_are_changed_by_dotted_keys_and_checked():
    settings = dict(
        map(
            read_setting,
            ["stages.vqa.steps=20", "stages.vqa.learning_rate=1e-5", "out=/tmp/x", "moe.top_k=2"],
        )
    )
    recipe = load_recipe("tiny", settings, stages="align,vqa")
    assert list(recipe.stages) == ["align", "vqa"]
    assert recipe.stage("vqa").steps == 20
    assert recipe.stage("vqa").learning_rate == 1e-5
    assert recipe.moe == {"top_k": 2}
    with pytest.raises(InputError, match="key=value"):
        read_setting("stages.vqa.steps")
    with pytest.raises(InputError, match=r"stages\.vqa.*steps"):
        load_recipe("tiny", {"stages.vqa.steps": "many"})
    with pytest.raises(InputError, match=r"out is 'runs/tiny', which has nothing inside"):
        load_recipe("tiny", {"out.folder": 1})
    with pytest.raises(InputError, match=r"stages\.vqa is a table"):
        load_recipe("tiny", {"stages.vqa": 3})
    with pytest.raises(UnknownNameError, match=r"stages\.foo is no published stage"):
        load_recipe("tiny", {"stages.foo.steps": 1}, stages="align")
    with pytest.raises(UnknownNameError, match="Did you mean 'align'"):
        load_recipe("tiny", stages="alig")


def test_settings_given_from_python_stay_as_they_are():
    changes = {"data.qa": {"reader": "folder", "path": "x"}, "data.qa.weight": 2.0}
    assert load_recipe("lora", changes).data["qa"].weight == 2.0
    assert changes == {"data.qa": {"reader": "folder", "path": "x"}, "data.qa.weight": 2.0}


def test_an_unknown_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(UnknownNameError, match=r"no recipe file 'tinny'.*Did you mean 'tiny'"):
        load_recipe("tinny")
    bad = tmp_path / "bad.yaml"
    bad.write_text("out: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(bad)
    bad.write_text("- a")
    with pytest.raises(InputError, match="mapping"):
        load_recipe(bad)
