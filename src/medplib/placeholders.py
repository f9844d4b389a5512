"""What image and region placeholders of a prompt become: the features that are put in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from medplib.errors import InputError


def scatter(words: Tensor, where: Tensor, values: Tensor, what: str) -> Tensor:
    """Put `values` (n, D) at the n true places of `where` (B, L). Raises InputError when n differs."""
    count = int(where.sum())
    if count != len(values):
        raise InputError(
            f"The prompt has {count} {what} placeholders, but the {what}s given fill {len(values)}; "
            "let MedPLIBProcessor write the prompt."
        )
    return words.masked_scatter(where.unsqueeze(-1), values.to(words))


def check_images(name: str, index: Tensor, count: int) -> None:
    """Raise InputError where `index` names an image that is not among `count`."""
    if torch.compiler.is_compiling() or not index.numel():
        return
    low, high = torch.stack(index.aminmax()).tolist()  # read from the device at once
    if low < 0 or high >= count:
        raise InputError(f"{name} must be 0 to {count - 1}, the images given; got {index.tolist()}.")
