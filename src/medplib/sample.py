"""Sample and Batch: what a MedPLIBProcessor takes, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medplib.geometry import Letterbox
from medplib.prompts.types import Box, Mask, Point


@dataclass
class Sample:
    """One row: images, question and answer turns, regions asked about, and target masks.

    images: path, PIL, array or tensor each. turns: (question, answer); the last answer may be None. prompts:
    the regions, in the order of "<region>" in the questions (one that is not written is added at the end of
    the last question). prompt_images: index within `images` for each prompt (default: the first image).
    masks: one bool (H, W) array per `<SEG>` in the answers, in pixels of the image it draws on. seg_images:
    index within `images` for each `<SEG>` of the answers (default: the last image).
    """

    images: Sequence[Any]
    turns: Sequence[tuple[str, str | None]]
    prompts: Sequence[Point | Box | Mask] = ()
    prompt_images: Sequence[int] | None = None
    masks: Sequence[np.ndarray] = ()
    seg_images: Sequence[int] | None = None


@dataclass
class Batch:
    """Tensors for `MedPLIB.forward` and what is needed to bring masks back to the images.

    images: the N different pictures, uint8 (H, W, 3). letterboxes: theirs on the mask side's square.
    row_images: for each row the numbers of its images. seg_images: for each `<SEG>` of the known answers its
    image.
    """

    tensors: dict[str, Tensor]
    images: list[np.ndarray]
    letterboxes: list[Letterbox]
    row_images: list[list[int]]
    seg_images: list[int] = field(default_factory=list)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The tensors on a device, pixels in `dtype`."""
        for name, value in self.tensors.items():
            pixels = dtype is not None and name in ("pixel_values", "mask_pixel_values")
            self.tensors[name] = value.to(device, dtype) if pixels else value.to(device)
        return self
