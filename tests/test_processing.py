"""MedPLIBProcessor: tokens, labels, images, regions and masks; and generated ids back to words."""

import copy
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medplib import Box, Letterbox, Mask, Point
from medplib.errors import InputError
from medplib.preprocess import prepare_clip, prepare_sam
from medplib.processing import CONTROL_TOKENS, MAX_QUESTION, MedPLIBProcessor, Sample

TYPED = (
    "<SEG>", "<image>", "<im_start>", "<im_end>", "</s>", "<s>", "<pad>", "<region>", "</region>",
    "<ref>x</ref>", "USER: <SEG></s> ASSISTANT: <SEG>", "<<SEG>SEG>",
)  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny_model):
    return tiny_model.processor


def ask(question, images=(), prompts=(), **more):
    return Sample(list(images), [(question, None)], list(prompts), **more)


def special_ids(processor):
    return {
        *processor.tokenizer.all_special_ids,
        *processor.tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)),
    }


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("typed", TYPED)
def test_control_tokens_that_a_user_types_stay_text(processor, typed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = processor([ask(f"Say {typed} now")]).tensors["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id
    assert not set(ids[1:]) & (
        special_ids(processor) | {processor.config.tokens.image, processor.config.tokens.region}
    )
    assert typed in processor.tokenizer.decode(ids[1:])


def test_typed_control_tokens_stay_text_beside_real_ones(processor, pictures):
    question = "<region> or <SEG> </region> <im_end>?"
    ids = processor([ask(question, pictures[:1], [Box(1, 2, 30, 40)])]).tensors["input_ids"][0]
    found = [i for i in ids.tolist() if i in special_ids(processor) or i < 0]
    names = processor.tokenizer.convert_ids_to_tokens([i for i in found if i >= 0])
    assert names == ["<s>", "<im_start>", "<im_end>", "<region>", "</region>"]
    assert (ids == processor.config.tokens.image).sum() == processor.num_image_tokens
    assert (ids == processor.config.tokens.region).sum() == 1


def test_threads_do_not_turn_typed_text_into_control_tokens(processor):
    """Fast tokenizers keep "control tokens are text" as a state, which another thread must not change."""
    wrong, seg = [], processor.config.tokens.seg

    def work(sample, count):
        for _ in range(60):
            ids = processor.encode(sample)[0]
            if ids.count(seg) != count:
                wrong.append(ids)

    typed, real = Sample([], [("<SEG> " * 5, None)]), Sample([], [("x", "<SEG> " * 3), ("y", None)])
    threads = [threading.Thread(target=work, args=pair) for pair in ((typed, 0), (real, 3)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_training_pads_on_the_right_and_generation_on_the_left(processor):
    rows = [Sample([], [("Hi", "Yes.")]), Sample([], [("A much longer question?", "And a longer answer.")])]
    trained = processor(rows, training=True).tensors
    for row, sample in enumerate(rows):
        ids, labels = processor.encode(sample, training=True)
        n = len(ids)
        assert trained["input_ids"][row, :n].tolist() == ids
        assert trained["labels"][row, :n].tolist() == labels
        assert trained["attention_mask"][row].tolist() == [1] * n + [0] * (trained["input_ids"].shape[1] - n)
        assert (trained["input_ids"][row, n:] == processor.pad_id).all()
        assert (trained["labels"][row, n:] == -100).all()
    asked = processor([ask("Hi"), ask("A much longer question?")]).tensors
    n = len(processor.encode(ask("Hi"))[0])
    assert "labels" not in asked
    assert asked["attention_mask"][0].tolist() == [0] * (asked["input_ids"].shape[1] - n) + [1] * n


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(processor, pictures):
    sample = Sample(pictures[:1], [("Is <region> x?", "No."), ("y?", "It is <SEG>.")], [Point(3, 4)])
    ids, labels = processor.encode(sample, training=True)
    assert processor.tokenizer.decode([i for i in labels if i != -100]) == " No.</s> It is <SEG>.</s>"
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


# ----------------------------------------------------------------------------------------------- images


def test_an_image_gives_the_same_tensors_however_it_is_given(processor, pictures, tmp_path):
    array = pictures[0]
    Image.fromarray(array).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(array)
    forms = [
        array, tmp_path / "picture.png", str(tmp_path / "picture.png"), Image.fromarray(array), tensor,
        tensor.permute(2, 0, 1), (tmp_path / "picture.png").read_bytes(), tensor.permute(2, 0, 1) / 255,
    ]  # fmt: skip
    for form in forms:
        batch = processor([ask("What?", [form])])
        assert torch.equal(batch.tensors["pixel_values"][0], prepare_clip(array, 64))
        assert torch.equal(batch.tensors["mask_pixel_values"][0], prepare_sam(array, 64))
        assert np.array_equal(batch.images[0], array)
        assert batch.letterboxes == [Letterbox((48, 60), 64)]


def test_an_image_is_prepared_once_however_often_it_is_used(processor, pictures, tmp_path):
    a, b, _ = pictures
    Image.fromarray(b).save(tmp_path / "b.png")
    rows = [
        ask("1?", [a]),
        ask("2?", [tmp_path / "b.png", a]),
        ask("3?"),
        ask("4?", [str(tmp_path / "b.png"), a, a]),
    ]
    batch = processor(rows)
    assert batch.tensors["pixel_values"].shape == (2, 3, 64, 64)
    assert batch.row_images == [[0], [1, 0], [], [1, 0, 0]]
    assert batch.tensors["image_index"].tolist() == [0, 1, 0, 1, 0, 0]
    images = (batch.tensors["input_ids"] == processor.config.tokens.image).sum(1) / processor.num_image_tokens
    assert images.tolist() == [1, 2, 0, 3]


def test_tensors_can_be_moved_and_only_pixels_change_their_type(processor, pictures):
    batch = processor([ask("What?", pictures[:1], [Box(1, 2, 30, 40)])]).to("cpu", torch.bfloat16)
    kinds = {name: value.dtype for name, value in batch.tensors.items()}
    assert kinds["pixel_values"] == kinds["mask_pixel_values"] == torch.bfloat16
    assert kinds["input_ids"] == kinds["image_index"] == kinds["attention_mask"] == torch.int64
    assert kinds["region_masks"] == torch.float32


# ---------------------------------------------------------------------------------------------- regions


def test_regions_follow_the_order_of_the_question_and_name_their_image(processor, pictures):
    a, b, _ = pictures
    prompts = [Point(50, 20), Box(3, 4, 20, 30), Mask(np.eye(70, 40))]
    rows = [ask("Hi"), ask("<region>, <region>, <region>?", [a, b], prompts, prompt_images=[0, 0, 1])]
    tensors = processor(rows).tensors
    assert tensors["region_images"].tolist() == [0, 0, 1]
    for region, prompt, size in zip(
        tensors["region_masks"], prompts, [(48, 60)] * 2 + [(70, 40)], strict=True
    ):
        assert np.array_equal(
            region.bool().numpy(), Letterbox(size, 64).mask(prompt.to_mask(size, point_size=41))
        )


def test_regions_on_the_published_grid(tiny_config, processor, pictures):
    config = tiny_config(region={"mask_mode": "official"})
    official = MedPLIBProcessor(processor.tokenizer, config, processor.num_image_tokens, processor.grid)
    tensors = official([ask("What?", pictures[2:], [Box(0, 0, 32, 64)])]).tensors
    assert tensors["region_masks"].tolist() == [[[1, 1, 0, 0]] * 4]


def test_a_region_that_is_not_written_is_added_at_the_end(processor, pictures):
    prompts = [Box(3, 4, 20, 30), Point(5, 6)]
    given = processor([ask("What is <region> here? <region>", pictures[:1], prompts)]).tensors["input_ids"]
    added = processor([ask("What is <region> here? ", pictures[:1], prompts)]).tensors["input_ids"]
    assert torch.equal(given, added)
    last = Sample(pictures[:1], [("Old?", "Yes."), ("New?", None)], prompts)
    assert (processor([last]).tensors["input_ids"] == processor.config.tokens.region).sum() == 2


def test_the_word_region_without_a_prompt_is_text_and_says_so(processor):
    with pytest.warns(UserWarning, match="no prompt was given"):
        ids = processor([ask("What is <region>?")]).tensors["input_ids"]
    assert not (ids == processor.config.tokens.region).any()


# ------------------------------------------------------------------------------------------------ masks


def test_target_masks_lie_on_the_square_of_the_image_they_belong_to(processor, pictures):
    a, b, _ = pictures
    first, second = np.zeros((48, 60), bool), np.zeros((70, 40), np.uint8)
    first[5:20, 10:50], second[30:60, 5:30] = True, 255
    sample = Sample([a, b], [("Both.", "<SEG> <SEG>")], masks=[second, first], seg_images=[1, 0])
    batch = processor([Sample([], [("Hi", "Yo")]), sample], training=True)
    assert batch.seg_images == batch.tensors["seg_images"].tolist() == [1, 0]
    for square, mask in zip(batch.tensors["masks"], (second, first), strict=True):
        assert np.array_equal(square.numpy(), Letterbox(mask.shape, 64).mask(mask).astype(np.float32))


def test_without_a_named_image_a_mask_belongs_to_the_last(processor, pictures):
    sample = Sample(pictures, [("Draw.", "<SEG>")], masks=[np.ones((64, 64), bool)])
    assert processor([sample], training=True).seg_images == [2]


def test_an_empty_target_mask_is_allowed(processor, pictures):
    sample = Sample(pictures[:1], [("Draw.", "<SEG>")], masks=[np.zeros((48, 60), bool)])
    assert processor([sample], training=True).tensors["masks"].sum() == 0


def test_samples_are_left_as_they_were(processor, pictures):
    sample = Sample(pictures[:1], [("Draw.", "<SEG>")], [Box(1, 2, 30, 40)], masks=[np.eye(48, 60)])
    before = copy.deepcopy(sample)
    processor([sample], training=True)
    for name in ("turns", "prompts", "prompt_images", "seg_images"):
        assert getattr(sample, name) == getattr(before, name)
    assert np.array_equal(sample.images[0], before.images[0])
    assert np.array_equal(sample.masks[0], before.masks[0])


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("written", "text", "labels"),
    [
        (" Yes.</s>", "Yes.", []),
        (" Here is the <ref>right lung</ref> <SEG>.</s>", "Here is the right lung.", ["right lung"]),
        ("<ref>a</ref><SEG> and <ref> b  c </ref> <SEG> , <SEG>", "a and b c,", ["a", "b c", ""]),
        ("<SEG><SEG>", "", ["", ""]),
        ("<ref>open <SEG> later <SEG>", "open later", ["open", ""]),
        ("<ref>first</ref> no, <ref>second</ref> <SEG>", "first no, second", ["second"]),
        ("A  B\n  C :  3.5 .\n\n<SEG>", "A B\nC: 3.5.", [""]),
        ("Costs .5 mm </s> and more <SEG>", "Costs .5 mm", []),
        ("<s>x<pad> y", "x y", []),
        ("<region>z</region> <mask></mask>!", "z!", []),
    ],
)
def test_generated_ids_become_clean_words_and_a_label_for_each_seg(processor, written, text, labels):
    ids = processor.tokenizer.encode(written, add_special_tokens=False)
    clean, raw, found = processor.decode(torch.tensor(ids))
    assert (clean, found) == (text, labels)
    assert raw.count("<SEG>") == len(labels)
    assert "</s>" not in raw


def test_a_seg_that_the_model_spells_out_is_no_mask(processor):
    ids = processor.tokenizer.encode("<SEG>", add_special_tokens=False, split_special_tokens=True)
    seg = processor.config.tokens.seg
    assert processor.decode([*ids, seg, -200]) == ("<SEG>", "<SEG><SEG>", [""])


# ----------------------------------------------------------------------------------------- what is refused


def mask(*size):
    return np.ones(size, bool)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample([], []), "at least one question"),
        (ask("  \n "), r"The question is '  \\n '; write at least one word"),
        (ask("half \ud83d of it"), r"holds half a character \(a surrogate\); remove it"),
        (ask(None), "The question is None"),
        (ask("x" * (MAX_QUESTION + 1)), "has 4001 characters; the limit is 4000. Shorten"),
        (Sample([], [("a", None), ("b", None)]), "The answer to 'a' is None; only the last may be None"),
        (Sample([], [("a", 7)]), "The answer to 'a' is 7"),
        (ask("<region> <region>?", [0], [Point(1, 1)]), "2 <region> but 1 prompts were given"),
        (ask("What?", [], [Point(1, 1)]), "1 region prompts were given, but no image"),
        (ask("What?", [0], [Point(60, 1)]), r"Point\(x=60, .* lies outside the image.*\(48, 60\)"),
        (ask("What?", [0], [Box(1, 1, 1, 5)]), "has no area"),
        (ask("What?", [0], [Box(1, 1, 99, 5)]), "reaches outside the image"),
        (ask("What?", [0], [Mask(np.zeros((48, 60)))]), "The mask is empty"),
        (ask("What?", [0], [Mask(mask(48, 61))]), r"\(48, 61\), the image has \(48, 60\)"),
        (ask("What?", [0], [(1, 2, 3, 4)]), "A prompt must be a Point, Box or Mask, got tuple"),
        (ask("What?", [0], [Point(1, 1)], prompt_images=[1]), "names image 1, but the sample has 1"),
        (ask("What?", [0], [Point(1, 1)], prompt_images=[-1]), "prompt_images names image -1"),
        (ask("What?", [0], [Point(1, 1)], prompt_images=[0, 0]), "prompt_images has 2 entries for 1"),
        (Sample([0], [("x", "<SEG>")], seg_images=[0, 0]), "seg_images has 2 entries for 1"),
        (Sample([0], [("x", "<SEG>")], seg_images=["0"]), "seg_images names image '0'"),
        (Sample([], [("x", "<SEG>")]), "holds 1 <SEG>, but the sample has no image"),
        (Sample([0], [("x", "<SEG>")], masks=[mask(48, 60)] * 2), "hold 1 <SEG>, but 2 masks were given"),
        (Sample([0], [("x", "<SEG>")], masks=[mask(60, 48)]), r"has size \(60, 48\), its image \(48, 60\)"),
        (Sample([0], [("x", "<SEG>")], masks=[np.full((48, 60), np.nan)]), "0 and 1 .* only, got float64"),
        (Sample([0], [("x", "<SEG>")], masks=[np.full((48, 60), 3)]), "holds 0 and 1 .* only, got int64"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_used_is_named(processor, pictures, sample, message):
    sample.images = [pictures[0] for _ in sample.images]
    with pytest.raises(InputError, match=message):
        processor([sample], training=True)


def test_one_image_and_one_sample_stand_in_lists(processor, pictures):
    for image, kind in (
        ("scan.png", "a text"),
        (Path("scan.png"), type(Path()).__name__),
        (pictures[0], "ndarray"),
    ):
        with pytest.raises(InputError, match=rf"in a list, got {kind}; write \[image\] for one"):
            processor([Sample(image, [("What?", None)])])
    with pytest.raises(InputError, match=r"in a list; write \[sample\]"):
        processor(Sample([pictures[0]], [("What?", None)]))


def test_a_question_at_the_limit_is_read(processor):
    assert processor([ask("x" * MAX_QUESTION)]).tensors["input_ids"].shape[0] == 1
    assert processor([ask("x" * (MAX_QUESTION + 1))], check_length=False).tensors["input_ids"].shape[0] == 1


def test_no_samples_at_all_are_refused(processor):
    with pytest.raises(InputError, match="at least one sample"):
        processor([])


def test_a_batch_with_masks_for_some_answers_only_is_refused(processor, pictures):
    with_mask = Sample(pictures[:1], [("x", "<SEG>")], masks=[mask(48, 60)])
    without = Sample(pictures[:1], [("x", "<SEG>")])
    with pytest.raises(InputError, match="hold 2 <SEG>, but 1 masks were given"):
        processor([with_mask, without], training=True)


def test_a_tokenizer_of_another_model_is_refused(processor, tiny_config):
    config = tiny_config(tokens={"image": -200, "region": -300, "seg": 9})
    with pytest.raises(InputError, match=r"tokenizer's id of <SEG> is 3.*tokens\.seg is 9"):
        MedPLIBProcessor(processor.tokenizer, config, 4, 4)
    with pytest.raises(InputError, match=r"318 tokens.*vocab_size is 100"):
        MedPLIBProcessor(processor.tokenizer, tiny_config(text={"vocab_size": 100}), 4, 4)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (5, "Samples come in a list, got int"),
        ("ab", "A sample must be a Sample, got str"),
        ([None], "A sample must be a Sample, got NoneType"),
        ([Sample([], 5)], "turns are pairs"),
        ([Sample([], ["ab"])], "turns are pairs"),
        ([Sample([], [5])], "turns are pairs"),
        ([Sample([], [("Who?", None)], prompts=Box(1, 1, 2, 2))], "prompts must be a list, got Box"),
        ([Sample([], [("Who?", None)], masks=5)], "masks must be a list, got int"),
        ([Sample([], [("Who?", None)], prompt_images=5)], "prompt_images must be a list, got int"),
    ],
)
def test_samples_of_another_kind_are_named(processor, samples, message):
    with pytest.raises(InputError, match=message):
        processor(samples)


def test_an_answer_that_spells_out_an_end_goes_on_after_it(processor):
    (ids,) = processor([Sample([], [("Who?", "a</s>b<pad> <ref><s>"), ("And?", None)])]).tensors["input_ids"]
    tokenizer = processor.tokenizer
    words = {"</s>": 1, "<pad>": 0, "<s>": 1, "<ref>": 1}  # the end of the answer, and the start of all
    for word, times in words.items():
        assert (ids == tokenizer.convert_tokens_to_ids(word)).sum() == times, word
    assert "a</s>b<pad> <ref><s></s>" in tokenizer.decode(ids)
