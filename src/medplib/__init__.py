"""MedPLIB's public names, imported on first use: `import medplib` loads neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medplib.configuration import MedPLIBConfig
    from medplib.decoders.mask_decoder import MaskDecoder
    from medplib.decoders.two_way import TwoWayTransformer
    from medplib.errors import CheckpointError, InputError, MedPLIBError, UnknownNameError
    from medplib.experts.losses import collect_aux_losses
    from medplib.experts.router import MoERouter, Routing, TopKGate, routing_mask
    from medplib.experts.trace import record_routing
    from medplib.experts.upcycle import assemble_mixture, upcycle
    from medplib.geometry import Letterbox
    from medplib.modeling import MedPLIB
    from medplib.processing import MedPLIBProcessor
    from medplib.prompts.combined import PromptEncoder
    from medplib.prompts.region import RegionPooler
    from medplib.prompts.types import Box, Mask, Point
    from medplib.registry import (
        EXPERTS,
        GATES,
        LANGUAGE_MODELS,
        MASK_DECODERS,
        PROJECTORS,
        PROMPT_ENCODERS,
        VISION_TOWERS,
        Registry,
    )
    from medplib.results import Answer, Finding
    from medplib.stages import Stage, StageSchedule, set_stage

    __version__: str

__all__ = [
    "EXPERTS",
    "GATES",
    "LANGUAGE_MODELS",
    "MASK_DECODERS",
    "PROJECTORS",
    "PROMPT_ENCODERS",
    "VISION_TOWERS",
    "Answer",
    "Box",
    "CheckpointError",
    "Finding",
    "InputError",
    "Letterbox",
    "Mask",
    "MaskDecoder",
    "MedPLIB",
    "MedPLIBConfig",
    "MedPLIBError",
    "MedPLIBProcessor",
    "MoERouter",
    "Point",
    "PromptEncoder",
    "RegionPooler",
    "Registry",
    "Routing",
    "Stage",
    "StageSchedule",
    "TopKGate",
    "TwoWayTransformer",
    "UnknownNameError",
    "__version__",
    "assemble_mixture",
    "collect_aux_losses",
    "record_routing",
    "routing_mask",
    "set_stage",
    "upcycle",
]

_MODULES = {
    "medplib.configuration": ("MedPLIBConfig",),
    "medplib.decoders.mask_decoder": ("MaskDecoder",),
    "medplib.decoders.two_way": ("TwoWayTransformer",),
    "medplib.errors": ("CheckpointError", "InputError", "MedPLIBError", "UnknownNameError"),
    "medplib.experts.losses": ("collect_aux_losses",),
    "medplib.experts.router": ("MoERouter", "Routing", "TopKGate", "routing_mask"),
    "medplib.experts.trace": ("record_routing",),
    "medplib.experts.upcycle": ("assemble_mixture", "upcycle"),
    "medplib.geometry": ("Letterbox",),
    "medplib.modeling": ("MedPLIB",),
    "medplib.processing": ("MedPLIBProcessor",),
    "medplib.prompts.combined": ("PromptEncoder",),
    "medplib.prompts.region": ("RegionPooler",),
    "medplib.prompts.types": ("Box", "Mask", "Point"),
    "medplib.registry": (
        "EXPERTS",
        "GATES",
        "LANGUAGE_MODELS",
        "MASK_DECODERS",
        "PROJECTORS",
        "PROMPT_ENCODERS",
        "Registry",
        "VISION_TOWERS",
    ),
    "medplib.results": ("Answer", "Finding"),
    "medplib.stages": ("Stage", "StageSchedule", "set_stage"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'medplib' has no attribute '{name}'")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("medplib")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
