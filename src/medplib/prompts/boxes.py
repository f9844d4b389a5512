"""Boxes to tokens: two tokens per box, its top-left and its bottom-right corner.

Letters: B batch, K boxes per sample, D width. Boxes are x0, y0, x1, y1 in pixels of the network's square.
"""

import torch
from torch import nn

from medplib.errors import InputError, check_size
from medplib.prompts.position import FourierPosition, check_tensors


class BoxEncoder(nn.Module):
    """Boxes -> tokens. Samples with fewer boxes are padded: `valid` says which boxes are real.

    With `shared` the position and padding embeddings come with each call, so several encoders can use one.

        encoder = BoxEncoder(256, image_size=(256, 256))
        encoder(torch.tensor([[10.0, 20.0, 50.0, 60.0]])).shape      # (1, 2, 256)
    """

    def __init__(self, dim: int, image_size: tuple[int, int], shared: bool = False):
        super().__init__()
        check_size(image_size=image_size)
        self.image_size = tuple(image_size)
        self.top_left = nn.Embedding(1, dim)
        self.bottom_right = nn.Embedding(1, dim)
        self.position = None if shared else FourierPosition(dim)
        self.padding = None if shared else nn.Embedding(1, dim)

    def forward(
        self,
        boxes: torch.Tensor,
        valid: torch.Tensor | None = None,
        position: FourierPosition | None = None,
        padding: nn.Embedding | None = None,
    ) -> torch.Tensor:
        """(B, 4) or (B, K, 4), valid bool (B,) or (B, K) -> (B, 2 K, D); both corners of a padding box become
        the padding embedding. Raises InputError for other shapes."""
        check_tensors(boxes=boxes, valid=valid)
        if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4:
            raise InputError(f"boxes must be (B, 4) or (B, K, 4), got {tuple(boxes.shape)}")
        if valid is not None and valid.shape != boxes.shape[:-1]:
            raise InputError(
                f"boxes {tuple(boxes.shape)} need valid {tuple(boxes.shape[:-1])}, got {tuple(valid.shape)}"
            )
        position, padding = position or self.position, padding or self.padding
        if position is None or padding is None:
            raise InputError("This BoxEncoder was made with shared=True: give position and padding")
        corners = (boxes if boxes.ndim == 3 else boxes[:, None]).unflatten(-1, (2, 2))  # (B, K, 2, 2)
        place = position.pixels(corners, self.image_size).to(padding.weight.dtype)  # (B, K, 2, D)
        tokens = place + torch.cat([self.top_left.weight, self.bottom_right.weight])  # (B, K, 2, D)
        if valid is not None:
            real = valid.reshape(*corners.shape[:2], 1, 1).bool()
            tokens = torch.where(real, tokens, padding.weight)
        return tokens.flatten(1, 2)  # (B, 2 K, D)
