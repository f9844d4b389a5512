"""Visual prompts: what a user points at (Point, Box, Mask) and the encoders that turn it into tokens.

Names load on first use, so `from medplib.prompts import Box` does not import torch.
"""

from importlib import import_module

_WHERE = {
    "Point": "types",
    "Box": "types",
    "Mask": "types",
    "Prompt": "types",
    "FourierPosition": "position",
    "PointEncoder": "points",
    "BoxEncoder": "boxes",
    "MaskEncoder": "masks",
    "PromptEncoder": "combined",
    "SAM_NAMES": "combined",
    "RegionPooler": "region",
    "GeometryRegionPooler": "region",
    "region_mask_to_grid": "region",
}

__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
