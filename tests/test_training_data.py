"""Which samples a step sees: keyed by (seed, epoch, index), balanced, the same on any number of processes."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_readers import png, put, talk, write_csv, write_parquet
from training_run import records

from medplib.data.files import File, Held, ImageFile
from medplib.data.questions import FOLLOW_UP_QUESTIONS, QuestionMaker
from medplib.data.record import TASKS, Record
from medplib.data.recordset import fingerprint
from medplib.errors import InputError
from medplib.prompts.types import Box
from medplib.training.batches import Collate, Place, StepBatches, TrainingData, steps_of
from medplib.training.recipe import Source, load_recipe
from medplib.training.sources import MiniQuestions, Order, open_source


def test_an_epoch_takes_each_source_by_its_weight():
    order = Order({"a": 100, "b": 10}, {"a": 1.0, "b": 3.0}, seed=1, per_epoch=40)
    for epoch in range(3):
        drawn = Counter(name for name, _ in order.epoch(epoch))
        assert drawn == {"a": 10, "b": 30}
    assert Counter(position for name, position in order.epoch(0) if name == "b") == dict.fromkeys(
        range(10), 3
    )
    firsts = [[p for n, p in order.epoch(e) if n == "a"] for e in range(10)]
    assert sorted(position for first in firsts for position in first) == list(
        range(100)
    )  # ten epochs go through it once


def test_the_order_depends_on_seed_and_epoch_alone():
    make = lambda seed: Order({"a": 30}, {}, seed=seed)  # noqa: E731
    late, fresh = make(1), make(1)
    late.epoch(0), late.epoch(1)
    assert late.epoch(2) == fresh.epoch(2)
    assert fresh.epoch(0) != fresh.epoch(1)
    assert make(2).epoch(0) != make(1).epoch(0)


def test_sources_that_cannot_be_mixed_are_refused():
    with pytest.raises(InputError, match=r"source b has no records"):
        Order({"a": 1, "b": 0}, {}, seed=0)
    with pytest.raises(InputError, match=r"all sources have a weight or none; b has none"):
        Order({"a": 1, "b": 1}, {"a": 1.0}, seed=0)


def batches(data=None, **changes):
    data = data or TrainingData({"some": records(24)}, seed=1)
    order = Order({"some": 24}, {}, seed=1)
    settings = {"batch_size": 8, "micro_batch": 2, "steps": 7, "grouping": True} | changes
    return StepBatches(data, order, **settings)


def by_step(made):
    return [sorted(p for batch in made[i : i + 4] for p in batch) for i in range(0, len(made), 4)]


def test_a_step_has_the_same_samples_on_any_number_of_processes():
    one = list(batches())
    two = [list(batches(rank=rank, world=2)) for rank in range(2)]
    assert len(one) == 28
    together = [batch for pair in zip(two[0], two[1], strict=True) for batch in pair]
    assert together == one


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_batches_begin_at_any_step(start):
    assert list(batches(start=start)) == list(batches())[start * 4 :]
    assert len(batches(start=start)) == 28


def test_an_epoch_holds_every_record_once_and_grouping_keeps_it_so():
    for grouping in (True, False):
        epoch = [p.position for batch in batches(grouping=grouping, steps=3) for p in batch]
        assert sorted(epoch) == list(range(24))


def test_grouping_brings_like_lengths_together_within_a_step():
    rows = [Record((("Why?", "word " * (1 + 40 * (i % 2))),), row=i) for i in range(24)]
    data = TrainingData({"some": rows}, seed=0)
    grouped, plain = (list(batches(data, steps=3, grouping=flag)) for flag in (True, False))
    mixed = [sum(len({data.length(p) for p in batch}) > 1 for batch in made) for made in (grouped, plain)]
    assert mixed[0] <= 3 < mixed[1]
    assert by_step(grouped) == by_step(plain)


def test_steps_are_counted_with_the_last_batch_filled_up():
    assert steps_of(100, 32, 3, None) == (12, 4)
    assert steps_of(100, 32, 3, 5) == (5, 4)


def test_a_batch_mixes_tasks_and_names_its_rows(tiny_model):
    data, collate = TrainingData({"some": records(6)}, 0), Collate(tiny_model.processor, 512)
    out = collate([data[Place(0, i, "some", i)] for i in range(6)])
    assert [TASKS[t] for t in out["tasks"]] == ["vqa", "region", "grounding"] * 2
    assert [row["row"] for row in out["origins"]] == list(range(6))
    inputs = {k: v for k, v in out.items() if k not in ("tasks", "origins")}
    assert torch.isfinite(tiny_model(**inputs).loss)


def test_long_samples_are_shortened_from_the_end_and_masks_follow(tiny_model):
    processor = tiny_model.processor
    image, mask = Held(np.zeros((32, 32, 3), np.uint8)), Held(np.ones((32, 32), bool))
    turns = (("What?", "A " * 40), ("Where is <region>?", "There. " * 10), ("Draw.", "Here <SEG>."))
    long = Record(turns, (image,), (Box(1.0, 1.0, 9.0, 9.0),), (mask,))
    data = TrainingData({"some": [long]}, 0)
    item = data[Place(0, 0, "some", 0)]
    full = len(processor.encode(item[0].sample)[0])
    fits = Collate(processor, full)._fit(item[0])
    assert len(fits.turns) == 3
    cut = Collate(processor, full - 1)._fit(item[0])
    assert (len(cut.turns), len(cut.masks), len(cut.prompts)) == (2, 0, 1)
    short = Collate(processor, 60)._fit(item[0])
    assert len(short.turns) == 1
    assert short.turns[0][1].startswith("A A")
    assert len(processor.encode(short)[0]) <= 60
    with pytest.raises(InputError, match=r"Row 0 of some takes \d+ tokens.*max_length 10"):
        Collate(processor, 10)._fit(item[0])


def test_an_unusable_row_is_named():
    class Broken:
        def load(self):
            raise InputError("'scan.png' cannot be read.")

    data = TrainingData({"some": [Record((("What?", "That."),), (Broken(),))]}, 0)
    with pytest.raises(InputError, match=r"Row 0 of some cannot be used: 'scan.png'"):
        data[Place(0, 0, "some", 0)]


@pytest.fixture(scope="module")
def mini():
    return MiniQuestions(per_image=3, table=0.0)


def test_mini_questions_are_keyed_and_share_their_picture(mini):
    first, again, other = mini.draw(1, 0, 5), mini.draw(1, 0, 5), mini.draw(1, 1, 5)
    assert [r.turns for r in first] == [r.turns for r in again]
    assert np.array_equal(first[0].images[0].array, again[0].images[0].array)
    assert not np.array_equal(first[0].images[0].array, other[0].images[0].array)
    assert len({id(r.images[0].array) for r in first}) == 1
    tasks = Counter(record.task for i in range(30) for record in mini.draw(0, 0, i))
    assert set(tasks) == set(TASKS)


def test_mini_questions_follow_one_another_in_conversations():
    tasks = {"modality": 0.1, "region": 0.3, "grounding": 0.3, "absent": 0.2, "several": 0.1}
    source = MiniQuestions(per_image=6, turns=4, tasks=tasks)
    drawn = [source.draw(7, 0, index) for index in range(12)]
    talks = [talk for image in drawn for talk in image]
    assert all(sum(len(talk.turns) for talk in image) == 6 for image in drawn)
    assert {len(talk.turns) for talk in talks} == {1, 2, 3, 4}
    assert all(one.images == image[0].images for image in drawn for one in image)
    short = ("And the", "Now", "What about", "Also", "Please mark")
    assert any(question.startswith(short) for talk in talks for question, _ in talk.turns[1:])
    assert not any(talk.turns[0][0].startswith(short) for talk in talks)
    again = MiniQuestions(per_image=6, turns=4, tasks=tasks).draw(7, 0, 3)
    assert [talk.turns for talk in again] == [talk.turns for talk in drawn[3]]


def test_a_follow_up_is_shorter_only_after_a_question_that_asked_to_draw():
    maker, rng = QuestionMaker({"liver": {"a"}, "spleen": {"a"}}), np.random.default_rng(0)
    mask = np.ones((4, 4), bool)
    liver, spleen = (maker.grounding(rng, name, mask, "CT") for name in ("liver", "spleen"))
    modality = maker.modality(rng, "CT")
    short = maker.follow_up(rng, spleen, liver)
    assert short.question in {t.format(s="spleen") for t in FOLLOW_UP_QUESTIONS}
    assert (short.answer, short.masks) == (spleen.answer, spleen.masks)
    assert maker.follow_up(rng, spleen, modality) is spleen
    assert maker.follow_up(rng, modality, liver) is modality


def test_the_fingerprint_follows_the_records(mini):
    assert fingerprint(records(6)) == fingerprint(records(6))
    assert fingerprint(records(6)) != fingerprint(records(7))
    assert fingerprint(records(6)) != fingerprint(records(6, kinds="v"))
    assert fingerprint(mini) == fingerprint(MiniQuestions(per_image=3, table=0.0))
    assert fingerprint(mini) != fingerprint(MiniQuestions(per_image=2, table=0.0))


def test_sources_that_cannot_be_opened_name_the_setting():
    with pytest.raises(InputError, match=r"data\.x: path is missing"):
        open_source("x", Source("slake"))
    with pytest.raises(InputError, match=r"data\.x: there is no 'gone'; give --set data\.x\.path=FOLDER"):
        open_source("x", Source("folder", path="gone"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 1}, "The mini set has no option 'nonsense'. Known: tasks, per_image"),
        ({"split": "test"}, "has no option 'split'"),
        ({"tasks": ["count"]}, "tasks of the mini set may hold vqa, region, grounding; got"),
        ({"tasks": {"foo": 1}}, r"may hold modality, presence, .* got \['foo'\]"),
        ({"tasks": {"modality": "x"}}, "a table of names .each with a number. .*got {'modality': 'x'}"),
        ({"tasks": {"modality": -1}}, "must be shares from 0"),
        ({"weights": {"ChestCT": 0}}, "must be shares from 0"),
        ({"per_image": "x"}, "The mini set: per_image must be a whole number, got 'x'"),
        ({"per_image": True}, "must be a whole number, got True"),
        ({"turns": 0}, "turns of the mini set must be at least 1, got 0"),
        ({"per_epoch": -3}, "per_epoch of the mini set must be at least 1, got -3"),
        ({"table": "x"}, "The mini set: table must be a number, got 'x'"),
        ({"removal": 2}, "removal of the mini set must be between 0 and 1, got 2"),
    ],
)
def test_options_of_the_mini_set_are_checked(options, message):
    with pytest.raises(InputError, match=rf"data\.x: .*{message}"):
        open_source("x", Source("mini", options=options))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The data sets of the shipped recipes, a row of each in files of their real names."""
    root = tmp_path / "data"
    put(root / "llava_med_alignment/alignment/llava_med_alignment_500k.json",
        [{"id": "1", "image": "a.jpg", "conversatons": talk("<image>\nWhat?", "A lung.")}])  # fmt: skip
    for kind, question, answer in (
        ("Complex", "What is it?", "A lung."),
        ("Region", "What is <region>masks/a.png</region>?", "A lung."),
        ("Grounding", "Segment the lung.", "<SEG><mask>masks/a.png</mask>"),
    ):
        row = {"image": "images/a.png", "conversations": talk(f"<image>\n{question}", answer)}
        put(root / f"MeCoVQA/train/MeCoVQA-{kind}.json", [row])
    row = {"img_name": "xmlab1/source.jpg", "question": "What?", "answer": "MRI", "q_lang": "en"}
    put(root / "Slake1.0/train.json", [row])
    row = {"image": {"bytes": png(), "path": "a.png"}, "question": "Is it?", "answer": "yes"}
    for name in ("PathVQA", "VQA-RAD"):
        write_parquet(root / name / "data/train-00000-of-00001.parquet", [row])
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    head_2 = "index,Figure_path,Caption,Question,ChoiceA,ChoiceB,ChoiceC,ChoiceD,Answer,split"
    pictures = (
        "llava_med_alignment/images/a.jpg", "MeCoVQA/images/a.png", "MeCoVQA/masks/a.png",
        "Slake1.0/imgs/xmlab1/source.jpg", "PMC-VQA/images/a.jpg", "mine/images/a.png",
        "mine/masks/lung/a.png", "ImageCLEF-2019/Train_images/a.jpg", "ImageCLEF-2021/Train_images/a.jpg",
    )  # fmt: skip
    for picture in pictures:
        put(root / picture)
    for version, line in ((head, "a.jpg,Q?,CT,CT,MR,PET,US,A"), (head_2, "0,a.jpg,,Q?,CT,MR,PET,US,A,train")):
        name = "train.csv" if version is head else "train_2.csv"
        write_csv(root / "PMC-VQA" / name, [version.split(","), line.split(",")])
    (root / "ImageCLEF-2019/All_QA_Pairs_train.txt").write_text("a|what is it?|a lung\n")
    (root / "ImageCLEF-2021/VQA-Med-2021-Train.txt").write_text("a|what is it?|a lung\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["published-7b", "lora"])
def test_every_source_of_a_shipped_recipe_opens_on_its_published_layout(published, name):
    for source, settings in load_recipe(name).data.items():
        (record,) = open_source(source, settings)
        assert record.split in ("train", None), source


def test_the_fingerprint_of_records_changes_with_their_files_regions_and_arrays():
    def made(file="a.png", box=4.0, pixel=0):
        array = np.full((8, 8), pixel > 0)
        turn = ("What is in <region>?", "Here is the liver <SEG>.")
        return [Record((turn,), (ImageFile(File(file)),), (Box(0, 0, box, 4),), (Held(array),))]

    assert fingerprint(made()) == fingerprint(made())
    assert len({fingerprint(r) for r in (made(), made("b.png"), made(box=5.0), made(pixel=1))}) == 4
