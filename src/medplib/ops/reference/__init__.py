"""What each operator of a mixture of experts means, in plain PyTorch; the kernel used when none is compiled.

T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows for experts.

An assignment is one (token, choice) pair; its number is token * K + choice. The index E in place of an expert
means that the assignment was dropped. Everything is deterministic: ties go to the lowest index, rows keep the
order of their tokens, and no sum depends on the order of threads. Sums are taken in the precise type:
float32, or float64 where an input is float64.

The functions here are what `library.py` registers: same arguments, same results, no gradient. Users call
`medplib.ops`.
"""

from medplib.ops.reference.experts import (
    decode_ffn,
    grouped_mm,
    grouped_mm_backward,
    swiglu,
    swiglu_backward,
)
from medplib.ops.reference.precision import cast, precise_type
from medplib.ops.reference.routing import (
    capacity_of,
    choose_top_k,
    combine,
    combine_backward,
    counter_bits,
    drop,
    gate,
    gate_backward,
    gate_logits,
    gate_logits_backward,
    invert,
    permute,
    permute_backward,
    plan,
)

__all__ = [
    "capacity_of",
    "cast",
    "choose_top_k",
    "combine",
    "combine_backward",
    "counter_bits",
    "decode_ffn",
    "drop",
    "gate",
    "gate_backward",
    "gate_logits",
    "gate_logits_backward",
    "grouped_mm",
    "grouped_mm_backward",
    "invert",
    "permute",
    "permute_backward",
    "plan",
    "precise_type",
    "swiglu",
    "swiglu_backward",
]
