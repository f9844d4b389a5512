"""The table of names: where each tensor of a published checkpoint lives in MedPLIB, and back.

Published layouts that share these names: MedPLIB (mixture), its dense stage-2 and stage-3 runs, LLaVA 1.5 and
LLaVA-Med 1.5 (which lack the mask side). Tensors are never changed on the way, only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from medplib.errors import CheckpointError
from medplib.prompts.combined import SAM_NAMES as PROMPT_NAMES
from medplib.vision.sam_vit import SAM_NAMES as VIT_NAMES
from medplib.vision.sam_vit import sam_to_timm

# (published prefix, our prefix); of several that fit, the first counts.
PREFIXES = (
    ("model.mm_projector.", "projector.layers."),
    ("model.region_fea_adapter.", "region_adapter."),
    ("model.text_hidden_fcs.0.", "seg_projector."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.network."),
    ("model.visual_model.image_encoder.", "mask_encoder.network."),
    ("model.visual_model.prompt_encoder.", "prompt_encoder."),
    ("model.visual_model.mask_decoder.", "mask_decoder."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# DeepSpeed's names inside a layer's `mlp.`.
GATE = "deepspeed_moe.gate.wg."
EXPERT = "deepspeed_moe.experts.deepspeed_experts."

# Computed from the configuration: an old rotary table, CLIP's position numbers, SAM's constants.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$|visual_model\.pixel_(mean|std)$")
# What peft writes around a trained model's names.
_PEFT = "base_model.model."

_PROMPT_BACK = {theirs: ours for ours, theirs in PROMPT_NAMES.items()}


def our_name(name: str, experts: Sequence[str] = ()) -> str | None:
    """A published name -> ours; None for a tensor that is not needed.

    experts: the mixture's expert names in the order of their published numbers. Raises CheckpointError for
    the number of an expert that has no name. An unknown name comes back unchanged.
    """
    name = name.removeprefix(_PEFT)
    if IGNORED.search(name):
        return None
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            return ours + _INSIDE.get(ours, lambda rest, _: rest)(rest, experts)
    return name


def official_name(name: str, experts: Sequence[str] = ()) -> str:
    """Our name -> the published one. Raises CheckpointError for a part that the published layout lacks."""
    for theirs, ours in PREFIXES:
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return theirs + _OUTSIDE.get(ours, lambda rest, _: rest)(rest, experts)
    raise CheckpointError(f"The published layout has no place for the weight {name!r}.")


def rename(names: Iterable[str], experts: Sequence[str] = ()) -> dict[str, str]:
    """{our name: published name}. Raises CheckpointError when two published tensors have the same place."""
    table: dict[str, str] = {}
    for theirs in names:
        ours = our_name(theirs, experts)
        if ours is None:
            continue
        if ours in table:
            raise CheckpointError(
                f"The checkpoint holds {table[ours]!r} and {theirs!r}, which are the same tensor here; "
                "remove one of them."
            )
        table[ours] = theirs
    return table


def sam_name(name: str) -> str:
    """A name of a SAM or SAM-Med2D checkpoint -> ours; one of no part comes back unchanged."""
    known = name.startswith(("image_encoder.", "prompt_encoder.", "mask_decoder."))
    return (our_name(f"model.visual_model.{name}") if known else None) or name


def _layer_in(rest: str, experts: Sequence[str]) -> str:
    rest = rest.replace(f".mlp.{GATE}", ".mlp.gate.")
    found = re.match(rf"(layers\.\d+\.mlp\.){re.escape(EXPERT)}(\d+)\.(.+)", rest)
    if not found:
        return rest
    number = int(found[2])
    if number >= len(experts):
        raise CheckpointError(
            f"The checkpoint holds expert {number}, but its configuration has {len(experts)} experts; "
            "they do not belong together."
        )
    return f"{found[1]}experts.{experts[number]}.{found[3]}"


def _layer_out(rest: str, experts: Sequence[str]) -> str:
    rest = re.sub(r"^(layers\.\d+\.mlp\.)gate\.weight$", rf"\1{GATE}weight", rest)
    found = re.match(r"(layers\.\d+\.mlp\.)experts\.([^.]+)\.(.+)", rest)
    if not found:
        return rest
    return f"{found[1]}{EXPERT}{list(experts).index(found[2])}.{found[3]}"


def _vit_out(rest: str, _: Sequence[str]) -> str:
    for theirs, ours in VIT_NAMES:
        rest = rest.replace(ours, theirs)
    return rest


_Inner = Callable[[str, Sequence[str]], str]
_INSIDE: dict[str, _Inner] = {
    "language_model.model.": _layer_in,
    "mask_encoder.network.": lambda rest, _: sam_to_timm(rest),
    "prompt_encoder.": lambda rest, _: _PROMPT_BACK.get(rest, rest),
}
_OUTSIDE: dict[str, _Inner] = {
    "language_model.model.": _layer_out,
    "mask_encoder.network.": _vit_out,
    "prompt_encoder.": lambda rest, _: PROMPT_NAMES.get(rest, rest),
}
