"""Loading and saving of MedPLIB: strict, offline for folders and the embedded model, and never by pickle."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from medplib.errors import CheckpointError, MedPLIBError, UnknownNameError

EMBEDDED = ("medplib-tiny",)


def resolve_model(name: str | Path) -> Path | str:
    """A known model's name, a folder or a Hub id ("owner/name") -> what transformers can load.

    Raises UnknownNameError for anything else, CheckpointError for a folder without a configuration.
    """
    text = str(name)
    if text in EMBEDDED:
        folder = Path(str(importlib.resources.files("medplib"))) / "assets" / text
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"The embedded model {text!r} is not in this installation; reinstall medplib.")
        return folder
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"The folder {text!r} holds no config.json; give one written by save_pretrained.")
        return path
    if path.exists():
        raise CheckpointError(f"{text!r} is a file; give the folder that holds config.json and the weights.")
    owner, _, repository = text.partition("/")
    if not owner or not repository or "/" in repository or text.startswith((".", "~")):
        raise UnknownNameError(
            f"No model named {text!r}. Known: {', '.join(EMBEDDED)}; or give an existing folder, "
            "or a Hub id like 'owner/name'."
        )
    return text


def weights_sha256(folder: Path) -> str:
    """One hash for all safetensors files of a folder, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class LoadingMixin:
    """`from_pretrained` and `save_pretrained` of MedPLIB."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "medplib-tiny", *args, **kwargs):
        """Load a model and its processor.

        name_or_path: "medplib-tiny" (embedded, works offline), a folder, or a Hub id. Keyword arguments are those
        of transformers (dtype, device_map, ...). Half-precision weights are loaded as fp32 unless `dtype` is
        given, because CPUs compute slowly or not at all in fp16. The model is in evaluation mode.
        Raises UnknownNameError for a name that is nothing known, CheckpointError (naming the keys) for weights
        that are missing, unexpected, misshapen, not finite or damaged, InputError for a bad configuration.
        """
        source = resolve_model(name_or_path)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = _default_dtype(source)
        try:
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        except MedPLIBError:
            raise
        except SafetensorError as error:
            raise CheckpointError(f"The weights of {str(name_or_path)!r} are damaged ({error}); copy them again.") from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"Could not load {str(name_or_path)!r}: {error}") from error
        _check_loaded(model, info, name_or_path)
        model.name = str(name_or_path)
        model.source = Path(source) if Path(source).is_dir() else None
        from medplib.processing import MedPLIBProcessor

        model.processor = MedPLIBProcessor.for_model(source, model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Write configuration, weights (safetensors) and, when there is one, the processor to a folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.processor is not None and kwargs.get("is_main_process", True):
            self.processor.save_pretrained(save_directory)

    def identity(self) -> dict[str, str]:
        """Name of the loaded model and the hash of its weight files (empty for a model made in memory)."""
        source = getattr(self, "source", None)
        if source is not None and getattr(self, "_sha256", None) is None:
            self._sha256 = weights_sha256(source)
        return {"name": getattr(self, "name", "unnamed"), "weights_sha256": getattr(self, "_sha256", None) or ""}


def _default_dtype(source: Path | str):
    config = Path(source) / "config.json"
    if config.is_file():
        try:
            saved = json.loads(config.read_text(encoding="utf-8")).get("dtype")
        except (ValueError, UnicodeDecodeError, AttributeError) as error:
            raise CheckpointError(f"{config.name} of {str(source)!r} is not readable JSON ({error}).") from error
        if saved in ("float16", "float32"):
            return torch.float32
    return "auto"


def _check_loaded(model, info: dict, name: str | Path) -> None:
    problems = [
        f"{what} {', '.join(sorted(map(str, info[key]))[:8])}{' ...' if len(info[key]) > 8 else ''} ({len(info[key])})"
        for what, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("other shape", "mismatched_keys"))
        if info.get(key)
    ]
    if problems:
        raise CheckpointError(f"The weights of {str(name)!r} do not fit its configuration: {'; '.join(problems)}.")
    if info.get("error_msgs"):
        raise CheckpointError(f"Could not load {str(name)!r}: {'; '.join(map(str, info['error_msgs']))}")
    for key, value in model.state_dict().items():
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"The weight {key!r} of {str(name)!r} holds NaN or infinity; the file is damaged.")


