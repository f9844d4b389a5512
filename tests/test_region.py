"""Regions to tokens: which features a mask gathers, and which random choices are made."""

import numpy as np
import pytest
import torch

from medplib.errors import InputError
from medplib.prompts.region import (
    GeometryRegionPooler,
    RegionPooler,
    farthest_points,
    masks_to_grid,
    nearest_points,
    region_mask_to_grid,
    sample_cells,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bilinear(plane, y, x):
    """The value of a (h, w) plane between its cells, one weight at a time."""
    total = 0.0
    for row in range(plane.shape[0]):
        for column in range(plane.shape[1]):
            total += plane[row, column].item() * max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
    return total


def slow_pool(features, mask):
    """(C, h, w), bool (h, w) -> (C,): the published reading, cell by cell."""
    height, width = mask.shape
    cells = [(r, c) for r in range(height) for c in range(width) if mask[r, c]]
    if not cells:
        return torch.zeros(len(features))
    means = [
        sum(bilinear(plane, r / height * (height - 1), c / width * (width - 1)) for r, c in cells)
        / len(cells)
        for plane in features
    ]
    return torch.tensor(means)


def test_pooling_equals_the_slow_way_region_by_region():
    features, masks = normal(2, 3, 4, 5), normal(5, 4, 5, seed=1) > 0.3
    masks[3] = False
    image_index = torch.tensor([0, 1, 1, 0, 1])
    pooled = RegionPooler()(features, masks, image_index)
    for region, image in enumerate(image_index.tolist()):
        torch.testing.assert_close(
            pooled[region], slow_pool(features[image], masks[region]), atol=1e-5, rtol=1e-5
        )
    assert pooled[3].abs().max() == 0


def test_masks_at_any_resolution_reach_the_grid_by_the_corner_pixel():
    square = normal(3, 12, 20, seed=2) > 0
    grid = masks_to_grid(square, (3, 5))
    assert torch.equal(grid, square[:, ::4, ::4])
    assert torch.equal(masks_to_grid(grid, (3, 5)), grid)
    assert torch.equal(masks_to_grid(grid, (6, 10)), grid.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_a_structure_between_the_cells_survives_unless_official():
    square = torch.zeros(1, 12, 12)
    square[0, 5:7, 6] = 1  # no pixel on a corner
    features = normal(1, 2, 3, 3)
    assert masks_to_grid(square, (3, 3)).nonzero().tolist() == [[0, 1, 1]]
    torch.testing.assert_close(RegionPooler()(features, square)[0], sample_cells(features)[0, :, 4])
    assert not masks_to_grid(square, (3, 3), official=True).any()
    read = RegionPooler(official=True)(features, square)[0]  # published: at every pixel of a finer mask
    places = torch.tensor([[[[6 / 12, 5 / 12], [6 / 12, 6 / 12]]]]) * 2 - 1
    slow = torch.nn.functional.grid_sample(features, places, align_corners=True)[0, :, 0].mean(-1)
    torch.testing.assert_close(read, slow)
    mask = np.zeros((24, 24), dtype=bool)
    mask[11, 13] = True
    assert np.argwhere(region_mask_to_grid(mask, 12, 4)).tolist() == [[1, 1]]
    assert not region_mask_to_grid(mask, 12, 4, official=True).any()
    assert not region_mask_to_grid(np.zeros((24, 24), dtype=bool), 12, 4).any()


def test_area_weights_average_by_how_much_of_each_cell_is_covered():
    features = normal(1, 2, 2, 2)
    square = torch.zeros(1, 8, 8, dtype=torch.bool)
    square[0, :4, :4] = True  # all of cell 0
    square[0, 0, 4:6] = True  # 2 of the 16 pixels of cell 1
    pooled = RegionPooler(weights="area")(features, square)[0]
    flat = features[0].flatten(1)
    torch.testing.assert_close(pooled, (flat[:, 0] * 16 + flat[:, 1] * 2) / 18)
    assert RegionPooler(weights="area")(features, torch.zeros(1, 8, 8)).abs().max() == 0


def test_a_region_keeps_at_most_max_points_cells():
    pooler = RegionPooler(max_points=7)
    features = torch.eye(36).reshape(1, 36, 6, 6)  # the pooled vector shows the share of every cell
    order = torch.randperm(36, generator=torch.Generator().manual_seed(3))
    pooled = pooler(features, torch.ones(1, 6, 6), permutations=[order])
    torch.testing.assert_close(pooled[0], sample_cells(features)[0, :, order[:7]].mean(1))
    few = torch.zeros(1, 6, 6)
    few[0, 2, :5] = 1
    torch.testing.assert_close(pooler(features, few)[0], sample_cells(features)[0, :, 12:17].mean(1))


def test_draws_repeat_and_leave_the_global_generator_alone():
    features, masks = normal(2, 4, 6, 6), torch.ones(3, 6, 6)
    image_index = torch.tensor([0, 1, 1])
    geometry = GeometryRegionPooler(4, 3, num_points=10, stages=(6, 3), neighbors=(4, 2))
    for pooler in (RegionPooler(max_points=5), geometry):
        before = torch.get_rng_state()
        first = pooler(features, masks, image_index)
        assert torch.equal(first, pooler(features, masks, image_index))
        assert torch.equal(before, torch.get_rng_state())
        alone = pooler(features[1:], masks[:2])  # the same regions without the other image
        torch.testing.assert_close(alone, first[1:])
        drawn = [
            pooler(features, masks, image_index, generator=torch.Generator().manual_seed(i))
            for i in (1, 2, 1)
        ]
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    other = RegionPooler(max_points=5, seed=1)(features, masks, image_index)
    assert not torch.allclose(other, RegionPooler(max_points=5)(features, masks, image_index), atol=1e-3)


def test_the_image_of_each_region_is_known_or_asked_for():
    features = normal(2, 3, 4, 4)
    masks = torch.ones(3, 4, 4)
    pooler = RegionPooler()
    torch.testing.assert_close(pooler(features, masks[:2]), pooler(features, masks[:2], torch.tensor([0, 1])))
    torch.testing.assert_close(pooler(features[:1], masks), pooler(features, masks, torch.tensor([0, 0, 0])))
    for wrong in (None, torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([0, 1, -1])):
        with pytest.raises(InputError, match="image_index"):
            pooler(features, masks, wrong)
    with pytest.raises(InputError, match="masks"):
        pooler(features, masks[0])
    for settings in ({"max_points": 0}, {"weights": "soft"}):
        with pytest.raises(InputError):
            RegionPooler(**settings)


def test_no_regions_give_no_tokens():
    none = torch.zeros(0, 8, 8)
    index = torch.zeros(0, dtype=torch.long)
    geometry = GeometryRegionPooler(3, 5, num_points=4, stages=(2,), neighbors=(2,))
    for pooler, width in ((RegionPooler(), 3), (RegionPooler(weights="area"), 3), (geometry, 5)):
        assert pooler(normal(2, 3, 4, 4), none, index).shape == (0, width)


def test_pooling_in_half_precision_stays_close_and_keeps_the_type():
    features, masks = normal(1, 3, 4, 4), torch.ones(1, 8, 8)
    pooled = RegionPooler()(features.bfloat16(), masks)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), RegionPooler()(features, masks), atol=1e-2, rtol=1e-2)


