"""The gating that MedPLIB was published with (DeepSpeed 0.13.1): top-1 and top-2 with a capacity, exactly.

T tokens, D width, E experts, K experts per token (1 or 2).

    router = MoERouter(512, experts, parity="deepspeed", capacity_factor=1.5, eval_capacity_factor=2.0)

What differs from this package's own rules: a capacity also in evaluation; with K = 1 a full expert keeps
tokens at random (also in evaluation) or, without random selection, those that torch.topk finds first on a
CPU, which is not the order of the tokens; with K = 2 the capacity is doubled, the second expert is drawn with
Gumbel noise (also in evaluation) and the weights are renormalised over the experts that were not full.
Padding counts as tokens. Checked against recorded runs in tests/parity/test_moe.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError
from medplib.experts.gate import Routing, check_gate, draw_gate_weight, gate_weight, gather_or_zero
from medplib.experts.noise import KeyedNoise
from medplib.registry import GATES


@GATES.register("deepspeed")
class DeepSpeedGate(nn.Module):
    """The published gate. Returns a Routing whose `served` holds what was not dropped.

    capacity_factor, eval_capacity_factor   for training and evaluation mode; None drops nothing
    min_capacity   rows that every expert may take at least; more than there are tokens is an error (K = 1)
    use_rts        random token selection: which tokens a full expert keeps (K = 1)
    seed, noise    the key of the random numbers, or a module like KeyedNoise that gives them
    """

    own_capacity = True
    balances_first_choice = True  # the published balance loss looks at first choices only

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        score: str = "softmax",
        renormalize: bool = False,
        *,
        capacity_factor: float | None = 1.0,
        eval_capacity_factor: float | None = 1.0,
        min_capacity: int = 0,
        use_rts: bool = True,
        seed: int | None = None,
        noise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k)
        if top_k > 2:
            raise InputError(f"The published gating knows top_k 1 and 2, got {top_k}.")
        if score != "softmax" or renormalize:
            raise InputError(
                f"The published gating has score='softmax' and renormalize=False (its top-2 renormalises "
                f"by itself); got score={score!r}, renormalize={renormalize!r}."
            )
        if noise is not None and not isinstance(noise, nn.Module):
            raise InputError(f"noise must be a module like KeyedNoise, or None; got {noise!r}.")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.use_rts = min_capacity, use_rts
        self.weight = gate_weight(dim, num_experts)
        self.noise = noise
        if noise is None and (top_k == 2 or use_rts):
            self.noise = KeyedNoise(seed)

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does: uniform within 1 / sqrt(D)."""
        draw_gate_weight(self.weight)

    def forward(self, tokens: Tensor) -> Routing:
        """tokens (T, D) -> Routing of T tokens."""
        logits = ops.gate_logits(tokens, self.weight)  # (T, E)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if self.noise is not None:
            self.noise.advance()
        if self.top_k == 2:
            gumbel = self.noise.gumbel(logits.shape, logits.device)  # type: ignore[union-attr]
            return published_top2(logits, factor, self.min_capacity, gumbel)
        chance = self.noise.uniform(logits.shape, logits.device) if self.use_rts else None  # type: ignore[union-attr]
        return published_top1(logits, factor, self.min_capacity, chance)

    def weigh(self, probabilities: Tensor, experts: Tensor, served: Tensor) -> Tensor:
        """The weights (T, K) of a given choice: probabilities (T, E), experts and served (T, K)."""
        if self.top_k == 1 or experts.shape[1] == 1:
            return gather_or_zero(probabilities, experts)
        return _renormalized(gather_or_zero(probabilities, served))

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, "
            f"min_capacity={self.min_capacity}, use_rts={self.use_rts}"
        )


def published_top1(
    logits: Tensor, capacity_factor: float | None, min_capacity: int = 0, chance: Tensor | None = None
) -> Routing:
    """Route logits (T, E) to one expert each, weighted by its raw probability.

    capacity_factor  None drops nothing
    chance (T, E)    uniform numbers: of the tokens of a full expert, those with the largest are kept. None:
                     those that torch.topk returns first for equal values, on a CPU.

    Raises InputError where the published code fails: fewer tokens than `min_capacity`, or a capacity above T.
    """
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(dim=-1)  # (T, E)
    experts = ops.choose_top_k(probabilities, 1)  # (T, 1)
    if num_tokens < min_capacity:
        raise InputError(
            f"{num_tokens} tokens are fewer than min_capacity {min_capacity}, which the published top-1 "
            f"gating refuses; use min_capacity=0 (decoding gives one token at a time) or more tokens."
        )
    served = experts
    if capacity_factor is not None and num_tokens:
        capacity = max(ops.capacity_of(num_tokens, num_experts, capacity_factor), min_capacity)
        if capacity > num_tokens:
            raise InputError(
                f"The capacity {capacity} is above the number of tokens {num_tokens}, which the published "
                f"top-1 gating refuses; use a capacity factor of at most {num_experts} (the number of "
                f"experts), got {capacity_factor}."
            )
        chosen = F.one_hot(experts[:, 0], num_experts)  # (T, E)
        if chance is None:
            kept = chosen.cpu().topk(capacity, dim=0).indices.to(logits.device)  # (C, E)
        else:
            kept = (chosen * chance).topk(capacity, dim=0).indices  # (C, E)
        open_to = torch.zeros_like(chosen).scatter_(0, kept, 1)  # (T, E)
        served = experts.masked_fill(open_to.gather(1, experts) == 0, num_experts)  # (T, 1)
    return Routing(logits, probabilities, experts, probabilities.gather(1, experts), served)


def published_top2(
    logits: Tensor, capacity_factor: float | None, min_capacity: int = 0, gumbel: Tensor | None = None
) -> Routing:
    """Route logits (T, E) to the best expert and a second one; first choices are served first, then in order.

    capacity_factor  is doubled; None drops nothing
    gumbel (T, E)    what is added to the logits before the second expert is chosen; None adds nothing

    The two weights are the probabilities divided by their sum; a dropped one counts as 0.
    """
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(dim=-1)  # (T, E)
    first = ops.choose_top_k(probabilities, 1)  # (T, 1)
    noisy = logits.detach() if gumbel is None else logits.detach() + gumbel
    second = ops.choose_top_k(noisy.scatter(1, first, float("-inf")), 1)  # (T, 1)
    experts = torch.cat([first, second], dim=1)  # (T, 2)
    served = experts
    if capacity_factor is not None:
        capacity = max(ops.capacity_of(num_tokens, num_experts, capacity_factor * 2), min_capacity)
        served = ops.drop_overflow(experts, num_experts, capacity)  # (T, 2)
    weights = _renormalized(gather_or_zero(probabilities, served))  # (T, 2)
    return Routing(logits, probabilities, experts, weights, served)


def _renormalized(weights: Tensor) -> Tensor:
    """The weights (T, K) of each token divided by their sum; zeros stay."""
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
