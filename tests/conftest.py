"""Fixtures every test may use: the folder of recorded numbers from the published implementation."""

import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """$MEDPLIB_GOLDEN, or the recordings kept with the tests."""
    folder = Path(os.environ.get("MEDPLIB_GOLDEN") or Path(__file__).parent / "fixtures" / "golden")
    if not folder.is_dir():
        pytest.fail(f"No folder of recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir):
    """`golden("sam/sam.json")` gives what the file holds, `golden("sam/sam.safetensors")` its tensors."""

    def load(name: str) -> dict:
        if name.endswith(".json"):
            return json.loads((golden_dir / name).read_text(encoding="utf-8"))
        from safetensors.torch import load_file

        return load_file(golden_dir / name)

    return load
