"""Decides which kernels run, and can say why: the compiled ones if there are any, the PyTorch ones otherwise.

Nothing here raises for want of a compiler or a device. The variable MEDPLIB_OPS chooses:

    auto      (default) CUDA kernels at the first use on a GPU, compiled then if need be; PyTorch on the CPU
    cpu       the same, and the C++ kernels on the CPU, from the import on
    prebuilt  like auto, but never calls a compiler
    off       PyTorch everywhere

Before CUDA kernels are used on a kind of GPU for the first time, a process of its own compares each with
PyTorch's operator (`_trial.py`); if one differs, PyTorch's run and `status()` says why.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from medplib.errors import InputError

MODES = ("auto", "cpu", "prebuilt", "off")
DEVICES = ("cpu", "cuda")


@dataclass
class _State:
    """What has been loaded: path by device, and for the other devices why not."""

    paths: dict[str, Path] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


_state = _State()


def mode() -> str:
    """The value of MEDPLIB_OPS, checked."""
    value = os.environ.get("MEDPLIB_OPS") or "auto"
    if value not in MODES:
        raise InputError(f"MEDPLIB_OPS must be one of {', '.join(MODES)}; got {value!r}.")
    return value


def loaded(device: str) -> bool:
    """Whether compiled kernels run on "cpu" or "cuda"."""
    return device in _state.paths


def may_load(device: str) -> bool:
    """Whether loading has not been tried yet."""
    return device not in _state.paths and device not in _state.reasons


def load(device: str) -> bool:
    """Load the compiled kernels for "cpu" or "cuda", building them if that is allowed; True if they run now.

    Tried once per process. A failure is one warning and a reason in `status()`.
    """
    if device not in DEVICES:
        raise InputError(f"Compiled kernels exist for {' and '.join(DEVICES)}, not for {device!r}.")
    if may_load(device):
        try:
            _load(device)
        except (OSError, RuntimeError) as error:  # no compiler, no permission, a library that does not fit
            _state.reasons[device] = " ".join(str(error).split())
            warnings.warn(
                f"medplib runs its PyTorch operators on {device}, because the compiled ones could not be "
                f"loaded: {_state.reasons[device][:500]}",
                stacklevel=2,
            )
    return loaded(device)


def _load(device: str) -> None:
    import torch  # before the library, which needs those of torch

    from medplib.ops import _build

    if mode() == "off":
        _state.reasons[device] = "MEDPLIB_OPS is off"
        return
    path = _build.prebuilt(device) or _build.cached(device)
    if path is None:
        if mode() == "prebuilt":
            _state.reasons[device] = "no library was built ahead of time (MEDPLIB_OPS=prebuilt)"
            return
        path = _build.build(device)
    if device == "cuda":
        from medplib.ops._trial import try_once

        try_once(device, path, _build.cache_folder())
    torch.ops.load_library(path)
    if not _state.paths:
        from medplib.ops.library import count_operations

        count_operations()
    _state.paths[device] = path


def status() -> dict[str, str]:
    """Which kernels run on each device, and why: {"cpu": "PyTorch (...)", "cuda": "compiled (...)"}."""
    return {device: _describe(device) for device in DEVICES}


def _describe(device: str) -> str:
    if loaded(device):
        path = _state.paths[device]
        when = "at installation" if path.parent == Path(__file__).parent else "on this machine"
        return f"compiled {when} ({path.name})"
    if device in _state.reasons:
        return f"PyTorch ({_state.reasons[device]})"
    if device == "cpu":
        return "PyTorch (MEDPLIB_OPS=cpu takes the C++ kernels)"
    if mode() == "off":
        return "PyTorch (MEDPLIB_OPS is off)"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch (no CUDA device)"
    return "not used yet; the first use loads the CUDA kernels, compiling them if need be"
