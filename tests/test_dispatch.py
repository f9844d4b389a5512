"""Dispatch: one token by itself gives what it gives among others, to the bit."""

import pytest
import torch

from medplib.experts import MoERouter
from medplib.experts.dispatch import mix

DIM = 6


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("top_k", [1, 3])
def test_one_token_gives_what_it_gives_among_others(kind, top_k):
    torch.manual_seed(0)
    experts = MoERouter(DIM, 4, hidden_dim=5).to(kind).experts
    tokens = torch.randn(1, DIM, dtype=kind, requires_grad=True)
    chosen = torch.randperm(4)[:top_k][None]
    weights = torch.rand(1, top_k, dtype=torch.float64 if kind == torch.float64 else torch.float32)
    weights.requires_grad_(True)
    results = []
    for fill in (0, 1):
        # the second time another token, which no expert gets, makes it the general case
        rows = torch.cat([tokens, tokens.detach().expand(fill, -1)])
        index = torch.cat([chosen, torch.full((fill, top_k), 4)])
        shares = torch.cat([weights, weights.detach().expand(fill, -1)])
        out = mix(rows, index, shares, experts)[:1]
        inputs = (tokens, weights, *experts.parameters())
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs, allow_unused=True)))
    assert results[0][0].dtype == kind
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_token_without_an_expert_gives_zero():
    experts = MoERouter(DIM, 2, hidden_dim=5).experts
    assert (mix(torch.randn(1, DIM), torch.tensor([[2]]), torch.ones(1, 1), experts) == 0).all()
