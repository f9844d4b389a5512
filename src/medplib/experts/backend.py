"""transformers' mixture models (Mixtral, Qwen-MoE, ...) on this package's operators.

T tokens, D width, E experts, K experts per token, R = T*K rows given to experts, H hidden width.

    from medplib.experts.backend import register_backend

    register_backend()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="medplib")
    model.set_experts_implementation("medplib")        # or of a model that is there already

Every expert runs once, on its own rows in the order of the tokens; nothing is padded and nothing is added
atomically, so forward and backward are the same bit for bit in every run. Needs transformers 5. The few
models whose experts transformers lets nobody replace (Llama 4, DBRX, JetMoE, Doge, LongCat) keep their loop.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medplib.experts.dispatch import is_captured, mix_eager
from medplib.experts.grouped import PlainSwiGLU, groupable, is_silu


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
    if is_captured(x):
        return _interface()["grouped_mm"](module, x, top_k_index, top_k_weights)
    first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    tables = [_per_expert(module, name) for name in (first, f"{first}_bias", second, f"{second}_bias")]
    experts = {str(e): partial(_run, module, tables=row) for e, row in enumerate(zip(*tables, strict=True))}
    plain = PlainSwiGLU(module.gate_up_proj, module.down_proj) if _is_swiglu(module, x) else None
    return mix_eager(x, top_k_index, top_k_weights, experts, plain).to(x.dtype)  # (T, D)


def _is_swiglu(module: Any, x: Tensor) -> bool:
    """Whether each expert is down(silu(gate(x)) * up(x)), the gate first, and nobody wants a gradient."""
    if torch.is_grad_enabled() or not x.is_cuda or not module.has_gate or module.has_bias:
        return False
    if module.is_transposed or getattr(module, "has_post_expert_norm", False):
        return False
    default = getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
    return default and is_silu(module.act_fn) and groupable(x, module.down_proj)  # (E, D, H)


def _run(module: Any, rows: Tensor, tables: tuple[Tensor | None, ...]) -> Tensor:
    """One expert, by its up and down weights and biases: rows (R, D) -> (R, D)."""
    up, up_bias, down, down_bias = tables
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
