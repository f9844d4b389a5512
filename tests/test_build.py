"""Installing with and without compiled operators: wheels built for real, their kernels asked for their names.

CUDA is compiled by .ci/run and not here, because that takes half a minute.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from medplib import MoERouter
from medplib.ops import _build

ROOT = Path(__file__).parents[1]
HIDE_TORCH = "import sys; sys.modules['torch'] = None\n"
NO_COMPILER = {"PATH": "", "CXX": "", "CUDA_HOME": "", "CUDA_PATH": "", "MEDPLIB_BUILD_EXT": ""}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in `folder`, which does not see this checkout."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "MEDPLIB"))
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build needs, without the weights."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    hidden = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "assets")
    shutil.copytree(ROOT / "src", folder / "src", ignore=hidden)
    return folder


def build(checkout: Path, kind: str, out: Path, before: str = "", **environment: str) -> Path:
    """What `pip wheel` or a release builds, by the same call; returns the file."""
    out.mkdir(exist_ok=True)
    code = f"{before}from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = run(code, checkout, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def pure(checkout, tmp_path_factory):
    """The wheel that everybody gets, built without torch and any compiler, and where it is unpacked."""
    wheel = build(checkout, "wheel", tmp_path_factory.mktemp("pure"), HIDE_TORCH, **NO_COMPILER)
    folder = tmp_path_factory.mktemp("pure site")
    zipfile.ZipFile(wheel).extractall(folder)
    return wheel, folder


USE = """
import warnings
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    import torch
    from medplib import MoERouter, ops
    torch.manual_seed(0)
    router = MoERouter(8, experts=3, hidden_dim=16, top_k=2)
    print(float(router(torch.randn(9, 8)).double().abs().sum()))
print(ops.status()["cpu"])
print(sum("PyTorch operators" in str(w.message) for w in heard))
"""


def use(folder: Path, **environment: str) -> tuple[str, int]:
    """Run a router there: the status of the CPU kernels, and how many warnings came."""
    done = run(USE, folder, PYTHONPATH=str(folder), MEDPLIB_OPS="cpu", **NO_COMPILER, **environment)
    assert done.returncode == 0, done.stderr
    total, status, warned = done.stdout.splitlines()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        router = MoERouter(8, experts=3, hidden_dim=16, top_k=2)
        expected = float(router(torch.randn(9, 8)).detach().double().abs().sum())
    assert float(total) == pytest.approx(expected, rel=1e-5)
    return status, int(warned)


def test_plain_wheel_needs_neither_torch_nor_compiler_and_carries_the_sources(pure):
    wheel, folder = pure
    assert wheel.name.endswith("-py3-none-any.whl")
    sources = {path.name for path in (ROOT / "src/medplib/ops/csrc").iterdir()}
    assert {path.name for path in (folder / "medplib/ops/csrc").iterdir()} == sources
    assert not list(folder.rglob("*.so"))
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any("torch" in requirement for requirement in requires)  # pip would fetch a second one


def test_without_a_compiler_pytorch_runs_and_the_status_says_why(pure, tmp_path):
    status, warnings = use(pure[1], MEDPLIB_CACHE_DIR=str(tmp_path))
    assert status.startswith("PyTorch (no C++ compiler on the path")
    assert warnings == 1


@needs_compiler
def test_kernels_built_at_installation_are_used_without_a_compiler(checkout, tmp_path):
    wheel = build(checkout, "wheel", tmp_path / "wheel", MEDPLIB_BUILD_EXT="cpu")
    _, python, abi, platform = wheel.stem.rsplit("-", 3)
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    name = _build.prebuilt_name("cpu")
    assert use(site, MEDPLIB_CACHE_DIR=str(tmp_path)) == (f"compiled at installation ({name})", 0)


def test_library_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    shutil.copytree(_build.HERE / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(_build, "HERE", tmp_path)
    (tmp_path / _build.prebuilt_name("cpu")).touch()
    assert _build.prebuilt("cpu")
    (tmp_path / "csrc" / "gate.h").write_text("// edited\n")
    assert _build.prebuilt("cpu") is None


@pytest.mark.parametrize("value", ["cpu", "cuda", "1"])
def test_building_kernels_in_isolation_fails_with_the_line_that_works(checkout, value):
    code = f"{HIDE_TORCH}from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"
    done = run(code, checkout, MEDPLIB_BUILD_EXT=value)
    assert done.returncode
    first, second = done.stderr.strip().splitlines()
    assert first.startswith(f"MEDPLIB_BUILD_EXT={value} compiles against the torch that is installed")
    assert "--no-build-isolation" in second


def test_kernels_that_cannot_be_built_or_do_not_exist_end_the_installation(checkout, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = run(code, checkout, **NO_COMPILER | {"MEDPLIB_BUILD_EXT": "cpu"})
    assert done.returncode
    assert "no C++ compiler on the path" in done.stderr
    done = run(code, checkout, MEDPLIB_BUILD_EXT="gpu")
    assert done.returncode
    assert "must be cpu, cuda, 1 (both) or 0 (neither, the default); got 'gpu'." in done.stderr


def test_source_distribution_carries_the_kernels_and_how_to_build_them(checkout, tmp_path):
    archive = build(checkout, "sdist", tmp_path / "out")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {f"src/medplib/ops/csrc/{path.name}" for path in (ROOT / "src/medplib/ops/csrc").iterdir()}
    assert names >= sources | {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"}


# The one compiler command


def compiler(folder: Path, script: str) -> str:
    """A stand-in for a compiler: a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_library_is_built_once_and_found_again(tmp_path, monkeypatch):
    writes = 'while [ "$1" != -o ]; do shift; done; echo once >> "$2"; echo called >> %s/calls'
    monkeypatch.setenv("CXX", compiler(tmp_path, writes % tmp_path))
    monkeypatch.setenv("MEDPLIB_CACHE_DIR", str(tmp_path / "cache"))
    assert _build.cached("cpu") is None
    path = _build.build("cpu")
    assert path == _build.build("cpu") == _build.cached("cpu")
    assert (tmp_path / "calls").read_text() == "called\n"
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"onc", b"other\n"])
def test_library_that_was_damaged_is_compiled_again(damage, tmp_path, monkeypatch):
    writes = 'while [ "$1" != -o ]; do shift; done; echo once > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, writes))
    monkeypatch.setenv("MEDPLIB_CACHE_DIR", str(tmp_path / "cache"))
    path = _build.build("cpu")
    path.write_bytes(damage)
    assert _build.cached("cpu") is None
    assert _build.build("cpu") == path
    assert path.read_text() == "once\n"


