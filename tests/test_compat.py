"""The published evaluation's quirks: off unless asked for, and found by name."""

import pytest
from parity.recorded_model import Recorded

from medplib import UnknownNameError
from medplib.official.compat import quirks


@pytest.fixture(scope="module")
def model(golden_dir):
    return Recorded(golden_dir / "model_tiny").load()


def test_quirks_are_off_by_default_and_found_by_name():
    assert not quirks(None).choose_states
    assert not any(vars(quirks(None)).values())
    assert quirks("official").first_seg
    assert quirks(["crop"]).crop
    assert not quirks(["crop"]).threshold
    with pytest.raises(UnknownNameError, match="first_seg"):
        quirks("firstseg")


def test_an_answer_in_compat_mode_always_has_one_mask(model, pictures):
    plain = model.ask(pictures[0], "What is it?", max_new_tokens=2)
    forced = model.ask(pictures[0], "What is it?", max_new_tokens=2, compat="official")
    assert forced.text == plain.text
    assert len(forced.findings) == 1
    assert forced.findings[0].mask.shape == pictures[0].shape[:2]
