"""The tensors of a published checkpoint, by name, each read only when it is needed.

safetensors files are memory-mapped; `.bin` and `.pth` files are opened with `weights_only=True`, which
refuses anything but tensors. LoRA adapters are merged while a tensor is read: W + alpha / r * B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medplib.errors import CheckpointError, is_number
from medplib.weights import shape_of

_LORA = re.compile(r"(?P<layer>.+)\.(?P<part>base_layer|lora_A|lora_B)(?:\.[^.]+)??\.(?P<kind>weight|bias)")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, an index that does not match them notwithstanding.

    All of model*.safetensors; else pytorch_model*.bin. Raises CheckpointError when there is neither, or when
    the numbered shards are not complete.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            _check_complete(files)
            return files
    raise CheckpointError(
        f"{str(folder)!r} holds neither model*.safetensors nor pytorch_model*.bin; copy the whole folder."
    )


def read_files(files: Iterable[Path]) -> dict[str, Any]:
    """{name: tensor or slice}; `value[...]` gives the tensor. Raises CheckpointError for damaged files and
    for a name that two files hold."""
    state: dict[str, Any] = {}
    for path in files:
        found = _open_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        twice = sorted(state.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{str(path)!r} holds {twice[0]!r}, and another file of its folder, too.")
        state |= found
    return state


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .bin or .pth of tensors, memory-mapped where its format allows. Never runs code from the file."""
    for mapped in (True, False):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except Exception as error:  # zip, pickle and torch each have their own errors for a damaged file
            if not mapped:
                raise CheckpointError(
                    f"{str(path)!r} is damaged, or holds more than tensors, which is refused: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
    for wrapper in ("model", "state_dict", "module"):  # SAM-Med2D, Lightning and DeepSpeed wrap their tensors
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{str(path)!r} is no dict of tensors; give a state dict.")
    return content


def merge_adapters(
    state: Mapping[str, Any], scaling: float | None, rank: int | None = None
) -> dict[str, Any]:
    """The state with every `lora_A`, `lora_B` pair merged into its `base_layer` (or plain) weight.

    scaling: alpha / r of the adapters; rank: that r, where it is known. Raises CheckpointError for half a
    pair, for shapes that do not fit, for a bias of an adapter's own, and for adapters whose scaling is not
    known.
    """
    plain: dict[str, Any] = {}
    pairs: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        found = _LORA.fullmatch(name)
        if not found:
            plain[name] = value
        elif found["part"] == "base_layer":
            plain[f"{found['layer']}.{found['kind']}"] = value
        elif found["kind"] == "bias":
            raise CheckpointError(
                f"{name!r} is a bias of the adapter's own, which is not supported: merge the adapter with "
                "peft (merge_and_unload) and load the result."
            )
        else:
            pairs.setdefault(f"{found['layer']}.weight", {})[found["part"]] = value
    for name, pair in pairs.items():
        if len(pair) < 2 or name not in plain:
            raise CheckpointError(
                f"The adapter of {name!r} is not complete; it needs lora_A, lora_B and the weight itself."
            )
        if scaling is None:
            raise CheckpointError(
                "The checkpoint holds LoRA adapters, but not their scaling: put adapter_config.json (with r "
                "and lora_alpha) beside it."
            )
        base, down, up = (shape_of(value) for value in (plain[name], pair["lora_A"], pair["lora_B"]))
        inner = down[0] if rank is None and down else rank
        if len(base) != 2 or down != [inner, base[1]] or up != [base[0], inner]:
            raise CheckpointError(
                f"The adapter of {name!r} does not fit: lora_A {down}, lora_B {up}, rank {inner} for {base}."
            )
        plain[name] = Merged(plain[name], pair["lora_A"], pair["lora_B"], scaling)
    return plain


def adapter_settings(folder: Path) -> tuple[float | None, int | None]:
    """alpha / r and r from a folder's adapter_config.json; None twice without one. Raises CheckpointError for
    a kind of adapter that is not W + alpha / r * B A with one alpha and r for all layers."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = content["r"], content["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error!r}); copy it again.") from error
    if type(rank) is not int or rank < 1 or not is_number(alpha):
        raise CheckpointError(
            f"{str(path)!r} has r {rank!r:.40} and lora_alpha {alpha!r:.40}; copy it again."
        )
    for key in ("rank_pattern", "alpha_pattern", "use_dora"):
        if content.get(key):
            raise CheckpointError(
                f"{str(path)!r} has {key} {content[key]!r:.80}, which is not supported: merge the adapter "
                "with peft (merge_and_unload) and load the result."
            )
    return (alpha / rank**0.5 if content.get("use_rslora", False) else alpha / rank), rank


@dataclass(frozen=True)
class Merged:
    """A weight with its adapter added, computed in float32 when it is read."""

    base: Any
    down: Any
    up: Any
    scaling: float

    def __getitem__(self, index: Any) -> Tensor:
        base = self.base[...]
        delta = (self.up[...].float() @ self.down[...].float()) * self.scaling
        return (base.float() + delta).to(base.dtype)[index]

    def get_shape(self) -> list[int]:
        """That of the weight."""
        return shape_of(self.base)


def _open_safetensors(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The weights {str(path)!r} are damaged ({error}); copy them again.") from error


def _check_complete(files: list[Path]) -> None:
    """`model-00001-of-00003.safetensors`: all numbers must be there."""
    numbered = [m for m in (re.search(r"-(\d+)-of-(\d+)\.", path.name) for path in files) if m]
    if not numbered:
        return
    wanted = {(number, int(m[2])) for m in numbered[:1] for number in range(1, int(m[2]) + 1)}
    found = {(int(m[1]), int(m[2])) for m in numbered}
    if lacking := sorted(number for number, _ in wanted - found):
        raise CheckpointError(
            f"{str(files[0].parent)!r} lacks shard {', '.join(map(str, lacking))} of {numbered[0][2]}; "
            "copy it again."
        )
