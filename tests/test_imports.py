"""What an import costs: shown in fresh interpreters."""

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import medplib

HEAVY = (
    "torch",
    "transformers",
    "timm",
    "peft",
    "accelerate",
    "matplotlib",
    "tokenizers",
    "pydicom",
    "highdicom",
    "gradio",
)


def loaded_by(code: str) -> set[str]:
    """The heavy packages in `sys.modules` after a fresh interpreter has run `code`."""
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    script = f"{textwrap.dedent(code)}\n{report}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_medplib_imports_nothing_heavy():
    code = """
        import medplib
        assert medplib.__version__
        assert "MoERouter" in dir(medplib) and "MedPLIB" in dir(medplib)
    """
    assert loaded_by(code) == set()


@pytest.mark.parametrize("package", ["", ".data", ".experts", ".prompts", ".training"])
def test_every_public_name_is_there(package):
    module = importlib.import_module(f"medplib{package}")
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_listing_the_registries_imports_nothing_heavy():
    code = """
        import medplib
        for name in ("EXPERTS", "GATES", "PROMPT_ENCODERS", "MASK_DECODERS", "VISION_TOWERS", "PROJECTORS",
                     "LANGUAGE_MODELS"):
            assert getattr(medplib, name).names()
    """
    assert loaded_by(code) == set()


def test_prompts_need_no_torch():
    assert loaded_by("from medplib import Box, Mask, Point\nBox(0, 0, 3, 3), Point(1, 2)") == set()


def test_building_and_augmenting_data_needs_no_torch():
    code = """
        import numpy as np
        from medplib.data import Augmentation
        from medplib.data.builder import BuildSettings, OpenAIWriter, SAMed2DFolder, build_mecovqa
        import medplib.data.sheet
    """
    assert loaded_by(code) == set()


def test_letterbox_needs_no_transformers_and_no_timm():
    assert not loaded_by("from medplib import Letterbox") & {"transformers", "timm"}


def test_router_needs_torch_alone():
    code = """
        from medplib import MoERouter, Stage, collect_aux_losses, record_routing, set_stage
        import torch
        router = MoERouter(8, experts=2, hidden_dim=4)
        with record_routing(router) as trace, collect_aux_losses(router):
            router(torch.randn(3, 8)).sum().backward()
        trace.table()
        set_stage(router, Stage("gates only", train=("gates",)))
    """
    assert loaded_by(code) == {"torch"}


def test_mask_side_needs_no_transformers():
    assert "transformers" not in loaded_by(
        "from medplib import MaskDecoder, PromptEncoder, RegionPooler, TwoWayTransformer"
    )


def test_every_public_name_is_there_and_is_the_one_for_type_checkers():
    tree = ast.parse(Path(medplib.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    for_checkers = {alias.name: node.module for node in imports for alias in node.names}
    assert for_checkers == medplib._HOME
    assert set(medplib.__all__) == {*medplib._HOME, "__version__"}
    assert sorted(medplib.__all__) == sorted(set(medplib.__all__))
    for name in medplib.__all__:
        assert getattr(medplib, name) is not None


def test_version_is_that_of_the_installed_package():
    assert medplib.__version__ == importlib.metadata.version("medplib")


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MoeRouter'"):
        _ = medplib.MoeRouter
