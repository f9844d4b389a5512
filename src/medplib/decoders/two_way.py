"""The two-way transformer of Segment Anything: prompt tokens look at the image, and the image looks back.

B masks, N tokens, P = h*w image positions, D width, H heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medplib.errors import InputError, check_whole


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than `dim` (inner width = dim / downsample)."""

    def __init__(self, dim: int, num_heads: int, downsample: int = 1) -> None:
        super().__init__()
        check_whole(dim=dim)
        inner = dim // downsample
        if num_heads < 1 or inner % num_heads:
            raise InputError(
                f"num_heads must divide dim // {downsample} = {inner}, got {num_heads}; "
                "choose another num_heads or dim."
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, inner/H)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, N, D), key and value (B, P, D) -> (B, N, D)."""
        q, k, v = (
            self._split(self.q_proj(query)),
            self._split(self.k_proj(key)),
            self._split(self.v_proj(value)),
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class FeedForward(nn.Module):
    """Linear, ReLU, Linear: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden_dim)
        self.lin2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image; an MLP; then the image attends to the tokens.

    `first` marks the first block: there the tokens are their own positions, so the self-attention sees them
    once and replaces them instead of adding to them.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, *, first: bool = False, downsample: int = 2
    ) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pos: Tensor, image_pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens, token_pos (B, N, D); image (B, P, D); image_pos (1, P, D) -> tokens, image."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pos
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)

        placed_image = image + image_pos
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pos, placed_image, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))

        image = image + self.cross_attn_image_to_token(placed_image, tokens + token_pos, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """The transformer inside the mask decoder (Kirillov et al. 2023, "Segment Anything", appendix A).

        TwoWayTransformer(256)(image (B, 256, h, w), position (1, 256, h, w), tokens (B, N, 256))

    Parameter names are those of the published weights.
    """

    def __init__(self, dim: int, depth: int = 2, num_heads: int = 8, mlp_dim: int = 2048) -> None:
        super().__init__()
        check_whole(depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
        self.dim = dim
        self.layers = nn.ModuleList(TwoWayBlock(dim, num_heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image: Tensor, image_position: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, D, h, w), image_position (1, D, h, w), tokens (B, N, D) -> (B, N, D), (B, h*w, D)."""
        image = image.flatten(2).transpose(1, 2)  # (B, P, D)
        image_pos = image_position.flatten(2).transpose(1, 2)  # (1, P, D)
        token_pos = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        return self.norm_final_attn(tokens), image
