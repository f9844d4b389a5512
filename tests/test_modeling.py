"""MedPLIB's forward, losses, generation and masks, against slow and obvious versions.

B rows, L tokens, D language width, S `<SEG>` tokens.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from medplib import Box, Letterbox, Mask, Point, record_routing
from medplib.errors import InputError
from medplib.preprocess import prepare_clip, prepare_sam
from medplib.processing import Sample
from medplib.targets import target_of

DENSE_AND_MIXTURE = pytest.mark.parametrize(
    "moe", [None, {"experts": ["grounding", "vqa"]}], ids=["dense", "mixture"]
)
DECODERS = {
    "llama": {}, "mistral": {"sliding_window": 16}, "qwen2": {}, "phi3": {}, "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16}, "gemma3_text": {"head_dim": 8, "sliding_window": 16},
}  # fmt: skip
SMALL_SAM = {
    "image_size": 32, "dim": 16, "depth": 1, "num_heads": 2, "global_blocks": [], "out_channels": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(pictures):
    """One image with two regions; two images with three <SEG>, one shared with the first row; text alone."""
    a, b, _ = pictures
    blob = np.zeros(b.shape[:2], bool)
    blob[10:30, 5:25] = True
    masks = [
        _disc(a.shape[:2], 20, 20, 9),
        blob,
        _disc(a.shape[:2], 30, 40, 7),
        _disc(b.shape[:2], 50, 20, 8),
    ]
    return [
        Sample(
            [a],
            [("What is in <region> and <region>?", "A <ref>lung</ref> <SEG>.")],
            [Box(3, 4, 40, 30), Point(50, 20)],
            masks=masks[:1],
        ),
        Sample(
            [b, a],
            [("Compare.", "<SEG> and <SEG>"), ("More in <region>?", "Yes: <SEG>, the end of a long answer.")],
            [Mask(_disc(a.shape[:2], 25, 25, 6))],
            prompt_images=[1],
            masks=masks[1:],
            seg_images=[0, 1, 0],
        ),
        Sample([], [("Hello?", "No image here.")]),
    ]


def _disc(size, y, x, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def train_batch(model, samples):
    return model.processor(samples, training=True).tensors


# ------------------------------------------------------------------------------------------------ forward


@DENSE_AND_MIXTURE
@torch.no_grad()
def test_a_padded_batch_equals_its_rows_alone(new_model, samples, moe):
    model = new_model(moe=moe)
    tensors = train_batch(model, samples)
    together = model(**tensors)
    masks = []
    for row, sample in enumerate(samples):
        alone = model(**train_batch(model, [sample]))
        length = alone.logits.shape[1]
        assert tensors["attention_mask"][row].sum() == length
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], atol=2e-4, rtol=1e-4)
        masks += [] if alone.mask_logits is None else [alone.mask_logits]
    torch.testing.assert_close(together.mask_logits, torch.cat(masks), atol=2e-4, rtol=1e-4)
    assert together.seg_rows.tolist() == [0, 1, 1, 1]


@torch.no_grad()
def test_every_seg_draws_on_the_image_it_names_in_row_major_order(tiny_model, samples, pictures):
    model = tiny_model
    tensors = train_batch(model, samples)
    out = model(**tensors, output_hidden_states=True)
    named = [
        pictures[0],
        pictures[1],
        pictures[0],
        pictures[1],
    ]  # by Sample.seg_images; the last image otherwise
    slow = []
    for row in range(len(samples)):
        for t in range(1, tensors["input_ids"].shape[1]):
            if tensors["input_ids"][row, t] == model.config.tokens.seg:
                pixels = prepare_sam(named[len(slow)], 64)[None]
                state = out.hidden_states[-1][row, t - 1][None]  # (1, D), the one that predicts <SEG>
                slow.append(model.decode_masks(state, model.mask_encoder(pixels), torch.tensor([0])))
    torch.testing.assert_close(out.mask_logits, torch.cat([m for m, _ in slow]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.iou_scores, torch.cat([i for _, i in slow]), atol=1e-4, rtol=1e-4)
    assert len(slow) == 4


@torch.no_grad()
def test_an_image_used_twice_equals_two_copies_of_it(tiny_model, samples):
    tensors = train_batch(tiny_model, samples)
    assert tensors["image_index"].tolist() == [0, 1, 0]
    assert len(tensors["pixel_values"]) == 2
    assert tensors["seg_images"].tolist() == [0, 1, 0, 1]
    copies = {**tensors, "image_index": None, "seg_images": torch.tensor([0, 1, 2, 1])}
    for name in ("pixel_values", "mask_pixel_values"):
        copies[name] = tensors[name][[0, 1, 0]]
    one, two = tiny_model(**tensors), tiny_model(**copies)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.mask_logits, two.mask_logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_placeholders_become_projected_images_and_pooled_regions(tiny_model, samples, pictures):
    model, tokens = tiny_model, tiny_model.config.tokens
    tensors = train_batch(model, samples)
    names = ("image_index", "region_masks", "region_images")
    features = model.vision_tower(tensors["pixel_values"])
    got = model.embed(tensors["input_ids"], features, **{name: tensors[name] for name in names})
    seen = {0: 0, 1: 0, 2: 0}
    images = {0: [pictures[0]], 1: [pictures[1], pictures[0]], 2: []}
    regions = iter(range(3))
    for row in range(3):
        for t, token in enumerate(tensors["input_ids"][row].tolist()):
            if token == tokens.image:
                number, at = divmod(seen[row], model.num_image_tokens)
                pixels = prepare_clip(images[row][number], 64)[None]
                wanted = model.projector(model.vision_tower(pixels).grid)[0, at]
                seen[row] += 1
            elif token == tokens.region:
                r = next(regions)
                pixels = tensors["pixel_values"][tensors["region_images"][r]][None]
                grid = model.vision_tower(pixels).grid[0]  # (C, h, w)
                share = F.adaptive_avg_pool2d(tensors["region_masks"][r][None], grid.shape[-2:])[0]
                mean = (grid * share).sum((1, 2)) / share.sum()
                wanted = model.region_adapter(
                    mean
                )  # the adapter is linear: before or after pooling is the same
            else:
                wanted = model.get_input_embeddings()(torch.tensor(token))
            torch.testing.assert_close(got[row, t], wanted, atol=1e-5, rtol=1e-4)
    assert [seen[row] // model.num_image_tokens for row in range(3)] == [1, 2, 0]
    assert next(regions, None) is None


@torch.no_grad()
def test_padding_is_not_routed(tiny_model, samples):
    tensors = train_batch(tiny_model, samples)
    real = int(tensors["attention_mask"].sum())
    with record_routing(tiny_model) as trace:
        tiny_model(**tensors)
    assert real < tensors["attention_mask"].numel()
    assert [int(layer.counts().sum()) for layer in trace.layers.values()] == [real, real]


def test_padding_is_not_routed_while_generating(tiny_model, samples):
    batch = tiny_model.processor(questions(samples))
    real = int(batch.tensors["attention_mask"].sum())
    with record_routing(tiny_model) as trace:
        new = tiny_model.generate_with_states(batch, max_new_tokens=5).ids.shape[1]
    assert real < batch.tensors["attention_mask"].numel()
    assert [int(layer.counts().sum()) for layer in trace.layers.values()] == [real + 3 * (new - 1)] * 2


@torch.no_grad()
def test_every_real_token_is_served_however_uneven_the_routing(new_model, samples):
    model = new_model()
    tensors = train_batch(model, samples)
    for layer in model.get_decoder().layers:
        layer.mlp.experts["vqa"].load_state_dict(layer.mlp.experts["grounding"].state_dict())
        layer.mlp.gate.weight.zero_()  # a tie: all tokens go to the first expert, with weight 1/2
    mixture = model(**tensors).logits
    for layer in model.get_decoder().layers:
        layer.mlp = layer.mlp.experts["grounding"]
        layer.mlp.down_proj.weight.mul_(0.5)
    dense = model(**tensors).logits
    real = tensors["attention_mask"].bool()
    torch.testing.assert_close(mixture[real], dense[real], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def test_losses_equal_a_slow_version_and_labels_are_never_moved(tiny_model, samples):
    tensors = train_batch(tiny_model, samples)
    out = tiny_model(**tensors)
    logits, labels = out.logits.double(), tensors["labels"]
    terms = [
        -torch.log_softmax(logits[row, t - 1], -1)[labels[row, t]]
        for row in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[row, t] != -100
    ]
    slow = {"ce": sum(terms) / len(terms), "dice": 0, "bce": 0, "focal": 0, "iou": 0}
    for mask, target, iou in zip(out.mask_logits, tensors["masks"].double(), out.iou_scores, strict=True):
        z = F.interpolate(mask[None, None], target.shape, mode="bilinear", align_corners=False)[0, 0].double()
        p = z.sigmoid()
        slow["dice"] += 1 - 2 * (p * target).sum() / (p.sum() + target.sum())
        slow["bce"] += -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z)).mean()
        right = torch.where(target == 1, p, 1 - p)
        alpha = torch.where(target == 1, 0.25, 0.75)
        slow["focal"] += -(alpha * (1 - right) ** 2 * right.log()).mean()
        slow["iou"] += ((p * target).sum() / (p + target - p * target).sum() - iou) ** 2
    for name in ("dice", "bce", "focal", "iou"):
        slow[name] = slow[name] / len(out.mask_logits)
    assert out.losses.keys() == slow.keys()
    for name, value in slow.items():
        assert float(out.losses[name]) == pytest.approx(float(value), rel=1e-4), name
    weights = {"ce": 1.0, "dice": 0.5, "bce": 2.0, "focal": 0.3, "iou": 0.1}
    assert float(out.loss) == pytest.approx(sum(weights[n] * float(v) for n, v in slow.items()), rel=1e-4)


def test_the_learned_labels_are_the_answers_and_their_ends(tiny_model, samples):
    tensors = train_batch(tiny_model, samples)
    tokenizer = tiny_model.processor.tokenizer
    learned = [tokenizer.decode(row[row != -100]) for row in tensors["labels"]]
    assert learned == [
        " A <ref>lung</ref> <SEG>.</s>",
        " <SEG> and <SEG></s> Yes: <SEG>, the end of a long answer.</s>",
        " No image here.</s>",
    ]
    at = tensors["labels"] != -100
    assert torch.equal(tensors["labels"][at], tensors["input_ids"][at])


def test_a_loss_with_weight_zero_is_not_computed_and_the_balance_is_on_request(new_model, samples):
    losses = {"ce": 1.0, "dice": 1.0, "bce": 0.0, "focal": 0.0, "iou": 0.0}
    model = new_model(losses=losses, moe={"experts": ["a", "b"], "balance_loss_coef": 0.25})
    out = model(**train_batch(model, samples))
    assert out.losses.keys() == {"ce", "dice", "balance"}
    assert 1.9 < out.losses["balance"].item() < 4  # two layers, each from 1 (balanced) to 2
    total = out.losses["ce"] + out.losses["dice"] + out.losses["balance"] / 4
    assert out.loss.item() == pytest.approx(total.item())


def test_every_setting_of_the_mixture_goes_through_a_saved_model(new_model, samples, tmp_path):
    moe = {
        "experts": ["a", "b", "c", "d"], "top_k": 2, "score": "sigmoid", "renormalize": True,
        "balance_loss_coef": 0.1, "sequence_loss_coef": 0.2, "z_loss_coef": 0.3,
        "capacity_factor": 1.0, "eval_capacity_factor": 1.5, "min_capacity": 2, "drop": "random", "seed": 5,
        "gate_args": {
            "scale": 2.5, "groups": 2, "top_groups": 1, "group_best": 2, "bias_rate": 0.01,
            "noise": "gumbel", "noise_scale": 0.5, "seed": 9,
        },
    }  # fmt: skip
    model = new_model(moe=moe)
    routers = [layer.mlp for layer in model.get_decoder().layers]
    assert [int(router.drop_noise.state[0]) for router in routers] == [5, 6]
    assert [int(router.gate.draws.state[0]) for router in routers] == [9, 10]
    assert {router.drop for router in routers} == {"random"}
    assert {router.gate.scale for router in routers} == {2.5}
    tensors = train_batch(model, samples)
    model.train()
    out = model(**tensors)  # moves the load bias and the counters of the noise
    assert out.losses.keys() >= {"balance", "sequence", "z"}
    plain = sum(value * getattr(model.config.losses, name, 0.0) for name, value in out.losses.items())
    aux = sum(out.losses[name] * moe[f"{name}_loss_coef"] for name in ("balance", "sequence", "z"))
    assert out.loss.item() == pytest.approx((plain + aux).item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.moe == model.config.moe
    again.train()
    model(**tensors), again(**tensors)  # both move on from the same counters
    for one, other in zip(routers, [layer.mlp for layer in again.get_decoder().layers], strict=True):
        assert torch.equal(one.gate.bias.steps, other.gate.bias.steps)
        assert torch.equal(one.gate.draws.state, other.gate.draws.state)
    torch.testing.assert_close(again.eval()(**tensors).logits, model.eval()(**tensors).logits)


def test_tokens_of_a_question_are_counted_by_type(new_model, samples):
    model = new_model()
    batch = model.processor(questions(samples))
    ids = batch.tensors["input_ids"]
    types = model.config.tokens.types(ids)
    with record_routing(model) as trace:
        model.generate_with_states(batch, max_new_tokens=3)
    seg = model.config.tokens.seg
    names = {-200: "image", -300: "region", seg: "<SEG>"}
    assert types == [[names.get(i, "text") for i in row] for row in ids.tolist()]
    shares = trace.by_token_type(types, rest="generated")
    for layer in shares.values():
        assert layer.keys() == {"image", "region", "<SEG>", "text", "generated"}
        assert all(sum(share.values()) == pytest.approx(1) for share in layer.values())
    assert model.config.tokens.types([seg, 5, -200]) == ["<SEG>", "text", "image"]


def test_a_batch_in_which_nothing_is_learned_has_a_loss_of_zero_with_a_graph(new_model, samples):
    model = new_model()
    tensors = train_batch(model, [samples[2]])
    loss = model(**{**tensors, "labels": torch.full_like(tensors["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0.0


# ---------------------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def trained_once(new_model, samples):
    """The loss and all gradients of one step."""
    model = new_model()
    out = model(**train_batch(model, samples))
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_every_part(trained_once):
    _, gradients = trained_once
    for part in (
        "language_model.model.embed_tokens", "language_model.lm_head", "vision_tower", "projector",
        "region_adapter", "mask_encoder", "mask_decoder", "seg_projector.0", "seg_projector.2",
        *(f"language_model.model.layers.0.mlp.{p}" for p in ("gate", "experts.grounding", "experts.vqa")),
        *(f"language_model.model.layers.1.mlp.{p}" for p in ("gate", "experts.grounding", "experts.vqa")),
    ):  # fmt: skip
        reached = [
            float(g.abs().max()) for name, g in gradients.items() if name.startswith(part) and g is not None
        ]
        assert reached, part
        assert max(reached) > 0, part
        assert all(math.isfinite(value) for value in reached), part


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(new_model, samples, trained_once):
    model = new_model()
    getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )()  # the name since 5.23
    model.language_model.train()
    calls = []
    count_calls(model.get_decoder().layers[0].mlp.gate, calls)
    out = model(**train_batch(model, samples))
    out.loss.backward()
    assert len(calls) == 2  # once forward, once again for the gradients
    torch.testing.assert_close(out.loss, trained_once[0].loss)
    for name, parameter in model.named_parameters():
        wanted = trained_once[1][name]
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, msg=name)


def test_frozen_parts_stay_in_evaluation_mode(new_model):
    model = new_model()
    model.mask_encoder.requires_grad_(False)
    model.train()
    assert model.language_model.training
    assert model.vision_tower.training
    assert not any(module.training for module in model.mask_encoder.modules())
    assert not any(module.training for module in model.eval().modules())


def test_a_model_in_half_precision_runs(new_model, samples):
    model = new_model().to(torch.bfloat16)
    batch = model.processor(samples, training=True).to("cpu", torch.bfloat16)
    out = model(**batch.tensors)
    assert out.mask_logits.dtype == out.logits.dtype == torch.bfloat16
    assert math.isfinite(out.loss.item())


# --------------------------------------------------------------------------------------------- generation


class Say(LogitsProcessor):
    """Makes generation write the given ids, row by row; then <eos>."""

    def __init__(self, rows, eos):
        self.rows, self.eos, self.step = rows, eos, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.rows):
            forced[row, ids[self.step] if self.step < len(ids) else self.eos] = 0.0
        self.step += 1
        return forced


def say(model, *texts):
    rows = [model.processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return LogitsProcessorList([Say(rows, model.processor.eos_id)]), rows


def questions(samples, number=3):
    """The same samples with their last answers still to be written."""
    return [
        Sample(s.images, [*s.turns[:-1], (s.turns[-1][0], None)], s.prompts, s.prompt_images)
        for s in samples[:number]
    ]


def count_calls(module, calls):
    return module.register_forward_hook(lambda _, inputs, out: calls.append(inputs))


@pytest.mark.parametrize("kind", DECODERS)
def test_any_decoder_generates_the_same_with_and_without_a_cache_and_in_a_batch(new_model, samples, kind):
    model = new_model(text={"model_type": kind, **DECODERS[kind]})
    batch = model.processor(questions(samples))
    names = ("input_ids", "attention_mask", "pixel_values", "image_index", "region_masks", "region_images")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    cached = model.generate(**{n: batch.tensors[n] for n in names}, **options)
    slow = model.generate(**{n: batch.tensors[n] for n in names}, **options, use_cache=False)
    assert torch.equal(cached, slow)
    length = batch.tensors["input_ids"].shape[1]
    for row, sample in enumerate(questions(samples)):
        alone = model.processor([sample]).tensors
        ids = model.generate(**{n: alone[n] for n in names if n in alone}, **options)[
            0, alone["input_ids"].shape[1] :
        ]
        wanted = cached[row, length:]
        assert wanted[: len(ids)].tolist() == ids.tolist()
        assert (wanted[len(ids) :] == 0).all()
    with torch.no_grad():
        assert model(**train_batch(model, samples)).mask_logits.shape == (4, 16, 16)


def test_placeholders_are_looked_for_in_prompts_and_where_one_may_be_generated(
    tiny_model, samples, monkeypatch
):
    model, looked = tiny_model, []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda *args: looked.append(not args[-1]) or embed(*args))
    batch = model.processor(questions(samples))
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    wanted = model.generate_with_states(batch, **options).ids
    assert looked == [True, False, False, False]
    batch.tensors["input_ids"].masked_fill_(batch.tensors["input_ids"] == model.config.tokens.image, 300)
    monkeypatch.setattr(model.config.tokens, "image", 300)
    assert torch.equal(model.generate_with_states(batch, **options).ids, wanted)
    assert looked[4:] == [True] * 4


def test_masks_come_from_the_pass_that_writes_the_words(tiny_model, samples):
    model = tiny_model
    asked = questions(samples)
    batch = model.processor(asked)
    processors, rows = say(model, "Here <SEG>", "<SEG> no <SEG><SEG> x", "A <SEG>.")
    words, masks = [], []
    hooks = [count_calls(model.get_decoder(), words), count_calls(model.mask_encoder, masks)]
    generated = model.generate_with_states(batch, max_new_tokens=20, logits_processor=processors)
    drawn = model._draw_generated(batch, generated)
    for hook in hooks:
        hook.remove()
    assert (
        len(words) == generated.ids.shape[1] == max(map(len, rows)) + 1
    )  # one call per token, the last is <eos>
    assert [len(inputs[0]) for inputs in masks] == [
        1
    ]  # both rows draw on the same image: encoded once, together
    assert generated.rows.tolist() == [0, 1, 1, 1, 2]
    assert [(row, image) for row, image, _ in drawn] == [(0, 0), (1, 1), (1, 1), (1, 1)]  # row 2 has no image

    prompt = batch.tensors
    ids = torch.cat([prompt["input_ids"], generated.ids], dim=1)
    attention = torch.cat([prompt["attention_mask"], torch.ones_like(generated.ids)], dim=1)
    old = prompt["seg_images"].tolist()  # of <SEG> in earlier turns
    assert old == [0, 0]
    everything = {**prompt, "input_ids": ids, "attention_mask": attention}
    everything["position_ids"] = (attention.cumsum(1) - 1).clamp_min(0)
    everything["seg_images"] = torch.tensor([0, *old, 0, 0, 0, 0])
    with torch.no_grad():
        forced = model(**everything)
    new = forced.mask_logits[[0, 3, 4, 5]]
    torch.testing.assert_close(torch.stack([logits for _, _, logits in drawn]), new, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("question", "label"),
    [
        ("Segment the right lung.", "right lung"),
        ("Please outline An ulcer!", "ulcer"),
        ("Draw a tumour", "tumour"),
        ("Mark anterior horn", "anterior horn"),
        ("Segment the", "the"),
        ("Is the lung clear?", ""),
    ],
)
def test_an_unnamed_mask_is_called_by_what_was_asked_for_without_its_article(question, label):
    assert target_of(question) == label


def test_without_seg_the_mask_side_does_not_run(tiny_model, samples):
    calls = []
    hook = count_calls(tiny_model.mask_encoder, calls)
    answers = tiny_model.answer(
        questions(samples), logits_processor=say(tiny_model, "No.", "Nothing.", "Hm")[0]
    )
    hook.remove()
    assert calls == []
    assert [a.text for a in answers] == ["No.", "Nothing.", "Hm"]
    assert all(a.findings == [] for a in answers)


def test_each_image_drawn_on_is_encoded_once(tiny_model, pictures):
    a, b, c = pictures
    asked = [Sample(images, [("Segment it.", None)]) for images in ([a], [b, c], [a, c], [b])]
    calls = []
    hook = count_calls(tiny_model.mask_encoder, calls)
    words = ("<SEG><SEG>", "<ref>x</ref><SEG>", "<SEG>", "none")
    answers = tiny_model.answer(asked, logits_processor=say(tiny_model, *words)[0])
    hook.remove()
    assert [len(inputs[0]) for inputs in calls] == [2]  # a and c
    assert [[f.image for f in answer.findings] for answer in answers] == [[0, 0], [1], [1], []]
    assert [f.mask.shape for answer in answers for f in answer.findings] == [(48, 60)] * 2 + [(64, 64)] * 2


def test_words_after_the_end_draw_nothing(tiny_model, pictures):
    processors, _ = say(tiny_model, "<SEG></s><SEG>", "one two three four five <SEG>")
    asked = [Sample([pictures[0]], [("Draw it.", None)])] * 2
    one, two = tiny_model.answer(asked, logits_processor=processors)
    assert (len(one.findings), len(two.findings)) == (1, 1)


def test_sampling_depends_on_its_seed_alone_and_leaves_the_generator_as_it_was(tiny_model, pictures):
    def ask(seed):
        torch.rand(3)
        return tiny_model.ask(
            pictures[0], "What?", seed=seed, do_sample=True, temperature=5.0, max_new_tokens=12
        ).text

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ask(7)
    torch.set_rng_state(before)
    torch.rand(3)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert ask(7) == first
    assert torch.equal(torch.get_rng_state(), after)
    assert ask(7) == first
    assert ask(8) != first


def test_only_the_last_hidden_state_is_kept_while_generating(tiny_model, samples):
    asked = []
    hook = tiny_model.get_decoder().register_forward_hook(
        lambda _, inputs, kwargs, out: asked.append(out.hidden_states), with_kwargs=True
    )
    ids = train_batch(tiny_model, samples[2:])["input_ids"]
    with torch.no_grad():
        out = tiny_model(ids, output_hidden_states=True, last_hidden_only=True)
        full = tiny_model(ids, output_hidden_states=True)
    hook.remove()
    assert len(out.hidden_states) == 1
    torch.testing.assert_close(out.hidden_states[0], full.hidden_states[-1][:, -1:])
    assert asked[0] is None
    assert len(asked[1]) == 3


def test_ways_of_decoding_that_masks_cannot_follow_are_refused(tiny_model, pictures):
    for options in (
        {"num_beams": 2},
        {"num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"eos_token_id": 5},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            tiny_model.ask(pictures[0], "What?", **options)


def test_an_option_that_nobody_knows_is_refused_with_the_one_that_was_meant(tiny_model, pictures):
    with pytest.raises(
        InputError, match=r"no option 'max_tokens'\. Did you mean 'max_new_tokens'\? Known: pro"
    ):
        tiny_model.ask(pictures[0], "What?", max_tokens=3)
    with pytest.raises(InputError, match=r"no option 'boxes'\. Known: prompts"):
        tiny_model.ask(pictures[0], "What?", boxes=[(1, 2, 3, 4)])
    with pytest.raises(InputError, match="seed must be a whole number of 64 bits or None, got 'a'"):
        tiny_model.ask(pictures[0], "What?", seed="a")
    tiny_model.ask(pictures[0], "What?", max_new_tokens=1, min_new_tokens=1, output_scores=True)
    tiny_model.ask(
        pictures[0], "What?", max_new_tokens=1, repetition_penalty=1.0, no_repeat_ngram_size=0
    )  # as good as none


# ----------------------------------------------------------------------------------- wrong tensors and sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "image placeholders, but no image was given"),
        ({"region_masks": None}, "region placeholders, but no region was given"),
        ({"region_masks": torch.zeros(0, 64, 64)}, "region placeholders, but no region was given"),
        ({"image_index": torch.tensor([0])}, "12 image placeholders, but the images given fill 4"),
        ({"seg_images": torch.tensor([0])}, "names 1 images, but the tokens hold 4 <SEG>"),
        ({"seg_images": None}, "2 mask images for 3 rows"),
        ({"masks": torch.zeros(2, 64, 64)}, "2 target masks, but 4 <SEG>"),
        ({"mask_pixel_values": None}, "4 target masks, but 0 <SEG> with an image"),
        ({"logits_to_keep": 1}, "leave logits_to_keep at 0"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(tiny_model, samples, change, message):
    with pytest.raises(InputError, match=message):
        tiny_model(**{**train_batch(tiny_model, samples), **change})


def test_regions_without_an_image_are_refused(tiny_model):
    with pytest.raises(InputError, match="no image that they lie in"):
        tiny_model(torch.tensor([[3, 4]]), region_masks=torch.ones(1, 64, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {"image": -200, "region": -300, "seg": 99999}}, "tokens.seg is 99999"),
        ({"mask": {"dim": 64}}, "mask.dim is 64"),
        ({"mask": {"image_size": 72}}, "multiple of its tower's stride 16, got 72"),
        ({"mask": {"encoder": {"name": "sam_vit", "args": SMALL_SAM}}}, "64, but its tower takes 32"),
        ({"text": {"model_type": "opt", "ffn_dim": 8}}, "OPTForCausalLM has no layers"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_when_the_model_is_built(new_model, change, message):
    with pytest.raises(InputError, match=message):
        new_model(**change)


def test_beams_and_samples_see_the_images_and_regions_of_their_own_row(tiny_model, pictures):
    a, b, c = pictures
    asked = [
        Sample(
            [a, b], [("<region> or <region>?", None)], [Box(1, 1, 9, 9), Point(5, 5)], prompt_images=[1, 0]
        ),
        Sample([], [("Hello?", None)]),
        Sample([c], [("What is in this <region> here?", None)], [Box(5, 5, 40, 40)]),
    ]
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}

    def write(samples, **more):
        tensors = tiny_model.processor(samples).tensors
        with torch.random.fork_rng():
            torch.manual_seed(0)
            written = tiny_model.generate(**tensors, **options, **more)
        return written[:, tensors["input_ids"].shape[1] :].tolist()

    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert write(asked, **beams) == [ids for sample in asked for ids in write([sample], **beams)]
    greedy = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}  # the best word is all that is drawn
    assert write(asked, **greedy) == [ids for sample in asked for ids in write([sample], **greedy)]


def test_the_score_is_of_the_pixels_drawn_and_not_of_the_padding(tiny_model, monkeypatch):
    tall = np.zeros((80, 16, 3), np.uint8)
    logits = torch.full((1, 16, 16), -5.0)
    logits[:, :, :4], logits[:, 3, 7:9] = 5.0, 1.0  # the padding left of the image, and a spot in it
    monkeypatch.setattr(tiny_model, "_draw_generated", lambda batch, generated: [(0, 0, logits[0])])
    (finding,) = tiny_model.ask(tall, "Segment it.", max_new_tokens=1).findings
    box = Letterbox((80, 16), 64)
    seen = box.unletterbox(logits[0])
    assert np.array_equal(finding.mask, (seen > 0).numpy())
    assert 0 < finding.area < 80 * 16
    assert finding.score == pytest.approx(seen[seen > 0].sigmoid().mean().item())
    assert finding.score < 0.8


@pytest.mark.parametrize("name", ["image_index", "seg_images"])
@pytest.mark.parametrize("wrong", [-1, 2])
def test_an_image_that_is_not_there_is_named(tiny_model, samples, name, wrong):
    tensors = dict(train_batch(tiny_model, samples))
    tensors[name] = tensors[name].clone()
    tensors[name][0] = wrong
    with pytest.raises(InputError, match=f"{name} must be 0 to 1, the images given; got .*{wrong}"):
        tiny_model(**tensors)
