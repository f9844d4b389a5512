"""Region pooling and region masks, against the published implementation."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from medplib.geometry import Letterbox
from medplib.prompts.region import (
    GeometryDraws,
    GeometryRegionPooler,
    RegionPooler,
    farthest_points,
    nearest_points,
    region_mask_to_grid,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def facts(golden):
    return golden("region/region.json")


@pytest.fixture(scope="module")
def tensors(golden):
    return golden("region/region.safetensors")


def to_grid(features: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, C, h, w), a square grid."""
    side = round(features.shape[1] ** 0.5)
    return features.transpose(1, 2).unflatten(2, (side, side))


def collect(tensors, name):
    """All regions of all images, and the image of each."""
    images = [
        index for index in range(len(tensors[f"{name}.feature_map"])) if f"{name}.masks.{index}" in tensors
    ]
    masks = [tensors[f"{name}.masks.{index}"] for index in images]
    image_index = torch.tensor([image for image, group in zip(images, masks, strict=True) for _ in group])
    recorded = torch.cat([tensors[f"{name}.out.{index}"] for index in images])
    return to_grid(tensors[f"{name}.feature_map"]), torch.cat(masks), image_index, recorded


def test_pooled_features_match(facts, tensors):
    features, masks, image_index, recorded = collect(tensors, "extract")
    counts = list(itertools.chain.from_iterable(facts["extract"]["nonzero"]))
    assert masks.flatten(1).count_nonzero(1).tolist() == counts
    pooler = RegionPooler(facts["extract"]["max_sample_point"], official=True)
    torch.testing.assert_close(pooler(features, masks, image_index), recorded, **CLOSE)
    torch.testing.assert_close(RegionPooler()(features, masks, image_index), recorded, **CLOSE)


def test_a_recorded_draw_of_points_gives_the_recorded_feature(tensors):
    features = to_grid(tensors["extract.feature_map"])[:1]
    order = tensors["extract.subsample.perm"]
    pooler = RegionPooler(max_points=len(order))
    pooled = pooler(features, torch.ones(1, *features.shape[-2:]), permutations=[order])
    torch.testing.assert_close(pooled, tensors["extract.subsample.out"], **CLOSE)


def test_region_masks_reach_the_recorded_grid(facts, tensors, golden_dir):
    for index, case in enumerate(facts["pre"]):
        mask = np.array(Image.open(golden_dir / "region" / f"mask_in_{index}.png")) != 0
        assert list(mask.shape) == case["shape"]
        recorded = tensors[f"pre.grid24.{index}"].numpy()
        packed = np.unpackbits(tensors[f"pre.padded336_packed.{index}"].numpy())
        size = round(len(packed) ** 0.5)
        box = Letterbox(mask.shape, size)
        assert list(box.resized_size) == case["resized"]
        np.testing.assert_array_equal(box.mask(mask), packed.reshape(size, size) != 0)
        grid = region_mask_to_grid(mask, size, size // len(recorded))
        np.testing.assert_array_equal(grid, recorded != 0)
        assert grid.sum() == case["nonzero24"]


def test_a_mask_of_the_published_demo_reaches_the_recorded_grid(tensors):
    mask, recorded = tensors["pre.worker255.in"].numpy(), tensors["pre.worker255.grid24"].numpy()
    size = round((tensors["pre.padded336_packed.0"].numel() * 8) ** 0.5)
    grid = region_mask_to_grid(mask, size, size // len(recorded), foreground=255)
    np.testing.assert_array_equal(grid, recorded != 0)


def geometry_pooler(facts, tensors) -> GeometryRegionPooler:
    pooler = GeometryRegionPooler(
        facts["input_dim"],
        facts["output_dim"],
        num_points=facts["num_init_point"],
        stages=facts["num_sub_point"],
        neighbors=facts["num_neighbor"],
        pool=facts["pooler_mode"],
        official=True,
    )
    theirs = {"flatten": "flatten_projector", "project": "dim_projector"}
    for stage in range(len(facts["num_sub_point"])):
        theirs[f"stages.{stage}.difference"] = f"diff_projector_list.{stage}"
        theirs[f"stages.{stage}.merge"] = f"agg_projector_list.{stage}.net.0"
        theirs[f"stages.{stage}.norm"] = f"agg_projector_list.{stage}.norm"
    state = {}
    for name, value in pooler.state_dict().items():
        part, kind = name.rsplit(".", 1)
        state[name] = tensors[f"geo.w.{theirs[part]}.{kind}"].reshape(value.shape)  # a 1-wide convolution
    pooler.load_state_dict(state)
    return pooler


def recorded_draws(facts, tensors, counts) -> GeometryDraws:
    """In the order of the calls: one per region that needs it, then one per stage."""
    calls = [tensors[f"geo.rng.{i}.{call[0]}"] for i, call in enumerate(facts["rng_calls_in_order"])]
    remaining = iter(calls)
    points = [None if count == facts["num_init_point"] else next(remaining) for count in counts]
    return GeometryDraws(points, list(remaining))


def test_geometry_features_match_with_the_recorded_draws(facts, tensors):
    features, masks, image_index, recorded = collect(tensors, "geo")
    pooler = geometry_pooler(facts["geo"], tensors)
    draws = recorded_draws(facts["geo"], tensors, masks.flatten(1).count_nonzero(1).tolist())
    with torch.no_grad():
        pooled = pooler(features, masks, image_index, draws=draws)
    torch.testing.assert_close(pooled, recorded, **CLOSE)


def test_a_generator_draws_in_the_published_order(facts, tensors):
    features, masks, image_index, recorded = collect(tensors, "geo")
    pooler = geometry_pooler(facts["geo"], tensors)
    generator = torch.Generator().manual_seed(facts["geo"]["seed"])
    with torch.no_grad():
        pooled = pooler(features, masks, image_index, generator=generator)
    torch.testing.assert_close(pooled, recorded, **CLOSE)


def test_farthest_points_match(tensors):
    chosen = tensors["geo.fps.idx"]
    ours = farthest_points(tensors["geo.fps.xyz"], chosen.shape[1], chosen[:, 0])
    assert ours.tolist() == chosen.tolist()


def test_nearest_points_match(tensors):
    places, recorded = tensors["geo.fps.xyz"], tensors["geo.knn.idx_sorted"]
    for official in (True, False):
        ours = nearest_points(places, places[:, : recorded.shape[1]], recorded.shape[2], official)
        assert ours.sort(-1).values.tolist() == recorded.tolist()
