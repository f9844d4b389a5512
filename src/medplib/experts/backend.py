"""transformers' mixture models (Mixtral, Qwen-MoE, ...) on this package's operators.

T tokens, D width, E experts, K experts per token, R = T*K rows given to experts, H hidden width.

    from medplib.experts.backend import register_backend

    register_backend()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="medplib")
    model.set_experts_implementation("medplib")        # or of a model that is there already

Every expert runs once, on its own rows in the order of the tokens; nothing is padded and nothing is added
atomically, so forward and backward are the same bit for bit in every run. Needs transformers 5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medplib import ops


def register_backend(name: str = "medplib") -> str:
    """Make the experts' implementation known to transformers under `name`, which is returned."""
    ALL_EXPERTS_FUNCTIONS = _interface()
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


def experts_forward(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of its own loop over the experts of `module`.

    x (T, D), top_k_index (T, K), top_k_weights (T, K) -> (T, D). An index of E (an expert on another device)
    adds nothing. While torch.compile traces or a CUDA graph is captured, transformers' grouped_mm is used:
    the rows per expert cannot be read then.
    """
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _interface()["grouped_mm"](module, x, top_k_index, top_k_weights)
    order, counts = ops.sort_by_expert(top_k_index, module.num_experts)  # (R,), (E,)
    rows = ops.permute(x, order, top_k_index.shape[1])  # (R, D)
    first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    tables = [_per_expert(module, name) for name in (first, f"{first}_bias", second, f"{second}_bias")]
    answers = []
    for e, part in enumerate(rows.split(counts.tolist())):
        if len(part):
            answers.append(_run(module, part, *(table[e] for table in tables)))
    if not answers:
        return torch.zeros_like(x)
    return ops.combine(torch.cat(answers), order, top_k_weights).to(x.dtype)  # (T, D)


def _run(
    module: Any,
    rows: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    """One expert: rows (R, D) -> (R, D)."""
    if module.is_transposed:
        up, down = up.T, down.T
    hidden = F.linear(rows, up, up_bias)  # (R, 2 * H), without a gate (R, H)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)  # (R, H)
    out = F.linear(hidden, down, down_bias)  # (R, D)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _per_expert(module: Any, name: str) -> tuple[Tensor | None, ...]:
    """A weight (E, ...) as E views that share one gradient; E times None for a bias that is not there."""
    if name.endswith("_bias") and not module.has_bias:
        return (None,) * module.num_experts
    return getattr(module, name).unbind(0)


def _interface() -> Any:
    """transformers' table of implementations."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("The experts' backend needs transformers 5: pip install -U transformers") from error
    return ALL_EXPERTS_FUNCTIONS
