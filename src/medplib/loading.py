"""Loading and saving of MedPLIB: strict, offline for folders and the embedded model, and never by pickle."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from medplib.configuration import MedPLIBConfig
from medplib.errors import CheckpointError, InputError, MedPLIBError
from medplib.experts.context import named_routers
from medplib.experts.packing import pack_mixtures
from medplib.lora import lora_layers
from medplib.model_folder import HUB_ARGUMENTS, HUB_FILES, local_folder, read_config, resolve_model
from medplib.placement import compute_device, keep_parts_whole
from medplib.quantization import stored
from medplib.weight_files import CHECKSUMS, check_files, sha256_of, weights_sha256
from medplib.weights import shorten

_SETTINGS = {"text_config", "vision", "region", "mask", "moe", "tokens", "losses", "template"}
# Of a folder's generation_config.json; another way of decoding is the caller's to choose.
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p")
_quiet_lock = threading.RLock()


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of MedPLIB."""

    quantization = None  # a QuantizationReport after from_pretrained(..., quantize=...)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "medplib-tiny", *args, **kwargs):
        """Load a model and its processor.

        name_or_path: "medplib-tiny" (embedded, works offline), a folder, or a Hub id. Keyword arguments are
        those of transformers (dtype, device_map, ...). Half-precision weights are loaded as fp32 unless
        `dtype` is given, because CPUs compute slowly or not at all in fp16. The model is in evaluation mode.

        The published layout of MedPLIB (and of LLaVA) is recognised by its config.json; see
        medplib.checkpoints. For it there are `overrides`, the sizes that its configuration lacks ({"sam":
        {...}, "clip": {...}}, by default the published ones), `clip`, a folder or Hub id of the CLIP tower
        where the weights lack it, and `adapter`, a folder with a LoRA adapter to merge.

        Of a generation_config.json only do_sample, temperature, top_k, top_p and the ids of special tokens
        are taken.

        quantize: "int8" or "int4" keeps the language model's linear layers in that many bits, made while they
        are loaded; `model.quantization` reports it (medplib.quantization; extra `quant`). device_map: "cpu",
        "cuda", "auto" or a place for each part, "disk" among them (extra `train`). Without it the model is on
        the CPU; `model.to("cuda")` moves it.

        Raises UnknownNameError for a name that is nothing known, CheckpointError (naming the keys) for
        weights that are missing, unexpected, misshapen, not finite or damaged, InputError for a bad
        configuration or setting, ImportError without an extra that is needed.
        """
        from medplib import checkpoints, quantization
        from medplib.processing import MedPLIBProcessor

        if "device" in kwargs:
            place = str(kwargs["device"])
            raise InputError(
                f"from_pretrained takes no device; call .to({place!r}) on the model, or give "
                f"device_map={place!r} (extra `train`)."
            )
        hub = {k: kwargs.pop(k) for k in (*HUB_ARGUMENTS, "subfolder") if kwargs.get(k) is not None}
        foreign = {k: kwargs.pop(k) for k in ("overrides", "clip", "adapter") if k in kwargs}
        folder, official = _locate(name_or_path, hub, foreign)
        wants_info, quantize = kwargs.pop("output_loading_info", False), kwargs.pop("quantize", None)
        config = _config_of(folder, foreign.pop("overrides", None), kwargs, official)
        if quantize is not None:
            chosen = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
            kwargs |= {} if chosen is None else {"dtype": chosen}
            kwargs |= quantization.loading_options(quantize, config, kwargs.get("device_map"), chosen)
        if official:
            kwargs["state_dict"] = checkpoints.official_state(folder, config, **foreign, hub=hub)
        elif (folder / "adapter_config.json").is_file():  # transformers would load the model it names instead
            raise CheckpointError(
                f"{str(folder)!r} holds an adapter_config.json, which is for published layouts; remove it."
            )
        elif kwargs.get("state_dict") is None and kwargs.get("variant") is None:
            check_files(folder, config.text_config.num_hidden_layers)
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.float32 if config.dtype in (torch.float16, torch.float32) else "auto"
        kwargs |= {
            "use_safetensors": True,
            "trust_remote_code": False,
            "local_files_only": True,
            "config": config,
        }
        if official and kwargs.get("dtype") == "auto":
            kwargs["dtype"] = config.dtype
        kwargs["ignore_mismatched_sizes"] = True  # for their names; _check_loaded refuses them
        try:
            with _quiet():
                place = None if official else folder  # transformers takes a folder or a state dict
                model, info = super().from_pretrained(place, *args, output_loading_info=True, **kwargs)
        except (MedPLIBError, ImportError):
            raise
        except Exception as error:  # transformers has no type of its own for what is wrong with a checkpoint
            reason = " ".join(str(error).split())[:1000] or type(error).__name__
            raise CheckpointError(f"Could not load {str(name_or_path)!r}: {reason}") from error
        keep_parts_whole(model)
        _check_loaded(model, info, name_or_path)
        pack_mixtures(model)
        kept = {name: getattr(model.generation_config, name) for name in _GENERATION}
        model.generation_config = GenerationConfig(**kept)
        model.quantization = None if quantize is None else quantization.report(model, quantize)
        model.name = str(name_or_path)
        model.source = folder
        model.processor = MedPLIBProcessor.for_model(folder, model)
        return (model, info) if wants_info else model

    def _apply(self, *args: Any, **kwargs: Any):
        """Move or cast everything (called by .to() and the like)."""
        moved = super()._apply(*args, **kwargs)
        pack_mixtures(self)
        return moved

    @property
    def device(self) -> torch.device:
        """Where inputs go, also when device_map has spread the parts."""
        return compute_device(self) or super().device

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Write configuration, weights (safetensors), their checksums and, when there is one, the processor.

        To upload a model use `push_to_hub`, which also takes the processor along.
        """
        if self.quantization is not None:
            raise InputError("A quantised model is not saved; save the plain one and quantise on loading.")
        if kwargs.pop("push_to_hub", False):
            raise InputError("save_pretrained does not upload; call model.push_to_hub('owner/name') instead.")
        if "state_dict" not in kwargs and any(r.exchange is not None for r in named_routers(self).values()):
            raise InputError(
                "Other processes hold some of the experts; give state_dict=gathered_state_dict(model)."
            )
        if "state_dict" not in kwargs and lora_layers(self):
            raise InputError(
                "The model carries LoRA layers, which from_pretrained does not read; call "
                "medplib.stages.merge_lora(model) first."
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise InputError(f"{str(save_directory)!r} is a file; give the path of a folder to save to.")
        with _quiet():
            super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            if self.processor is not None:
                self.processor.save_pretrained(save_directory)
            weights = sorted(folder.glob("model*.safetensors"))
            for path in weights:  # safetensors 0.8 gives them to their owner alone
                shutil.copymode(folder / "config.json", path)
            lines = [f"{sha256_of(path)}  {path.name}\n" for path in weights]
            # Last of all: until then the checksums of an earlier save reveal one that was interrupted.
            (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")

    def identity(self) -> dict[str, str]:
        """Name of the loaded model and the hash of its weight files (empty for a model made in memory)."""
        source = getattr(self, "source", None)
        if source is not None and getattr(self, "_sha256", None) is None:
            self._sha256 = weights_sha256(source)
        digest = getattr(self, "_sha256", None) or ""
        known = {"name": getattr(self, "name", "unnamed"), "weights_sha256": digest}
        return known | ({} if self.quantization is None else {"quantized": self.quantization.kind})


def _locate(name: str | Path, hub: Mapping[str, Any], foreign: dict[str, Any]) -> tuple[Path, bool]:
    """The folder of a model, and whether it is in a published layout. `foreign` are the arguments for such a
    one, to which the place of the CLIP tower is added where the Hub keeps it apart."""
    from medplib import checkpoints

    folder = local_folder(name, **hub)
    official = checkpoints.holds_official(folder)
    if official and isinstance(resolve_model(name), str):  # from the Hub
        if not any(folder.glob("*.safetensors")):
            folder = local_folder(name, (*HUB_FILES, "pytorch_model*.bin"), **hub)
        foreign.setdefault("clip", checkpoints.published_clip(folder))
    if foreign and not official:
        read_config(folder)  # what cannot be read is neither
        raise InputError(f"{', '.join(foreign)} is for published layouts; {str(name)!r} is ours.")
    return folder, official


def _config_of(folder: Path, overrides: Any, kwargs: dict[str, Any], official: bool) -> MedPLIBConfig:
    """The configuration among `kwargs`, or the folder's with the settings among them; they are taken out."""
    from medplib import checkpoints

    config = kwargs.pop("config", None)
    if config is None:
        settings = {k: kwargs.pop(k) for k in _SETTINGS & set(kwargs)}
        if official:
            return checkpoints.official_config(folder, overrides, **settings)
        return read_config(folder, **settings)
    if not isinstance(config, MedPLIBConfig):
        raise InputError(f"config must be a MedPLIBConfig, got {type(config).__name__}.")
    return config


