"""Tests of `medplib.vision`: towers give the grids and skips they announce, nothing is downloaded."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import CLIPVisionConfig

from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.registry import VISION_TOWERS
from medplib.vision.clip import CLIPTower
from medplib.vision.sam_vit import SamImageEncoder
from medplib.vision.timm_tower import TimmPyramid, TimmTower, TopDownMerge, append_coordinates

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 4}
TINY_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


def _pyramid(**kwargs) -> TimmPyramid:
    torch.manual_seed(0)
    return TimmPyramid("resnet10t", **{"dim": 24, "model_args": SMALL, "skip_channels": (12, 8, 4), **kwargs})


def _sam(adapters: bool = True, **kwargs) -> SamImageEncoder:
    torch.manual_seed(0)
    settings = {
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "window_size": 3,
        "global_blocks": (1,),
        "out_channels": 8,
    }
    return SamImageEncoder(64, 16, **(settings | kwargs), adapters=adapters).eval()


def _announced(tower, images) -> torch.Tensor:
    """The grid, after checking that all maps have the sizes the tower announces."""
    found = tower(images)
    h, w = images.shape[-2] // tower.stride, images.shape[-1] // tower.stride
    assert found.grid.shape == (len(images), tower.channels, h, w)
    expected = [(len(images), c, h << i + 1, w << i + 1) for i, c in enumerate(tower.skip_channels)]
    assert [tuple(skip.shape) for skip in found.skips] == expected
    return found.grid


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "model_args", "side"),
    [
        ("test_resnet", {}, 64),
        ("test_vit", {"img_size": 64}, 64),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 12, "depths": [1, 1]}, 64),
    ],
    ids=["convolutions", "tokens", "channels last"],
)
def test_a_timm_tower_gives_a_grid_of_the_size_it_announces(model, model_args, side):
    tower = TimmTower(model, model_args=model_args).eval()
    assert tower.skip_channels == ()
    _announced(tower, torch.rand(2, 3, side, side))


@torch.no_grad()
def test_a_grid_of_tokens_keeps_their_places_and_drops_the_class_token():
    tower = TimmTower("test_vit", model_args={"img_size": 64}).eval()
    images = torch.rand(1, 3, 64, 64)
    network = tower.network.model
    tokens = network.blocks(network.norm_pre(network._pos_embed(network.patch_embed(images))))
    grid = tower(images).grid
    assert tokens.shape[1] == 4 * 4 + network.num_prefix_tokens
    torch.testing.assert_close(grid[0, :, 1, 2], tokens[0, network.num_prefix_tokens + 1 * 4 + 2])


@torch.no_grad()
@pytest.mark.parametrize("model", ["resnet10t", "test_resnet"])
def test_a_pyramid_gives_the_sizes_it_announces(model):
    model_args = SMALL if model == "resnet10t" else {"channels": [24, 48, 96, 160]}
    tower = TimmPyramid(model, dim=24, model_args=model_args, skip_channels=(12, 8, 4)).eval()
    assert (tower.channels, tower.skip_channels, tower.stride) == (24, (12, 8, 4), 16)
    _announced(tower, torch.rand(2, 3, 64, 96))


@torch.no_grad()
def test_a_pyramid_may_have_fewer_skips_and_another_top():
    tower = _pyramid(top_stride=8, skip_strides=(4,)).eval()
    assert tower.skip_channels == (12,)
    _announced(tower, torch.rand(1, 3, 64, 64))
    assert _pyramid(skip_strides=()).skip_channels == ()


@torch.no_grad()
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_merge_equals_repeating_the_coarse_map_and_adding_the_fine_one(norm):
    torch.manual_seed(0)
    merge = TopDownMerge(6, 5, 4, norm).eval()
    coarse, fine = torch.randn(2, 6, 3, 3), torch.randn(2, 5, 6, 6)
    repeated = merge.reduce(coarse).repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = merge.smooth(repeated + merge.lateral(fine))
    torch.testing.assert_close(merge(coarse, fine), expected)


def test_the_grid_and_every_skip_have_seen_the_deepest_level():
    tower = _pyramid()
    found = tower(torch.rand(1, 3, 64, 64))
    deepest = next(tower.network.layer4[0].downsample.parameters())  # its residual branch starts at zero
    for feature in (found.grid, *found.skips):
        (gradient,) = torch.autograd.grad(feature.square().sum(), deepest, retain_graph=True)
        assert gradient.abs().max() > 0


def test_coordinates_go_from_minus_one_to_one_with_x_first():
    out = append_coordinates(torch.zeros(2, 3, 3, 5))
    assert out.shape == (2, 5, 3, 5)
    torch.testing.assert_close(out[1, 3, 0], torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    torch.testing.assert_close(out[1, 4, :, 2], torch.tensor([-1.0, 0.0, 1.0]))


@torch.no_grad()
def test_with_coordinates_a_uniform_image_is_not_uniform_to_the_network():
    images = torch.zeros(1, 3, 256, 256)
    middle = (slice(None), slice(None), 8, slice(6, 10))  # far from the border in the receptive field's terms
    with_place = _pyramid(coordinates=True, skip_strides=()).eval()(images).grid[middle]
    assert (with_place[..., 0] - with_place[..., -1]).abs().max() > 1e-4


def test_an_unknown_timm_name_is_refused_with_close_matches():
    with pytest.raises(UnknownNameError, match=r"no model named 'resnet10tt'.*'resnet10t'"):
        TimmTower("resnet10tt")


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet10t.c3_in1k", "local-dir:/tmp/x", "../x", ""])
def test_a_name_that_is_not_a_plain_timm_model_is_refused(name):
    with pytest.raises(UnknownNameError):
        TimmPyramid(name, dim=8)


@pytest.mark.parametrize(
    ("model_args", "words"),
    [
        ({"pretrained": True}, "may not set 'pretrained'"),
        ({"checkpoint_path": "x"}, "may not set 'checkpoint_path'"),
        ({"norm_layer": "../../x"}, "norm_layer"),
        ({"channels": [8, "x"]}, "channels"),
        ({"block_args": {"a": 1}}, "block_args"),
        ({"act_layer": None}, "act_layer"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_model_args_that_are_not_plain_settings_of_the_network_are_refused(model_args, words):
    with pytest.raises(InputError, match=words):
        TimmPyramid("resnet10t", dim=8, model_args=model_args)


def test_no_tower_downloads_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("a download was tried")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(RuntimeError):
        timm.create_model("test_resnet", pretrained=True)
    TimmTower("test_resnet")
    _pyramid()


def test_strides_that_the_network_does_not_have_are_named():
    with pytest.raises(InputError, match=r"no features of stride \[2\]; its strides are \[4, 8, 16, 32\]"):
        TimmPyramid("convnext_atto", dim=8, model_args={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]})
    with pytest.raises(InputError, match="must halve from top_stride 16"):
        _pyramid(skip_strides=(4, 2))
    with pytest.raises(InputError, match="norm must be 'group' or 'batch', got 'layer'"):
        _pyramid(norm="layer")


@torch.no_grad()
@pytest.mark.parametrize("make", [_pyramid, _sam], ids=["pyramid", "sam"])
def test_a_tower_built_without_memory_and_then_loaded_equals_the_original(make):
    tower, images = make().eval(), torch.rand(1, 3, 64, 64)
    with torch.device("meta"):
        copy = make().eval()
    copy.load_state_dict(tower.state_dict(), assign=True)
    torch.testing.assert_close(copy(images).grid, tower(images).grid, rtol=0, atol=0)


@torch.no_grad()
def test_towers_take_float_images_whatever_their_own_precision():
    for tower in (_pyramid(coordinates=True).bfloat16().eval(), _sam().bfloat16()):
        assert tower(torch.rand(1, 3, 64, 64)).grid.dtype == torch.bfloat16


@torch.no_grad()
def test_a_sam_encoder_gives_the_size_it_announces_and_takes_no_other():
    _announced(_sam(), torch.rand(2, 3, 64, 64))
    with pytest.raises(InputError, match=r"64 x 64, got \(64, 48\)"):
        _sam()(torch.rand(1, 3, 64, 48))


@torch.no_grad()
def test_blocks_whose_adapters_say_nothing_equal_blocks_without_adapters():
    plain, adapted, images = _sam(adapters=False), _sam(), torch.rand(1, 3, 64, 64)
    for parameter in plain.parameters():
        parameter.normal_(std=0.2)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for block in adapted.network.blocks:
        block.adapter.norm.weight.zero_()
    torch.testing.assert_close(adapted(images).grid, plain(images).grid)
    adapted.network.blocks[0].adapter.norm.weight.fill_(1.0)
    assert not torch.allclose(adapted(images).grid, plain(images).grid)


@torch.no_grad()
def test_a_window_as_large_as_the_grid_equals_global_attention():
    windowed, everywhere = _sam(window_size=4, global_blocks=()), _sam(window_size=4, global_blocks=(0, 1))
    everywhere.load_state_dict(windowed.state_dict())
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(windowed(images).grid, everywhere(images).grid)


def _published(encoder: SamImageEncoder) -> dict[str, torch.Tensor]:
    names = {"mlp.fc1.": "mlp.lin1.", "mlp.fc2.": "mlp.lin2.", "adapter.": "Adapter."}
    state = {}
    for name, value in encoder.network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"image_encoder.{name}"] = value + 1
    return state


@pytest.mark.parametrize("adapters", [True, False])
def test_published_names_load_with_and_without_adapters(adapters):
    source, target = _sam(adapters), _sam(adapters)
    target.load_sam_state_dict(_published(source) | {"mask_decoder.iou_token.weight": torch.zeros(1)})
    for name, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value + 1)


def test_published_weights_that_do_not_fit_change_nothing():
    encoder = _sam()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match="adapter"):
        encoder.load_sam_state_dict(_published(_sam(adapters=False)))
    with pytest.raises(CheckpointError, match="other shape"):
        encoder.load_sam_state_dict(_published(_sam(out_channels=4)))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 60}, "multiple of patch_size"),
        ({"image_size": 48}, "even number of patches"),
        ({"num_heads": 3}, "num_heads must divide"),
        ({"global_blocks": (12,)}, "global_blocks"),
    ],
)
def test_sam_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SamImageEncoder(**({"image_size": 64, "dim": 16, "num_heads": 2} | settings))


@torch.no_grad()
def test_a_clip_tower_gives_the_patches_of_the_chosen_layer_without_the_class_token():
    torch.manual_seed(0)
    tower, images = CLIPTower(TINY_CLIP).eval(), torch.rand(2, 3, 24, 24)
    network = tower.network
    hidden = network.pre_layrnorm(network.embeddings(images))
    for layer in network.encoder.layers[:2]:  # -2 of three layers: after the second
        hidden = layer(hidden, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    grid = _announced(tower, images)
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(grid[:, :, row, column], hidden[:, 1 + row * 3 + column])


@torch.no_grad()
def test_a_clip_tower_takes_a_dict_or_a_configuration_and_keeps_all_layers():
    tower = CLIPTower(CLIPVisionConfig(**TINY_CLIP), select_layer=0)
    assert tower.state_dict().keys() == CLIPTower(TINY_CLIP).state_dict().keys()
    assert len(tower.network.encoder.layers) == 3
    _announced(tower, torch.rand(1, 3, 24, 24))


def test_a_clip_tower_refuses_a_layer_or_an_image_it_does_not_have():
    with pytest.raises(InputError, match="select_layer must be between -4 and 3 for 3 layers, got 4"):
        CLIPTower(TINY_CLIP, select_layer=4)
    with pytest.raises(InputError, match="24 x 24"):
        CLIPTower(TINY_CLIP)(torch.rand(1, 3, 32, 32))


def test_a_clip_configuration_of_wrong_types_is_refused():
    with pytest.raises(InputError, match="hidden_size"):
        CLIPTower(TINY_CLIP | {"hidden_size": "wide"})


def test_the_default_towers_are_the_published_ones():
    with torch.device("meta"):
        clip, sam = VISION_TOWERS.build("clip"), VISION_TOWERS.build("sam_vit")
    assert (clip.channels, clip.image_size // clip.stride) == (1024, 24)
    assert (sam.channels, sam.image_size // sam.stride) == (256, 16)


@pytest.mark.parametrize(
    "changes",
    [
        *({"image_size": 0}, {"image_size": 64.0}, {"dim": 0}, {"out_channels": 0}, {"global_blocks": 1}),
        *({"global_blocks": ("a",)}, {"window_size": -1}),
    ],
)
def test_sizes_that_no_sam_encoder_has_are_named(changes):
    settings = {
        "image_size": 32,
        "dim": 8,
        "depth": 1,
        "num_heads": 2,
        "global_blocks": (),
        "out_channels": 8,
    }
    with pytest.raises(InputError, match=next(iter(changes))):
        SamImageEncoder(**settings | changes)
