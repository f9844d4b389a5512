"""Tests of `medplib.decoders`: two-way transformer, mask decoder with skips, way back to pixels."""

from __future__ import annotations

import pytest
import torch

from medplib.decoders.mask_decoder import MaskDecoder, upscale_channels
from medplib.decoders.postprocess import mask_score, masks_from_logits
from medplib.decoders.two_way import Attention, TwoWayTransformer
from medplib.errors import CheckpointError, InputError
from medplib.geometry import Letterbox

DIM, SIDE = 32, 3


def _decoder(num_upscales: int = 2, skip_channels=()) -> MaskDecoder:
    torch.manual_seed(0)
    transformer = TwoWayTransformer(DIM, depth=2, num_heads=4, mlp_dim=16)
    return MaskDecoder(
        DIM, transformer, iou_head_hidden_dim=16, skip_channels=skip_channels, num_upscales=num_upscales
    ).eval()  # fmt: skip


def _inputs(batch: int = 2, tokens: int = 3):
    torch.manual_seed(1)
    image, dense = torch.randn(batch, DIM, SIDE, SIDE), torch.randn(batch, DIM, SIDE, SIDE)
    return image, torch.randn(1, DIM, SIDE, SIDE), torch.randn(batch, tokens, DIM), dense


def _skips(channels, batch: int = 2):
    torch.manual_seed(2)
    return [torch.randn(batch, c, SIDE << i + 1, SIDE << i + 1) for i, c in enumerate(channels)]


def test_attention_equals_one_softmax_per_head_and_query():
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, downsample=2)
    query, key, value = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    q, k, v = attention.q_proj(query)[0], attention.k_proj(key)[0], attention.v_proj(value)[0]
    rows = []
    for i in range(3):
        heads = []
        for part in (slice(0, 2), slice(2, 4)):
            weights = torch.softmax((k[:, part] @ q[i, part]) / 2**0.5, dim=0)
            heads.append(weights @ v[:, part])
        rows.append(attention.out_proj(torch.cat(heads)))
    torch.testing.assert_close(attention(query, key, value)[0], torch.stack(rows))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="num_heads must divide"):
        TwoWayTransformer(24, num_heads=5)


@torch.no_grad()
@pytest.mark.parametrize("num_upscales", [1, 2, 3])
@pytest.mark.parametrize("multimask", [False, True])
def test_each_upscale_doubles_the_side_of_the_masks(num_upscales, multimask):
    masks, iou = _decoder(num_upscales)(*_inputs(), multimask=multimask)
    side, kinds = SIDE * 2**num_upscales, 3 if multimask else 1
    assert masks.shape == (2, kinds, side, side)
    assert iou.shape == (2, kinds)


def test_channels_halve_with_each_upscale_but_stay_at_eight_after_the_second():
    assert upscale_channels(256, 2) == (64, 32)
    assert upscale_channels(256, 3) == (64, 32, 16)
    assert upscale_channels(64, 4) == (16, 8, 8, 8)


@torch.no_grad()
def test_one_image_under_many_prompts_equals_the_image_repeated():
    decoder, (image, position, sparse, dense) = _decoder(skip_channels=(5, 4)), _inputs(batch=3)
    skips = _skips((5, 4), batch=1)
    once = decoder(image[:1], position, sparse, dense[:1], skips=skips)
    repeated = decoder(
        image[:1].repeat(3, 1, 1, 1), position, sparse, dense[:1].repeat(3, 1, 1, 1),
        skips=[s.repeat(3, 1, 1, 1) for s in skips],
    )  # fmt: skip
    torch.testing.assert_close(once, repeated)


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_change_in_a_skip_stays_where_it_was_made(level):
    channels = (6, 5, 4)
    decoder, inputs, skips = _decoder(3, channels), _inputs(), _skips(channels)
    before = decoder(*inputs, skips=skips)[0]
    skips[level] = skips[level].clone()
    skips[level][1, :, 2, 3] += 1
    changed = (decoder(*inputs, skips=skips)[0] - before)[:, 0].abs() > 0
    side = 2 ** (2 - level)
    expected = torch.zeros_like(changed)
    expected[1, 2 * side : 3 * side, 3 * side : 4 * side] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_skips_through_empty_projections_change_nothing():
    plain, with_skips = _decoder(), _decoder(skip_channels=(5,))
    with_skips.load_state_dict(plain.state_dict(), strict=False)
    for parameter in with_skips.skip_projections.parameters():
        parameter.zero_()
    torch.testing.assert_close(with_skips(*_inputs(), skips=_skips((5,))), plain(*_inputs()))


def test_skips_of_a_wrong_number_or_size_are_refused():
    decoder = _decoder(skip_channels=(5, 4))
    with pytest.raises(InputError, match="takes 2 skips, got 0"):
        decoder(*_inputs())
    with pytest.raises(InputError, match=r"skips\[0\] must have size \(6, 6\)"):
        decoder(*_inputs(), skips=_skips((4, 5))[::-1])
    with pytest.raises(InputError, match="at most 2"):
        _decoder(2, (5, 4, 3))


