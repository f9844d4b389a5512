"""A model spread over devices by `device_map`, with parts on the CPU or the disk until they run (accelerate).

Accelerate brings the weights of each layer to where it computes while that layer's `forward` runs. The parts
around the language model use weights of their layers directly, as Segment Anything and timm do, which such
hooks cannot see; so a part comes and goes whole, and the language model layer by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from medplib.modeling import MedPLIB


def is_spread(model: torch.nn.Module) -> bool:
    """Whether accelerate's hooks move inputs or weights of this model."""
    return hasattr(model, "_hf_hook")


def compute_device(model: torch.nn.Module) -> torch.device | None:
    """Where a spread model computes first and wants its inputs; None for a model on one device."""
    return torch.device(model._hf_hook.execution_device) if is_spread(model) else None


def keep_parts_whole(model: MedPLIB) -> None:
    """Make each offloaded part that must not be split come and go in one piece."""
    if not is_spread(model):
        return
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules

    for name, part in model.named_children():
        hooks = [module._hf_hook for module in part.modules() if hasattr(module, "_hf_hook")]
        weights = [hook.weights_map for hook in hooks if getattr(hook, "weights_map", None) is not None]
        if type(part).__name__ in model._no_split_modules and weights:
            remove_hook_from_submodules(part)
            attach_align_device_hook(
                part, compute_device(model), offload=True, weights_map=weights[0].dataset, module_name=name,
                preload_module_classes=[type(part).__name__],
            )  # fmt: skip
