"""Bad input to a loaded model: one clear error each, naming the value and the remedy, and nothing changed."""

import numpy as np
import pytest
import torch
from PIL import Image

from medplib import Box, InputError, Mask, MedPLIB, MedPLIBError, Point
from medplib.processing import Sample

GOOD = np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8)


def files(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("no picture")
    Image.fromarray(GOOD).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:200])
    Image.fromarray(GOOD[:1, :1]).save(folder / "one.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def unchanged(tiny_model):
    """The model's weights, mode, processor and the random generator are the same after the test."""
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    random, processor = torch.get_rng_state(), tiny_model.processor
    yield
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert tiny_model.processor is processor
    assert not tiny_model.training


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("absent.png", "absent.png' does not exist. Check the path"),
        ("empty.png", r"empty.png' is empty \(0 bytes\). Save or copy it again"),
        ("words.png", "words.png' is not a readable picture. Readable: PNG"),
        ("cut.png", "cut.png' is damaged or cut short"),
        ("one.png", r"one.png' is 1 x 1 pixels .*at least 8"),
        (GOOD[:1, :1], "is 1 x 1 pixels .*at least 8"),
        (np.full((48, 60), np.nan), "2880 values that are NaN or infinite; replace them"),
        (GOOD.astype(object), "no numbers that can be shown. Use bool, integers or floats"),
        (GOOD.astype(complex), "no numbers that can be shown"),
        (np.zeros((48, 60, 5), np.uint8), "must have 1, 3 or 4 channels"),
        (torch.full((3, 48, 60), torch.inf), "NaN or infinite"),
        (None, "An image must be a path, bytes, a Pillow image, a numpy array or a .*, got NoneType"),
        (7, "An image must be a path.* got int"),
        ("https://example.org/x.png", "is an address; nothing is fetched"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchanged")
def test_an_unusable_image_is_named(tiny_model, folder, image, message):
    if isinstance(image, str) and "://" not in image:
        image = folder / image
    for act in (tiny_model.ask, tiny_model.segment):
        with pytest.raises(InputError, match=message):
            act(image, "What is it?")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([Point(-1, 5)], "lies outside the image.*needs 0 <= x < 60 and 0 <= y < 48"),
        ([Point(5, 48)], "lies outside the image"),
        ([Point(np.nan, 5)], "x must be a finite number"),
        ([Point("5", 5)], "x must be a number of pixels, got '5'"),
        ([Point(5, 5, label=2)], r"label must be 1 \(foreground\) or 0"),
        ([Box(5, 5, 61, 20)], "reaches outside the image"),
        ([Box(20, 5, 10, 20)], "has no area; give x0 < x1"),
        ([Mask(np.zeros((48, 60), bool))], "The mask is empty"),
        ([Mask(np.ones((60, 48), bool))], "draw the mask on the original image"),
        ([Mask(np.full((48, 60), 0.5))], "cut it at a threshold first"),
        ([Mask("absent.png")], "absent.png' cannot be read"),
        ([(1, 2)], "must be a Point, Box or Mask, got tuple"),
        ([Point(5, 5)], "2 <region> but 1 prompts"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_an_unusable_prompt_is_named(tiny_model, prompts, message):
    question = "Compare <region> and <region>." if "<region>" in message else "What is in <region>?"
    with pytest.raises(InputError, match=message):
        tiny_model.ask(GOOD, question, prompts=prompts)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "The question is ''; write at least one word"),
        (" \t\n", "write at least one word"),
        ("why " * 2500, "has 10000 characters; the limit is 4000. Shorten it"),
        (None, "The question is None"),
        (b"What?", "The question is b'What"),
        ("ä" * 600, "takes .* tokens .*reads at most 512 together. Shorten the question"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_an_unusable_question_is_named(tiny_model, question, message):
    with pytest.raises(InputError, match=message):
        tiny_model.ask(GOOD, question)


@pytest.mark.parametrize("target", ["", [], ["lung", ""], [3], None, 5])
@pytest.mark.usefixtures("unchanged")
def test_segment_wants_names(tiny_model, target):
    with pytest.raises(InputError, match="Name what to segment, for example 'the right lung'"):
        tiny_model.segment(GOOD, target)


@pytest.mark.parametrize("number", [0, -3, 2.5, None, "many", True])
@pytest.mark.usefixtures("unchanged")
def test_max_new_tokens_is_a_positive_number(tiny_model, number):
    with pytest.raises(InputError, match="max_new_tokens must be a whole number of at least 1"):
        tiny_model.ask(GOOD, "What?", max_new_tokens=number)


@pytest.mark.usefixtures("unchanged")
def test_questions_that_are_answered_already_are_refused(tiny_model):
    with pytest.raises(InputError, match="has an answer already"):
        tiny_model.answer([Sample([GOOD], [("What?", "A lung.")])])
    with pytest.raises(InputError, match="at least one sample"):
        tiny_model.answer([])
    with pytest.raises(InputError, match=r"turns are pairs \(question, answer\)"):
        tiny_model.ask(GOOD, "What?", history=[("only a question",)])


def test_a_model_in_training_or_without_a_processor_says_so(new_model):
    model = new_model()
    with pytest.raises(InputError, match=r"call model\.eval\(\)"):
        model.train().ask(GOOD, "What?")
    model.eval().processor = None
    with pytest.raises(InputError, match="no processor; load it with from_pretrained"):
        model.ask(GOOD, "What?")


def test_an_unknown_model_is_named():
    with pytest.raises(MedPLIBError, match=r"No model named 'medplib-huge'\. Did you mean 'medplib-tiny'"):
        MedPLIB.from_pretrained("medplib-huge")


def test_good_input_still_works(tiny_model, folder):
    answer = tiny_model.ask(
        folder / "good.png", "What is in <region>?", prompts=Point(5, 5), max_new_tokens=3
    )
    assert answer.prompts == (Point(5, 5),)
    assert np.array_equal(answer.images[0], GOOD)
    answer = tiny_model.segment([GOOD, folder / "good.png"], ["lung", "the heart."], max_new_tokens=3)
    assert answer.question == "Segment the lung and the heart."
    assert len(answer.images) == 2
    words = tiny_model.ask([], "Hello?", history=[("Who?", "Me.")], max_new_tokens=3)
    assert words.images == []
    assert words.findings == []


def test_the_answer_keeps_its_prompts_with_their_images_and_can_be_gone_on_from(tiny_model, pictures):
    sample = Sample(pictures[:2], [("A?", None)], [Point(1, 1), Point(3, 60)], prompt_images=[0, 1])
    (answer,) = tiny_model.answer([sample], max_new_tokens=2)
    assert answer.prompts == (Point(1, 1), Point(3, 60))
    assert answer.prompt_images == (0, 1)
    assert answer.to_dict()["prompts"][1] == {"type": "point", "image": 1, "x": 3, "y": 60, "label": 1}
    for image, point in enumerate(answer.prompts):
        drawn = np.argwhere((np.asarray(answer.overlay(image)) != answer.images[image]).any(2))
        assert (abs(drawn - (point.y, point.x)) <= 5).all()
    further = tiny_model.ask(answer, "And <region>?", [Point(2, 2)], max_new_tokens=2)
    assert further.prompts == (Point(1, 1), Point(3, 60), Point(2, 2))
    assert further.prompt_images == (0, 1, 0)


@pytest.mark.parametrize("prompts", [5, "box", {"a": 1}])
def test_prompts_that_are_no_list_are_named(tiny_model, pictures, prompts):
    with pytest.raises(InputError, match=f"prompts must be a list, got {type(prompts).__name__}"):
        tiny_model.ask(pictures[0], "What?", prompts)


@pytest.mark.parametrize("history", [5, "abc", [5], ["ab"], [("a", "b", "c")]])
def test_a_history_that_is_no_list_of_pairs_is_named(tiny_model, pictures, history):
    with pytest.raises(InputError, match=r"history must be a list|turns are pairs"):
        tiny_model.ask(pictures[0], "What?", history=history)


def test_no_prompts_and_no_history_may_be_none(tiny_model, pictures):
    answer = tiny_model.ask(pictures[0], "What?", None, history=None, max_new_tokens=2)
    assert answer.prompts == ()
    assert len(answer.history) == 1


def test_a_seed_is_any_whole_number_of_64_bits(tiny_model, pictures, tmp_path):
    answer = tiny_model.ask(pictures[0], "What?", seed=np.int64(3), do_sample=True, max_new_tokens=2)
    answer.save(tmp_path / "answer")
    assert type(answer.seed) is int
    with pytest.raises(InputError, match=f"seed must be a whole number of 64 bits or None, got {2**64}"):
        tiny_model.ask(pictures[0], "What?", seed=2**64, do_sample=True)


def test_an_answer_keeps_the_mask_it_was_asked_about(tiny_model, pictures, tmp_path):
    region = np.zeros(pictures[0].shape[:2], bool)
    region[5:20, 5:20] = True
    file = tmp_path / "region.png"
    Image.fromarray(region).save(file)
    answer = tiny_model.ask(pictures[0], "What?", [Mask(file), Mask(region)], max_new_tokens=2)
    file.unlink()
    region[:] = True
    answer.save(tmp_path / "answer")
    assert [prompt.mask.sum() for prompt in answer.prompts] == [225, 225]
    assert len(tiny_model.ask(answer, "And now?", max_new_tokens=2).prompts) == 2
