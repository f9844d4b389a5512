"""The feed-forward blocks used as experts.

D width, H hidden width. Both map (..., D) to (..., D). An expert found by name is built as
`EXPERTS.build(name, dim, hidden_dim, **options)`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medplib.errors import check_whole


class SwiGLU(nn.Module):
    """The gated block of LLaMA: down(silu(gate(x)) * up(x)). Named as in LLaMA, so its weights load.

    SwiGLU(512, 1376)(torch.randn(2, 7, 512)).shape  # (2, 7, 512)
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        check_whole(dim=dim, hidden_dim=hidden_dim)
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nn.Module):
    """The plain block of most vision transformers: down(gelu(up(x)))."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        check_whole(dim=dim, hidden_dim=hidden_dim)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.down_proj(F.gelu(self.up_proj(x)))