def _check_loaded(model, info: dict, name: str | Path) -> None:
    problems = [
        f"{what} {shorten(sorted(map(_key_name, info[key])))}"
        for what, key in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("other shape", "mismatched_keys"),
        )
        if info.get(key)
    ]
    if problems:
        raise CheckpointError(
            f"The weights of {str(name)!r} do not fit its configuration: {'; '.join(problems)}."
        )
    if info.get("error_msgs"):
        raise CheckpointError(f"Could not load {str(name)!r}: {'; '.join(map(str, info['error_msgs']))}")
    for key, value in model.state_dict().items():
        if not _is_finite(value):
            raise CheckpointError(
                f"The weight {key!r} of {str(name)!r} holds NaN or infinity; the file is damaged."
            )


def _is_finite(value: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity, found without a copy; what was not read counts as finite."""
    parts = stored(value)
    if len(parts) > 1:  # quantised
        return all(map(_is_finite, parts))
    if not value.is_floating_point() or value.device.type == "meta" or not value.numel():
        return True
    value = value.float() if value.itemsize == 1 else value  # 8-bit floats cannot be compared
    return bool(torch.stack(value.aminmax()).isfinite().all())  # of a NaN, both are NaN


def _key_name(key: Any) -> str:
    """transformers gives the misshapen keys as (name, shape in the file, shape in the model)."""
    return f"{key[0]} {tuple(key[1])} for {tuple(key[2])}" if isinstance(key, tuple) else str(key)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report from transformers: what is wrong becomes an error of ours."""
    with _quiet_lock:
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        if level <= logging.INFO:  # somebody wants to see everything
            yield
            return
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
