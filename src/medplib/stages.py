"""Training stages as data: what trains, what gets LoRA, which losses count; and the switch between them.

    table = set_stage(model, "grounding")     # or Stage("mine", train=("mask_decoder", "experts.grounding"))
    print(table)

Works on any module, in particular any that holds MoERouters; see `medplib.parts.module_parts` for the names.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import nn

from medplib.errors import InputError, UnknownNameError, is_number
from medplib.lora import (
    LoRA,
    adapter_parameters,
    attach_lora,
    attached_settings,
    find_targets,
    lora_layers,
    merge_lora,
    require_peft,
)
from medplib.parts import PartTable, keep_frozen_in_eval, module_parts, part_table
from medplib.quantization import is_quantized

__all__ = [
    "ALIGN",
    "GROUNDING",
    "MIXTURE",
    "STAGES",
    "VQA",
    "LoRA",
    "Stage",
    "StageSchedule",
    "keep_frozen_in_eval",
    "merge_lora",
    "module_parts",
    "set_stage",
]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, checked when it is made; change one with `dataclasses.replace(stage, epochs=1)`.

    train          parts trained in full, with the parts inside them; "gates?" is skipped where there are none
    freeze         parts kept closed even where a part around them trains
    lora           {part: LoRA}
    loss_weights   {loss: weight}, for the caller's training loop
    data           names of the data sets, for the caller
    learning_rate, betas, weight_decay   of AdamW
    epochs, steps  the length; `steps`, if given, is what StageSchedule goes by
    batch_size     samples per optimiser step, over all devices
    max_length     tokens per sample
    warmup         linear warm-up, as a share of one epoch
    decay          of the learning rate after it: "linear" or "cosine", to 0, or "constant"
    clip           largest norm of the gradient
    precision      "fp32", "bf16" or "fp16"
    seed           of the order of the data and all that is drawn
    """

    name: str = field(kw_only=False)
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    lora: Mapping[str, LoRA] | None = None
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    data: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    epochs: float = 1
    steps: int | None = None
    batch_size: int = 128
    max_length: int = 2048
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.01
    decay: str = "linear"
    clip: float = 1.0
    precision: str = "bf16"
    seed: int = 42

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"A stage needs a name, got {self.name!r}.")
        for key in ("train", "freeze", "data"):
            object.__setattr__(self, key, self._names(key))
        if self.lora is not None:
            if not isinstance(self.lora, Mapping) or not all(
                isinstance(part, str) and isinstance(lora, LoRA) for part, lora in self.lora.items()
            ):
                raise self._wrong("lora", "a dict from part names to LoRA settings")
            object.__setattr__(self, "lora", dict(self.lora) or None)
        if not self.train and not self.lora:
            raise InputError(f"Stage '{self.name}' trains nothing; name parts in train= or lora=.")
        weights = self.loss_weights
        if not isinstance(weights, Mapping) or not all(is_number(v) and v >= 0 for v in weights.values()):
            raise self._wrong("loss_weights", "a dict from loss names to finite numbers of at least 0")
        object.__setattr__(self, "loss_weights", {name: float(value) for name, value in weights.items()})
        for key in ("learning_rate", "epochs", "clip"):
            if not is_number(getattr(self, key)) or getattr(self, key) <= 0:
                raise self._wrong(key, "a finite number above 0")
        for key in ("weight_decay", "warmup"):
            if not is_number(getattr(self, key)) or getattr(self, key) < 0:
                raise self._wrong(key, "a finite number of at least 0")
        for key, least in (("batch_size", 1), ("max_length", 1), ("seed", 0), ("steps", 1)):
            value = getattr(self, key)
            if not (key == "steps" and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < least
            ):
                raise self._wrong(key, f"a whole number of at least {least}")
        betas = tuple(self.betas) if isinstance(self.betas, list | tuple) else ()
        if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise self._wrong("betas", "two numbers from 0 up to 1")
        object.__setattr__(self, "betas", betas)
        for key, known in (
            ("precision", ("fp32", "bf16", "fp16")),
            ("decay", ("linear", "cosine", "constant")),
        ):
            if getattr(self, key) not in known:
                raise self._wrong(key, f"{', '.join(known[:-1])} or {known[-1]}")

    def _names(self, key: str) -> tuple[str, ...]:
        value = getattr(self, key)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise self._wrong(key, "a tuple of names")
        value = tuple(value)
        if not all(isinstance(name, str) and name.removesuffix("?") for name in value):
            raise self._wrong(key, "a tuple of names")
        return value

    def _wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"Stage '{self.name}': {key} must be {wanted}, got {getattr(self, key)!r}.")


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

