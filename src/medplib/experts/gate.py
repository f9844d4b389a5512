"""What a gate decides (Routing), and TopKGate, which scores every expert for a token and takes the K best.

T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError, check_whole, is_number
from medplib.experts.bias import LoadBias
from medplib.experts.noise import KeyedNoise
from medplib.experts.selection import NOISE_SCALES, check_selection, in_best_groups, perturb, spread

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """What a gate decided for T tokens.

    logits (T, E) and probabilities (T, E) in float32, experts (T, K) the chosen ones, best first, and their
    weights (T, K). An index of E in `experts` means no expert.
    served (T, K) is `experts` with E where a capacity dropped the token; None when nothing was dropped.
    real (T,) is False for padding that was routed along to no expert, as compiled and captured forwards do;
    None when all T are tokens.

    A gate of your own is a module that returns one:

        def forward(self, tokens):                                          # (T, D)
            logits = self.linear(tokens.float())                            # (T, E)
            probabilities = logits.softmax(dim=-1)
            weights, experts = probabilities.topk(2, dim=-1)                # (T, 2) each
            return Routing(logits, probabilities, experts, weights)
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    served: Tensor | None = None
    real: Tensor | None = None

    def without_padding(self) -> Routing:
        """The routing of the real tokens alone; reads the device where padding was routed along."""
        if self.real is None:
            return self
        rows = self.real.nonzero().squeeze(1)
        served = None if self.served is None else self.served[rows]
        return Routing(
            self.logits[rows], self.probabilities[rows], self.experts[rows], self.weights[rows], served
        )


class TopKGate(nn.Module):
    """A linear gate without bias: scores in float32, choice of the K best, ties to the lowest index.

        TopKGate(512, num_experts=4, top_k=2)(torch.randn(10, 512)).experts.shape  # (10, 2)

    score          "softmax" over all experts, or "sigmoid" per expert
    renormalize    divide the K weights of a token by their sum. For K = 1 that is refused: the weight would
                   be the constant 1 and the gate would never receive a gradient.
    scale          what all weights are multiplied with
    groups, top_groups, group_best   choose only among the experts of a token's best groups; see selection.py
    bias_rate, bias_update   balance the load by a bias instead of a loss; see bias.py. Not for the weights.
                   Stands still while the gate is frozen.
    noise, noise_scale   in training only: "jitter" (the gate's input times 1 +- scale), "multiplicative" (the
                   logits times 1 +- scale) or "gumbel" (scale * Gumbel added to the logits). The last two
                   change the choice alone: weights and losses are those of the clean logits.
    seed           key of the noise, which comes from a hash and not from torch's generators
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        score: str = "softmax",
        renormalize: bool = False,
        *,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int | None = None,
        group_best: int = 1,
        bias_rate: float | None = None,
        bias_update: str = "forward",
        noise: str | None = None,
        noise_scale: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k)
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}; got {score!r}.")
        if not is_number(scale) or scale <= 0:
            raise InputError(f"scale must be a finite number above 0, got {scale!r}.")
        if renormalize and top_k == 1:
            raise InputError(
                "renormalize=True with top_k=1 makes every weight exactly 1, so the gate gets zero gradient "
                "and never learns. Use renormalize=False, or top_k of at least 2."
            )
        check_selection(num_experts, top_k, groups, top_groups, group_best, noise, noise_scale)
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.score, self.renormalize, self.scale = score, renormalize, scale
        self.groups, self.top_groups, self.group_best = groups, top_groups or groups, group_best
        self.noise = noise
        self.noise_scale = NOISE_SCALES.get(noise, 0.0) if noise_scale is None else noise_scale
        self.weight = gate_weight(dim, num_experts)
        self.bias = None if bias_rate is None else LoadBias(num_experts, bias_rate, bias_update)
        self.draws = None if noise is None else KeyedNoise(seed)

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does: uniform within 1 / sqrt(D)."""
        draw_gate_weight(self.weight)

    def forward(self, tokens: Tensor) -> Routing:
        """tokens (T, D) -> Routing of T tokens."""
        noise = self.noise if self.training else None
        if noise is not None:
            self.draws.advance()  # type: ignore[union-attr]
        if noise == "jitter":
            tokens = tokens * spread(self.draws, tokens.shape, self.noise_scale, tokens)
        logits = ops.gate_logits(tokens, self.weight)  # (T, E)
        if noise in (None, "jitter") and self.bias is None and self.groups == 1:
            routing = Routing(logits, *ops.route(logits, self.top_k, self.score, self.renormalize))
            return routing if self.scale == 1 else replace(routing, weights=routing.weights * self.scale)
        experts = self._choose(perturb(logits, noise, self.noise_scale, self.draws))  # (T, K)
        probabilities = self._scores(logits)  # (T, E)
        return Routing(logits, probabilities, experts, self.weigh(probabilities, experts))

    def weigh(self, probabilities: Tensor, experts: Tensor, served: Tensor | None = None) -> Tensor:
        """The weights (T, K) of a given choice: probabilities (T, E), experts (T, K)."""
        weights = gather_or_zero(probabilities, experts)  # (T, K)
        if self.renormalize and experts.shape[1] > 1:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1)
        return weights if self.scale == 1 else weights * self.scale

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()

    def _choose(self, logits: Tensor) -> Tensor:
        """The K experts of each token, by logits (T, E) that may carry noise: (T, K)."""
        chosen_by = logits
        balancing = self.bias is not None and self.training and self.weight.requires_grad
        if self.bias is not None:
            if balancing:
                self.bias.begin()
            chosen_by = self._scores(logits) + self.bias()  # (T, E)
        if self.groups > 1:
            scores = chosen_by if self.bias is not None else self._scores(logits)
            allowed = in_best_groups(scores, self.groups, self.top_groups, self.group_best)
            chosen_by = chosen_by.masked_fill(~allowed, float("-inf"))
        experts = ops.choose_top_k(chosen_by, self.top_k)  # (T, K)
        if balancing:
            self.bias.count(experts)
        return experts

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, "
            f"renormalize={self.renormalize}"
        )


def check_gate(num_experts: int, top_k: int) -> None:
    """Raise InputError unless these can be the numbers of experts and of choices."""
    check_whole(num_experts=num_experts)
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise InputError(f"top_k must be between 1 and {num_experts} (the number of experts), got {top_k!r}.")


def gate_weight(dim: int, num_experts: int) -> nn.Parameter:
    """A gate's matrix (E, D), drawn."""
    check_whole(dim=dim)
    weight = nn.Parameter(torch.empty(num_experts, dim))
    draw_gate_weight(weight)
    return weight


def draw_gate_weight(weight: Tensor) -> None:
    """Fill a gate's matrix (E, D) as nn.Linear does: uniform within 1 / sqrt(D)."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)


def gather_or_zero(values: Tensor, experts: Tensor) -> Tensor:
    """Each token's value for each of its experts, 0 where there is none: (T, E), (T, K) -> (T, K)."""
    padded = torch.cat([values, values.new_zeros(len(values), 1)], dim=-1)  # (T, E+1)
    return padded.gather(-1, experts)
