"""From an RGB image to the normalised square a vision tower reads, prepared as CLIP and SAM towers expect it.

Both put the image into a `Letterbox` (longest side to `size`, centred padding). They differ in what the
padding holds: CLIP pads the picture with its mean colour and normalises afterwards, SAM normalises first and
pads with 0, which is nearly but not exactly the same.
"""

from collections.abc import Sequence

import numpy as np
import torch

from medplib.geometry import Letterbox

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN = (123.675, 116.28, 103.53)  # of pixels in 0..255
SAM_STD = (58.395, 57.12, 57.375)


def pad_clip(array: np.ndarray, size: int, mean: Sequence[float] = CLIP_MEAN) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): resized, padded with the mean colour, cut to whole levels."""
    box = Letterbox(np.shape(array)[:2], size)
    square = np.empty((size, size, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]  # (122, 116, 104) for CLIP
    square[box.window] = box.image(array)
    return square


def prepare_clip(
    array: np.ndarray,
    size: int = 336,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> torch.Tensor:
    """uint8 RGB (H, W, 3) -> float32 (3, size, size), `mean` and `std` for pixels in 0..1."""
    pixels = torch.from_numpy(pad_clip(array, size, mean)).permute(2, 0, 1).float() / 255  # (3, size, size)
    return ((pixels - _column(mean)) / _column(std)).contiguous()


def prepare_sam(
    array: np.ndarray,
    size: int = 256,
    mean: Sequence[float] = SAM_MEAN,
    std: Sequence[float] = SAM_STD,
) -> torch.Tensor:
    """uint8 RGB (H, W, 3) -> float32 (3, size, size), `mean` and `std` for pixels in 0..255."""
    box = Letterbox(np.shape(array)[:2], size)
    pixels = torch.from_numpy(box.image(array)).permute(2, 0, 1).float()  # (3, h', w')
    square = torch.zeros(3, size, size)
    square[(slice(None), *box.window)] = (pixels - _column(mean)) / _column(std)
    return square


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1)