# The published recipe (MedPLIB, AAAI 2025, and the authors' scripts). "region_adapter" and the mask side
# carry no "?": a model without them cannot be trained by these stages and should say so.
ALIGN = Stage(
    "align",
    train=("projector",),
    data=("llava_med_alignment",),
    learning_rate=1e-3,  # stage I is "as LLaVA 1.5": these four are LLaVA 1.5's pretraining values
    epochs=1,
    batch_size=256,
    max_length=2048,
)
VQA = Stage(
    "vqa",
    # The authors' script leaves the region adapter closed although stage IV loads it from here; ours opens
    # it.
    train=("lm_head", "embeddings", "norms", "projector", "region_adapter"),
    # The recipe states rank 16 but no alpha for this stage; 16 is the alpha of the other two.
    lora={"language_model": LoRA(rank=16, alpha=16, targets=_ATTENTION + _FEED_FORWARD)},
    data=(
        "mecovqa_complex",
        "mecovqa_region",
        "slake",
        "path_vqa",
        "pmc_vqa",
        "imageclef_2019",
        "imageclef_2021",
        "vqa_rad",
    ),
    learning_rate=1e-4,
    epochs=3,
    max_length=2048,
)
GROUNDING = Stage(
    "grounding",
    train=("mask_decoder", "seg_projector"),
    lora={"language_model": LoRA(rank=8, alpha=16, targets=_FEED_FORWARD)},
    loss_weights={"ce": 1.0, "dice": 5.0, "bce": 1.0, "focal": 1.0, "iou": 0.0},
    data=("mecovqa_grounding",),
    learning_rate=3e-4,
    epochs=10,
)
MIXTURE = Stage(
    "mixture",
    train=("gates", "lm_head", "embeddings", "mask_decoder", "seg_projector", "region_adapter"),
    lora={"language_model": LoRA(rank=8, alpha=16, targets=(*_FEED_FORWARD, "q_proj", "v_proj"))},
    # Published with capacity factor 1.5, which is an argument of MoERouter; its default serves every token.
    loss_weights={"ce": 1.0, "dice": 0.5, "bce": 2.0, "focal": 0.0, "iou": 0.0, "balance": 0.0},
    data=(*VQA.data, *GROUNDING.data),
    learning_rate=3e-4,
    epochs=3,
    max_length=1024,
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in (ALIGN, VQA, GROUNDING, MIXTURE)}
"""The four stages of MedPLIB, in order. Each trains other parameters: make a new optimiser at a change."""


def set_stage(model: nn.Module, stage: Stage | str, *, merge: bool = False) -> PartTable:
    """Open what the stage trains, close everything else, and return the table of what trains (print it).

    Closed parameters get requires_grad False and lose their gradient; closed modules go to eval mode (call
    `keep_frozen_in_eval` after each `model.train()`). LoRA layers are attached through peft. Adapters of an
    earlier stage must be merged first (`merge_lora`), or here with merge=True, unless the stage asks for the
    same ones.

    Everything is checked before anything changes: UnknownNameError for a part the model lacks, InputError for
    settings that do not fit it, ImportError if LoRA is wanted and peft is missing.
    """
    stage = _by_name(stage)
    parts = module_parts(model)
    opened = _parameters(parts, _present(parts, stage.train, stage.name))
    closed = _parameters(parts, _present(parts, stage.freeze, stage.name))
    wanted = _wanted_lora(model, parts, stage, closed)
    opened = {key: parameter for key, parameter in opened.items() if key not in closed}
    _check_opened(model, stage, opened, wanted)
    present = attached_settings(model)
    keep = bool(present) and present == {name: (lora.rank, lora.alpha) for name, lora in wanted.items()}
    if lora_layers(model) and not keep and not merge:
        raise InputError(
            f"The model carries LoRA layers that stage '{stage.name}' does not ask for; call "
            f"merge_lora(model) first, or set_stage(..., merge=True)."
        )
    if wanted and not keep:
        require_peft()

    if not keep:
        merge_lora(model)
        if wanted:
            attach_lora(model, wanted)
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        trains = id(parameter) in opened or id(parameter) in adapters
        if not is_quantized(parameter):
            parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    keep_frozen_in_eval(model)
    return part_table(model, f"stage {stage.name}")


