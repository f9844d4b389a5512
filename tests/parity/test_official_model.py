"""The published tiny model loads, and gives the numbers that the published code gave."""

import math

import pytest
import torch
from safetensors.torch import load_file

from medplib.experts import balance_loss
from medplib.experts.context import named_routers
from medplib.geometry import official_crop
from medplib.official.compat import THRESHOLD, mask_losses
from medplib.processing import Batch

from .recorded_model import Recorded, expand

CLOSE = {"rel": 1e-5, "abs": 1e-6}  # of losses; a small one is a difference of larger numbers


@pytest.fixture(scope="module")
def recorded(golden_dir):
    return Recorded(golden_dir / "model_tiny")


@pytest.fixture(scope="module")
def model(recorded):
    """As a user gets it: nothing is dropped."""
    return recorded.load()


@pytest.fixture(scope="module")
def published(recorded):
    """With the published gating, padding and capacities included."""
    return recorded.load(moe={"parity": "deepspeed"})


def test_token_numbers_are_the_recorded_ones(recorded, model):
    assert model.config.tokens.seg == recorded.dims["seg_token_idx"]
    assert model.num_image_tokens == recorded.dims["num_image_tokens"]


def model_for(recorded, published, case):
    """The evaluation model, or one in training mode with the case's capacity and without random drops."""
    if not case.facts["training"]:
        return published
    moe = {"parity": "deepspeed", "capacity_factor": case.facts["capacity_factor"]}
    return recorded.load(moe=moe | {"gate_args": {"use_rts": case.facts["use_rts"]}}).train()


def run(recorded, model, case, grad=False):
    """The forward of a case. A row without image is filled up with zero vectors, as published. Also each
    layer's Routing."""
    rows, names = recorded.rows(model, case), case.facts["samples"]
    shown = set(rows["image_index"].tolist())
    read = recorded.length(case)

    def fill_up(_, __, out):
        for row in range(len(out)):
            if row not in shown:
                out[row, read:] = 0
        return out

    heard = []
    hooks = [
        router.gate.register_forward_hook(lambda _, __, routing: heard.append(routing))
        for router in named_routers(model).values()
    ]
    if len(shown) < len(names):
        hooks.append(model.get_input_embeddings().register_forward_hook(fill_up))
    with torch.set_grad_enabled(grad):
        out = model(**rows, **recorded.images(names), **recorded.regions(names), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, heard


def kept_masks(case, out) -> list[int]:
    """The published code gives each row's targets to its last `<SEG>`."""
    kept = []
    for row, flags in enumerate(case.facts["valid_mask_bool"] if out.mask_logits is not None else []):
        mine = [i for i, at in enumerate(out.seg_rows.tolist()) if at == row]
        kept += mine[len(mine) - len(flags) :]
    return kept


def close(ours, theirs, atol, what):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=lambda text: f"{what}: {text}")


def test_every_recorded_forward_is_reproduced(recorded, published):
    assert recorded.cases
    for case in recorded.cases.values():
        model = model_for(recorded, published, case)
        out, heard = run(recorded, model, case)
        theirs = case.tensors
        for routing, counts, balance in zip(
            heard, theirs["out.exp_counts"], theirs["out.l_aux_per_layer"], strict=True
        ):
            first = routing.experts[:, :1]
            assert torch.bincount(first[:, 0], minlength=len(counts)).tolist() == counts.tolist(), case.name
            ours = balance_loss(routing.probabilities, first)
            assert ours.item() == pytest.approx(balance.item(), **CLOSE), case.name
        for name in theirs:
            if name.startswith("out.hidden."):
                which = name.removeprefix("out.hidden.")
                layer = -1 if which == "last" else int(which)
                close(out.hidden_states[layer], theirs[name], 1e-4, f"{case.name} {name}")
        tail = theirs["out.logits_tail"]
        close(out.logits[:, -tail.shape[1] :], tail, 1e-4, f"{case.name} logits")
        check_losses_and_masks(recorded, model, case, out)


def words_loss(model, out):
    """The cross-entropy and the balance losses, which a coefficient of 0 leaves out."""
    return out.losses["ce"] + model.config.moe.balance_loss_coef * out.losses.get("balance", 0.0)


def check_losses_and_masks(recorded, model, case, out):
    wanted, theirs = case.facts["losses"], case.tensors
    weights, ce = recorded.dims["loss_weights"], words_loss(model, out)
    if math.isnan(wanted["ce_loss"]):  # no row has a label: here that is 0
        assert out.losses["ce"].item() == 0.0
    else:
        assert weights["ce"] * ce.item() == pytest.approx(wanted["ce_loss"], **CLOSE), case.name
    kept, total = kept_masks(case, out), weights["ce"] * ce.item()
    assert len(kept) == len(case.facts["label_shapes"])
    for i, mask in enumerate(kept):
        resized, size = (tuple(case.facts[key][i]) for key in ("resize_list", "label_shapes"))
        close(out.mask_logits[mask], theirs[f"seg.low_res.{i}"][0, 0], 1e-3, f"{case.name} mask {i}")
        close(out.iou_scores[mask], theirs[f"seg.iou.{i}"][0, 0], 1e-3, f"{case.name} IoU {i}")
        drawn, recorded_mask = (
            official_crop(out.mask_logits[mask], resized, size),
            theirs[f"seg.pred_mask.{i}"],
        )
        close(drawn, recorded_mask[0, 0], 1e-3, f"{case.name} cropped mask {i}")
        assert torch.equal(drawn > 0, recorded_mask[0, 0] > 0)
    if kept:
        sizes, targets = case.facts["resize_list"], recorded.targets(case.facts["samples"])
        terms = mask_losses(out.mask_logits[kept], out.iou_scores[kept], targets, sizes)
        for name, term in terms.items():
            assert term.item() == pytest.approx(wanted[f"unscale_mask_{name}_loss"], **CLOSE), case.name
            total += weights[name] * term.item()
    if not math.isnan(wanted["loss"]):
        assert total == pytest.approx(wanted["loss"], **CLOSE), case.name


