"""Making a mixture from the published runs: which run each tensor comes from, and merged adapters."""

import pytest
import torch

from medplib import MedPLIB, MedPLIBConfig, assemble_mixture
from medplib.experts.upcycle import PUBLISHED_OVERRIDES
from medplib.official.configuration import convert, is_official
from medplib.official.files import merge_adapters
from medplib.official.names import our_name, rename

from .recorded_model import Recorded


@pytest.fixture(scope="module")
def facts(golden):
    return golden("moe_init/moe_init.json")


@pytest.fixture
def mixture(facts, golden_dir):
    """A model of the recorded runs' sizes, with the mixture that was made of them."""
    content = facts["stage_config_json"] | {"moe": facts["moe_config_written"]}
    return MedPLIB(MedPLIBConfig(**convert(content, Recorded(golden_dir / "model_tiny").overrides)))


def test_adapters_merge_as_published(golden):
    facts, tensors = golden("moe_init/lora_merge.json"), golden("moe_init/lora_merge.safetensors")
    given = {name: value for name, value in tensors.items() if not name.startswith("merged.")}
    merged = merge_adapters(given, facts["lora_alpha"] / facts["lora_r"])
    experts = [f"e{i}" for i in range(64)]
    table = rename(merged, experts)
    wanted = {
        name.removeprefix("merged."): value for name, value in tensors.items() if name.startswith("merged.")
    }
    assert len(table) == len(wanted) > 0
    for name, value in wanted.items():
        ours = merged[table[our_name(name, experts)]][...]
        # What was merged elsewhere may differ in the order of a sum.
        assert (ours - value).abs().max() <= facts["max_abs_err"] + 1e-6 * value.abs().max(), name


def test_the_names_of_every_published_run_are_ours(facts, mixture):
    experts = mixture.config.moe.experts
    written = [
        name.replace(".base_layer.", ".") for name in facts["train_state_dict_keys"] if "lora_" not in name
    ]
    assert set(rename(written, experts)) == set(mixture.state_dict())
    mixed = tuple(f"language_model.model.layers.{layer}.mlp." for layer in mixture.config.moe_layers)
    outside = {name for name in mixture.state_dict() if not name.startswith(mixed)}
    assert {name for name in rename(facts["stage2_keys"]) if not name.startswith(mixed)} == outside


def test_each_tensor_comes_from_the_published_run(facts, mixture):
    """The frozen image side is the same in all runs; fresh gates stay as they are."""
    experts = mixture.config.moe.experts
    shapes = {ours: facts["stage2_keys"][theirs] for ours, theirs in rename(facts["stage2_keys"]).items()}
    runs = {
        run: {name: torch.full(shape, float(number)) for name, shape in shapes.items()}
        for number, run in enumerate(("stage3", "stage2"), start=1)
    }
    sources = dict(zip(experts, runs.values(), strict=True))  # expert 0 is that of the grounding run
    overrides = dict.fromkeys(PUBLISHED_OVERRIDES, experts[0])
    taken = assemble_mixture(mixture, sources, rest=experts[1], overrides=overrides)
    names = dict(zip(experts, runs, strict=True))
    compared = 0
    for theirs, route in facts["routes_after_initialize_moe_modules"].items():
        ours = our_name(theirs.replace(".base_layer.", "."), experts)
        if isinstance(route, str):  # frozen since it was published, computed, or drawn anew (gates, adapters)
            frozen = route.startswith("vision_pretrained")
            assert (ours in taken) == frozen, theirs
            continue
        origins = {origin.split(":")[0] for origin in route}
        if origins & set(runs):
            assert names[taken[ours]] in origins, theirs
            assert (mixture.state_dict()[ours] == float(list(runs).index(names[taken[ours]]) + 1)).all()
            compared += 1
    assert compared > len(experts)


def test_the_run_configuration_is_read_as_dense(facts, tmp_path):
    assert is_official(facts["stage_config_json"])
    assert convert(facts["stage_config_json"])["moe"] is None
    assert not is_official(MedPLIB.config_class().to_dict())