def test_a_transformer_of_another_width_is_refused():
    with pytest.raises(InputError, match=f"The transformer is {2 * DIM} wide, the mask decoder {DIM}"):
        MaskDecoder(DIM, TwoWayTransformer(2 * DIM, depth=1, num_heads=2))


def test_batches_that_do_not_match_are_refused():
    image, position, _, dense = _inputs(batch=2)
    with pytest.raises(InputError, match="image_embeddings has batch 2 but sparse has 3"):
        _decoder()(image, position, torch.randn(3, 1, DIM), dense)


def test_every_parameter_receives_a_gradient_even_for_a_single_mask():
    decoder = _decoder(skip_channels=(5, 4))
    masks, iou = decoder(*_inputs(), skips=_skips((5, 4)))
    (masks.square().sum() + iou.sum()).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_published_weights_load_under_their_prefix_and_leave_the_skips_alone():
    source, target = _decoder(), _decoder(skip_channels=(5,))
    state = {f"mask_decoder.{name}": value + 1 for name, value in source.state_dict().items()}
    skip = target.skip_projections[0].weight.clone()
    target.load_sam_state_dict(state | {"image_encoder.pos_embed": torch.zeros(1)})
    for name, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value + 1)
    assert torch.equal(target.skip_projections[0].weight, skip)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(damage):
    decoder = _decoder()
    state = {f"mask_decoder.{name}": value + 1 for name, value in decoder.state_dict().items()}
    if damage == "missing":
        del state["mask_decoder.iou_token.weight"]
    elif damage == "unexpected":
        state["mask_decoder.extra"] = torch.zeros(1)
    else:
        state["mask_decoder.iou_token.weight"] = torch.zeros(2, DIM)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with pytest.raises(CheckpointError, match="extra" if damage == "unexpected" else "iou_token"):
        decoder.load_sam_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("geometry", ["correct", "official"])
def test_masks_come_back_at_the_size_of_the_image(geometry):
    letterbox = Letterbox((20, 30), 32)
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = masks_from_logits(logits, letterbox, threshold=0.3, geometry=geometry)
    assert masks.dtype == torch.bool
    assert masks.shape == (2, 20, 30)
    assert torch.equal(masks, letterbox.unletterbox(logits, geometry=geometry) > 0.3)


def test_logits_that_are_not_a_stack_of_masks_are_refused():
    with pytest.raises(InputError, match=r"\(M, h, w\), got \(8, 8\)"):
        masks_from_logits(torch.zeros(8, 8), Letterbox((20, 30), 32))


def test_the_score_is_the_mean_probability_inside_the_mask():
    logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    assert mask_score(logits) == pytest.approx(torch.tensor([2.0, 0.5]).sigmoid().mean().item())
    assert mask_score(logits, threshold=5.0) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoWayTransformer("a"), "dim must be a whole number of at least 1, got 'a'"),
        (lambda: TwoWayTransformer(16, depth=-1), "depth must be a whole number of at least 1, got -1"),
        (lambda: TwoWayTransformer(16, mlp_dim=0), "mlp_dim must be a whole number of at least 1, got 0"),
        (lambda: decoder_of(num_multimask_outputs=1.5), "num_multimask_outputs must be .* got 1.5"),
        (lambda: decoder_of(iou_head_depth=0), "iou_head_depth must be .* got 0"),
        (lambda: decoder_of(skip_channels=3), "skip_channels must be a list of whole numbers, got 3"),
        (lambda: decoder_of(num_upscales="a"), "num_upscales must be .* got 'a'"),
    ],
)
def test_sizes_that_no_decoder_has_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("wrong", ["image_embeddings", "image_position", "dense", "sparse"])
def test_an_input_of_another_shape_is_named(wrong):
    shapes = {
        "image_embeddings": (1, 16, 4, 6), "image_position": (1, 16, 4, 6), "sparse": (2, 1, 16),
        "dense": (1, 16, 4, 6),
    }  # fmt: skip
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert decoder_of()(**given)[0].shape == (2, 1, 16, 24)
    with pytest.raises(InputError, match=f"{wrong} must be|image_position must be"):
        decoder_of()(**given | {wrong: given[wrong][..., :3]})


def test_an_input_that_is_no_tensor_is_named():
    with pytest.raises(InputError, match="image_embeddings must be a tensor, got a NoneType"):
        decoder_of()(None, torch.zeros(1, 16, 4, 6), torch.zeros(2, 1, 16), torch.zeros(1, 16, 4, 6))


def decoder_of(**settings):
    return MaskDecoder(16, TwoWayTransformer(16, depth=1, num_heads=2, mlp_dim=8), **settings)
