"""Compiles the operators of csrc/ with one compiler command, once per content, into a cache.

    python -m medplib.ops._build               compile for this machine: the CPU, and CUDA if there is nvcc
    python -m medplib.ops._build --cpu         the C++ kernels alone (--cuda: the CUDA kernels alone)
    python -m medplib.ops._build --check       every architecture, warnings and spilled registers are errors,
                                               then load the result

The cache is $MEDPLIB_CACHE_DIR, by default ~/.cache/medplib. Honoured as elsewhere: CXX, CUDA_HOME,
CUDA_PATH, TORCH_CUDA_ARCH_LIST. The sources use the stable interface of libtorch alone, so they compile in
seconds and serve torch 2.11 and all that follow. At the top nothing of medplib is imported, because setup.py
uses this file too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {"cpu": "routing_cpu.cpp", "cuda": "routing_cuda.cu"}
CHECKED_ARCHITECTURES = "8.0;9.0+PTX"
TORCH_TARGET = "0x020a000000000000"  # the interface of torch 2.10, which newer ones keep
COMMON = ("-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-shared")
STALE = 3600.0  # seconds after which an unfinished file was left by a process that died


class BuildError(RuntimeError):
    """The operators cannot be compiled here; the message says why."""


def build(device: str, *, strict: bool = False, folder: Path | None = None) -> Path:
    """Compile the kernels for "cpu" or "cuda", or find them compiled; returns the library.

    `strict` takes every architecture of CI and makes warnings errors; `folder` replaces the cache. Processes
    that want the same library wait for one another; a process that dies leaves nothing that is half written.
    """
    architectures = cuda_architectures(strict) if device == "cuda" else ""
    folder = folder or cache_folder()
    path = folder / _name(device, architectures, strict)
    if is_whole(path):
        return path
    command = compile_command(device, architectures, strict)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not is_whole(path):
            _sweep(folder)
            _compile(command, path)
            path.with_suffix(".sha256").write_text(_sum(path))
    return path


def is_whole(path: Path) -> bool:
    """Whether a library is there as it was compiled; loading one that was cut short can end the process."""
    try:
        return path.with_suffix(".sha256").read_text() == _sum(path)
    except (OSError, ValueError):
        return False


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_to(device: str, path: Path) -> None:
    """Compile the kernels for "cpu" or "cuda" to this very file; for an installation (setup.py)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _compile(compile_command(device, cuda_architectures() if device == "cuda" else ""), path)


def cached(device: str) -> Path | None:
    """What `build` compiled earlier for this machine, if anything; calls no compiler."""
    try:
        architectures = cuda_architectures() if device == "cuda" else ""
    except BuildError:
        return None
    path = cache_folder() / _name(device, architectures)
    return path if is_whole(path) else None


def prebuilt(device: str) -> Path | None:
    """What was compiled at installation from the very sources that lie here, if anything."""
    path = HERE / prebuilt_name(device)
    return path if path.is_file() else None


def prebuilt_name(device: str) -> str:
    """The file that an installation with MEDPLIB_BUILD_EXT puts beside this one."""
    return f"_C_{device}_{_sources_hash()[:12]}.so"


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    chosen = os.environ.get("MEDPLIB_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medplib"


def compile_command(device: str, architectures: str = "", strict: bool = False) -> list[str]:
    """The one compiler command, without its output."""
    torch = torch_folder()
    source = [str(HERE / "csrc" / SOURCES[device]), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    headers = ["-isystem", str(torch / "include")]
    if device == "cpu":
        warnings = ["-Wall", "-Wextra", *(["-Werror"] if strict else [])]
        flags = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *warnings]
        return [*cxx_compiler(), *COMMON, *flags, *headers, *source]
    checks = ["-Werror", "all-warnings", "-Xptxas", "-v"] if strict else []
    warnings = ["-Xcompiler", "-Wall,-Wextra", *checks]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", "--threads", "0"]
    targets = [f"-gencode=arch=compute_{v},code={kind}_{v}" for v, kind in _targets(architectures)]
    flags = ["-DUSE_CUDA", *host, *warnings, *targets]
    return [str(cuda_compiler()), *COMMON, *flags, *headers, *source, "-ltorch_cuda"]


def _targets(architectures: str) -> Iterator[tuple[str, str]]:
    """ "8.0;9.0+PTX" -> ("80", "sm"), ("90", "sm"), ("90", "compute")."""
    for word in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", word)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {architectures!r}")
        version = match[1] + match[2]
        yield version, "sm"
        if match[3]:
            yield version, "compute"


