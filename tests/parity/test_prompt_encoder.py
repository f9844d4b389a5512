"""PromptEncoder against the published SAM-Med2D prompt encoder."""

import pytest
import torch

from medplib.prompts.combined import SAM_NAMES, PromptEncoder

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def facts(golden):
    return golden("sam/sam.json")


@pytest.fixture(scope="module")
def tensors(golden):
    return golden("sam/sam.safetensors")


@pytest.fixture(scope="module")
def encoder(facts, tensors):
    dims = facts["dims"]
    side = dims["image_size"] // dims["patch_size"]
    encoder = PromptEncoder(
        dims["prompt_dim"],
        grid_size=(side, side),
        image_size=(dims["image_size"], dims["image_size"]),
        mask_channels=dims["mask_in_chans"],
    )
    return encoder.load_sam_state_dict(tensors, prefix="w.prompt_encoder.").eval()


def test_every_recorded_mix_of_prompts_gives_the_recorded_embeddings(facts, tensors, encoder):
    assert facts["prompt_cases"]
    for name, case in facts["prompt_cases"].items():
        given = {kind: tensors[f"prompt.in.{kind}"] for kind in ("boxes", "masks") if case[kind]}
        if case["points"]:
            given["points"] = (tensors["prompt.in.points"], tensors["prompt.in.labels"])
        if case["text"]:
            given["text"] = tensors[f"prompt.in.{case['text']}"]
        with torch.no_grad():
            sparse, dense = encoder(**given)
        assert [*sparse.shape] == case["sparse"], name
        assert [*dense.shape] == case["dense"], name
        recorded = tensors[f"prompt.{name}.dense"].expand(dense.shape)  # constant maps are stored as 1 x 1
        torch.testing.assert_close(sparse, tensors[f"prompt.{name}.sparse"], **CLOSE)
        torch.testing.assert_close(dense, recorded, **CLOSE)


def test_dense_position_matches(tensors, encoder):
    torch.testing.assert_close(encoder.dense_position(), tensors["prompt.dense_pe"], **CLOSE)


def test_the_name_table_holds_the_keys_of_the_published_checkpoint(golden, encoder):
    keys = golden("sam/sam_med2d_vit_b_keys.json")
    shapes = keys.get("keys", keys)
    prefix = "prompt_encoder."
    published = {name[name.index(prefix) + len(prefix) :] for name in shapes if prefix in name}
    assert published == set(SAM_NAMES.values())
    assert set(encoder.state_dict()) == set(SAM_NAMES)
