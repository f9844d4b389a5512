"""MedPLIBConfig: every size and name of a model, as small dataclasses that are checked when they are made."""

# No `from __future__ import annotations` here: with it the type checks of @strict fall silent.

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from medplib.errors import InputError, MedPLIBError, UnknownNameError
from medplib.plain_values import (
    MAX_COUNT,
    MAX_EXPERTS,
    MAX_SIDE,
    MAX_SIZE,
    check_plain,
    check_square,
    check_weight,
)
from medplib.preprocess import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD

# The published model: LLaMA's 32000 words and 267 control tokens, of which <SEG> is the first.
_PUBLISHED_TEXT = {"model_type": "llama", "vocab_size": 32267}
_PUBLISHED_TOKENS = {"image": -200, "region": -300, "seg": 32000}

# What transformers itself may keep in a configuration, beside what it declares as fields.
_TRANSFORMERS_KEYS = frozenset(
    (
        *("torch_dtype", "name_or_path", "output_attentions", "num_labels", "use_cache", "model_type"),
        *("attn_implementation", "experts_implementation", "quantization_config", "per_layer_config"),
        *("tokenizer_class", "processor_class", "return_unused_kwargs"),
        *(f.name for f in fields(PreTrainedConfig)),
        *GenerationConfig._get_default_generation_params(),
    )
)


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
    All others are arguments of MoERouter: the losses' coefficients, limits to what an expert takes and whom
    it drops, the published gating. `gate_args` holds what else the gate takes, by name: for "topk" scale,
    groups, top_groups, group_best, bias_rate, bias_update, noise, noise_scale and seed. A seed is that of
    layer 0, and each layer adds its index.
    """

    experts: list[str] = field(default_factory=lambda: ["grounding", "vqa"])
    layers: list[int] | None = None
    top_k: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    gate: str = "topk"
    balance_loss_coef: float = 0.0
    sequence_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    drop: Literal["position", "probability", "random"] = "position"
    seed: int | None = None
    gate_args: dict = field(default_factory=dict)
    parity: Literal["deepspeed"] | None = None

    def __post_init__(self):
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise InputError(f"moe.experts must be a list of different names, got {self.experts}.")
        if len(self.experts) > MAX_EXPERTS:
            raise InputError(f"moe.experts may hold at most {MAX_EXPERTS} names, got {len(self.experts)}.")
        if not 1 <= self.top_k <= len(self.experts):
            raise InputError(
                f"moe.top_k must be between 1 and {len(self.experts)} (the number of experts), "
                f"got {self.top_k}."
            )
        for name in ("balance_loss_coef", "sequence_loss_coef", "z_loss_coef"):
            check_weight(f"moe.{name}", getattr(self, name))
        check_plain("moe.gate_args", self.gate_args)


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
        check_square("vision", self)


@strict
@dataclass
class RegionConfig:
    """How a point, box or mask becomes one token: the pooler, and what a mask looks like on the feature grid.

    `mask_mode` "official" is the published nearest-neighbour sampling; "area" weighs each cell by the share
    of it that the region covers, which keeps structures smaller than a cell. A point stands for a square of
    `point_size` pixels.
    """

    pooler: Part = field(default_factory=lambda: Part("mean"))
    mask_mode: Literal["official", "area"] = "official"
    point_size: int = 41

    def __post_init__(self):
        if not 1 <= self.point_size <= MAX_SIDE:
            raise InputError(
                f"region.point_size must be between 1 and {MAX_SIDE} pixels, got {self.point_size}."
            )


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
        check_square("mask", self)
        for name in ("dim", "mask_channels", "depth", "num_heads", "mlp_dim"):
            limit = MAX_COUNT if name == "depth" else MAX_SIZE
            if not 1 <= getattr(self, name) <= limit:
                raise InputError(f"mask.{name} must be between 1 and {limit}, got {getattr(self, name)}.")
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"mask.threshold is a probability between 0 and 1, got {self.threshold}.")


@strict
@dataclass
class TokenConfig:
    """Ids of the control tokens. Placeholders may lie outside the vocabulary (published: -200 and -300)."""

    image: int
    region: int
    seg: int

    def __post_init__(self):
        if len({self.image, self.region, self.seg}) < 3 or self.seg < 0:
            raise InputError(f"tokens needs three different ids, seg in the vocabulary; got {asdict(self)}.")

    def types(self, input_ids: Any) -> list:
        """What each token is, in the shape of input_ids (...): "image", "region", "<SEG>" or "text".

        With it `RoutingTrace.by_token_type` says which expert serves what:

            trace.by_token_type(config.tokens.types(batch["input_ids"]), rest="generated")
        """
        names = {self.image: "image", self.region: "region", self.seg: "<SEG>"}

        def named(ids: Any) -> Any:
            return [named(item) for item in ids] if isinstance(ids, list) else names.get(ids, "text")

        return named(input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids))


@strict
@dataclass
class LossConfig:
    """Weights of the losses, by default those of the published mixture stage. 0 leaves a mask loss out."""

    ce: float = 1.0
    dice: float = 0.5
    bce: float = 2.0
    focal: float = 0.0
    iou: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            check_weight(f"losses.{name}", value)


@strict
class MedPLIBConfig(PreTrainedConfig):
    """All settings of a MedPLIB model.

    `text_config` is any Hugging Face decoder's configuration; the other parts are the dataclasses of this
    module (dicts are accepted and checked). No string in it names code or a download: parts are found by name
    in the registries. Raises InputError for a misspelt key, a wrong type or a size out of range.

        MedPLIBConfig(text_config={"model_type": "qwen2", "hidden_size": 896}, moe={"experts": ["a", "b"]})
    """

    model_type = "medplib"
    sub_configs: ClassVar[dict] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    text_config: Any = None
    vision: Any = None
    region: Any = None
    mask: Any = None
    moe: Any = None
    tokens: Any = None
    losses: Any = None
    template: Any = "vicuna_v1"
    tie_word_embeddings: Any = False

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self.text_config = _make_text(_PUBLISHED_TEXT if self.text_config is None else self.text_config)
        self.vision = _make(VisionConfig, _or(self.vision, {"tower": {"name": "clip"}}), "vision")
        self.region = _make(RegionConfig, _or(self.region, {}), "region")
        self.mask = _make(MaskConfig, _or(self.mask, {"encoder": {"name": "sam_vit"}}), "mask")
        self.moe = None if self.moe is None else _make(MoEConfig, self.moe, "moe")
        self.tokens = _make(TokenConfig, _or(self.tokens, _PUBLISHED_TOKENS), "tokens")
        self.losses = _make(LossConfig, _or(self.losses, {}), "losses")
        if not isinstance(self.template, str):
            raise InputError(f"template must be the name of a chat template, got {self.template!r}.")
        layers = self.text_config.num_hidden_layers
        named = (self.moe.layers if self.moe else None) or []
        if len(set(named)) < len(named) or not all(0 <= i < layers for i in named):
            raise InputError(
                f"moe.layers must be different numbers from 0 to {layers - 1}, the language model's layers; "
                f"got {named}."
            )
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        own = [f.name for f in fields(self) if f.name not in _TRANSFORMERS_KEYS]
        for key, value in given.items():
            if key.startswith("_") or key in _TRANSFORMERS_KEYS:
                check_plain(key, value)
                continue
            raise InputError(str(UnknownNameError.among(f"MedPLIBConfig has no setting '{key}'.", key, own)))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration that `to_dict` wrote. Raises InputError for anything else."""
        kind = config_dict.get("model_type", "medplib") if isinstance(config_dict, dict) else "nothing"
        if kind != "medplib":
            raise InputError(
                f"This is the configuration of a {str(kind)[:40]!r} model, not of a 'medplib' model; give a "
                "folder written by MedPLIB.save_pretrained."
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except MedPLIBError:
            raise
        except Exception as error:  # whatever transformers' own checks raise, depending on the key
            raise InputError(f"The configuration cannot be used: {_reason(error)}") from error

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that hold a mixture."""
        if self.moe is None:
            return []
        every = range(self.text_config.num_hidden_layers)
        return list(every if self.moe.layers is None else self.moe.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, parts included."""
        out = super().to_dict()
        return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in out.items()}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _make(cls: type, value: Any, where: str) -> Any:
    """A dict (from JSON) or an instance -> a checked instance, nested parts included."""
    if isinstance(value, cls):
        made = value
    elif isinstance(value, dict):
        known = {f.name: f.type for f in fields(cls)}
        unknown = sorted(str(key) for key in set(value) - set(known))
        if unknown:
            raise InputError(f"{where} has no setting {', '.join(unknown)}. Known: {', '.join(known)}.")
        given = {k: _convert(known[k], v, f"{where}.{k}") for k, v in value.items()}
        try:
            made = cls(**given)
        except (StrictDataclassError, TypeError) as error:
            raise InputError(f"{where}: {_reason(error)}") from error
    else:
        raise InputError(f"{where} must be a {cls.__name__} or a dict of its fields, got {value!r:.80}.")
    if isinstance(made, Part):
        check_plain(f"{where}.args", made.args)
    return made


