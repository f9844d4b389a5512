"""MedPLIBConfig: every size and name of a model, as small dataclasses that are checked when they are made."""

# No `from __future__ import annotations` here: with it the type checks of @strict fall silent.

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from medplib.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)

# A configuration beyond these limits is damaged or hostile, and building it would take minutes or all memory.
MAX_SIDE = 4096  # pixels of a network square
MAX_LAYERS = 1024
MAX_EXPERTS = 256
MAX_WIDTH = 1 << 20  # of any layer, and any other size of a part
MAX_VOCABULARY = 1 << 24

# Settings that transformers keeps in every configuration beside the declared ones.
_FOREIGN = {
    *("torch_dtype", "num_labels", "name_or_path", "output_attentions", "attn_implementation"),
    *("experts_implementation", "quantization_config", "tokenizer_class", "processor_class", "use_cache"),
    *("output_hidden_states", "return_dict", "architectures", "transformers_version", "model_type", "dtype"),
}
_COUNTS = re.compile(r"layer|depth|block|stage|upscale", re.IGNORECASE)  # names of settings that say how many
_WORD = re.compile(r"[A-Za-z0-9_]{1,40}")


@strict
@dataclass
class Part:
    """A replaceable part: its name in a registry and the plain arguments of its constructor."""

    name: str
    args: dict = field(default_factory=dict)


@strict
@dataclass
class MoEConfig:
    """The mixture in the language model.

    `layers` are the indices of the decoder layers whose FFN becomes a mixture; None means all of them.
    The defaults are the published ones: two experts, top-1, raw softmax probability, dropless in evaluation.
    """

    experts: list[str] = field(default_factory=lambda: ["grounding", "vqa"])
    layers: list[int] | None = None
    top_k: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    gate: str = "topk"
    balance_loss_coef: float = 0.0

    def __post_init__(self):
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise InputError(f"moe.experts must be a list of different names, got {self.experts}.")
        if not 1 <= self.top_k <= len(self.experts):
            raise InputError(
                f"moe.top_k must be between 1 and {len(self.experts)} (the number of experts), got {self.top_k}."
            )


@strict
@dataclass
class VisionConfig:
    """The tower that the language model sees through, and how an image is prepared for it."""

    tower: Part
    projector: Part = field(default_factory=lambda: Part("mlp2x_gelu"))
    image_size: int = 336
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))

    def __post_init__(self):
        _check_side("vision.image_size", self.image_size)


@strict
@dataclass
class RegionConfig:
    """How a point, box or mask becomes one token: the pooler, and what a mask looks like on the feature grid.

    `mask_mode` "official" is the published nearest-neighbour sampling; "area" weighs each cell by the share of
    it that the region covers, which keeps structures smaller than a cell.
    """

    pooler: Part = field(default_factory=lambda: Part("mean"))
    mask_mode: Literal["official", "area"] = "official"
    point_size: int = 41


@strict
@dataclass
class MaskConfig:
    """The mask side: image encoder, prompt encoder, decoder, and how masks are brought back to the image."""

    encoder: Part
    dim: int = 256
    image_size: int = 256
    mean: list[float] = field(default_factory=lambda: list(SAM_MEAN))
    std: list[float] = field(default_factory=lambda: list(SAM_STD))
    mask_channels: int = 16
    decoder: Part = field(default_factory=lambda: Part("sam"))
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    threshold: float = 0.5
    geometry: Literal["correct", "official"] = "correct"

    def __post_init__(self):
        _check_side("mask.image_size", self.image_size)
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"mask.threshold is a probability between 0 and 1, got {self.threshold}.")


@strict
@dataclass
class TokenConfig:
    """Ids of the control tokens. Placeholders may lie outside the vocabulary (published: -200 and -300)."""

    image: int
    region: int
    seg: int


@strict
@dataclass
class LossConfig:
    """Weights of the losses; the defaults are those of the published mixture stage."""

    ce: float = 1.0
    dice: float = 0.5
    bce: float = 2.0
    focal: float = 0.0
    iou: float = 0.0


def _check_side(name: str, side: int) -> None:
    if not 8 <= side <= MAX_SIDE:
        raise InputError(f"{name} must be between 8 and {MAX_SIDE} pixels, got {side}.")


def _make(cls: type, value: Any, where: str) -> Any:
    """A dict (from JSON) or an instance -> a checked instance, nested parts included."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a {cls.__name__} or a dict of its fields, got {value!r}.")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise InputError(f"{where} has no setting {', '.join(unknown)}. Known: {', '.join(known)}.")
    nested = {k: _make(Part, v, f"{where}.{k}") if known[k].type is Part else v for k, v in value.items()}
    try:
        return cls(**nested)
    except (StrictDataclassError, TypeError) as error:
        reason = str(error.__cause__ or error).strip().replace("\n", " ")
        raise InputError(f"{where}: {reason}") from error


@strict
class MedPLIBConfig(PreTrainedConfig):
    """All settings of a MedPLIB model.

    `text_config` is any Hugging Face decoder's configuration; the other parts are the dataclasses of this
    module (dicts are accepted and checked). No string in it names code or a download: parts are found by name
    in the registries. Raises InputError for a misspelt key, a wrong type or a size out of range.
    """

    model_type = "medplib"
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision: Any = None
    region: Any = None
    mask: Any = None
    moe: Any = None
    tokens: Any = None
    losses: Any = None
    template: str = "vicuna_v1"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision = _make(VisionConfig, self.vision or {"tower": {"name": "clip"}}, "vision")
        self.region = _make(RegionConfig, self.region or {}, "region")
        self.mask = _make(MaskConfig, self.mask or {"encoder": {"name": "sam_vit"}}, "mask")
        self.moe = _make(MoEConfig, self.moe, "moe") if self.moe is not None else None
        self.tokens = _make(TokenConfig, self.tokens or {"image": -200, "region": -300, "seg": 32000}, "tokens")
        self.losses = _make(LossConfig, self.losses or {}, "losses")
        super().__post_init__(**kwargs)
        layers = self.text_config.num_hidden_layers
        if not 1 <= layers <= MAX_LAYERS:
            raise InputError(f"text_config.num_hidden_layers must be between 1 and {MAX_LAYERS}, got {layers}.")
        wrong = [i for i in (self.moe.layers or []) if not 0 <= i < layers] if self.moe else []
        if wrong:
            raise InputError(f"moe.layers names {wrong}, but the language model has layers 0 to {layers - 1}.")
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that hold a mixture."""
        if self.moe is None:
            return []
        return list(range(self.text_config.num_hidden_layers)) if self.moe.layers is None else list(self.moe.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, parts included."""
        out = super().to_dict()
        return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in out.items()}
