"""Which experts a token may take, beyond the plain best: noise on the scores, and groups of experts.

T tokens, D width, E experts, G groups of E / G experts each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medplib.errors import InputError, is_number

NOISE_SCALES = {"jitter": 0.01, "multiplicative": 0.01, "gumbel": 1.0}
"""The kinds of noise and their usual scale. Jitter is on the gate's input, the others on its logits."""


def perturb(logits: Tensor, kind: str | None, scale: float, draws: nn.Module | None) -> Tensor:
    """The scores (T, E) by which experts are chosen, without gradient; `draws` is like KeyedNoise."""
    chosen_by = logits.detach()
    if kind == "multiplicative":
        return chosen_by * spread(draws, logits.shape, scale, logits)
    if kind == "gumbel":
        return chosen_by + scale * draws.gumbel(logits.shape, logits.device)  # type: ignore[union-attr]
    return chosen_by


def spread(draws: nn.Module | None, shape: torch.Size, scale: float, like: Tensor) -> Tensor:
    """Factors between 1 - scale and 1 + scale, in the type of `like`."""
    numbers = draws.uniform(shape, like.device)  # type: ignore[union-attr]
    return (1 + scale * (2 * numbers - 1)).to(like.dtype)


def in_best_groups(scores: Tensor, groups: int, top_groups: int, group_best: int) -> Tensor:
    """Which experts lie in a token's `top_groups` best groups: (T, E) -> (T, E) bool.

    Neighbouring experts form a group. It is worth the sum of its `group_best` best scores (DeepSeek-V2 takes
    1, DeepSeek-V3 takes 2); of equal groups the first wins.
    """
    tokens, experts = scores.shape
    by_group = scores.view(tokens, groups, experts // groups)
    worth = by_group.sort(dim=-1, descending=True).values[..., :group_best].sum(dim=-1)  # (T, G)
    best = worth.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]  # (T, top_groups)
    allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)  # (T, G)
    return allowed.repeat_interleave(experts // groups, dim=1)  # (T, E)


def check_selection(
    num_experts: int,
    top_k: int,
    groups: int,
    top_groups: int | None,
    group_best: int,
    noise: str | None,
    noise_scale: float | None,
) -> None:
    """Refuse groups that do not fit the experts, and noise that is not known."""
    if not isinstance(groups, int) or groups < 1 or num_experts % groups:
        raise InputError(f"groups must divide the {num_experts} experts evenly, got {groups}.")
    size = num_experts // groups
    if groups > 1 and top_groups is None:
        raise InputError(f"With groups={groups} say in top_groups how many of them a token may use.")
    if top_groups is not None and not (isinstance(top_groups, int) and 1 <= top_groups <= groups):
        raise InputError(
            f"top_groups must be between 1 and {groups} (the number of groups), got {top_groups}."
        )
    if top_groups is not None and top_groups * size < top_k:
        raise InputError(
            f"{top_groups} groups of {size} experts hold fewer than top_k={top_k}; raise top_groups."
        )
    if not isinstance(group_best, int) or not 1 <= group_best <= size:
        raise InputError(f"group_best must be between 1 and {size} (the size of a group), got {group_best}.")
    if noise is not None and noise not in NOISE_SCALES:
        raise InputError(f"noise must be one of {', '.join(NOISE_SCALES)} or None, got {noise!r}.")
    if noise_scale is not None and not (is_number(noise_scale) and noise_scale > 0):
        raise InputError(f"noise_scale must be a finite number above 0, got {noise_scale!r}.")
    if noise_scale is not None and noise is None:
        raise InputError(f"noise_scale={noise_scale!r} scales nothing without noise; give noise.")
    if noise in ("jitter", "multiplicative") and noise_scale is not None and noise_scale >= 1:
        raise InputError(f"noise_scale of {noise} must be below 1, got {noise_scale!r}.")
