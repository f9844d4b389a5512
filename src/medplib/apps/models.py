"""A model as the command line names it: where it runs, in which dtype, in how many bits; and its options."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from medplib.errors import InputError

ModelName = Annotated[str, typer.Option("--model", help="A known model, a folder or a Hub id.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... By default where the model is loaded.")
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16 or auto (as in the file)."),
]
Quantize = Annotated[
    str | None, typer.Option(metavar="BITS", help="int8 or int4: keep the language model in that many bits.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(metavar="auto", help="Spread the model over GPUs, CPU and disk. Not with --device."),
]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_model_options(
    device: str | None, dtype: str | None, quantize: str | None, device_map: str | None
) -> None:
    """Raise InputError for what can be refused before torch is imported."""
    if device is not None and not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", device):
        raise InputError(f"--device must be cpu, cuda, cuda:1, xpu or mps, got {device!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if quantize not in (None, "int8", "int4"):
        raise InputError(f"--quantize must be int8 or int4, got {quantize!r}.")
    if device_map not in (None, "auto"):
        raise InputError(f"--device-map must be auto, got {device_map!r}. For one device use --device.")
    if device is not None and device_map is not None:
        raise InputError("Give either --device or --device-map.")


def check_out(out: Path | None) -> None:
    """Raise InputError for a file and for what cannot be written, before the model is loaded."""
    if out is None:
        return
    folder = out.expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {str(out)!r} is a file. Give the path of a folder.")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {str(out)!r}: {str(folder)!r} cannot be written. Give another folder.")


def load_model(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    device_map: str | None = None,
) -> Any:
    """The loaded model; what quantising did is said on standard error.

    The weights go straight to the device where accelerate is installed, else through the CPU's memory. Raises
    InputError for a device that is not there and an extra that is not installed, and what `from_pretrained`
    raises.
    """
    quieten()
    from medplib import MedPLIB

    if device not in (None, "cpu"):
        _check_device(device)
        if quantize is not None or find_spec("accelerate"):
            device_map = device
    given = {"dtype": dtype, "quantize": quantize, "device_map": device_map}
    try:
        model = MedPLIB.from_pretrained(name, **{k: v for k, v in given.items() if v is not None})
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        raise InputError(str(error)) from error
    if quantize is not None:
        typer.echo(str(model.quantization), err=True)
    return model if device is None or device_map is not None else model.to(device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say that a device is missing
        reason = str(error).splitlines()[0] if str(error) else "not available"
        raise InputError(f"--device {device} cannot be used here: {reason}") from error


def quieten() -> None:
    """No progress bars, usage statistics and notes to developers, unless the environment says otherwise."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao brings one up
