"""The type that sums are taken in, and matrix products that autocast leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def precise_type(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """`tensor.to(kind)`, in a tenth of the host's time where it is of that type already."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from changing the types of matrix products."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