class StageSchedule:
    """Several stages one after another, by optimiser step.

        schedule = StageSchedule([VQA, GROUNDING], steps=[3000, 2000])
        for step in range(schedule.total_steps):
            if table := schedule.apply(model, step):
                optimiser = make_optimiser(model)     # another set of parameters trains now

    `steps` gives each stage's length; without it every stage must have `steps` of its own.
    """

    def __init__(self, stages: Sequence[Stage | str], steps: Sequence[int] | None = None) -> None:
        if isinstance(stages, str | Stage) or not isinstance(stages, Iterable):
            raise InputError(f"stages must be a list of stages, got {stages!r:.80}.")
        if steps is not None and not isinstance(steps, Iterable):
            raise InputError(f"steps must be a list with the length of each stage, got {steps!r}.")
        self.stages = tuple(_by_name(stage) for stage in stages)
        lengths = [stage.steps for stage in self.stages] if steps is None else list(steps)
        if not self.stages or len(lengths) != len(self.stages):
            raise InputError(f"{len(self.stages)} stages need as many lengths in steps, got {len(lengths)}.")
        for stage, length in zip(self.stages, lengths, strict=True):
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise InputError(f"Stage '{stage.name}' needs a length of at least 1 step, got {length!r}.")
        self.steps: tuple[int, ...] = tuple(lengths)  # type: ignore[arg-type]
        self._applied: tuple[weakref.ref[nn.Module], int] | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(self.steps)

    def at(self, step: int) -> Stage:
        """The stage that `step` (counted from 0) belongs to."""
        return self.stages[self._index(step)]

    def apply(self, model: nn.Module, step: int) -> PartTable | None:
        """Bring `model` into the stage of `step`. Returns the table when that changed it, else None.

        LoRA of the stage before is merged. Resuming in the middle of a stage works the same way.
        """
        index = self._index(step)
        if self._applied is not None and self._applied[0]() is model and self._applied[1] == index:
            return None
        table = set_stage(model, self.stages[index], merge=True)
        self._applied = (weakref.ref(model), index)
        return table

    def _index(self, step: int) -> int:
        if isinstance(step, bool) or not isinstance(step, Integral) or not 0 <= step < self.total_steps:
            raise InputError(f"step must be between 0 and {self.total_steps - 1}, got {step!r}.")
        return bisect.bisect_right(list(itertools.accumulate(self.steps)), step)


def _by_name(stage: Stage | str) -> Stage:
    if isinstance(stage, Stage):
        return stage
    if not isinstance(stage, str) or stage not in STAGES:
        raise UnknownNameError.among(f"No stage named {stage!r}.", str(stage), list(STAGES))
    return STAGES[stage]


def _present(parts: Mapping[str, list[nn.Module]], names: Iterable[str], stage: str) -> list[str]:
    """The named parts that the model has; one that it lacks is an error unless marked with "?"."""
    found = []
    for name in names:
        plain = name.removesuffix("?")
        if plain in parts:
            found.append(plain)
        elif plain == name:
            raise UnknownNameError.among(
                f"Stage '{stage}' names the part '{name}', which this model lacks.", name, list(parts)
            )
    return found


def _parameters(parts: Mapping[str, list[nn.Module]], names: list[str]) -> dict[int, nn.Parameter]:
    return {id(p): p for name in names for module in parts[name] for p in module.parameters()}


def _wanted_lora(
    model: nn.Module, parts: Mapping[str, list[nn.Module]], stage: Stage, closed: Mapping[int, nn.Parameter]
) -> dict[str, LoRA]:
    """Which linear layer gets which adapter; layers in closed parts get none."""
    wanted: dict[str, LoRA] = {}
    for key, lora in (stage.lora or {}).items():
        for part in _present(parts, [key], stage.name):
            for name in find_targets(model, parts[part], lora, part):
                weight = next(model.get_submodule(name).parameters())
                if id(weight) in closed:
                    continue
                if wanted.get(name, lora) != lora:
                    raise InputError(f"Stage '{stage.name}': {name} gets two different LoRA settings.")
                wanted[name] = lora
    return wanted


def _check_opened(
    model: nn.Module, stage: Stage, opened: Mapping[int, nn.Parameter], wanted: Mapping[str, LoRA]
) -> None:
    if not opened and not wanted:
        raise InputError(f"Stage '{stage.name}' would train nothing in this {type(model).__name__}.")
    if getattr(getattr(model, "quantization", None), "kind", None) == "int4":
        raise InputError(
            "int4 layers pass no gradient on, so nothing trains here; load the model with quantize='int8' "
            "for LoRA, or without quantize."
        )
    for name, parameter in model.named_parameters():
        if id(parameter) in opened and is_quantized(parameter):
            raise InputError(f"{name} is quantised and cannot be trained in full; use LoRA.")
    for name in wanted:
        if any(id(parameter) in opened for parameter in model.get_submodule(name).parameters()):
            raise InputError(f"Stage '{stage.name}' trains {name} in full and with LoRA; choose one.")
