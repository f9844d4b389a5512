"""What a gate decides (Routing), and TopKGate, which scores every expert for a token and takes the K best.

T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """What a gate decided for T tokens.

    logits (T, E) and probabilities (T, E) in float32, experts (T, K) the chosen ones, best first, and their
    weights (T, K). An index of E in `experts` means no expert.
    served (T, K) is `experts` with E where a capacity dropped the token; None when nothing was dropped.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    weights: Tensor
    served: Tensor | None = None


class TopKGate(nn.Module):
    """A linear gate without bias: scores in float32, choice of the K best, ties to the lowest index.

        TopKGate(512, num_experts=4, top_k=2)(torch.randn(10, 512)).experts.shape  # (10, 2)

    With `renormalize` the K weights of a token sum to 1. For K = 1 that is refused: the weight would be the
    constant 1 and the gate would never receive a gradient.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        score: str = "softmax",
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k)
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}; got {score!r}.")
        if renormalize and top_k == 1:
            raise InputError(
                "renormalize=True with top_k=1 makes every weight exactly 1, so the gate gets zero gradient "
                "and never learns. Use renormalize=False, or top_k of at least 2."
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.score, self.renormalize = score, renormalize
        self.weight = gate_weight(dim, num_experts)

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does: uniform within 1 / sqrt(D)."""
        draw_gate_weight(self.weight)

    def forward(self, tokens: Tensor) -> Routing:
        """tokens (T, D) -> Routing of T tokens."""
        logits = ops.gate_logits(tokens, self.weight)  # (T, E)
        return Routing(logits, *ops.route(logits, self.top_k, self.score, self.renormalize))

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, "
            f"renormalize={self.renormalize}"
        )


def check_gate(num_experts: int, top_k: int) -> None:
    """Raise InputError unless these can be the numbers of experts and of choices."""
    if not isinstance(num_experts, int) or num_experts < 1:
        raise InputError(f"num_experts must be a whole number of at least 1, got {num_experts!r}.")
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise InputError(f"top_k must be between 1 and {num_experts} (the number of experts), got {top_k!r}.")


def gate_weight(dim: int, num_experts: int) -> nn.Parameter:
    """A gate's matrix (E, D), drawn."""
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
