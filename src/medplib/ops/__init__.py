"""The operators of a mixture of experts: score, choose, sort, permute, combine."""

from medplib.ops.reference import (
    capacity_of,
    choose_top_k,
    combine,
    drop_overflow,
    gate_logits,
    permute,
    route,
    sort_by_expert,
)

__all__ = [
    "capacity_of",
    "choose_top_k",
    "combine",
    "drop_overflow",
    "gate_logits",
    "permute",
    "route",
    "sort_by_expert",
]
