"""A model's folder: the embedded one, one on this disk, or one that the Hub gives; and its config.json."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from medplib.configuration import MedPLIBConfig
from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.weight_files import CHECKSUMS

EMBEDDED = ("medplib-tiny",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CHECKSUMS)  # nothing that is a pickle


def resolve_model(name: str | Path) -> Path | str:
    """A known model's name, a folder or a Hub id ("owner/name") -> a folder, or the Hub id itself.

    Raises UnknownNameError for anything else, CheckpointError for a folder without a configuration.
    """
    text = str(name)
    if text in EMBEDDED:
        folder = Path(str(importlib.resources.files("medplib"))) / "assets" / text
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"The embedded model {text!r} is not in this installation; reinstall medplib."
            )
        return folder
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, an unknown home folder
        is_folder = exists = False
    if is_folder:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"The folder {text!r} holds no config.json; give one written by save_pretrained."
            )
        return path
    if exists:
        raise CheckpointError(f"{text!r} is a file; give the folder that holds config.json and the weights.")
    if not _HUB_ID.fullmatch(text):
        known = UnknownNameError.among(f"No model named {text[:200]!r}.", text[:200], EMBEDDED)
        raise UnknownNameError(f"{known} Or give an existing folder, or a Hub id like 'owner/name'.")
    return text


def local_folder(name: str | Path, patterns: Sequence[str] = HUB_FILES, **hub_arguments) -> Path:
    """The folder of a model; a Hub id is downloaded first (safetensors and text files only, no pickles).

    patterns: the files to download. hub_arguments: revision, token, cache_dir, force_download,
    local_files_only, and subfolder (of a folder, too). Raises as `resolve_model`, and CheckpointError where
    the download fails.
    """
    subfolder = hub_arguments.pop("subfolder", None)
    source = resolve_model(name)
    if isinstance(source, str):
        try:
            source = Path(snapshot_download(source, allow_patterns=list(patterns), **hub_arguments))
        except Exception as error:  # the many ways in which a network can fail
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"There is no folder {str(name)!r}, and it could not be loaded from the Hugging Face Hub: "
                f"{reason[0][:300].rstrip('.')}. Check the name, or give a folder."
            ) from error
    return source / subfolder if subfolder else source


def read_config(folder: Path, **changes) -> MedPLIBConfig:
    """The configuration in a folder. CheckpointError if it is no JSON object, InputError for its content."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"config.json of {str(folder)!r} cannot be read as JSON ({error}); copy it again."
        ) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(
            f"config.json of {str(folder)!r} is not a model's configuration; copy it again."
        )
    for where in (content, content.get("text_config")):
        if isinstance(where, dict) and where.get("quantization_config") is not None:
            raise InputError(
                f"config.json of {str(folder)!r} has a quantization_config; remove it, and quantise plain "
                "weights while they are loaded, with quantize=."
            )
    try:
        config = MedPLIBConfig.from_dict({**content, **changes})
    except InputError as error:
        raise InputError(f"config.json of {str(folder)!r}: {error}") from error
    config.name_or_path = str(folder)
    return config
