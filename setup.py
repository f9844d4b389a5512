"""Only the opt-in that compiles the operators at installation; everything else is in pyproject.toml.

    MEDPLIB_BUILD_EXT=cpu|cuda|1 pip install --no-build-isolation --no-cache-dir .

1 stands for both. Without the variable no compiler is called, torch is not imported, and the wheel is pure.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICES = {"": (), "0": (), "cpu": ("cpu",), "cuda": ("cuda",), "1": ("cpu", "cuda")}


def wanted() -> tuple[str, ...]:
    """The kernels to compile, from the environment; ends the installation if that cannot be."""
    value = os.environ.get("MEDPLIB_BUILD_EXT", "")
    if value not in CHOICES:
        sys.exit(f"MEDPLIB_BUILD_EXT must be cpu, cuda, 1 (both) or 0 (neither, the default); got {value!r}.")
    if CHOICES[value] and importlib.util.find_spec("torch") is None:
        sys.exit(
            f"MEDPLIB_BUILD_EXT={value} compiles against the torch that is installed, which pip's build "
            f'isolation hides. Use:\n    pip install "setuptools>=77" torch && MEDPLIB_BUILD_EXT={value} '
            f"pip install --no-build-isolation --no-cache-dir ."
        )
    return CHOICES[value]


def builder():
    """src/medplib/ops/_build.py as a module, without importing medplib."""
    path = Path(__file__).parent / "src" / "medplib" / "ops" / "_build.py"
    spec = importlib.util.spec_from_file_location("medplib_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles each extension with the one command of _build.py, to the name that _build.py looks for."""

    def build_extension(self, extension: Extension) -> None:
        device = extension.name.rpartition("_C_")[2]
        build = builder()
        path = Path(self.get_ext_fullpath(extension.name))
        try:
            build.build_to(device, path)
        except build.BuildError as error:
            sys.exit(f"MEDPLIB_BUILD_EXT: the {device} kernels cannot be compiled: {error}")

    def get_ext_filename(self, name: str) -> str:
        *package, last = name.split(".")
        return os.path.join(*package, builder().prebuilt_name(last.removeprefix("_C_")))


class PlatformWheel(bdist_wheel):
    """The kernels know nothing of Python, so one wheel serves every version of it on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if devices := wanted():
    setup(
        ext_modules=[Extension(f"medplib.ops._C_{device}", sources=[]) for device in devices],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
else:
    setup()
