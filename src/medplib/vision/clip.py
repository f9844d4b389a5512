"""CLIP's vision transformer as a tower: the patch features of one layer, as a grid.

B images, C width, (h, w) grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from medplib.errors import InputError
from medplib.vision.features import VisionFeatures

# CLIP ViT-L/14 at 336 pixels, the tower of the published model.
VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class CLIPTower(nn.Module):
    """A CLIP vision transformer with random weights, built from its configuration; nothing is downloaded.

        CLIPTower()(torch.rand(1, 3, 336, 336)).grid   # (1, 1024, 24, 24)

    `select_layer` counts hidden states: 0 is the embedding, -1 the last layer, -2 (published) the one before.
    All layers are kept, so published weights load whole. The class token is left out of the grid.
    """

    def __init__(
        self, config: Mapping[str, object] | CLIPVisionConfig | None = None, select_layer: int = -2
    ) -> None:
        super().__init__()
        if not isinstance(config, CLIPVisionConfig):
            try:
                config = CLIPVisionConfig(**(VIT_L_14_336 if config is None else config))
            except (TypeError, StrictDataclassError) as error:
                raise InputError(f"transformers takes no such CLIP vision configuration: {error}") from error
        states = config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise InputError(
                f"select_layer must be between {-states} and {states - 1} for {states - 1} layers, "
                f"got {select_layer}."
            )
        self.select_layer = select_layer
        self.network = CLIPVisionModel(config)
        self.image_size: int = config.image_size
        self.channels: int = config.hidden_size
        self.stride: int = config.patch_size
        self.skip_channels: tuple[int, ...] = ()

    def forward(self, images: Tensor) -> VisionFeatures:
        """images (B, 3, H, W) with H = W = image_size, CLIP-normalised -> grid (B, C, h, w)."""
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise InputError(
                f"This tower takes images of {self.image_size} x {self.image_size}, got "
                f"{tuple(images.shape[-2:])}; letterbox them to that size."
            )
        states = self.network(images, output_hidden_states=True).hidden_states
        patches = states[self.select_layer][:, 1:]  # (B, h*w, C)
        side = self.image_size // self.stride
        return VisionFeatures(patches.transpose(1, 2).unflatten(2, (side, side)))  # (B, C, h, w)
