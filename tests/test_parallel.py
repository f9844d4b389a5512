"""Experts spread over two processes (gloo) do what they do in one."""

import json
import subprocess
import sys
from pathlib import Path

import parallel_run
import pytest
from test_train_distributed import launch


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory):
    """{case: what failed} of each process."""
    arguments = {"model": str(tiny_folder), "out": str(tmp_path_factory.mktemp("parallel") / "model")}
    outputs = launch(arguments, script=Path(parallel_run.__file__))
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize("case", [case.__name__ for case in (*parallel_run.CASES, parallel_run.model_saved)])
def test_two_processes_do_what_one_does(found, case):
    assert [process[case] for process in found] == ["", ""]


def test_a_router_that_is_not_distributed_does_not_import_it():
    code = """
import sys, torch
from medplib.experts import MoERouter
MoERouter(8, experts=2, hidden_dim=4)(torch.randn(3, 8)).sum().backward()
assert "medplib.experts.parallel" not in sys.modules
from medplib.experts import distribute_experts
"""
    subprocess.run([sys.executable, "-c", code], check=True)
