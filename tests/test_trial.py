"""The trial of compiled kernels: what is wrong, or crashes, or is no library, is not used."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from medplib.ops import _loader, _trial, library, reference


def test_covers_every_operator_and_finds_nothing_where_nothing_is_wrong():
    called = {name for shape in _trial.SHAPES for name, _ in _trial._calls(shape, torch.float32)}
    assert called >= set(library.SCHEMAS) - {"gate_logits_backward", *library.ONLY_REFERENCE}
    assert list(_trial.differences("cpu")) == []


@pytest.mark.parametrize("name", ["plan", "combine", "swiglu", "gate"])
def test_an_operator_that_differs_is_named(name, monkeypatch):
    meaning = getattr(reference, name)

    def other(*arguments):
        given = meaning(*arguments)
        return given.neg() if isinstance(given, torch.Tensor) else (given[0] + 1, *given[1:])

    monkeypatch.setattr(reference, name, other)
    first = next(_trial.differences("cpu"))
    assert first.startswith(f"{name}, result 0, at T D H E K (1, 64, 96, 2, 1) in torch.float32")


def test_a_library_that_fails_leaves_pytorch_in_charge_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(_loader, "_state", _loader._State())
    monkeypatch.delenv("MEDPLIB_OPS", raising=False)
    monkeypatch.setenv("MEDPLIB_CACHE_DIR", str(tmp_path))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr("medplib.ops._build.prebuilt", lambda device: broken)
    monkeypatch.setattr(_trial, "_hardware", lambda device: "sm90")
    with pytest.warns(UserWarning, match="PyTorch operators on cuda.*failed when tried"):
        assert not _loader.load("cuda")
    assert "failed when tried" in _loader.status()["cuda"]
    assert not list(tmp_path.glob("*.tried"))


def test_a_library_that_passed_is_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "kernels-cpu.tried").touch()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("tried again"))
    _trial.try_once("cpu", Path("kernels.so"), tmp_path)


def test_a_library_that_passed_is_used_where_no_mark_can_be_left(tmp_path, monkeypatch):
    passed = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: passed)
    (tmp_path / "file").touch()
    _trial.try_once("cpu", Path("kernels.so"), tmp_path / "file")


def test_the_trial_finds_the_package_where_this_process_found_it(tmp_path, monkeypatch):
    given = {}

    def listen(command, env, **_):
        given.update(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", listen)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    _trial.try_once("cpu", Path("kernels.so"), tmp_path)
    assert str(tmp_path / "elsewhere") in given["PYTHONPATH"].split(os.pathsep)
