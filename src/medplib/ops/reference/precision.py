"""The type that sums are taken in, and matrix products that autocast leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def precise_type(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from changing the types of matrix products."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
