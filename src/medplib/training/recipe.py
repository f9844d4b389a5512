"""Recipe: everything a training run needs, read from YAML and checked when it is made.

    recipe = load_recipe("tiny", {"stages.vqa.steps": 20, "out": "runs/mine"})

A stage is named after one of the four in medplib.stages and keeps all its values; the recipe holds only what
differs from them.
"""

# No `from __future__ import annotations` here: with it the type checks of @strict fall silent.

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from medplib.errors import InputError, UnknownNameError
from medplib.lora import LoRA
from medplib.stages import STAGES, Stage


@strict
@dataclass
class Source:
    """Records to train on. reader: "mini", or a name that `medplib.data.readers.read` knows, with its `path`,
    `split` and `options`. weight: its share among a stage's sources; None goes by its length."""

    reader: str
    path: str | None = None
    split: str | None = "train"
    weight: float | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InputError(
                f"weight must be above 0 and finite, got {self.weight}; leave the source out instead."
            )


@strict
@dataclass
class StageChanges:
    """What a stage changes of the published one, which is `base`, by default that of its own name.

    Those down to `seed` are fields of medplib.stages.Stage; {} as `lora` takes the adapters away.
    start: the model it begins with: an earlier stage, or anything MedPLIB.from_pretrained takes; by default
    the stage before it. experts: {expert: stage} makes a mixture of dense stages first; all that is no
    expert comes from the stage of "vqa" (or of the last one named), the mask side from that of "grounding".
    interpolate: the model kept lies this share of the way from the one the stage began with to the one it
    trained (WiSE-FT, Wortsman et al., CVPR 2022): less of what is new, and less of what is old forgotten.
    """

    base: str | None = None
    train: list[str] | None = None
    freeze: list[str] | None = None
    lora: dict | None = None
    loss_weights: dict | None = None
    data: list[str] | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    betas: list[float] | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    decay: str | None = None
    clip: float | None = None
    precision: str | None = None
    seed: int | None = None
    start: str | None = None
    experts: dict | None = None
    interpolate: float | None = None

    def __post_init__(self):
        if self.interpolate is not None and not 0 < self.interpolate <= 1:
            raise InputError(
                f"interpolate must be above 0 and at most 1, got {self.interpolate}; 1 keeps what trained."
            )

    def apply(self, name: str) -> Stage:
        """The Stage called `name`. Raises InputError or UnknownNameError."""
        base = self.base or name
        if base not in STAGES:
            raise UnknownNameError.among(
                f"stages.{name} is no published stage, nor is its base '{base}'; name one in base.",
                base,
                STAGES,
            )
        own = {f.name for f in fields(Stage)}
        given = {k: v for k, v in vars(self).items() if k in own and v is not None}
        if "lora" in given:
            given["lora"] = {
                part: _build(
                    LoRA,
                    {"dropout": 0.05, **_mapping(v, f"stages.{name}.lora.{part}")},
                    f"stages.{name}.lora.{part}",
                )
                for part, v in given["lora"].items()
            }
        return dataclasses.replace(STAGES[base], name=name, **given)


PUBLISHED_EXPERTS = {"grounding": "grounding", "vqa": "vqa"}


