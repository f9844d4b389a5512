"""PromptEncoder: points, boxes, a mask and text embeddings together, as SAM's mask decoder reads them.

Letters: B batch, N points, K boxes and T text tokens per sample, D width, h, w the grid of the image
embedding, n sparse tokens. Coordinates are (x, y) in pixels of the network's square, sizes (height, width).
"""

from collections.abc import Mapping

import torch
from torch import nn

from medplib.errors import InputError, check_size, check_whole
from medplib.prompts.boxes import BoxEncoder
from medplib.prompts.masks import MaskEncoder
from medplib.prompts.points import PointEncoder
from medplib.prompts.position import FourierPosition, check_tensors
from medplib.weights import check_fit

# Our parameter names -> those of SAM and SAM-Med2D. Shapes are equal.
SAM_NAMES = {
    "position.directions": "pe_layer.positional_encoding_gaussian_matrix",
    "padding.weight": "not_a_point_embed.weight",
    "points.background.weight": "point_embeddings.0.weight",
    "points.foreground.weight": "point_embeddings.1.weight",
    "boxes.top_left.weight": "point_embeddings.2.weight",
    "boxes.bottom_right.weight": "point_embeddings.3.weight",
    "masks.no_mask.weight": "no_mask_embed.weight",
    **{
        f"masks.down.{layer}.{name}": f"mask_downscaling.{layer}.{name}"
        for layer in (0, 1, 3, 4, 6)
        for name in ("weight", "bias")
    },
}


class PromptEncoder(nn.Module):
    """Any mix of prompts -> sparse tokens (B, n, D) and a dense map (B, D, h, w).

    Sparse tokens come in the order points, one padding token (when there are points and no boxes, as in SAM),
    boxes, text. Batches whose samples hold different prompts are padded: label -1 for points, `boxes_valid`,
    `text_valid` and `masks_valid` for the rest. A padded place becomes the padding embedding, which the mask
    decoder still sees; it is not invisible.

        encoder = PromptEncoder(256, grid_size=(16, 16), image_size=(256, 256))
        sparse, dense = encoder(text=torch.randn(2, 1, 256))        # (2, 1, 256), (2, 256, 16, 16)
    """

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        image_size: tuple[int, int],
        mask_channels: int = 16,
    ):
        super().__init__()
        check_size(grid_size=grid_size, image_size=image_size)
        self.dim = dim
        self.grid_size = tuple(grid_size)
        self.position = FourierPosition(dim)
        self.padding = nn.Embedding(1, dim)
        self.points = PointEncoder(dim, image_size, shared=True)
        self.boxes = BoxEncoder(dim, image_size, shared=True)
        self.masks = MaskEncoder(dim, grid_size, mask_channels)

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        batch_size: int | None = None,
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        text_valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """points: xy (B, N, 2) and labels (B, N); boxes (B, 4) or (B, K, 4); masks (B, 1, 4h, 4w);
        text (B, T, D); `*_valid`: bool, one per box (B,) or (B, K), mask (B,), text token (B, T).

        Returns sparse (B, n, D), n may be 0, and dense (B, D, h, w). Raises InputError when shapes or batch
        sizes disagree.
        """
        if points is not None and not (isinstance(points, tuple | list) and len(points) == 2):
            raise InputError("points must be a pair of tensors: xy (B, N, 2) and labels (B, N), 1 or 0.")
        batch = self._batch_size(points, boxes, masks, text, batch_size)
        tokens = []
        if points is not None:
            tokens.append(self.points(*points, position=self.position, padding=self.padding))  # (B, N, D)
            if boxes is None:
                tokens.append(self.padding.weight.expand(batch, 1, -1))
        if boxes is not None:
            tokens.append(self.boxes(boxes, boxes_valid, self.position, self.padding))  # (B, 2 K, D)
        if text is not None:
            tokens.append(self._text(text, text_valid))  # (B, T, D)
        if not tokens:
            tokens.append(self.padding.weight.new_empty(batch, 0, self.dim))
        return torch.cat(tokens, dim=1), self.masks(masks, batch, masks_valid)

    def dense_position(self) -> torch.Tensor:
        """(1, D, h, w): where each cell of the image embedding is."""
        return self.position.grid(self.grid_size).to(self.padding.weight.dtype)

    def load_sam_state_dict(
        self, state: Mapping[str, torch.Tensor], prefix: str = "prompt_encoder."
    ) -> "PromptEncoder":
        """Take the weights of a SAM or SAM-Med2D checkpoint: its keys under `prefix`, all of them.

        Raises CheckpointError that lists what is missing, unexpected or of another shape; the encoder is then
        unchanged. Returns itself.
        """
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        own = self.state_dict()
        check_fit(found, {SAM_NAMES[k]: v for k, v in own.items()}, f"The weights under {prefix!r}")
        self.load_state_dict({name: found[SAM_NAMES[name]] for name in own})
        return self

    def _text(self, text: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        if text.ndim != 3 or text.shape[-1] != self.dim:
            raise InputError(f"text must be (B, T, {self.dim}), got {tuple(text.shape)}")
        text = text.to(self.padding.weight.dtype)
        check_tensors(text_valid=valid)
        if valid is None:
            return text
        if valid.shape != text.shape[:2]:
            raise InputError(f"text_valid must be {tuple(text.shape[:2])}, got {tuple(valid.shape)}")
        return torch.where(valid.bool()[..., None], text, self.padding.weight)

    @staticmethod
    def _batch_size(points, boxes, masks, text, batch_size) -> int:
        given = {
            "points": None if points is None else points[0],
            "boxes": boxes,
            "masks": masks,
            "text": text,
        }
        check_tensors(**given)
        sizes = {
            name: len(prompt) if prompt.ndim else 1 for name, prompt in given.items() if prompt is not None
        }
        if batch_size is not None:
            check_whole(0, batch_size=batch_size)
            sizes["batch_size"] = batch_size
        if len(set(sizes.values())) > 1:
            raise InputError(f"Prompts must agree on the batch size, got {sizes}")
        return next(iter(sizes.values()), 1)
