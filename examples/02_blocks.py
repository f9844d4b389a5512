"""Blocks of medplib in a network of your own: experts, box prompts and a mask decoder on a timm ResNet."""

import numpy as np
import timm
import torch
from torch import Tensor, nn

from medplib import MaskDecoder, MoERouter, PromptEncoder, TwoWayTransformer, collect_aux_losses
from medplib.data import make_phantom
from medplib.experts import record_routing
from medplib.losses import dice_loss, mask_bce_loss


class YourNetwork(nn.Module):
    """Outlines what lies in a box. B images, D width."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet10t", features_only=True, out_indices=(2,))
        self.neck = nn.Conv2d(self.backbone.feature_info.channels()[-1], dim, kernel_size=1)
        self.mixture = MoERouter(dim, experts=["texture", "shape"], hidden_dim=128, balance_loss_coef=0.01)
        self.prompts = PromptEncoder(dim, grid_size=(16, 16), image_size=(128, 128))
        self.decoder = MaskDecoder(dim, TwoWayTransformer(dim, depth=1, num_heads=4, mlp_dim=128))

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """images (B, 3, 128, 128), boxes (B, 4) in pixels -> mask logits (B, 64, 64)."""
        grid = self.neck(self.backbone(images)[0])  # (B, D, 16, 16)
        tokens = grid.flatten(2).transpose(1, 2)  # (B, 256, D)
        tokens = tokens + self.mixture(tokens)
        grid = tokens.transpose(1, 2).reshape(grid.shape)  # (B, D, 16, 16)
        sparse, dense = self.prompts(boxes=boxes)
        masks, _ = self.decoder(grid, self.prompts.dense_position(), sparse, dense)
        return masks[:, 0]  # (B, 64, 64)


samples = [make_phantom("dermoscopy", seed, size=128) for seed in range(8)]
images = torch.stack([torch.from_numpy(s.load_image()).permute(2, 0, 1) for s in samples]) / 255
lesions = np.stack([s.load_mask("skin lesion") for s in samples])  # (8, 128, 128)
places = [np.argwhere(lesion) for lesion in lesions]  # (y, x) of every pixel
boxes = torch.tensor(np.stack([[*p.min(0)[::-1], *(p.max(0) + 1)[::-1]] for p in places])).float()
targets = torch.from_numpy(lesions[:, ::2, ::2]).float()  # (8, 64, 64)

torch.manual_seed(0)
network = YourNetwork()
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for step in range(40):
    with collect_aux_losses(network) as aux, record_routing(network) as trace:
        logits = network(images, boxes)
    loss = dice_loss(logits, targets) + mask_bce_loss(logits, targets) + aux.total()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 13 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f}")
print(trace.table())  # which expert the tokens of the last step went to