@strict
@dataclass
class Recipe:
    """A training run.

    out                  folder of the run: one folder per stage with log.jsonl, snapshots, samples, model
    stages               {name: StageChanges}, in order
    chain                names of all stages in order, where `stages` holds only those to be run now
    data, validation     {name: Source}; a stage takes those its `data` names; validation is only asked
    model, load          where it starts, and further arguments of MedPLIB.from_pretrained
    dense                a mixture as a dense start: the expert whose feed-forward blocks are taken
    mask_weights         a SAM or SAM-Med2D file for the mask side, read before the first stage
    moe                  settings of the mixture that a stage with `experts` makes, as in MoEConfig
    dtype                of the weights that do not train; those that do are float32
    micro_batch          samples per forward and device; the stage's batch_size is over all devices and
                         accumulated forwards
    samples_per_epoch    by default all records of the stage's sources together
    length_grouping      samples of like length share a forward, so that little of it is padding
    augment              arguments of medplib.data.transforms.Augmentation, {} for its defaults; None: none;
                         its transform as {name in torchvision.transforms.v2: its arguments}
    gradient_checkpointing  compute activations twice, store them once per layer
    save_steps, keep     a snapshot each so many steps; how many are kept
    log_steps, report_to a line of log.jsonl each so many steps and at the end; "tensorboard", "wandb", ...
    sample_steps, samples  each so many steps (0: never) the model answers so many validation records
    workers              data loader processes
    device               "cpu" or None for the best there is
    strategy             with several processes: "ddp" or "fsdp2"; deepspeed: its configuration file instead
    """

    out: str
    stages: dict
    data: dict
    chain: list[str] = field(default_factory=list)
    validation: dict = field(default_factory=dict)
    model: str = "medplib-tiny"
    load: dict = field(default_factory=dict)
    dense: str | None = None
    mask_weights: str | None = None
    moe: dict = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int = 1
    samples_per_epoch: int | None = None
    length_grouping: bool = True
    augment: dict | None = None
    gradient_checkpointing: bool = False
    save_steps: int = 500
    keep: int = 2
    log_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    sample_steps: int = 0
    samples: int = 4
    workers: int = 0
    device: Literal["cpu"] | None = None
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    deepspeed: str | None = None

    def __post_init__(self):
        for key, kind in (("data", Source), ("validation", Source), ("stages", StageChanges)):
            table = _mapping(getattr(self, key), key)
            made = {str(name): _build(kind, value or {}, f"{key}.{name}") for name, value in table.items()}
            setattr(self, key, made)
        for key in ("micro_batch", "save_steps", "keep", "log_steps", "samples", "samples_per_epoch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"{key} must be at least 1, got {value}.")
        for key in ("sample_steps", "workers"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} must be at least 0, got {getattr(self, key)}.")
        if not self.stages:
            raise InputError(f"stages is empty; name at least one, such as {', '.join(STAGES)}.")
        for name, changes in self.stages.items():
            for source in changes.apply(name).data:
                if changes.data is not None and source not in self.data:
                    raise UnknownNameError.among(
                        f"stages.{name}.data names '{source}', a source that data lacks.", source, self.data
                    )

    def before(self, name: str) -> list[str]:
        """The stages that come before `name`: of those run now, else of the whole chain."""
        names = list(self.stages)
        if name in names[1:] or name not in self.chain:
            return names[: names.index(name)]
        return self.chain[: self.chain.index(name)]

    def stage(self, name: str) -> Stage:
        """The stage with the recipe's changes."""
        return self.stages[name].apply(name)

    def sources(self, name: str) -> dict[str, Source]:
        """The sources of a stage. Raises InputError where it has none."""
        wanted = self.stage(name).data
        found = {key: source for key, source in self.data.items() if key in wanted}
        if not found:
            raise InputError(
                f"Stage '{name}' learns from {', '.join(wanted) or 'nothing'}, and data has only "
                f"{', '.join(self.data) or 'nothing'}; name sources of data in stages.{name}.data."
            )
        return found

    def experts(self, name: str) -> dict[str, str]:
        """{expert: stage it comes from} of a stage that begins by making a mixture, else empty."""
        changes = self.stages[name]
        if changes.experts is None:
            return (
                dict(PUBLISHED_EXPERTS) if (changes.base or name) == "mixture" and not changes.start else {}
            )
        return {str(k): str(v) for k, v in changes.experts.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Recipe(**recipe.to_dict())` is equal to it."""
        return asdict(self)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = files("medplib.training") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(
    name: str | Path, changes: Mapping[str, Any] | None = None, stages: str | None = None
) -> Recipe:
    """A shipped recipe's name or a YAML file -> Recipe.

    changes: {dotted key: value}, such as {"stages.vqa.steps": 20}; the text of a value is read as YAML.
    stages: "align,vqa" keeps these, in this order. Raises InputError or UnknownNameError, naming the key.
    """
    text = _read(name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"The recipe {str(name)!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"The recipe {str(name)!r} must be a YAML mapping such as 'model: medplib-tiny'.")
    for key, value in (changes or {}).items():
        _set(content, key, value)
    if stages is not None:
        chosen = [part.strip() for part in stages.split(",") if part.strip()]
        table = _mapping(content.get("stages"), "stages")
        for stage in chosen:
            if stage not in table:
                raise UnknownNameError.among(f"The recipe has no stage '{stage}'.", stage, table)
        make_recipe(content)  # a mistake in a stage that is left out would vanish with it
        content |= {"stages": {stage: table[stage] for stage in chosen}, "chain": list(map(str, table))}
    return make_recipe(content)


def make_recipe(content: Mapping[str, Any] | Recipe) -> Recipe:
    """A mapping as YAML gives it -> Recipe. Raises InputError naming a misspelt key or a wrong type."""
    return content if isinstance(content, Recipe) else _build(Recipe, content, "")


def read_setting(text: str) -> tuple[str, Any]:
    """ "key=value" of the command line -> (dotted key, value). Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set needs key=value, such as --set stages.vqa.steps=20; got {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: {value!r} cannot be read as a value.") from error


def _read(name: str | Path) -> str:
    if str(name) in shipped_recipes():
        return (files("medplib.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UnknownNameError.among(f"There is no recipe file {str(name)!r}.", str(name), shipped_recipes())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {str(name)!r} cannot be read: {error}.") from error


def _set(content: dict, key: str, value: Any) -> None:
    """Set a dotted key; tables on the way are made where the recipe leaves them out."""
    *path, last = key.split(".")
    place: Any = content
    for i, step in enumerate(path):
        if place.get(step) is None:
            place[step] = {}
        place = place[step]
        if not isinstance(place, dict):
            raise InputError(
                f"{key}: {'.'.join(path[: i + 1])} is {place!r:.40}, which has nothing inside to set."
            )
    if isinstance(place.get(last), dict) and not isinstance(value, dict | None):
        raise InputError(f"{key} is a table of {', '.join(map(str, place[last]))}; set one of those.")
    place[last] = copy.deepcopy(value)  # a later key may change what is inside


def _build(cls: type, value: Any, where: str) -> Any:
    """A mapping -> a checked instance of `cls`; `where` is its dotted place in the recipe."""
    if isinstance(value, cls):
        return value
    table, known = _mapping(value, where or "recipe"), {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in known:
            raise UnknownNameError.among(f"The recipe has no setting '{prefix}{key}'.", str(key), known)
    missing = [
        k
        for k, f in known.items()
        if k not in table and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where or 'The recipe'} needs {', '.join(missing)}.")
    given = {k: _number(known[k].type, v, f"{prefix}{k}") for k, v in table.items()}
    try:
        return cls(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from error
    except (StrictDataclassError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"{where or 'The recipe'}: {reason}") from error


def _number(wanted: Any, value: Any, where: str) -> Any:
    """Finite numbers, also as YAML 1.1 may leave them: 1 for 1.0, and "1e-4", which it reads as text."""
    if wanted not in (float, float | None) or type(value) not in (int, str, float):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} must be a finite number, got {value!r:.80}.")
    return number


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a table of names and values, got {value!r:.80}.")
    return value
