"""The CUDA kernels run where there is no GPU: thread by thread on the CPU, by cuda_on_cpu/launch.h.

What a GPU does besides (its memory model, its rounding of exp and log, speed) is not shown here; test_cuda.py
does that where there is one. With MEDPLIB_EMULATED_ORDER=backward the threads run in the other order.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medplib.ops import _build, _trial

HERE = Path(__file__).parent
LONG = ("every_run", "finite_differences", "opcheck", "wrong_arguments")  # long here, or no matter of kernels

RUN = """
import sys
from pathlib import Path

import pytest
import torch

import medplib.ops
from medplib.ops import _loader

torch.ops.load_library(sys.argv[1])
_loader._state.paths["cpu"] = Path(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CUDA sources as a library for the CPU; wrong shifts, bounds and addresses end the process."""
    if not shutil.which("g++"):
        pytest.skip("no g++ on this machine")
    path = tmp_path_factory.mktemp("emulated") / "cuda_on_cpu.so"
    torch = _build.torch_folder()
    faults = "-fsanitize=alignment,bounds,shift,signed-integer-overflow"
    command = [
        *("g++", "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"),
        *("-shared", "-w", faults, "-fsanitize-undefined-trap-on-error"),
        f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}",
        *("-isystem", str(torch / "include"), "-I", str(_build.HERE / "csrc")),
        *("-include", str(HERE / "cuda_on_cpu" / "launch.h"), str(_build.HERE / "csrc" / "routing_cuda.cu")),
        *(f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.skipif(os.environ.get("MEDPLIB_OPS") == "cpu", reason="shown by the run without it")
def test_cuda_kernels_pass_the_tests_of_the_operators(library):
    tests = [str(HERE / "test_ops.py"), "-q", "-x", "-p", "no:cacheprovider"]
    chosen = "cpu and " + " and ".join(f"not {name}" for name in LONG)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library), *tests, "-k", chosen],
        env={**os.environ, "MEDPLIB_OPS": "off"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_cuda_kernels_pass_the_trial_before_their_first_use(library, tmp_path):
    """As on a GPU, where it decides whether they are used."""
    _trial.try_once("cpu", library, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cuda_on_cpu-cpu.tried"]
