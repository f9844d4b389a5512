"""The foundations of a model without pretrained towers: both image encoders and the mask decoder, by names.

The published model starts from CLIP and SAM-Med2D weights. A model trained from nothing learns their part
here: a learned embedding per structure name stands in for the `<SEG>` state, and throwaway heads read each
cell's structures and the modality from the vision tower.

B images, P prompts, V structure names, g side of the vision grid, (h, w) the mask decoder's output.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib import losses
from medplib.preprocess import prepare_clip, prepare_sam
from medplib.training.labelled import Labelled


class TowerTrainer(nn.Module):
    """The parts of `model` on the image side plus the stand-in prompts and throwaway heads."""

    def __init__(self, model, names: list[str], modalities: list[str]) -> None:
        super().__init__()
        self.vision_tower, self.mask_encoder = model.vision_tower, model.mask_encoder
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.names, self.modalities = names, modalities
        self.prompts = nn.Embedding(len(names), model.config.mask.dim)
        nn.init.normal_(self.prompts.weight, std=0.5)
        self.cell_head = nn.Conv2d(model.vision_tower.channels, len(names), 1)
        self.modality_head = nn.Linear(model.vision_tower.channels, len(modalities))

    def stand_ins(self) -> dict[str, Tensor]:
        """The prompts and heads, which no model keeps but the next run of the towers starts from."""
        ours = ("prompts.", "cell_head.", "modality_head.")
        return {k: v.contiguous() for k, v in self.state_dict().items() if k.startswith(ours)}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The unweighted losses: dice and bce of the masks, iou head, cells (BCE), modality (CE)."""
        grid = self.vision_tower(batch["pixel_values"]).grid  # (B, C, g, g)
        cells = F.binary_cross_entropy_with_logits(
            self.cell_head(grid).float(), batch["cells"], weight=batch["cell_weights"]
        )
        modality = F.cross_entropy(self.modality_head(grid.mean((2, 3))).float(), batch["modality"])
        features = self.mask_encoder(batch["mask_pixel_values"])
        at = batch["mask_images"]
        sparse, dense = self.prompt_encoder(text=self.prompts(batch["mask_names"])[:, None])
        masks, iou = self.mask_decoder(
            features.grid[at], self.prompt_encoder.dense_position(), sparse, dense,
            skips=tuple(s[at] for s in features.skips),
        )  # fmt: skip
        logits, target = masks[:, 0].float(), batch["masks"]
        target = F.interpolate(target[:, None], logits.shape[-2:], mode="area")[:, 0]
        return {
            "dice": losses.dice_loss(logits, target),
            "bce": losses.mask_bce_loss(logits, target),
            "iou": losses.iou_loss(logits, target, iou[:, 0]),
            "cells": cells,
            "modality": modality,
        }


class TowerBatch:
    """Labelled images -> tensors for TowerTrainer (picklable, for data loader workers)."""

    def __init__(
        self, config, grid: int, names: list[str], modalities: list[str], unsure, max_masks: int = 4
    ):
        self.vision, self.mask, self.grid = config.vision, config.mask, grid
        self.names, self.modalities, self.unsure, self.max_masks = names, modalities, unsure, max_masks

    def __call__(self, images: list[Labelled], rng: np.random.Generator) -> dict[str, Tensor]:
        out: dict[str, list] = {
            k: [] for k in ("pixels", "mask_pixels", "cells", "weights", "masks", "at", "names")
        }
        for i, item in enumerate(images):
            out["pixels"].append(
                prepare_clip(item.image, self.vision.image_size, self.vision.mean, self.vision.std)
            )
            out["mask_pixels"].append(
                prepare_sam(item.image, self.mask.image_size, self.mask.mean, self.mask.std)
            )
            cells = torch.zeros(len(self.names), self.grid, self.grid)
            weights = torch.ones(len(self.names), 1, 1)
            for name in self.unsure.get(item.dataset, ()):
                if name in self.names:
                    weights[self.names.index(name)] = 0.0
            masks = torch.as_tensor(item.masks).float()
            for name, mask in zip(item.names, masks, strict=True):
                small = F.adaptive_avg_pool2d(mask[None], self.grid)[0]
                cells[self.names.index(name)] = small
                weights[self.names.index(name)] = 1.0
            out["cells"].append(cells)
            out["weights"].append(weights.expand_as(cells))
            for m in rng.permutation(len(item.names))[: self.max_masks]:
                out["masks"].append(masks[m])
                out["at"].append(i)
                out["names"].append(self.names.index(item.names[m]))
        return {
            "pixel_values": torch.stack(out["pixels"]),
            "mask_pixel_values": torch.stack(out["mask_pixels"]),
            "cells": torch.stack(out["cells"]),
            "cell_weights": torch.stack(out["weights"]),
            "modality": torch.tensor([self.modalities.index(x.modality) for x in images]),
            "masks": torch.stack(out["masks"]),
            "mask_images": torch.tensor(out["at"]),
            "mask_names": torch.tensor(out["names"]),
        }
