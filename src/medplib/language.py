"""The language model: any Hugging Face decoder with `layers[i].mlp`, where mixtures may replace FFNs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from medplib.errors import InputError


def from_config(text_config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised causal decoder for `text_config`, in torch's default dtype; nothing is fetched.

    Raises InputError where transformers has no causal decoder for it.
    """
    try:
        return AutoModelForCausalLM.from_config(
            text_config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
    except ValueError as error:
        raise InputError(
            f"transformers cannot build a causal decoder from text_config of type "
            f"{text_config.model_type!r}: {error}"
        ) from error


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises InputError where the architecture has no `layers[i].mlp`."""
    layers = getattr(language_model.get_decoder(), "layers", None)
    if layers is None or not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        name = type(language_model).__name__
        raise InputError(
            f"{name} has no layers[i].mlp, which can become a mixture. Use a decoder of the Llama kind "
            "(Llama, Mistral, Qwen, Gemma, Phi-3, ...)."
        )
    return layers


def install_mixtures(
    language_model: PreTrainedModel,
    layers: Sequence[int],
    experts: Sequence[str],
    *,
    seed: int | None = None,
    gate_args: Mapping[str, Any] | None = None,
    **router_args: Any,
) -> None:
    """Replace the FFN of each layer in `layers` by a MoERouter whose named experts are copies of that FFN.

    The experts keep the FFN's own class and parameter names, so LoRA targets and checkpoint keys stay the
    usual ones. Everything is built before anything is replaced. Layer i takes the seeds given plus i, so that
    layers do not draw alike.
    """
    from medplib.experts.router import MoERouter

    blocks = decoder_layers(language_model)
    width = language_model.config.hidden_size
    built = {}
    for i in layers:
        gate = dict(gate_args or {})
        if gate.get("seed") is not None:
            gate["seed"] += i
        built[i] = MoERouter(
            width, experts={name: copy.deepcopy(blocks[i].mlp) for name in experts},
            seed=None if seed is None else seed + i, gate_args=gate, **router_args,
        )  # fmt: skip
    for i, router in built.items():
        blocks[i].mlp = router
