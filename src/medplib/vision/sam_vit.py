"""The image encoder of Segment Anything, on timm's ViT-SAM, with or without the adapters of SAM-Med2D.

B images, (h, w) grid of patches, C width of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from timm.models.vision_transformer_sam import (
    Block,
    VisionTransformerSAM,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from medplib.errors import InputError, check_whole
from medplib.vision.features import VisionFeatures
from medplib.weights import check_fit

# Published names that differ from timm's, as (published, timm).
SAM_NAMES = (("mlp.lin1.", "mlp.fc1."), ("mlp.lin2.", "mlp.fc2."), ("Adapter.", "adapter."))


class Adapter(nn.Module):
    """SAM-Med2D's adapter: channels weighed by their global mean, then a convolution down and up, added back.

    `channel` is a squeeze-and-excitation over the whole grid, `spatial` sees 3x3 neighbourhoods at half
    resolution. Needs even h and w. Source: Cheng et al. 2023, "SAM-Med2D", section 3.2.
    """

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.channel = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, kernel_size=4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h, w, C) -> (B, h, w, C)."""
        weighed = x * self.channel(x.mean((1, 2)))[:, None, None, :]  # (B, h, w, C)
        local = self.spatial(weighed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, h, w, C)
        return self.norm(x + local)


class AdapterBlock(Block):
    """timm's ViT-SAM block with an adapter beside the MLP: both read the second norm."""

    def __init__(self, dim: int, **kwargs) -> None:
        super().__init__(dim, **kwargs)
        self.adapter = Adapter(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h, w, C) -> (B, h, w, C)."""
        size = tuple(x.shape[1:3])
        attended = self.norm1(x)
        if self.window_size:
            windows, padded = window_partition(attended, self.window_size)  # (B*windows, side, side, C)
            attended = window_unpartition(self.attn(windows), self.window_size, size, padded)  # (B, h, w, C)
        else:
            attended = self.attn(attended)
        x = x + self.drop_path1(self.ls1(attended))
        normed = self.norm2(x)
        return x + self.drop_path2(self.ls2(self.mlp(normed))) + self.adapter(normed)


class SamImageEncoder(nn.Module):
    """Images of one fixed size to a grid. The defaults are SAM-Med2D's ViT-B at 256 pixels.

        encoder = SamImageEncoder()
        encoder.load_sam_state_dict(torch.load("sam-med2d_b.pth", weights_only=True)["model"])
        encoder(torch.rand(1, 3, 256, 256)).grid   # (1, 256, 16, 16)

    `image_size=1024, adapters=False` is Segment Anything's ViT-B; ViT-L and ViT-H differ in `dim`, `depth`,
    `num_heads` and `global_blocks`. Images must be normalised by the caller.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        window_size: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        out_channels: int = 256,
        mlp_ratio: float = 4.0,
        adapters: bool = True,
    ) -> None:
        super().__init__()
        check_whole(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        check_whole(out_channels=out_channels)
        check_whole(0, window_size=window_size)
        if not isinstance(global_blocks, list | tuple):
            raise InputError(f"global_blocks must be a list of whole numbers, got {global_blocks!r}.")
        check_whole(0, **{f"global_blocks[{i}]": block for i, block in enumerate(global_blocks)})
        if image_size % patch_size:
            raise InputError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}.")
        if adapters and image_size // patch_size % 2:
            raise InputError(
                f"The adapters need an even number of patches per side, got {image_size} / {patch_size} = "
                f"{image_size // patch_size}; choose another image_size or adapters=False."
            )
        if dim % num_heads:
            raise InputError(f"num_heads must divide dim {dim}, got {num_heads}.")
        wrong = [i for i in global_blocks if i >= depth]
        if wrong:
            raise InputError(f"global_blocks must be between 0 and {depth - 1} (depth {depth}), got {wrong}.")
        self.image_size, self.stride, self.channels = image_size, patch_size, out_channels
        self.skip_channels: tuple[int, ...] = ()
        self.network = VisionTransformerSAM(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=AdapterBlock if adapters else Block,
            use_rel_pos=True,
            window_size=window_size,
            global_attn_indexes=tuple(global_blocks),
            neck_chans=out_channels,
        )

    def forward(self, images: Tensor) -> VisionFeatures:
        """images (B, 3, H, W) with H = W = image_size -> grid (B, out_channels, h, w)."""
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise InputError(
                f"This encoder takes images of {self.image_size} x {self.image_size}, got "
                f"{tuple(images.shape[-2:])}; letterbox them to that size."
            )
        images = images.to(self.network.patch_embed.proj.weight.dtype)
        return VisionFeatures(self.network.forward_features(images))

    def load_sam_state_dict(self, state: Mapping[str, Tensor], prefix: str = "image_encoder.") -> None:
        """Load the image encoder's part of a published SAM or SAM-Med2D state dict.

        Strict: raises CheckpointError naming missing, unexpected or misshapen tensors, and changes nothing.
        Other parts of the state dict are left alone; the published files hold no pixel mean or std.
        """
        given = {sam_to_timm(k.removeprefix(prefix)): v for k, v in state.items() if k.startswith(prefix)}
        wanted = self.network.state_dict()
        remedy = "Check dim, depth, image_size and adapters."
        check_fit(given, wanted, f"The weights under {prefix!r}", remedy)
        self.network.load_state_dict(given)


def sam_to_timm(name: str) -> str:
    """A published parameter name, without its prefix -> the name inside `SamImageEncoder.network`."""
    for published, ours in SAM_NAMES:
        name = name.replace(published, ours)
    return name
