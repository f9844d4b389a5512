"""Gradient checkpointing repeats each forward as it was, also when others followed before the backward."""

import copy
import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from medplib.errors import InputError
from medplib.experts import MoERouter, recomputation, routing_mask

SETTINGS = {
    "mask": {},
    "random drops": {"capacity_factor": 0.6, "drop": "random", "seed": 3},
    "published": {"parity": "deepspeed", "capacity_factor": 0.7, "seed": 3},
    "noise": {"top_k": 2, "gate_args": {"noise": "gumbel", "seed": 1}},
    "bias": {"top_k": 2, "gate_args": {"bias_rate": 0.05}},
}


def gradients(router, run):
    """Three forwards in other surroundings, then one backward for all."""
    torch.manual_seed(1)
    xs = [torch.randn(3, 20, 16, requires_grad=True) for _ in range(3)]
    with routing_mask(torch.rand(3, 20) > 0.3):
        total = run(router, xs[0]).square().sum()
    with router.force("expert_2"):
        total = total + run(router, xs[1]).square().sum()
    (total + run(router, xs[2]).square().sum()).backward()
    return [x.grad for x in xs] + [parameter.grad for parameter in router.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_forward_is_repeated_as_it_was(setting, reentrant):
    torch.manual_seed(0)
    router = MoERouter(16, 4, hidden_dim=8, **SETTINGS[setting])
    repeated = copy.deepcopy(router)
    wanted = gradients(router, lambda r, x: r(x))
    found = gradients(repeated, lambda r, x: checkpoint(r, x, use_reentrant=reentrant))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name, value in router.state_dict().items():
        assert torch.equal(repeated.state_dict()[name], value)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_checkpoints_inside_a_checkpoint_are_repeated_as_they_were(outer, inner):
    torch.manual_seed(0)
    router = MoERouter(16, 4, hidden_dim=8, **SETTINGS["random drops"])

    def nested(r, x):
        return checkpoint(lambda y: checkpoint(r, y, use_reentrant=inner).sin(), x, use_reentrant=outer)

    wanted = gradients(copy.deepcopy(router), lambda r, x: r(x).sin())
    for ours, theirs in zip(gradients(router, nested), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_that_was_forgotten_is_not_repeated_otherwise(reentrant):
    router, x = MoERouter(8, 2), torch.randn(4, 8, requires_grad=True)
    outs = [checkpoint(router, x, use_reentrant=reentrant) for _ in range(recomputation.LENGTH + 1)]
    with pytest.raises(InputError, match="Run `backward` earlier"):
        outs[0].sum().backward()


def test_what_surrounded_a_forward_is_not_saved():
    router = MoERouter(8, 2)
    with router.force("expert_0"), routing_mask(torch.ones(3)):
        router(torch.randn(3, 8))
    file = io.BytesIO()
    torch.save(router, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False)._past._forwards
    assert router._past._forwards