def cuda_architectures(strict: bool = False) -> str:
    """What to compile for: all of CI's, else TORCH_CUDA_ARCH_LIST, else the GPUs that are here."""
    if strict:
        return CHECKED_ARCHITECTURES
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    import torch

    if not torch.cuda.is_available():
        return CHECKED_ARCHITECTURES
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def cxx_compiler() -> list[str]:
    """$CXX, or the first of c++, g++ and clang++ on the path."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler on the path (set CXX, or install g++)")


def cuda_compiler() -> Path:
    """nvcc in $CUDA_HOME or $CUDA_PATH, on the path, or installed by pip; of the CUDA version of torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home, "bin", "nvcc") for home in homes if home]
    if found := shutil.which("nvcc"):
        places.append(Path(found))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    places.extend(sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvcc")))
    for place in places:
        if place.is_file():
            _check_cuda_version(place)
            return place
    raise BuildError('no nvcc (set CUDA_HOME, or pip install "nvidia-cuda-nvcc")')


def _check_cuda_version(nvcc: Path) -> None:
    import torch

    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError("this torch was built without CUDA")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)", text)
    if not match or match[1] != wanted.split(".")[0]:
        got = match[1] if match else "unknown"
        raise BuildError(f"{nvcc} is of CUDA {got}, but torch needs CUDA {wanted.split('.')[0]}")


def torch_folder() -> Path:
    """Where torch is installed; it is not imported for that."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError("torch is not installed in the environment that compiles the operators")
    return Path(found.origin).parent


def _name(device: str, architectures: str, strict: bool = False) -> str:
    """A file name that changes with all that decides what the library does."""
    import torch

    parts = [
        _sources_hash(), torch.__version__, str(torch.version.cuda), architectures, str(strict),
        platform.machine(), sys.platform, *COMMON, Path(__file__).read_text(encoding="utf-8"),
    ]  # fmt: skip
    return f"{device}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted((HERE / "csrc").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError(f"operators are compiled on Linux only, not on {sys.platform}") from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that were killed while compiling."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _compile(command: Sequence[str], path: Path) -> None:
    """Run the command and put its output in place in one step. Raises BuildError, also if a kernel spills."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        output = (done.stderr or done.stdout).strip()
        if done.returncode:
            raise BuildError(f"the compiler failed ({shlex.join(command)}):\n{output[-4000:]}")
        if spilled := spilling(output):
            raise BuildError(f"registers are spilled to memory by {', '.join(spilled)}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def spilling(output: str) -> list[str]:
    """The kernels that spill registers, from what `ptxas -v` says: "NAME for sm_90 (8 bytes)"."""
    found, kernel = [], "?"
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = f"{match[1]} for {match[2]}"
        match = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if match and (size := int(match[1]) + int(match[2])):
            found.append(f"{kernel} ({size} bytes)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medplib.ops._build", description="Compile the operators."
    )
    parser.add_argument("--cpu", action="store_true", help="the C++ kernels")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels")
    parser.add_argument(
        "--check", action="store_true", help="warnings and spills are errors; load the result"
    )
    options = parser.parse_args(arguments)
    devices = [device for device in SOURCES if getattr(options, device)]
    failed = False
    for device in devices or SOURCES:
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = build(device, strict=options.check, folder=Path(folder) if options.check else None)
                if options.check:
                    _load(path)
        except (BuildError, OSError) as error:
            failed |= bool(devices) or device == "cpu"  # without being asked for, CUDA may be absent
            sys.stdout.write(f"{device}: not compiled: {error}\n")
        else:
            place = "checked" if options.check else str(path)
            sys.stdout.write(f"{device}: {place} ({time.monotonic() - begin:.1f} s)\n")
    return int(failed)


def _load(path: Path) -> None:
    """Load a library into this process, beside torch and the operators' schemas."""
    import torch

    import medplib.ops.library  # noqa: F401  defines the schemas

    torch.ops.load_library(path)


if __name__ == "__main__":
    sys.exit(main())
