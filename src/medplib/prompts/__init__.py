"""Visual prompts: what a user points at (Point, Box, Mask) and the encoders that turn it into tokens.

Names load on first use, so `from medplib.prompts import Box` does not import torch.
"""

from medplib.lazy import lazily

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
__getattr__, __dir__ = lazily(__name__, _WHERE)
