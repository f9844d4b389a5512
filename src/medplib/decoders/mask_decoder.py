"""The mask decoder of Segment Anything, with optional finer image features: embeddings in, mask logits out.

B masks (one prompt each), D width, (h, w) image grid, N prompt tokens, M mask tokens, u upscales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from medplib.errors import InputError, check_whole
from medplib.weights import check_fit


class MLP(nn.Module):
    """`depth` linear layers with ReLU between them: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (depth - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def upscale_channels(dim: int, num_upscales: int) -> tuple[int, ...]:
    """Channels after each upscale: D/4, D/8 as in Segment Anything, then halves of that, at least 8."""
    return tuple(dim // (4 << i) if i < 2 else max(8, dim // (4 << i)) for i in range(num_upscales))


class MaskDecoder(nn.Module):
    """Turns image features and prompt embeddings into mask logits and a predicted IoU for each mask.

        decoder = MaskDecoder(256, TwoWayTransformer(256))
        masks, iou = decoder(image, position, sparse, dense)   # (B, 1, 4h, 4w), (B, 1)

    `transformer` is any module with the call of `TwoWayTransformer`. `skip_channels` are the channels of the
    finer image maps, coarsest first; the i-th is added after the i-th upscale through a 1x1 convolution.
    Parameter names are those of the published Segment Anything weights.
    """

    def __init__(
        self,
        dim: int,
        transformer: nn.Module,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        skip_channels: Sequence[int] = (),
        num_upscales: int = 2,
    ) -> None:
        super().__init__()
        check_whole(dim=dim, num_upscales=num_upscales, iou_head_depth=iou_head_depth)
        check_whole(iou_head_hidden_dim=iou_head_hidden_dim)
        check_whole(0, num_multimask_outputs=num_multimask_outputs)
        if dim % 8:
            raise InputError(f"dim must be a multiple of 8, got {dim}.")
        if not isinstance(skip_channels, list | tuple):
            raise InputError(f"skip_channels must be a list of whole numbers, got {skip_channels!r}.")
        check_whole(**{f"skip_channels[{i}]": channels for i, channels in enumerate(skip_channels)})
        if getattr(transformer, "dim", dim) != dim:
            raise InputError(
                f"The transformer is {transformer.dim} wide, the mask decoder {dim}; make them equal."
            )
        if len(skip_channels) > num_upscales:
            raise InputError(
                f"skip_channels has {len(skip_channels)} entries for {num_upscales} upscales; "
                f"give at most {num_upscales}."
            )
        self.dim, self.num_upscales = dim, num_upscales
        self.transformer = transformer
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, dim)

        channels = upscale_channels(dim, num_upscales)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((dim, *channels), channels, strict=False)):
            layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
            if i < num_upscales - 1:
                layers.append(LayerNorm2d(after))
            layers.append(nn.GELU())
        self.output_upscaling = nn.Sequential(*layers)
        self.skip_projections = nn.ModuleList(
            nn.Conv2d(skip, after, kernel_size=1)
            for skip, after in zip(skip_channels, channels, strict=False)
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, dim, channels[-1], 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(
        self,
        image_embeddings: Tensor,
        image_position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask: bool = False,
        skips: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and predicted IoU.

        image_embeddings (B, D, h, w), or (1, D, h, w) for one image under B prompts; image_position
        (1, D, h, w); sparse (B, N, D); dense (B or 1, D, h, w); skips (B or 1, C_i, h*2^i, w*2^i) for
        i = 1, 2, ..., finest last -> masks (B, K, h*2^u, w*2^u), iou (B, K), where K is 1, or
        num_multimask_outputs with `multimask`.
        Raises InputError for a wrong number of skips or sizes that do not fit.
        """
        self._check(image_embeddings, image_position, sparse, dense, multimask, skips)
        batch = sparse.shape[0]
        chosen = slice(1, None) if multimask else slice(0, 1)
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1+M, D)
        tokens = torch.cat(
            [output_tokens.expand(batch, -1, -1).to(sparse.dtype), sparse], dim=1
        )  # (B, 1+M+N, D)
        image = (image_embeddings + dense).expand(batch, -1, -1, -1)  # (B, D, h, w)
        tokens, flat = self.transformer(image, image_position, tokens)
        upscaled = self._upscale(flat.transpose(1, 2).reshape(image.shape), skips)  # (B, c, h*2^u, w*2^u)

        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens]  # (B, M, D)
        kernels = torch.stack(
            [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )  # (B, M, c)
        masks = torch.einsum("bmc,bchw->bmhw", kernels[:, chosen], upscaled)  # (B, K, h*2^u, w*2^u)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, chosen]

    def _upscale(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        remaining = iter(zip(self.skip_projections, skips, strict=True))
        for layer in self.output_upscaling:
            x = layer(x)
            if isinstance(layer, nn.ConvTranspose2d) and (pair := next(remaining, None)) is not None:
                project, skip = pair
                x = x + project(skip)  # added before the norm and the activation, as Segment Anything 2 does
        return x

    def _check(
        self,
        image: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask: bool,
        skips: Sequence[Tensor],
    ) -> None:
        for name, value in (("image_embeddings", image), ("sparse", sparse), ("dense", dense)):
            if not isinstance(value, Tensor):
                raise InputError(f"{name} must be a tensor, got a {type(value).__name__}.")
        if sparse.ndim != 3 or sparse.shape[-1] != self.dim:
            raise InputError(f"sparse must be (B, N, {self.dim}), got {tuple(sparse.shape)}.")
        grid = (self.dim, *image.shape[-2:])
        for name, value in (("image_embeddings", image), ("image_position", position), ("dense", dense)):
            if value.ndim != 4 or tuple(value.shape[1:]) != grid:
                raise InputError(
                    f"{name} must be (B or 1, {', '.join(map(str, grid))}), got {tuple(value.shape)}."
                )
        if multimask and self.num_mask_tokens == 1:
            raise InputError("multimask needs num_multimask_outputs of at least 1, this decoder has 0.")
        for name, value in (("image_embeddings", image), ("dense", dense)):
            if value.shape[0] not in (1, sparse.shape[0]):
                raise InputError(
                    f"{name} has batch {value.shape[0]} but sparse has {sparse.shape[0]}; "
                    "give one image per prompt, or a single image for all."
                )
        if len(skips) != len(self.skip_projections):
            raise InputError(
                f"This decoder takes {len(self.skip_projections)} skips, got {len(skips)}; "
                "pass the skips of its vision tower."
            )
        height, width = image.shape[-2:]
        for i, skip in enumerate(skips):
            expected = (height << i + 1, width << i + 1)
            if tuple(skip.shape[-2:]) != expected:
                raise InputError(
                    f"skips[{i}] must have size {expected} (finest last), got {tuple(skip.shape[-2:])}."
                )

    def load_sam_state_dict(self, state: Mapping[str, Tensor], prefix: str = "mask_decoder.") -> None:
        """Load the decoder's part of a published SAM or SAM-Med2D state dict.

        Strict: raises CheckpointError naming missing, unexpected or misshapen tensors, and changes nothing.
        The skip projections, which SAM does not have, keep their values.
        """
        given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        wanted = {k: v for k, v in self.state_dict().items() if not k.startswith("skip_projections.")}
        check_fit(given, wanted, f"The weights under {prefix!r}")
        self.load_state_dict(given, strict=False)
