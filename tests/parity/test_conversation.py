"""Token ids and labels equal those that the published tokenizer, templates and label masking gave."""

import pytest

from medplib.conversation import REGION, Run, get_template, render
from medplib.official.tokenizer import LegacyLlamaTokenizer
from medplib.processing import MedPLIBProcessor, Sample

from .recorded_model import Recorded

OUR_TEMPLATES = {"v1": "vicuna_v1", "llava_v1": "llava_v1"}


@pytest.fixture(scope="module")
def tokenizer(golden_dir):
    return LegacyLlamaTokenizer.from_pretrained(golden_dir / "model_tiny")


@pytest.fixture(scope="module")
def facts(golden):
    return golden("conversation/conversation.json")


@pytest.fixture(scope="module")
def encode(tokenizer, golden_dir):
    """`encode(template, turns, images, regions)` -> ids and labels, one token per image as recorded."""
    from medplib.checkpoints import official_config

    recorded = Recorded(golden_dir / "model_tiny")

    def make(template, turns, images=1, prompts=()):
        config = official_config(recorded.folder, recorded.overrides, template=OUR_TEMPLATES[template])
        processor = MedPLIBProcessor(tokenizer, config, num_image_tokens=1, grid=1)
        return processor.encode(Sample([None] * images, turns, prompts), training=True)

    return make


def as_turns(raw) -> list[tuple[str, str]]:
    """What a data set's row says -> our turns: the image's place and the names of mask files left out."""
    import re

    texts = []
    for _, text in raw:
        text = re.sub(r"<region>[^<]*</region>", REGION, str(text))
        texts.append(re.sub(r"<mask>[^<]*</mask>", "", text).replace("<image>", "").strip())
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_the_templates_are_the_published_ones(facts):
    for name, wanted in facts["templates"].items():
        pieces = render(get_template(OUR_TEMPLATES[name]), [("Hi", None)])
        text = "".join(piece.text for piece in pieces)
        assert text == wanted["generation_prompt_example"]
        assert get_template(OUR_TEMPLATES[name]).end == wanted["sep2"]


def test_control_tokens_have_the_published_ids(tokenizer, facts):
    assert facts["special_ids"]
    for token, number in facts["special_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer.encode(token) == [number]
    assert tokenizer.pad_token_id == facts["pad_id"]
    assert tokenizer.convert_tokens_to_ids("<SEG>") == facts["seg_id"]


def test_ids_and_labels_of_every_recorded_conversation(encode, facts):
    assert facts["samples"]
    for sample in facts["samples"]:
        if sample["status"] != "ok":
            continue
        turns = as_turns(sample["raw"])
        regions = sum(question.count(REGION) for question, _ in turns)
        ids, labels = encode(sample["template"], turns, prompts=[None] * regions)
        assert ids == sample["input_ids"], sample["name"]
        if sample["supervised_text"]:
            assert labels == sample["labels"], sample["name"]
        else:  # the published reader mutes a row whose region is empty; here an empty region is an error
            assert set(sample["labels"]) == {-100}


def test_placeholders_split_a_prompt_as_published(tokenizer, facts):
    recorded = facts["tokenizer_image_token"]
    runs = []
    for i, chunk in enumerate(recorded["prompt"].split("<image>")):
        runs += [Run([-200])] if i else []
        for j, text in enumerate(chunk.split("<region></region>")):
            runs += [Run("<region>", True), Run([-300]), Run("</region>", True)] if j else []
            runs.append(Run(text, True))
    assert [tokenizer.bos_token_id, *tokenizer.encode_runs(runs)[0]] == recorded["dataset"]


def test_ids_and_labels_of_the_samples_of_the_tiny_model(tokenizer, golden_dir):
    """Written from the recorded prompts and answers; a question's own <SEG> counts as control token there."""
    recorded = Recorded(golden_dir / "model_tiny")
    texts = recorded.json("prompts")
    for name, prompt in texts["prompts"].items():
        runs = []
        for i, chunk in enumerate(prompt.split("<image>")):
            runs += [Run([-200])] if i else []
            for j, text in enumerate(chunk.split("<region></region>")):
                runs += [Run("<region>", True), Run([-300]), Run("</region>", True)] if j else []
                runs.append(Run(text, True))
        runs += [Run(f" {texts['answers'][name]}", True, True), Run("</s>", True, True)]
        ids, learned = tokenizer.encode_runs(runs)
        ids, learned = [tokenizer.bos_token_id, *ids], [False, *learned]
        assert ids == recorded.inputs[f"{name}.ids"].tolist(), name
        labels = [number if flag else -100 for number, flag in zip(ids, learned, strict=True)]
        assert labels == recorded.inputs[f"{name}.labels"].tolist(), name


SAID = ("Here is the <ref>right lung</ref> <SEG>.", "<SEG> and <SEG>", "No: none.")


@pytest.mark.parametrize("answer", SAID)
def test_what_the_model_wrote_is_read_again_as_the_same_tokens(tokenizer, golden_dir, answer):
    """The turns of a conversation are kept as text, with their control tokens."""
    from medplib.checkpoints import official_config

    recorded = Recorded(golden_dir / "model_tiny")
    config = official_config(recorded.folder, recorded.overrides, template="vicuna_v1")
    processor = MedPLIBProcessor(tokenizer, config, num_image_tokens=1, grid=1)
    ids, labels = processor.encode(Sample([None], [("Segment it.", answer)]), training=True)
    _, written, _ = processor.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    again, _ = processor.encode(Sample([None], [("Segment it.", written)]), training=True)
    assert again == ids
