"""The recordings that these tests are held against: others than those kept here, by MEDPLIB_GOLDEN."""

import os
from pathlib import Path

import pytest
from conftest import opener


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """$MEDPLIB_GOLDEN, or the recordings kept with the tests."""
    folder = Path(os.environ.get("MEDPLIB_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")
    if not folder.is_dir():
        pytest.fail(f"No folder of recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir):
    """`golden("sam/sam.json")` gives what the file holds, `golden("sam/sam.safetensors")` its tensors."""
    return opener(golden_dir)
