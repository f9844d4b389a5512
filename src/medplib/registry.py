"""Registries: replaceable parts found by name, in this package, the caller's code or installed plugins.

    from medplib.registry import EXPERTS

    @EXPERTS.register("vesselness")
    class VesselExpert(nn.Module): ...

    MoERouter(512, experts=2, expert="vesselness", hidden_dim=1024)

Built-in names are kept as `"module:Class"` text and imported on first use, so listing them imports nothing.
An installed package adds names through the entry point group `medplib.plugins`; see `load_plugins`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from medplib.errors import InputError, UnknownNameError

PLUGIN_GROUP = "medplib.plugins"

Part = TypeVar("Part")

_plugin_lock = threading.RLock()
_plugins_tried: set[tuple[str, str]] = set()
_plugins_failed: dict[str, str] = {}


class Registry:
    """Names for the replaceable parts of one kind ("expert", "vision tower", ...).

    Every entry is a class or a function that makes the part; `build(name, *args, **kwargs)` calls it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {}  # name -> object, or "module:attribute" text not yet imported

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that adds a class or function under `name` and returns it unchanged.

        The same class or function defined again, as when a notebook's cell is run twice, takes the place of
        its former self. Raises InputError if the name is taken by another object.
        """
        self._check_name(name)

        def add(part: Part) -> Part:
            if not callable(part):
                raise InputError(f"The {self.kind} '{name}' must be a class or a function, got {part!r}.")
            known = self._entries.get(name)
            if known is not None and not _same(known, part):
                raise InputError(
                    f"The {self.kind} name '{name}' is taken by {_describe(known)}; "
                    f"choose another name for {_describe(part)}."
                )
            self._entries[name] = part
            return part

        return add

    def add_lazy(self, name: str, target: str) -> None:
        """Add `name` for the object at `target`, written "module:attribute", without importing it."""
        self._check_name(name)
        module, _, attribute = target.partition(":") if isinstance(target, str) else ("", "", "")
        if not module or not attribute:
            raise InputError(f"The {self.kind} '{name}' needs a target 'module:attribute', got {target!r}.")
        known = self._entries.get(name)
        if known is None:
            self._entries[name] = target
        elif _describe(known) != target:
            raise InputError(
                f"The {self.kind} name '{name}' is taken by {_describe(known)}; "
                f"choose another name for {target}."
            )

    def get(self, name: str) -> Any:
        """The class or function registered under `name`, imported if need be.

        Raises UnknownNameError, with the closest known name, if neither this process nor a plugin knows it.
        """
        if name not in self:
            raise UnknownNameError(self._unknown(name))
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            try:
                entry = getattr(importlib.import_module(module), attribute)
            except AttributeError as error:
                raise ImportError(
                    f"The {self.kind} '{name}' should be at {entry}, but {module} has no '{attribute}'."
                ) from error
            self._entries[name] = entry
        return entry

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Make the part called `name` from the given arguments."""
        return self.get(name)(*args, **kwargs)

    def names(self) -> list[str]:
        """All names in alphabetical order, plugins included. No built-in part is imported."""
        load_plugins()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            raise InputError(
                f"The {self.kind} is asked for by its name (a text), got {name!r}. "
                "Register it under a name first: @registry.register('part')."
            )
        if name not in self._entries:
            load_plugins()
        return name in self._entries

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(sorted(self._entries))})"

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or name != name.strip():
            raise InputError(
                f"A {self.kind} is registered under a name, as in @registry.register('part'); got {name!r}."
            )

    def _unknown(self, name: str) -> str:
        message = str(UnknownNameError.among(f"No {self.kind} named '{name}'.", name, self.names()))
        for plugin, problem in _plugins_failed.items():
            message += f" The plugin {plugin} could not be loaded ({problem})."
        return message


def load_plugins() -> None:
    """Load the installed packages that declare an entry point in the group `medplib.plugins`, each once.

    The entry point names a module, whose import registers parts through the decorators, or a function without
    arguments that registers them:

        [project.entry-points."medplib.plugins"]
        vesselness = "my_package.experts"        # or "my_package:register_parts"

    Called when a name is missed and when names are listed; packages installed since the last call are found.
    A plugin that fails is reported by a warning, and again in the error for a name that is then not found.
    """
    with _plugin_lock:
        for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
            key = (entry.name, entry.value)
            if key in _plugins_tried:
                continue
            _plugins_tried.add(key)  # before loading: a plugin may itself list names
            try:
                loaded = entry.load()
                if isinstance(loaded, types.ModuleType | type):
                    continue  # the import has run the decorators
                loaded()
            except (Exception, SystemExit) as error:
                _plugins_failed[f"{entry.name} = {entry.value}"] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"The medplib plugin {entry.name} = {entry.value} could not be loaded and is left out: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _describe(entry: Any) -> str:
    """The "module:attribute" text of an entry, imported or not."""
    if isinstance(entry, str):
        return entry
    return f"{getattr(entry, '__module__', '?')}:{getattr(entry, '__qualname__', repr(entry))}"


