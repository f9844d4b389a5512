"""Tests of `medplib.projectors`: tokens come row by row, and pooling folds neighbours together."""

from __future__ import annotations

import pytest
import torch

from medplib.errors import InputError
from medplib.projectors import MLPProjector, PooledMLPProjector


def test_tokens_are_the_grid_row_by_row():
    torch.manual_seed(0)
    projector, grid = MLPProjector(6, 8), torch.randn(2, 6, 3, 4)
    tokens = projector(grid)
    assert tokens.shape == (2, projector.num_tokens(3, 4), 8)
    for row in range(3):
        for column in range(4):
            alone = projector.layers(grid[:, :, row, column])
            torch.testing.assert_close(tokens[:, row * 4 + column], alone)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5)])
def test_pooling_folds_each_block_of_positions_into_one_token(height, width):
    torch.manual_seed(0)
    projector, grid = PooledMLPProjector(3, 8, factor=2), torch.randn(2, 3, height, width)
    tokens = projector(grid)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    assert tokens.shape == (2, projector.num_tokens(height, width), 8) == (2, rows * columns, 8)
    for row in range(rows):
        for column in range(columns):
            block = torch.zeros(2, 3, 2, 2)
            inside = grid[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            block[:, :, : inside.shape[2], : inside.shape[3]] = inside
            expected = projector.mlp.layers(block.flatten(1))
            torch.testing.assert_close(tokens[:, row * columns + column], expected)


def test_a_factor_below_one_is_refused():
    with pytest.raises(InputError, match="factor must be 1 or more, got 0"):
        PooledMLPProjector(3, 8, factor=0)
