"""Keyed noise: what its numbers depend on, and that they are spread as they should be."""

import copy
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from medplib import MoERouter
from medplib.errors import InputError
from medplib.experts.noise import KeyedNoise

MASK = 2**64 - 1


def slow_uniform(seed, draws, place):
    """SplitMix64 in Python's whole numbers."""

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    step = 0x9E3779B97F4A7C15
    key = mix((mix(seed) + draws * step) & MASK)
    return ((mix((key + (place + 1) * step) & MASK) >> 41) + 0.5) / 2**23


def test_numbers_are_those_of_the_hash_in_whole_numbers():
    noise = KeyedNoise(seed=12345)
    for draws in range(3):
        wanted = torch.tensor([slow_uniform(12345, draws, place) for place in range(10)])
        assert torch.equal(noise.uniform((2, 5)), wanted.view(2, 5))
        noise.advance()


def test_numbers_are_uniform_and_gumbel():
    noise = KeyedNoise(seed=0)
    numbers = noise.uniform((20000,))
    assert 0 < numbers.min() < numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert torch.histc(numbers, 10).sub(2000).abs().max() < 200
    gumbel = noise.gumbel((20000,))
    assert gumbel.isfinite().all()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.03)


def test_another_key_or_draw_gives_other_numbers_and_a_copy_the_same():
    noise = KeyedNoise(seed=1)
    first, twin = noise.uniform((50,)), copy.deepcopy(noise)
    noise.advance()
    twin.load_state_dict(noise.state_dict())
    assert torch.equal(noise.uniform((50,)), twin.uniform((50,)))
    for other in (noise, KeyedNoise(seed=2)):
        assert abs(torch.corrcoef(torch.stack([first, other.uniform((50,))]))[0, 1]) < 0.4


def test_number_of_a_place_does_not_depend_on_how_many_follow():
    noise = KeyedNoise(seed=3).half()
    assert torch.equal(noise.uniform((10, 3))[:4], noise.uniform((4, 3)))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on this machine")
def test_code_compiled_for_the_cpu_draws_the_same_numbers():
    torch._dynamo.reset()
    noise, twin = KeyedNoise(seed=12345), KeyedNoise(seed=12345)

    def draw(source, count):
        source.advance()
        return source.uniform((count, 3))

    compiled = torch.compile(draw, fullgraph=True)
    for count in (50, 100, 200):
        assert torch.equal(compiled(twin, count), draw(noise, count))


def test_global_generator_is_neither_used_nor_moved():
    noise = KeyedNoise(seed=3)
    before = torch.get_rng_state()
    noise.advance()
    noise.uniform((4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    one = KeyedNoise()
    assert not torch.equal(one.state, KeyedNoise().state)
    torch.manual_seed(0)
    assert torch.equal(one.state, KeyedNoise().state)


def test_recomputation_draws_what_the_forward_drew():
    noise, seen = KeyedNoise(seed=4), []

    def forward(x):
        noise.advance()
        seen.append(noise.uniform((3,)))
        return x * seen[-1]

    x = torch.ones(3, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert noise.state[1] == 1


def test_wrong_seed_is_named():
    with pytest.raises(InputError, match="seed must be a whole number or None, got 'a'"):
        KeyedNoise("a")


def test_checkpoint_around_compiled_code_draws_and_balances_as_plain_code_does():
    options = {"noise": "gumbel", "noise_scale": 5.0, "seed": 1, "bias_rate": 0.5}
    router = MoERouter(8, 4, hidden_dim=4, gate_args=options)
    x, state = torch.randn(64, 8, requires_grad=True), copy.deepcopy(router.state_dict())

    def run(function) -> list[torch.Tensor]:
        router.load_state_dict(state)
        x.grad = None
        for _ in range(2):
            function(x).square().sum().backward()
        return [
            x.grad,
            router.gate.draws.state.clone(),
            router.gate.bias.load.clone(),
            router.gate.bias.steps,
        ]

    expected = [part.clone() for part in run(router)]
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager")
    got = run(lambda x: checkpoint(compiled, x, use_reentrant=False))
    torch.testing.assert_close(got, expected)