def test_machine_without_nvcc_compiles_the_rest_and_says_so(tmp_path, monkeypatch, capsys):
    def no_nvcc():
        raise _build.BuildError("no nvcc")

    writes = 'while [ "$1" != -o ]; do shift; done; echo library > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, writes))
    monkeypatch.setenv("MEDPLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "cuda_compiler", no_nvcc)
    assert _build.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"cpu: {tmp_path}")
    assert said[1] == "cuda: not compiled: no nvcc"
    assert _build.main(["--cuda"]) == 1  # asked for by name


def test_failed_compiler_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo no such header >&2; exit 1"))
    with pytest.raises(_build.BuildError, match="no such header"):
        _build.build("cpu", folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so")) + list((tmp_path / "cache").glob("*.tmp"))


def test_spilled_registers_are_an_error(tmp_path, monkeypatch):
    says = """
        ptxas info    : Compiling entry function 'calm' for 'sm_80'
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
        ptxas info    : Compiling entry function 'full' for 'sm_90'
            8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"""
    monkeypatch.setenv("CXX", compiler(tmp_path, f"cat >&2 <<END\n{says}\nEND"))
    with pytest.raises(_build.BuildError, match=r"by full for sm_90 \(20 bytes\)$"):
        _build.build("cpu", folder=tmp_path / "cache")


def test_checked_command_compiles_every_architecture_with_warnings_as_errors(monkeypatch):
    monkeypatch.setattr(_build, "cuda_compiler", lambda: Path("nvcc"))
    command = _build.compile_command("cuda", _build.cuda_architectures(strict=True), strict=True)
    targets = [word for word in command if word.startswith("-gencode")]
    assert targets == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert command[command.index("-Werror") + 1] == "all-warnings"
    assert "-Werror" in _build.compile_command("cpu", strict=True)
    with pytest.raises(_build.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        _build.compile_command("cuda", "sm_90")
