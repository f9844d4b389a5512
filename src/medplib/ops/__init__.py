"""The operators of a mixture of experts: score, choose, sort, permute, combine.

`status()` says whether PyTorch's or compiled kernels run; see `_loader.py` for the variable MEDPLIB_OPS.
"""

from medplib.ops import _loader
from medplib.ops._loader import status
from medplib.ops.functions import (
    Gated,
    Plan,
    capacity_of,
    choose_top_k,
    combine,
    count_choices,
    decode_ffn,
    drop_overflow,
    gate,
    gate_logits,
    grouped_mm,
    invert,
    permute,
    plan,
    route,
    sort_by_expert,
    swiglu,
    uniform,
)

__all__ = [
    "Gated",
    "Plan",
    "capacity_of",
    "choose_top_k",
    "combine",
    "count_choices",
    "decode_ffn",
    "drop_overflow",
    "gate",
    "gate_logits",
    "grouped_mm",
    "invert",
    "permute",
    "plan",
    "route",
    "sort_by_expert",
    "status",
    "swiglu",
    "uniform",
]

if _loader.mode() == "cpu":
    _loader.load("cpu")
