"""What the published code computes differently from this package, by name, for comparisons with its numbers.

S masks, (h, w) the decoder's mask, (H, W) the original image. Explained in docs/official_quirks.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from medplib import losses
from medplib.errors import UnknownNameError
from medplib.geometry import official_crop

THRESHOLD = 0.1  # probability above which the published evaluation draws a pixel
LOSSES = ("bce", "dice", "iou", "focal")


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Which of the published evaluation's quirks to reproduce; all off is what this package does.

    first_seg  of several `<SEG>` only the first draws, and one in the question counts
    forced_mask  an answer without `<SEG>` still gives a mask, from the state before the last one
    threshold  a pixel is drawn above a probability of 0.1 instead of `config.mask.threshold`
    crop  the padding is cut as published, see `geometry.official_crop`
    release_state  with exactly one `<SEG>` the state before the last one is used, and without any there is no
        mask: the code as it was when the weights were published, instead of `forced_mask`
    """

    first_seg: bool = False
    forced_mask: bool = False
    threshold: bool = False
    crop: bool = False
    release_state: bool = False

    @property
    def choose_states(self) -> bool:
        """Whether another state than that of each written `<SEG>` may draw."""
        return self.first_seg or self.forced_mask or self.release_state


OFFICIAL = Quirks(first_seg=True, forced_mask=True, threshold=True, crop=True)
RELEASE = Quirks(first_seg=True, threshold=True, crop=True, release_state=True)


def quirks(names: str | Iterable[str] | Quirks | None) -> Quirks:
    """None, "official", "release", or some of the names in Quirks -> Quirks. Raises UnknownNameError."""
    if names is None or isinstance(names, Quirks):
        return names or Quirks()
    known = {"official": OFFICIAL, "release": RELEASE}
    if isinstance(names, str) and names in known:
        return known[names]
    if not isinstance(names, str | Iterable):
        raise UnknownNameError.among(f"No quirk named {names!r}.", str(names), known)
    names = [names] if isinstance(names, str) else list(names)
    fields = [f.name for f in dataclasses.fields(Quirks)]
    for name in names:
        if name not in fields:
            raise UnknownNameError.among(f"No quirk named {name!r}.", str(name), (*known, *fields))
    return Quirks(**dict.fromkeys(names, True))


def published_states(
    prompt: Tensor, new: Tensor, states: Tensor, seg: int, chosen: Quirks
) -> tuple[Tensor, Tensor]:
    """Which state draws a mask in which row, as published: prompt (B, L) and new (B, T) token ids, states
    (B, L + T - 1, D) where state t predicts token t + 1 -> rows (S,), states (S, D).

    `new` holds -1 after the end of a row's answer.
    """
    rows, picked = [], []
    length = prompt.shape[1]
    for row in range(len(new)):
        end = length + int((new[row] >= 0).sum())
        ids = torch.cat([prompt[row], new[row]])[1:end]
        at = (ids == seg).nonzero()[:, 0].tolist()
        if not chosen.first_seg:
            at = [place for place in at if place >= length - 1]
        before_last = max(end - 3, 0)
        if chosen.release_state and len(at) == 1:
            at = [before_last]
        elif chosen.first_seg:
            at = at[:1]
        if not at and chosen.forced_mask:
            at = [before_last]
        rows += [row] * len(at)
        picked += [states[row, place] for place in at]
    where = torch.tensor(rows, dtype=torch.long, device=states.device)
    return where, torch.stack(picked) if picked else states.new_zeros(0, states.shape[-1])


def mask_losses(
    logits: Sequence[Tensor] | Tensor,
    predicted_iou: Tensor,
    targets: Sequence[Tensor],
    resized_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """The published mask losses, unweighted: each mask in its image's own size after the published crop.

    logits S x (h, w), predicted_iou (S,), targets S x (H, W) in {0, 1}, resized_sizes S x (h', w').
    """
    each: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
    for logit, iou, target, resized in zip(logits, predicted_iou, targets, resized_sizes, strict=True):
        drawn = official_crop(logit[None], tuple(resized), tuple(target.shape))  # (1, H, W)
        terms = losses.all_mask_losses(drawn, target[None].to(drawn), iou[None], pooled_iou=True)
        for name in LOSSES:
            each[name].append(terms[name])
    return {name: torch.stack(values).mean() for name, values in each.items()}
