"""A gate whose experts choose their tokens: perfectly balanced, and for training only.

T tokens, D width, E experts, C tokens per expert.

    router = MoERouter(512, 8, top_k=2, gate="expert_choice")    # 2 experts per token on average
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError
from medplib.experts.gate import Routing, check_gate, draw_gate_weight, gate_weight, gather_or_zero
from medplib.registry import GATES


@GATES.register("expert_choice")
class ExpertChoiceGate(nn.Module):
    """Every expert takes the C = ceil(T * top_k / E) tokens that like it best (Zhou et al., 2022).

    A token gets any number of experts, from none to all; its weights are its raw probabilities. Padding is
    never chosen.

    Whether a token is chosen depends on all the others, the later ones and other samples included. A language
    model cannot generate so, which is why evaluation mode is refused, unless `eval_top_k` says how many
    experts each token then takes for itself; a warning then recalls that this is not what was trained.
    """

    own_capacity = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        score: str = "softmax",
        renormalize: bool = False,
        *,
        eval_top_k: int | None = None,
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k)
        if score != "softmax" or renormalize:
            raise InputError(
                f"Expert choice has score='softmax' and renormalize=False, got {score!r} and {renormalize!r}."
            )
        if eval_top_k is not None:
            check_gate(num_experts, eval_top_k)
        self.dim, self.num_experts, self.top_k, self.eval_top_k = dim, num_experts, top_k, eval_top_k
        self.weight = gate_weight(dim, num_experts)

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does: uniform within 1 / sqrt(D)."""
        draw_gate_weight(self.weight)

    def forward(self, tokens: Tensor) -> Routing:
        """tokens (T, D) -> Routing of T tokens with K = E in training and K = eval_top_k in evaluation."""
        if not self.training and self.eval_top_k is None:
            raise InputError(
                "Expert choice cannot be used in evaluation: a token's experts depend on the tokens after "
                "it. Give the gate eval_top_k, evaluate with gate='topk', or call .train() on a frozen gate."
            )
        logits = ops.gate_logits(tokens, self.weight)  # (T, E)
        if not self.training:
            warnings.warn(
                f"Expert choice is trained with experts choosing tokens; in evaluation each token takes its "
                f"{self.eval_top_k} best experts, which is not what was trained.",
                stacklevel=2,
            )
            return Routing(logits, *ops.route(logits, self.eval_top_k))  # type: ignore[arg-type]
        probabilities = logits.softmax(dim=-1)  # (T, E)
        capacity = -(-tokens.shape[0] * self.top_k // self.num_experts)  # C
        best = probabilities.detach().sort(dim=0, descending=True, stable=True).indices[:capacity]  # (C, E)
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, best, True)  # (T, E)
        liked = probabilities.detach().masked_fill(~chosen, -1)
        order = ops.choose_top_k(liked, self.num_experts)  # (T, E) chosen ones first, best first
        experts = order.masked_fill(~chosen.gather(1, order), self.num_experts)  # (T, E)
        weights = self.weigh(probabilities, experts)
        return Routing(logits, probabilities, experts, weights, served=experts)

    def weigh(self, probabilities: Tensor, experts: Tensor, served: Tensor | None = None) -> Tensor:
        """The weights (T, K) of a given choice: probabilities (T, E), experts (T, K)."""
        return gather_or_zero(probabilities, experts)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, eval_top_k={self.eval_top_k}"
