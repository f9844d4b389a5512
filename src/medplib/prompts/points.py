"""Clicks to tokens: one token per point, from where it is and whether it is foreground or background.

Letters: B batch, N points per sample (short samples are padded), D width. Points are (x, y) in pixels of the
network's square.
"""

import torch
from torch import nn

from medplib.errors import InputError, check_size
from medplib.prompts.position import FourierPosition, check_tensors


class PointEncoder(nn.Module):
    """Points and labels -> tokens. Labels: 1 foreground, 0 background, -1 padding (the place is ignored).

    With `shared` the position and padding embeddings come with each call, so several encoders can use one.

        encoder = PointEncoder(256, image_size=(256, 256))
        encoder(torch.tensor([[[30.0, 40.0]]]), torch.tensor([[1]])).shape      # (1, 1, 256)
    """

    def __init__(self, dim: int, image_size: tuple[int, int], shared: bool = False):
        super().__init__()
        check_size(image_size=image_size)
        self.image_size = tuple(image_size)
        self.background = nn.Embedding(1, dim)
        self.foreground = nn.Embedding(1, dim)
        self.position = None if shared else FourierPosition(dim)
        self.padding = None if shared else nn.Embedding(1, dim)

    def forward(
        self,
        points: torch.Tensor,
        labels: torch.Tensor,
        position: FourierPosition | None = None,
        padding: nn.Embedding | None = None,
    ) -> torch.Tensor:
        """(B, N, 2), (B, N) -> (B, N, D). Raises InputError for other shapes and unknown labels."""
        _check(points, labels)
        position, padding = position or self.position, padding or self.padding
        if position is None or padding is None:
            raise InputError("This PointEncoder was made with shared=True: give position and padding")
        place = position.pixels(points, self.image_size).to(padding.weight.dtype)  # (B, N, D)
        kind = torch.where((labels == 1)[..., None], self.foreground.weight, self.background.weight)
        return torch.where((labels == -1)[..., None], padding.weight, place + kind)  # (B, N, D)


def _check(points: torch.Tensor, labels: torch.Tensor) -> None:
    check_tensors(points=points, labels=labels)
    if points.ndim != 3 or points.shape[-1] != 2 or labels.shape != points.shape[:2]:
        raise InputError(
            f"points must be (B, N, 2) and labels (B, N), got {tuple(points.shape)} and {tuple(labels.shape)}"
        )
    if not torch.compiler.is_compiling() and ((labels != 1) & (labels != 0) & (labels != -1)).any():
        raise InputError(
            "point labels must be 1 (foreground), 0 (background) or -1 (padding), "
            f"got {sorted(set(labels.flatten().tolist()))}"
        )
