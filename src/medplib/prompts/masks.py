"""A rough mask as a prompt: added to every cell of the image embedding (a dense prompt, not tokens).

Letters: B batch, h, w the grid of the image embedding, D width. The mask has four times the grid's side.
"""

import torch
from torch import nn
from torch.nn import functional

from medplib.errors import InputError, check_size, check_whole
from medplib.prompts.position import check_tensors


class MaskEncoder(nn.Module):
    """Mask logits -> one vector per grid cell; without a mask, one learned vector everywhere.

    encoder = MaskEncoder(256, grid_size=(16, 16))
    encoder(torch.randn(2, 1, 64, 64)).shape        # (2, 256, 16, 16)
    """

    def __init__(self, dim: int, grid_size: tuple[int, int], mask_channels: int = 16):
        super().__init__()
        check_whole(mask_channels=mask_channels)
        check_size(grid_size=grid_size)
        if mask_channels < 8 or mask_channels % 4:  # normalising a single channel would erase the mask
            raise InputError(f"mask_channels must be a multiple of 4 and at least 8, got {mask_channels}")
        self.grid_size = tuple(grid_size)
        self.no_mask = nn.Embedding(1, dim)
        self.down = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            _ChannelNorm(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            _ChannelNorm(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, dim, kernel_size=1),
        )

    def forward(
        self,
        masks: torch.Tensor | None,
        batch_size: int | None = None,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 1, 4h, 4w) or None (then `batch_size` says B, else 1) -> (B, D, h, w).

        `valid` bool (B,): samples without a mask in a batch with masks. Raises InputError for other shapes.
        """
        check_tensors(masks=masks, valid=valid)
        absent = self.no_mask.weight.reshape(1, -1, 1, 1)
        if masks is None:
            return absent.expand(1 if batch_size is None else batch_size, -1, *self.grid_size)  # (B, D, h, w)
        wanted = (1, *(4 * side for side in self.grid_size))
        if masks.ndim != 4 or tuple(masks.shape[1:]) != wanted:
            raise InputError(
                f"masks must be (B, {', '.join(map(str, wanted))}), four times the grid, got "
                f"{tuple(masks.shape)}; resize the mask first"
            )
        dense = self.down(masks.to(self.no_mask.weight.dtype))  # (B, D, h, w)
        if valid is None:
            return dense
        if valid.shape != masks.shape[:1]:
            raise InputError(f"valid must be ({masks.shape[0]},), got {tuple(valid.shape)}")
        return torch.where(valid.bool().reshape(-1, 1, 1, 1), dense, absent)


class _ChannelNorm(nn.Module):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)