def test_gradients_reach_the_features_under_the_mask_only():
    features = normal(1, 2, 4, 4).requires_grad_()
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2] = 1
    RegionPooler(weights="area")(features, mask).sum().backward()
    assert features.grad[0, 0].nonzero().tolist() == [[1, 2]]


def test_farthest_points_equal_the_slow_way():
    places = torch.rand(2, 12, 2, generator=torch.Generator().manual_seed(0))
    ours = farthest_points(places, 6, torch.tensor([3, 7]))
    for region, start in enumerate((3, 7)):
        chosen = [start]
        while len(chosen) < 6:
            gaps = [
                min((places[region, p] - places[region, c]).norm().item() for c in chosen) for p in range(12)
            ]
            chosen.append(gaps.index(max(gaps)))
        assert ours[region].tolist() == chosen


def test_nearest_points_equal_the_slow_way_and_take_equal_ones_in_order():
    places = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(0))
    for official in (True, False):
        near = nearest_points(places, places[:, :3], 4, official)[0]
        for anchor in range(3):
            gaps = (places[0] - places[0, anchor]).norm(dim=-1)
            assert sorted(near[anchor].tolist()) == sorted(gaps.argsort()[:4].tolist())
    corners = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]]])
    assert nearest_points(corners, corners[:, 4:], 3)[0, 0].tolist() == [4, 0, 1]


def test_geometry_pooling_takes_small_large_exact_and_empty_regions():
    pooler = GeometryRegionPooler(3, 5, num_points=6, stages=(4, 2), neighbors=(3, 2), pool="mean")
    masks = torch.zeros(4, 4, 4)
    masks[0, 0, 0] = 1
    masks[1, :2, :3] = 1  # exactly num_points
    masks[2] = 1
    pooled = pooler(normal(1, 3, 4, 4), masks)
    assert pooled.shape == (4, 5)
    assert pooled.isfinite().all()
    assert pooled[3].abs().max() == 0
    pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in pooler.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": (4, 2), "neighbors": (2,)},
        {"stages": (9,), "neighbors": (2,)},
        {"stages": (4, 2), "neighbors": (2, 5)},
        {"stages": ()},
        {"stages": (4,), "neighbors": (2,), "pool": "sum"},
    ],
)
def test_geometry_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(InputError):
        GeometryRegionPooler(3, 5, num_points=8, **settings)


def test_a_region_is_the_same_alone_as_beside_others():
    features, masks = normal(1, 4, 6, 6), torch.ones(3, 6, 6)
    masks[1, :2], masks[2, 3:] = 0, 0
    geometry = GeometryRegionPooler(4, 3, num_points=10, stages=(6, 3), neighbors=(4, 2))
    for pooler in (RegionPooler(max_points=5), geometry):
        together = pooler(features, masks)
        for i in range(3):
            torch.testing.assert_close(pooler(features, masks[i : i + 1])[0], together[i])
        torch.testing.assert_close(pooler(features, masks.flip(0)), together.flip(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RegionPooler(max_points="many"),
            "max_points must be a whole number of at least 1, got 'many'",
        ),
        (lambda: RegionPooler(max_points=1.5), "max_points .* got 1.5"),
        (lambda: RegionPooler(seed="a"), "seed must be a whole number or None, got 'a'"),
        (lambda: GeometryRegionPooler(4, 3, stages=5), "stages must be a list of whole numbers, got 5"),
        (lambda: GeometryRegionPooler(4, 3, stages=("a", 2)), r"stages\[0\] must be a whole number"),
        (lambda: RegionPooler()(None, torch.ones(1, 6, 6)), "features must be a tensor, got a NoneType"),
        (lambda: RegionPooler()(normal(1, 4, 6, 6), [[1]]), "masks must be a tensor, got a list"),
        (lambda: RegionPooler()(normal(1, 4, 6, 6), torch.ones(1, 0, 6)), r"got .* and \(1, 0, 6\)"),
        (
            lambda: RegionPooler()(normal(2, 4, 6, 6), torch.ones(2, 6, 6), torch.tensor([True, False])),
            r"image_index must be \(2,\) whole numbers, got \(2,\) torch.bool",
        ),
    ],
)
def test_what_no_region_can_be_pooled_from_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
