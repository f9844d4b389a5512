"""Regions to tokens: the image features under a mask, pooled into one vector that stands for the region.

Letters: B images, C channels, h, w the feature grid, N = h * w its cells, R regions, P points per region.
A region's mask covers the network's square, at any resolution; it is brought to the grid here.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from medplib.errors import InputError, check_whole
from medplib.geometry import Letterbox
from medplib.prompts.position import check_tensors


def region_mask_to_grid(
    mask: np.ndarray,
    image_size: int = 336,
    patch_size: int = 14,
    foreground: int = 1,
    official: bool = False,
) -> np.ndarray:
    """bool (H, W) on the original image -> bool (n, n) on the grid of patches, n = image_size / patch_size.

    As published: letterboxed to the square, then the pixel at the top-left corner of each patch decides. A
    mask that slips between these pixels would vanish; unless `official`, it keeps every patch it touches.
    `foreground=255` is the published demo, see `Letterbox.mask`.
    """
    square = Letterbox(np.shape(mask), image_size).mask(mask, foreground)  # (size, size)
    cells = max(1, round(image_size / patch_size))
    step = 1.0 / (1.0 / patch_size)  # the published resize is told 1 / patch_size and inverts it
    corner = np.minimum((np.arange(cells) * step).astype(np.int64), image_size - 1)
    grid = square[np.ix_(corner, corner)]  # (n, n)
    if not official and not grid.any():
        rows, columns = (np.minimum(at // patch_size, cells - 1) for at in np.nonzero(square))
        grid[rows, columns] = True
    return grid


class RegionPooler(nn.Module):
    """Features (B, C, h, w) and masks (R, h', w') -> one vector per region (R, C). No parameters.

    weights="binary" is the published way: at most `max_points` of the grid cells the mask holds, chosen at
    random when there are more, sampled a fraction of a cell towards the top left (cell i of n is read at
    i * (n - 1) / n) and averaged. weights="area" averages all cells by how much of each the mask covers, read
    where they are: nothing random, and kind to small structures and small models.

    A mask without a pixel on any cell's corner would give nothing; here it takes every cell it touches.
    `official=True` gives the zero vector instead, as published, and reads the features at every pixel of a
    mask that is finer than the grid. An empty mask gives the zero vector always.

    The draw depends on `seed` and the region's mask alone, whatever else is in the batch, in training as in
    evaluation: the global generator is neither used nor moved. Give forward a `generator` for fresh draws
    (`torch.default_generator` is the published behaviour).

        pooler = RegionPooler()
        pooler(torch.randn(1, 1024, 24, 24), torch.ones(2, 336, 336)).shape      # (2, 1024)
    """

    def __init__(
        self,
        max_points: int = 512,
        seed: int | None = None,
        weights: Literal["binary", "area"] = "binary",
        official: bool = False,
    ):
        super().__init__()
        check_whole(max_points=max_points)
        if weights not in ("binary", "area"):
            raise InputError(f"weights must be 'binary' or 'area', got {weights!r}")
        self.max_points = max_points
        self.seed = _seed(seed)
        self.weights = weights
        self.official = official

    def forward(
        self,
        features: torch.Tensor,
        masks: torch.Tensor,
        image_index: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        permutations: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """features (B, C, h, w); masks (R, h', w'), not 0 = inside; image_index (R,): each region's image,
        needed unless there is one image, or one region per image -> (R, C) in the dtype of `features`.

        `permutations`: for each region an order of its cells (row by row); the first `max_points` are used.
        Raises InputError when shapes disagree.
        """
        image_index = _check(features, masks, image_index)
        if self.weights == "area":
            values = features.float().flatten(2)  # (B, C, N)
            share = functional.adaptive_avg_pool2d((masks != 0).float()[:, None], features.shape[-2:])
            share = share.flatten(1)  # (R, N)
        else:
            size = tuple(masks.shape[-2:] if self.official else features.shape[-2:])
            values = sample_cells(features, size)  # (B, C, N)
            inside = masks_to_grid(masks, size, self.official).flatten(1)  # (R, N)
            share = self._choose(inside, generator, permutations).float()
        share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (R, N)
        return (values[image_index] * share[:, None]).sum(-1).to(features.dtype)  # (R, C)

    def _choose(self, inside, generator, permutations) -> torch.Tensor:
        """(R, N) bool -> (R, N) bool with at most `max_points` cells per region."""
        if inside.shape[1] <= self.max_points:
            return inside
        chosen = inside.clone()
        generators = _generators(self.seed, len(inside), generator)
        for region, count in enumerate(inside.sum(1).tolist()):
            if count <= self.max_points:
                continue
            order = permutations[region] if permutations is not None else _permute(count, generators[region])
            cells = inside[region].nonzero().flatten()  # (count,)
            chosen[region] = False
            chosen[region, cells[order[: self.max_points].to(cells.device)]] = True
        return chosen


class GeometryDraws(NamedTuple):
    """The random choices of `GeometryRegionPooler`, to inject recorded ones.

    points: per region, an order of its cells when it has more than `num_points`, or the cells to repeat when
    it has fewer (else ignored). starts: per stage, the first point of every region (R,).
    """

    points: Sequence[torch.Tensor | None]
    starts: Sequence[torch.Tensor]


class GeometryRegionPooler(nn.Module):
    """A region's shape and features -> one vector, by stages of farthest points and their neighbours.

    `num_points` cells of the region (repeated if it has fewer) become points with a place and a feature. Each
    stage keeps points far from each other and describes each by its nearest neighbours. The last points are
    flattened and projected. Randomness and empty masks as in `RegionPooler`; `official` also chooses between
    equally near neighbours as published.
    Source: the sampler of Ferret (You et al. 2023), as found in the published MedPLIB code.

        pooler = GeometryRegionPooler(1024, 4096)
        pooler(torch.randn(1, 1024, 24, 24), torch.ones(2, 336, 336)).shape      # (2, 4096)
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_points: int = 512,
        stages: Sequence[int] = (128, 32),
        neighbors: Sequence[int] = (24, 24),
        pool: Literal["max", "mean"] = "max",
        seed: int | None = None,
        official: bool = False,
    ):
        super().__init__()
        check_whole(num_points=num_points)
        for name, values in (("stages", stages), ("neighbors", neighbors)):
            if not isinstance(values, list | tuple):
                raise InputError(f"{name} must be a list of whole numbers, got {values!r}")
            check_whole(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        if not stages or len(stages) != len(neighbors):
            raise InputError(f"stages and neighbors must be equally long, got {stages} and {neighbors}")
        for before, kept, near in zip((num_points, *stages), stages, neighbors, strict=False):
            if not (1 <= kept <= before and 1 <= near <= before):
                raise InputError(
                    f"A stage that reads {before} points can keep and compare 1 to {before} of them, "
                    f"got stages {tuple(stages)} and neighbors {tuple(neighbors)}"
                )
        self.num_points = num_points
        self.seed = _seed(seed)
        self.official = official
        self.stages = nn.ModuleList(
            GeometryStage(dim, kept, near, pool, official)
            for kept, near in zip(stages, neighbors, strict=True)
        )
        self.flatten = nn.Linear(dim * stages[-1], dim)
        self.project = nn.Linear(dim, out_dim)

    def forward(
        self,
        features: torch.Tensor,
        masks: torch.Tensor,
        image_index: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        draws: GeometryDraws | None = None,
    ) -> torch.Tensor:
        """features (B, C, h, w), masks (R, h', w'), image_index (R,) as in RegionPooler -> (R, out_dim)."""
        image_index = _check(features, masks, image_index)
        height, width = features.shape[-2:]
        inside = masks_to_grid(masks, (height, width), self.official).flatten(1)  # (R, N)
        if not len(inside):
            return features.new_zeros(0, self.project.out_features)
        draws = draws or self._draw(inside, generator)
        cells = torch.stack([self._cells(*pair) for pair in zip(inside, draws.points, strict=True)])  # (R, P)
        size = torch.tensor([height, width], device=cells.device)
        places = torch.stack([cells // width, cells % width], dim=-1) / size  # (R, P, 2) as row, column
        values = sample_cells(features)[image_index].transpose(1, 2)  # (R, N, C)
        values = _take(values, cells)  # (R, P, C)
        for stage, start in zip(self.stages, draws.starts, strict=True):
            places, values = stage(places, values, start.to(cells.device))
        flat = self.flatten(values.flatten(1).to(self.flatten.weight.dtype))  # (R, C)
        out = self.project(flat) * inside.any(1, keepdim=True)  # (R, out_dim), 0 for an empty mask
        return out.to(features.dtype)

    def _draw(self, inside, generator) -> GeometryDraws:
        """All points first, then the starts stage by stage: with one generator, the published order."""
        generators = _generators(self.seed, len(inside), generator)
        points = []
        for count, source in zip(inside.sum(1).tolist(), generators, strict=True):
            if count > self.num_points:
                points.append(_permute(count, source))
            else:
                points.append(_integers(max(count, 1), self.num_points - count, source))
        starts, available = [], self.num_points
        for stage in self.stages:
            starts.append(torch.cat([_integers(available, 1, source) for source in generators]))
            available = stage.num_points
        return GeometryDraws(points, starts)

    def _cells(self, inside: torch.Tensor, draw: torch.Tensor | None) -> torch.Tensor:
        """(N,) bool -> (P,) cell numbers: a choice of the region's cells, or all of them and repeats."""
        cells = inside.nonzero().flatten()  # (count,)
        if len(cells) == 0:
            return cells.new_zeros(self.num_points)
        if len(cells) == self.num_points:
            return cells
        draw = draw.to(cells.device)
        if len(cells) > self.num_points:
            return cells[draw[: self.num_points]]
        return torch.cat([cells, cells[draw]])


class GeometryStage(nn.Module):
    """Places (R, P, 2) and values (R, P, C) -> those of `num_points` anchors far from each other.

    Each anchor reads its nearest neighbours: how they differ from it, and itself.
    """

    def __init__(
        self,
        dim: int,
        num_points: int,
        num_neighbors: int,
        pool: Literal["max", "mean"] = "max",
        official: bool = False,
    ):
        super().__init__()
        if pool not in ("max", "mean"):
            raise InputError(f"pool must be 'max' or 'mean', got {pool!r}")
        self.num_points = num_points
        self.num_neighbors = num_neighbors
        self.pool = pool
        self.official = official
        self.difference = nn.Linear(dim + 2, dim + 2)
        self.merge = nn.Linear(2 * (dim + 2), dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, places: torch.Tensor, values: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`start` (R,): the first anchor. Returns places (R, num_points, 2), values (R, num_points, C)."""
        anchors = farthest_points(places, self.num_points, start)  # (R, Q)
        described = torch.cat([values, places.to(values.dtype)], dim=-1)  # (R, P, C + 2)
        described = described.to(self.difference.weight.dtype)
        anchor_places = _take(places, anchors)  # (R, Q, 2)
        near = nearest_points(places, anchor_places, self.num_neighbors, self.official)  # (R, Q, K)
        anchor = _take(described, anchors)[:, :, None]  # (R, Q, 1, C + 2)
        around = _take(described, near.flatten(1)).unflatten(1, near.shape[1:])  # (R, Q, K, C + 2)
        both = torch.cat([self.difference(around - anchor), anchor.expand_as(around)], dim=-1)
        merged = self.norm(torch.relu(self.merge(both)))  # (R, Q, K, C)
        return anchor_places, merged.amax(2) if self.pool == "max" else merged.mean(2)


def masks_to_grid(masks: torch.Tensor, grid_size: tuple[int, int], official: bool = False) -> torch.Tensor:
    """(R, h', w') -> bool (R, h, w): the pixel at each cell's top-left corner; a mask that would vanish keeps
    every cell it touches, unless `official`."""
    rows, columns = (
        torch.arange(cells, device=masks.device) * pixels // cells
        for cells, pixels in zip(grid_size, masks.shape[-2:], strict=True)
    )
    inside = masks != 0
    grid = inside[:, rows][:, :, columns]  # (R, h, w)
    if official or not len(masks):
        return grid
    touched = functional.adaptive_max_pool2d(inside.float()[:, None], grid_size)[:, 0] > 0  # (R, h, w)
    return torch.where(grid.flatten(1).any(1)[:, None, None], grid, touched)


def sample_cells(features: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """(B, C, h, w) -> float32 (B, C, N): every cell of a grid of `size`, by default (h, w), read at
    (column / width, row / height) with corners aligned."""
    batch = len(features)
    height, width = features.shape[-2:] if size is None else size
    y, x = (torch.arange(side, device=features.device) / side * 2 - 1 for side in (height, width))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
    places = places.expand(batch, -1, -1, -1)
    return functional.grid_sample(features.float(), places, align_corners=True).flatten(2)


def farthest_points(places: torch.Tensor, count: int, start: torch.Tensor) -> torch.Tensor:
    """(R, P, 2), start (R,) -> (R, count): each next point is the one farthest from those chosen."""
    chosen, distance = [start], torch.full(places.shape[:2], torch.inf, device=places.device)
    while len(chosen) < count:
        last = _take(places, chosen[-1][:, None])  # (R, 1, 2)
        distance = torch.minimum(distance, ((places - last) ** 2).sum(-1))  # (R, P)
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, dim=1)


def nearest_points(
    places: torch.Tensor, anchors: torch.Tensor, count: int, official: bool = False
) -> torch.Tensor:
    """(R, P, 2), (R, Q, 2) -> (R, Q, count): the points nearest to each anchor, itself among them.

    On a grid many points are equally near. Equal ones are taken in their order, the same on every machine.
    `official` computes |a|^2 - 2ab + |b|^2 instead, whose rounding decides between them, as published.
    """
    if not official:
        distance = ((anchors[:, :, None] - places[:, None]) ** 2).sum(-1)  # (R, Q, P)
        return distance.sort(dim=-1, stable=True).indices[..., :count]
    with torch.autocast(places.device.type, enabled=False):
        distance = -2 * anchors @ places.transpose(1, 2)  # (R, Q, P)
    distance = distance + (anchors**2).sum(-1)[..., None] + (places**2).sum(-1)[:, None]
    return distance.topk(count, dim=-1, largest=False, sorted=False).indices


def _take(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(R, P, C), (R, Q) -> (R, Q, C)."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def _check(features: torch.Tensor, masks: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
    """The image of each region, (R,), once everything fits."""
    check_tensors(image_index=image_index)
    for name, value in (("features", features), ("masks", masks)):
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} must be a tensor, got a {type(value).__name__}")
    if features.ndim != 4 or masks.ndim != 3 or 0 in (*features.shape[2:], *masks.shape[1:]):
        raise InputError(
            f"features must be (B, C, h, w) and masks (R, h', w'), "
            f"got {tuple(features.shape)} and {tuple(masks.shape)}"
        )
    images, regions = len(features), len(masks)
    if image_index is None:
        if images == 1:
            return torch.zeros(regions, dtype=torch.long, device=features.device)
        if images == regions:
            return torch.arange(regions, device=features.device)
        raise InputError(f"{regions} regions of {images} images need image_index, the image of each region")
    if image_index.shape != (regions,) or image_index.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"image_index must be ({regions},) whole numbers, got {tuple(image_index.shape)} "
            f"{image_index.dtype}"
        )
    if (
        regions
        and not torch.compiler.is_compiling()
        and not ((image_index >= 0) & (image_index < images)).all()
    ):
        raise InputError(f"image_index must be 0 to {images - 1}, got {image_index.tolist()}")
    return image_index.to(features.device)


def _seed(seed: int | None) -> int:
    """The seed, 0 for None. Raises InputError for what is no whole number."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        raise InputError(f"seed must be a whole number or None, got {seed!r}")
    return int(seed or 0)


def _generators(seed: int, count: int, generator: torch.Generator | None) -> list[torch.Generator]:
    """A source of randomness for each of `count` regions: the given one, or a new one from the seed, so that
    no region's draw depends on its neighbours in the batch."""
    if generator is not None:
        return [generator] * count
    return [torch.Generator().manual_seed(seed % 2**63) for _ in range(count)]


def _permute(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)


def _integers(below: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, below, (count,), generator=generator, device=generator.device)