def test_gradients_are_those_recorded(recorded, published):
    from medplib.official.names import our_name

    cases = [case for case in recorded.cases.values() if "grad_norms" in case.facts]
    if not cases:
        pytest.skip("no gradients are recorded")
    for case in cases:
        model = model_for(recorded, published, case)
        model.zero_grad()
        out, _ = run(recorded, model, case, grad=True)
        weights, kept = recorded.dims["loss_weights"], kept_masks(case, out)
        loss = weights["ce"] * words_loss(model, out)
        if kept:
            sizes, targets = case.facts["resize_list"], recorded.targets(case.facts["samples"])
            masks = mask_losses(out.mask_logits[kept], out.iou_scores[kept], targets, sizes)
            loss = loss + sum(weights[name] * term for name, term in masks.items())
        loss.backward()
        ours = dict(model.named_parameters())
        for name, norm in case.facts["grad_norms"].items():
            grad = ours[our_name(name, model.config.moe.experts)].grad
            assert grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{case.name} {name}"
        for name, value in case.tensors.items():
            if name.startswith("grad."):
                grad = ours[our_name(name.removeprefix("grad."), model.config.moe.experts)].grad
                close(grad, value, 1e-4, f"{case.name} {name}")
        model.zero_grad()


@pytest.fixture(scope="module")
def dropless(recorded, model):
    """Whether the published evaluation has room for every token."""
    return recorded.json("config")["moe"]["eval_capacity_factor"] >= len(model.config.moe.experts)


def test_the_dropless_model_sees_what_the_published_one_sees(recorded, model, published, dropless):
    """Where the published evaluation drops no token, real tokens get the same states without its gating."""
    cases = [case for case in recorded.cases.values() if not case.facts["training"]]
    if not dropless or not cases:
        pytest.skip("the recorded evaluation drops tokens")
    case = max(cases, key=lambda case: len(case.facts["samples"]))
    real = recorded.rows(model, case)["attention_mask"].bool()
    ours, theirs = (run(recorded, each, case)[0].hidden_states[-1] for each in (model, published))
    close(ours[real], theirs[real], 1e-4, case.name)


def generated(recorded, model, name, facts, compat):
    """One recorded generation: its tensors, ours, and our mask logits on the square."""
    tensors = load_file(recorded.folder / f"evaluate_{name}.safetensors")
    ids = tensors["in.input_ids"][0]
    ids, mask, _ = expand(ids, torch.ones_like(ids), ids, model.config.tokens.image, model.num_image_tokens)
    sample = facts["images_of_sample"]
    images = recorded.images([sample])
    batch = Batch({"input_ids": ids[None], "attention_mask": mask[None], **images}, [], [], [])
    if (ids == model.config.tokens.region).any():
        batch.tensors |= recorded.regions([sample])
    out = model.generate_with_states(batch, max_new_tokens=facts["max_new_tokens"], compat=compat)
    features = model.mask_encoder(images["mask_pixel_values"])
    index = torch.zeros(len(out.states), dtype=torch.long)
    logits = model.decode_masks(out.states, features, index)[0] if len(out.states) else out.states
    return tensors, out, logits


@pytest.mark.parametrize(("variant", "compat"), [("head_fixed", "official"), ("release_9c3efe9", "release")])
def test_recorded_generations_are_reproduced(recorded, model, published, dropless, variant, compat):
    model = model if dropless else published
    compared = 0
    for name, facts in recorded.evaluations.items():
        wanted = facts[variant]
        if wanted["status"] != "ok":  # this variant of the published code failed
            continue
        compared += 1
        # The demo's switch leaves the mask out where no <SEG> was written.
        chosen = ["first_seg"] if facts["inference_demo"] and compat == "official" else compat
        tensors, out, logits = generated(recorded, model, name, facts, chosen)
        assert out.ids[0].tolist() == wanted["new_ids"], name
        assert len(logits) == wanted["n_masks"], name
        for i in range(len(logits)):
            resized, size = tuple(facts["resize_list"][i]), tuple(facts["original_size"])
            text = model.seg_projector(out.states[i])
            close(text, tensors[f"{variant}.text_embed.{i}"][0, 0], 1e-4, name)
            close(logits[i], tensors[f"{variant}.low_res.{i}"][0, 0], 1e-3, name)
            drawn, theirs = official_crop(logits[i], resized, size), tensors[f"{variant}.pred_mask.{i}"][0]
            close(drawn, theirs, 1e-3, name)
            assert torch.equal(drawn.sigmoid() > THRESHOLD, theirs.sigmoid() > THRESHOLD)
    assert compared


def test_by_default_a_mask_comes_from_the_state_that_predicts_each_seg(recorded, model, published, dropless):
    model = model if dropless else published
    for name, facts in recorded.evaluations.items():
        if facts["head_fixed"]["status"] != "ok":
            continue
        tensors, _, logits = generated(recorded, model, name, facts, None)
        written = facts["head_fixed"]["new_ids"].count(model.config.tokens.seg)
        assert len(logits) == written
        in_prompt = (tensors["in.input_ids"] == model.config.tokens.seg).any()
        if written == 1 and not in_prompt:
            close(logits[0], tensors["head_fixed.low_res.0"][0, 0], 1e-3, name)
