"""The command `medplib demo`: a web page on this machine to ask about images. Needs gradio (`demo`)."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from medplib.apps.models import (
    Device,
    DeviceMap,
    DType,
    ModelName,
    Quantize,
    check_model_options,
    load_model,
)
from medplib.apps.terminal import NOTICE, errors_in_one_line, printable

_GRADIO = (6, 16)  # earlier ones have known holes


def demo(
    model: ModelName = "medplib-tiny",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
) -> None:
    """Open a web page on this machine: an image, places clicked on it, questions and answers.

    Images, questions and answers stay on this machine and are deleted when the page is closed. End it with
    Ctrl-C.
    """
    with errors_in_one_line():
        check_model_options(device, dtype, quantize, device_map)
        need_gradio()
        loaded = load_model(model, device, dtype, quantize, device_map)
        from medplib.apps.demo_page import is_local, serving

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what is open is deleted then, too
        with serving(loaded, host, port) as address:
            if not is_local(host):
                shown = printable(host)
                typer.echo(
                    f"Everybody who can reach {shown} over the network can use this; there is no log-in."
                )
            typer.echo(f"{address} (end with Ctrl-C)\n{NOTICE}")
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                typer.echo()


def need_gradio() -> None:
    """Have gradio without telemetry when it is imported. Raises ImportError if it is missing or too old."""
    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise ImportError("medplib demo needs gradio: pip install 'medplib[demo]'.") from None
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < _GRADIO:
        raise ImportError(
            f"medplib demo needs gradio {'.'.join(map(str, _GRADIO))} or newer, not {found}: "
            "pip install 'medplib[demo]'."
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