def _convert(wanted: Any, value: Any, where: str) -> Any:
    """What may be written more loosely: parts as dicts, whole numbers for floats, tuples for lists."""
    if wanted is Part:
        return _make(Part, value, where)
    if wanted is float and type(value) is int and abs(value) <= MAX_SIZE:
        return float(value)
    if get_origin(wanted) is list and isinstance(value, list | tuple):
        return [_convert(get_args(wanted)[0], item, where) for item in value]
    return value


def _make_text(value: Any) -> PreTrainedConfig:
    """The language model's configuration, its sizes checked before anything is built from it."""
    if not isinstance(value, PreTrainedConfig):
        if not isinstance(value, dict):
            raise InputError(f"text_config must be a configuration or a dict, got {value!r:.80}.")
        check_plain("text_config", value, limit=None)
        kind = value.get("model_type", "llama")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise InputError(
                f"text_config.model_type must be a decoder that transformers knows, such as 'llama', "
                f"'mistral' or 'qwen2'; got {kind!r:.80}."
            )
        try:
            value = CONFIG_MAPPING[kind](**{k: v for k, v in value.items() if k != "model_type"})
        except Exception as error:  # each of the many configuration classes has its own checks
            raise InputError(f"text_config: {_reason(error)}") from error
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
    ):
        size = getattr(value, name, None)
        required = name in ("num_hidden_layers", "hidden_size", "vocab_size")
        limit = MAX_COUNT if name == "num_hidden_layers" else MAX_SIZE
        if (size is not None or required) and not (type(size) is int and 1 <= size <= limit):
            raise InputError(f"text_config.{name} must be a number between 1 and {limit}, got {size!r:.80}.")
    return value


def _reason(error: BaseException) -> str:
    """The innermost message of a wrapped error, on one line."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__


AutoConfig.register("medplib", MedPLIBConfig, exist_ok=True)
