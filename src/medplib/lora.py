"""Low-rank adapters (LoRA) on named linear layers: attached through peft, merged back into plain nn.Linear.

Hu et al., LoRA, 2021. peft is imported only when an adapter is attached: pip install "medplib[train]".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medplib.errors import InputError, is_number

ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Settings of an adapter: weight + alpha / rank * B @ A on the linear layers called `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"LoRA rank must be a whole number of at least 1, got {self.rank!r}.")
        if not is_number(self.alpha) or self.alpha <= 0:
            raise InputError(f"LoRA alpha must be a finite number above 0, got {self.alpha!r}.")
        if not isinstance(self.targets, list | tuple) or not all(
            isinstance(t, str) and t for t in self.targets
        ):
            raise InputError(f"LoRA targets must be a tuple of layer names, got {self.targets!r}.")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise InputError("LoRA targets must name at least one layer, such as 'q_proj'.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout must be from 0 up to 1, got {self.dropout!r}.")


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that carry an adapter, by qualified name."""
    if "peft" not in sys.modules:
        return {}  # nobody can have attached one
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def attached_settings(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every adapter in `model`, by the layer's qualified name."""
    return {
        name: (layer.r[ADAPTER], layer.lora_alpha[ADAPTER])
        for name, layer in lora_layers(model).items()
        if ADAPTER in layer.r
    }


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters in `model`."""
    return [
        parameter
        for layer in lora_layers(model).values()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    ]


def find_targets(model: nn.Module, part: list[nn.Module], lora: LoRA, part_name: str) -> list[str]:
    """Names, in `model`, of the linear layers of `part` that `lora` is meant for.

    Raises InputError for a target that the part does not have.
    """
    wrapped = set(lora_layers(model).values())
    inside = {id(module) for root in part for module in root.modules()}
    found: dict[str, list[str]] = {target: [] for target in lora.targets}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in found and id(module) in inside and (isinstance(module, nn.Linear) or module in wrapped):
            found[last].append(name)
    lacking = [target for target, names in found.items() if not names]
    if lacking:
        raise InputError(
            f"LoRA on '{part_name}' targets {', '.join(lacking)}, but it has no linear layer of that name."
        )
    return [name for names in found.values() for name in names]


def require_peft() -> None:
    """Raise the error that says how to get peft, if it is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "medplib[train]"') from error


def attach_lora(model: nn.Module, layers: Mapping[str, LoRA]) -> None:
    """Put adapters on the named linear layers of `model`, in place; B starts at 0, so the output stays.

    Only the adapters' own parameters are added; which parameters train is left as it was.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    had = getattr(model, "peft_config", None)
    for settings in dict.fromkeys(layers.values()):
        names = [name for name, chosen in layers.items() if chosen == settings]
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="|".join(re.escape(name) for name in names),  # matched in full
        )
        inject_adapter_in_model(config, model, ADAPTER)
        if had is None and hasattr(model, "peft_config"):
            del model.peft_config  # peft's note for its own wrappers; nothing here is wrapped
    for parameter in model.parameters():
        if id(parameter) in flags:
            parameter.requires_grad_(flags[id(parameter)])


def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter to its layer's weight and put the plain nn.Linear back; returns the layers' names.

    Do this at the end of a stage: the weights get their published names again. Raises InputError, before
    anything changes, if an adapter holds NaN or infinity.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        if not all(_finite(parameter) for parameter in layer.parameters()):
            raise InputError(f"The adapter of {name} holds NaN or infinity; it was not merged.")
    for name, layer in layers.items():
        if not layer.merged:
            layer.merge()
        parent, _, last = name.rpartition(".")
        plain = layer.get_base_layer()
        plain.train(layer.training)
        setattr(model.get_submodule(parent), last, plain)
    return list(layers)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
