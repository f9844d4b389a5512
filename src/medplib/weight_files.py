"""The weight files of a folder: there, readable, unchanged since they were saved; their hashes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from medplib.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = (
    "weights.sha256"  # as `sha256sum` writes it; `sha256sum -c weights.sha256` checks a folder by hand
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weights_sha256(folder: Path) -> str:
    """One hash for all safetensors files of a folder, in order of their names."""
    return sha256_of(*sorted(folder.glob("*.safetensors")))


def check_files(folder: Path, layers: int) -> None:
    """What can be seen before building: files there, readable, unchanged, and as many layers as named.

    layers: of the language model. Raises CheckpointError, naming the file.
    """
    files = _weight_files(folder)
    keys: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                keys += file.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"The weights {str(path)!r} are damaged ({error}); copy them again."
            ) from error
    found = {
        int(m[1]) for m in (re.match(r"language_model\.(?:\w+\.)*?layers\.(\d+)\.", key) for key in keys) if m
    }
    if found and max(found) + 1 != layers:
        raise CheckpointError(
            f"config.json of {str(folder)!r} says text_config.num_hidden_layers is {layers}, but its "
            f"weights have {max(found) + 1} layers; they do not belong together."
        )
    _check_sums(folder, files)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. CheckpointError, with a remedy where there are pickles only."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{str(folder)!r} holds its weights only as {', '.join(pickles[:3])}: a pickle, which can "
                "run any code "
                "when it is loaded. Convert it where you trust it: safetensors.torch.save_file(torch.load("
                f"{pickles[0]!r}, weights_only=True), {WEIGHTS!r})."
            )
        raise CheckpointError(
            f"{str(folder)!r} holds no {WEIGHTS}; copy the whole folder, or save the model again."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(index)!r} is damaged ({error!r}); copy it again.") from error
    for name, path in zip(names, files, strict=True):
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                f"{str(index)!r} names the file {name!r}, which is not in the folder; copy it again."
            )
    return files


def _check_sums(folder: Path, files: list[Path]) -> None:
    """Compare with the checksums that save_pretrained wrote; folders from elsewhere may have none."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return
    lines = re.findall(r"^([0-9a-f]{64}) [ *](\S+)$", sums.read_text("utf-8", "replace"), re.MULTILINE)
    wanted = {name: digest for digest, name in lines}
    for path in files:
        if wanted.get(path.name) != sha256_of(path):
            raise CheckpointError(
                f"{str(path)!r} is not the file that was saved: its SHA-256 differs from {CHECKSUMS}. Copy "
                f"it again, or delete {CHECKSUMS} if you changed the weights on purpose."
            )


def sha256_of(*paths: Path) -> str:
    """One hash over the bytes of these files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
