"""Random Fourier features: a place in the image as a vector, the same for points, boxes and the grid.

Letters: D width. Coordinates are (x, y) in pixels, sizes (height, width).
Source: Tancik et al. 2020, "Fourier features let networks learn high frequency functions"; used so by SAM.
"""

import math

import torch
from torch import nn

from medplib.errors import InputError, check_whole


class FourierPosition(nn.Module):
    """(..., 2) in 0..1 -> (..., D): sine and cosine of D / 2 random directions, drawn once and kept.

    FourierPosition(256)(torch.rand(4, 2)).shape        # (4, 256)
    """

    def __init__(self, dim: int, scale: float = 1.0):
        super().__init__()
        check_whole(dim=dim)
        if dim % 2:
            raise InputError(f"dim must be even (half sine, half cosine), got {dim}")
        self.scale = scale
        self.register_buffer("directions", torch.empty(2, dim // 2))  # persistent: a drawn constant
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions anew: normal, with standard deviation `scale`."""
        nn.init.normal_(self.directions, std=self.scale)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """(..., 2) as x, y in 0..1 -> (..., D) float32; half precision would blur places."""
        x, y = (2 * places.float() - 1).unsqueeze(-1).unbind(-2)  # (..., 1) each
        along_x, along_y = self.directions.float()  # products, not @, which autocast would round
        angles = 2 * math.pi * (x * along_x + y * along_y)  # (..., D / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (..., D)

    def pixels(self, xy: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Pixel positions (..., 2) -> (..., D). A pixel's position is its centre, half a pixel further."""
        height, width = image_size
        size = torch.tensor([width, height], dtype=torch.float32, device=xy.device)
        return self((xy.float() + 0.5) / size)

    def grid(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """(h, w) -> (1, D, h, w): the centres of the cells."""
        rows, columns = (
            (torch.arange(side, dtype=torch.float32, device=self.directions.device) + 0.5) / side
            for side in grid_size
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return self(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]  # (1, D, h, w)


def check_tensors(**prompts: object) -> None:
    """Raise InputError for what is no tensor; None is nothing."""
    for name, prompt in prompts.items():
        if prompt is not None and not isinstance(prompt, torch.Tensor):
            raise InputError(
                f"{name} must be a tensor, got a {type(prompt).__name__}; use torch.tensor(...)."
            )
