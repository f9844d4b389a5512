"""Gives every operator a schema, a shape rule and a gradient, under `torch.ops.medplib`.

T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows.

The default kernel of each is the function of that name in `reference`. A compiled library (`_loader.py`)
registers kernels for its device under the same names, which the dispatcher then prefers; shapes and gradients
stay as written here. All operators return new tensors, of sizes known from the arguments' shapes, so that
they trace, compile and export; their gradients are again operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medplib.ops import _loader, reference

NAMESPACE = "medplib"
SCHEMAS = {
    "gate_logits": "(Tensor tokens, Tensor weight) -> Tensor",
    "gate_logits_backward": "(Tensor grad, Tensor tokens, Tensor weight, bool for_tokens, bool for_weight) "
    "-> (Tensor, Tensor)",
    "gate": "(Tensor logits, Tensor? selection, Tensor? mask, int k, bool sigmoid, bool renormalize, "
    "bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gate_backward": "(Tensor? grad_probabilities, Tensor? grad_weights, Tensor probabilities, "
    "Tensor experts, bool sigmoid, bool renormalize) -> Tensor",
    "plan": "(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    "counter_bits": "(Tensor seed, SymInt count) -> Tensor",
    "drop": "(Tensor experts, Tensor? priority, Tensor? seed, int num_experts, int capacity) -> Tensor",
    "permute": "(Tensor tokens, Tensor order, Tensor? position, int k) -> Tensor",
    "permute_backward": "(Tensor grad, Tensor position) -> Tensor",
    "combine": "(Tensor rows, Tensor order, Tensor position, Tensor weights, Tensor? residual) -> Tensor",
    "combine_backward": "(Tensor grad, Tensor rows, Tensor order, Tensor position, Tensor weights) "
    "-> (Tensor, Tensor)",
    "grouped_mm": "(Tensor rows, Tensor[] weights, Tensor ends) -> Tensor",
    "grouped_mm_backward": "(Tensor grad, Tensor rows, Tensor[] weights, Tensor ends, bool for_rows, "
    "bool[] for_weights) -> (Tensor, Tensor[])",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor gate_up) -> Tensor",
    "decode_ffn": "(Tensor tokens, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? residual) -> Tensor",
}
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


# Shapes: what an operator would return, without computing it.


def _gate_logits_shape(tokens: Tensor, weight: Tensor) -> Tensor:
    return tokens.new_empty(
        tokens.shape[0], weight.shape[0], dtype=reference.precise_type(tokens, weight)
    )  # (T, E)


def _gate_logits_backward_shape(
    grad: Tensor, tokens: Tensor, weight: Tensor, for_tokens: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape if for_tokens else (0,)),
        weight.new_empty(weight.shape if for_weight else (0,)),
    )


def _gate_shape(
    logits: Tensor,
    selection: Tensor | None,
    mask: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalize: bool,
    statistics: bool,
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, num_experts),
        logits.new_empty(num_tokens, k, dtype=torch.int64),
        logits.new_empty(num_tokens, k),
        logits.new_empty(num_experts if statistics else 0, dtype=torch.int64),
        logits.new_empty(num_experts + 3 if statistics else 0),
    )


def _gate_backward_shape(
    grad_probabilities: Tensor | None, grad_weights: Tensor | None, probabilities: Tensor, *_: Any
) -> Tensor:
    return probabilities.new_empty(probabilities.shape)


def _plan_shape(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    return (
        experts.new_empty(experts.numel(), dtype=torch.int64),
        experts.new_empty(experts.shape, dtype=torch.int64),
        experts.new_empty(num_experts, dtype=torch.int64),
        experts.new_empty(num_experts, dtype=torch.int32),
    )


def _counter_bits_shape(seed: Tensor, count: int) -> Tensor:
    return seed.new_empty(count)


def _drop_shape(experts: Tensor, *_: Any) -> Tensor:
    return experts.new_empty(experts.shape)


def _permute_shape(tokens: Tensor, order: Tensor, position: Tensor | None, k: int) -> Tensor:
    return tokens.new_empty(order.shape[0], tokens.shape[1])  # (R, D)


def _permute_backward_shape(grad: Tensor, position: Tensor) -> Tensor:
    return grad.new_empty(position.shape[0], grad.shape[1])  # (T, D)


def _combine_shape(
    rows: Tensor, order: Tensor, position: Tensor, weights: Tensor, residual: Tensor | None
) -> Tensor:
    return rows.new_empty(position.shape[0], rows.shape[1])  # (T, D)


def _combine_backward_shape(
    grad: Tensor, rows: Tensor, order: Tensor, position: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _grouped_mm_shape(rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[0])  # (R, H)


def _grouped_mm_backward_shape(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    ends: Tensor,
    for_rows: bool,
    for_weights: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    return (
        rows.new_empty(rows.shape if for_rows else (0,)),
        [w.new_empty(w.shape if asked else (0,)) for w, asked in zip(weights, for_weights, strict=True)],
    )


def _swiglu_shape(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _swiglu_backward_shape(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _decode_ffn_shape(tokens: Tensor, *_: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


# Gradients: what to keep of a forward, and the operator that uses it.


def _keep_gate_logits(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_logits_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    for_tokens, for_weight = ctx.needs_input_grad[:2]  # a frozen gate costs no product
    grads = torch.ops.medplib.gate_logits_backward(grad, *ctx.saved_tensors, for_tokens, for_weight)
    return grads[0] if for_tokens else None, grads[1] if for_weight else None


def _keep_gate(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.sigmoid, ctx.renormalize = inputs[4:6]
    ctx.save_for_backward(output[0], output[1])
    ctx.set_materialize_grads(False)


def _gate_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    probabilities, experts = ctx.saved_tensors
    if grads[0] is None and grads[2] is None:
        return (None,) * 7
    grad = torch.ops.medplib.gate_backward(
        grads[0], grads[2], probabilities, experts, ctx.sigmoid, ctx.renormalize
    )
    return grad, None, None, None, None, None, None


def _keep_permute(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    tokens, order, position, ctx.k = inputs
    ctx.num_tokens = tokens.shape[0]
    ctx.save_for_backward(order, position)


def _permute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, position = ctx.saved_tensors
    if position is None:
        position = reference.invert(order, ctx.num_tokens, ctx.k)
    return torch.ops.medplib.permute_backward(grad, position), None, None, None


def _keep_combine(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _combine_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights = torch.ops.medplib.combine_backward(grad, *ctx.saved_tensors)
    return rows, None, None, weights, grad if ctx.needs_input_grad[4] else None


def _keep_grouped_mm(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    rows, weights, ends = inputs
    ctx.save_for_backward(rows, ends, *weights)


def _grouped_mm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    rows, ends, *weights = ctx.saved_tensors
    for_rows, for_weights = ctx.needs_input_grad[:2]  # a frozen expert costs no product
    grads = torch.ops.medplib.grouped_mm_backward(grad, rows, weights, ends, for_rows, list(for_weights))
    of_weights = [one if asked else None for one, asked in zip(grads[1], for_weights, strict=True)]
    return grads[0] if for_rows else None, of_weights, None


def _keep_swiglu(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.medplib.swiglu_backward(grad, *ctx.saved_tensors)


_GRADIENTS: dict[str, tuple[Callable, Callable]] = {
    "gate_logits": (_gate_logits_gradient, _keep_gate_logits),
    "gate": (_gate_gradient, _keep_gate),
    "permute": (_permute_gradient, _keep_permute),
    "combine": (_combine_gradient, _keep_combine),
    "grouped_mm": (_grouped_mm_gradient, _keep_grouped_mm),
    "swiglu": (_swiglu_gradient, _keep_swiglu),
}
ONLY_REFERENCE = ("grouped_mm", "grouped_mm_backward")  # products, which PyTorch does best
_WITHOUT_GRADIENT = {
    "decode_ffn": "decode_ffn is for inference. To train, use permute, the experts and combine.",
    "gate_logits_backward": "The gradient of gate_logits cannot be differentiated again.",
    "gate_backward": "The gradient of gate cannot be differentiated again.",
    "permute_backward": "The gradient of permute cannot be differentiated again.",
    "combine_backward": "The gradient of combine cannot be differentiated again.",
    "grouped_mm_backward": "The gradient of grouped_mm cannot be differentiated again.",
    "swiglu_backward": "The gradient of swiglu cannot be differentiated again.",
}


def _refusal(reason: str) -> Callable:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(reason)

    return refuse


def _default_kernel(name: str) -> Callable:
    """The reference; on CUDA it first has the compiled kernels loaded, and steps aside for them."""
    meaning = getattr(reference, name)
    if name in ONLY_REFERENCE:
        return meaning

    def kernel(*args: Any) -> Any:
        if _loader.may_load("cuda") and any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
            _loader.load("cuda")
            if _loader.loaded("cuda"):
                return getattr(torch.ops.medplib, name)(*args)
        return meaning(*args)

    return kernel


def _register() -> None:
    for name, schema in SCHEMAS.items():
        full = f"{NAMESPACE}::{name}"
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _default_kernel(name), "CompositeExplicitAutograd")
        torch.library.register_fake(full, globals()[f"_{name}_shape"], lib=_LIBRARY)
        if name in _GRADIENTS:
            gradient, keep = _GRADIENTS[name]
            torch.library.register_autograd(full, gradient, setup_context=keep, lib=_LIBRARY)
        elif name in _WITHOUT_GRADIENT:
            torch.library.register_autograd(full, _refusal(_WITHOUT_GRADIENT[name]), lib=_LIBRARY)


def count_operations() -> None:
    """Tell torch's FlopCounterMode the cost of the operators that hold matrix products of their own.

    It sees those of the reference by itself, but not into a compiled kernel.
    """
    from torch.utils.flop_counter import register_flop_formula

    def product(tokens: Sequence[int], weight: Sequence[int]) -> int:
        return 2 * tokens[0] * weight[0] * weight[1]

    formulas = {
        "gate_logits": lambda tokens, weight, **_: product(tokens, weight),
        "gate_logits_backward": lambda grad, tokens, weight, for_tokens, for_weight, **_: (
            (for_tokens + for_weight) * product(tokens, weight)
        ),
        "decode_ffn": lambda tokens, experts, weights, gate_up, *_, **__: (
            3 * experts[0] * experts[1] * gate_up[1] * gate_up[2]
        ),
    }
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.medplib, name))(formula)


_register()