def _same(known: Any, part: Any) -> bool:
    """Whether `part` is the object `known`, what the text `known` points at, or `known` defined again.

    What has no name of its own within its module (a lambda, a function's local) is never defined again.
    """
    name = _describe(part)
    return known is part or (_describe(known) == name and (isinstance(known, str) or "<" not in name))


EXPERTS = Registry("expert")
GATES = Registry("gate")
PROMPT_ENCODERS = Registry("prompt encoder")
MASK_DECODERS = Registry("mask decoder")
VISION_TOWERS = Registry("vision tower")
PROJECTORS = Registry("projector")
LANGUAGE_MODELS = Registry("language model")
READERS = Registry("reader")

EXPERTS.add_lazy("swiglu", "medplib.experts.mlp:SwiGLU")
EXPERTS.add_lazy("gelu", "medplib.experts.mlp:GELUMLP")
GATES.add_lazy("topk", "medplib.experts.gate:TopKGate")
GATES.add_lazy("deepspeed", "medplib.experts.deepspeed:DeepSpeedGate")
GATES.add_lazy("expert_choice", "medplib.experts.expert_choice:ExpertChoiceGate")
PROMPT_ENCODERS.add_lazy("points", "medplib.prompts.points:PointEncoder")
PROMPT_ENCODERS.add_lazy("boxes", "medplib.prompts.boxes:BoxEncoder")
PROMPT_ENCODERS.add_lazy("masks", "medplib.prompts.masks:MaskEncoder")
PROMPT_ENCODERS.add_lazy("sam", "medplib.prompts.combined:PromptEncoder")
PROMPT_ENCODERS.add_lazy("mean", "medplib.prompts.region:RegionPooler")
PROMPT_ENCODERS.add_lazy("geometry", "medplib.prompts.region:GeometryRegionPooler")
MASK_DECODERS.add_lazy("sam", "medplib.decoders.mask_decoder:MaskDecoder")
VISION_TOWERS.add_lazy("clip", "medplib.vision.clip:CLIPTower")
VISION_TOWERS.add_lazy("timm", "medplib.vision.timm_tower:TimmTower")
VISION_TOWERS.add_lazy("timm_pyramid", "medplib.vision.timm_tower:TimmPyramid")
VISION_TOWERS.add_lazy("sam_vit", "medplib.vision.sam_vit:SamImageEncoder")
PROJECTORS.add_lazy("mlp2x_gelu", "medplib.projectors:MLPProjector")
PROJECTORS.add_lazy("pooled_mlp", "medplib.projectors:PooledMLPProjector")
LANGUAGE_MODELS.add_lazy("auto", "medplib.language:from_config")
READERS.add_lazy("mecovqa", "medplib.data.readers.mecovqa:read_mecovqa")
READERS.add_lazy("sa_med2d", "medplib.data.readers.sa_med2d:read_sa_med2d")
READERS.add_lazy("llava_med", "medplib.data.readers.llava_med:read_llava_med")
READERS.add_lazy("slake", "medplib.data.readers.slake:read_slake")
READERS.add_lazy("vqa_rad", "medplib.data.readers.vqa_tables:read_vqa_rad")
READERS.add_lazy("path_vqa", "medplib.data.readers.vqa_tables:read_path_vqa")
READERS.add_lazy("pmc_vqa", "medplib.data.readers.choices:read_pmc_vqa")
READERS.add_lazy("omnimedvqa", "medplib.data.readers.choices:read_omnimedvqa")
READERS.add_lazy("imageclef", "medplib.data.readers.imageclef:read_imageclef")
READERS.add_lazy("folder", "medplib.data.readers.folder:read_folder")
READERS.add_lazy("nnunet", "medplib.data.readers.nnunet:read_nnunet")
READERS.add_lazy("coco", "medplib.data.readers.coco:read_coco")
READERS.add_lazy("jsonl", "medplib.data.readers.jsonl:read_jsonl")
READERS.add_lazy("huggingface", "medplib.data.readers.huggingface:read_huggingface")
