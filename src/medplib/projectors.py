"""Projectors: a grid of vision features becomes the language model's image tokens, row by row.

B images, C channels, (h, w) grid, D width of the language model, f pooling factor.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medplib.errors import InputError


class MLPProjector(nn.Module):
    """Linear, GELU, Linear on every grid position.

    MLPProjector(1024, 4096)(torch.rand(1, 1024, 24, 24))   # (1, 576, 4096)
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def num_tokens(self, h: int, w: int) -> int:
        """Tokens that a grid of (h, w) becomes."""
        return h * w

    def forward(self, grid: Tensor) -> Tensor:
        """grid (B, C, h, w) -> (B, h*w, D)."""
        return self.layers(grid.flatten(2).transpose(1, 2))  # (B, h*w, D)


class PooledMLPProjector(nn.Module):
    """Folds each f x f block of grid positions into one, then as `MLPProjector`: f*f times fewer tokens.

        PooledMLPProjector(256, 512)(torch.rand(1, 256, 16, 16))   # (1, 64, 512)

    A grid that f does not divide is padded with zeros at the bottom and right.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise InputError(f"factor must be 1 or more, got {factor}.")
        self.factor = factor
        self.mlp = MLPProjector(in_dim * factor * factor, out_dim)

    def num_tokens(self, h: int, w: int) -> int:
        """Tokens that a grid of (h, w) becomes."""
        return -(-h // self.factor) * -(-w // self.factor)

    def forward(self, grid: Tensor) -> Tensor:
        """grid (B, C, h, w) -> (B, ceil(h/f)*ceil(w/f), D)."""
        h, w = grid.shape[-2:]
        grid = F.pad(grid, (0, -w % self.factor, 0, -h % self.factor))
        return self.mlp(F.pixel_unshuffle(grid, self.factor))  # in: (B, C*f*f, ceil(h/f), ceil(w/f))
