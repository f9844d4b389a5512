"""What only a GPU can show: the bits of the CPU, graphs, streams, no waiting; skipped where there is none.

With MEDPLIB_OPS=off, PyTorch's operators run here; unless it is cpu, the first test runs this file and
test_ops.py once more with the compiled ones.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from medplib import MedPLIB, MoERouter, ops
from medplib.experts import count_routing, record_routing
from medplib.ops import _loader, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

HERE = Path(__file__).parent
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
compiled_only = pytest.mark.skipif(
    os.environ.get("MEDPLIB_OPS") == "off", reason="the compiled kernels are off (MEDPLIB_OPS)"
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu())


@pytest.mark.skipif(os.environ.get("MEDPLIB_OPS") == "cpu", reason="the compiled kernels run already")
def test_everything_holds_with_the_compiled_kernels():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "test_ops.py", __file__],
        env={**os.environ, "MEDPLIB_OPS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


@compiled_only
def test_compiled_kernels_are_loaded_at_the_first_use():
    ops.swiglu(torch.randn(2, 8, device="cuda"))
    assert _loader.loaded("cuda"), ops.status()
    assert ops.status()["cuda"].startswith("compiled ")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "dim", "experts", "k"), [(4096, 512, 2, 1), (3000, 96, 64, 6), (515, 33, 7, 7)]
)
def test_large_mixtures_move_the_bits_of_the_cpu(tokens, dim, experts, k, dtype):
    logits, x, residual = (
        random(tokens, experts),
        random(tokens, dim, dtype=dtype),
        random(tokens, dim, dtype=dtype),
    )
    gated = reference.gate(logits, None, None, k, False, False, True)
    on_gpu = ops.gate(logits.cuda(), k)
    assert same(on_gpu.experts, gated[1])
    assert same(on_gpu.counts, gated[3])
    torch.testing.assert_close(on_gpu.sums.cpu(), gated[4], rtol=1e-4, atol=1e-2)
    capacity = ops.capacity_of(tokens, experts, 0.8)
    for options in ({}, {"priority": gated[2]}, {"seed": 3}):
        moved = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        kept = ops.drop_overflow(gated[1], experts, capacity, **options)
        assert same(ops.drop_overflow(gated[1].cuda(), experts, capacity, **moved), kept)
    expected, plan = reference.plan(kept, experts), ops.plan(kept.cuda(), experts)
    assert all(same(a, b) for a, b in zip(plan, expected, strict=True))
    rows = ops.permute(x.cuda(), plan.order, k, plan.position)
    assert same(rows, reference.permute(x, expected[0], expected[1], k))
    weights = gated[2].to(reference.precise_type(x))
    out = ops.combine(rows, plan.order, weights.cuda(), plan.position, residual.cuda())
    assert same(out, reference.combine(rows.cpu(), expected[0], expected[1], weights, residual))


def chain(x: torch.Tensor, gate: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Every operator of training, each expert the same matrix: (T, D) -> (T, H)."""
    gated = ops.gate(ops.gate_logits(x, gate), 2, renormalize=True)
    kept = ops.drop_overflow(gated.experts, len(gate), len(x), seed=5)
    plan = ops.plan(kept, len(gate))
    rows = ops.permute(x, plan.order, 2, plan.position)
    return ops.combine(ops.swiglu(rows @ gate_up.T), plan.order, gated.weights, plan.position)


def leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = ((600, 64), (8, 64), (48, 64))
    return [random(*s, seed=i, dtype=dtype).cuda().requires_grad_() for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", TYPES)
def test_forward_and_backward_never_wait_and_repeat_their_bits(dtype):
    def run() -> list[torch.Tensor]:
        given = leaves(dtype)
        seeds = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("error")
            chain(*given).float().square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(seeds)
        return [leaf.grad for leaf in given]

    chain(*leaves(dtype))  # loads the kernels, and the libraries of torch
    first = run()
    assert all(same(a, b) for _ in range(3) for a, b in zip(run(), first, strict=True))


def test_captured_graph_answers_for_new_tokens():
    with torch.no_grad():
        x, gate, gate_up = leaves()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                chain(x, gate, gate_up)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x, gate, gate_up)
        for seed in (7, 8):
            x.copy_(random(600, 64, seed=seed))
            graph.replay()
            torch.testing.assert_close(out, chain(x, gate, gate_up))


def test_kernels_run_on_the_current_stream():
    with torch.no_grad():
        given = leaves()
        expected = chain(*given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work of another stream would be done before this
            late = given[0] * 2
            out = chain(late, *given[1:])
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(out, chain(given[0] * 2, *given[1:]))
        assert not torch.equal(out, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_decode_repeats_its_bits_and_agrees_with_the_cpu(tokens, dtype):
    x, gate_up, down = random(tokens, 256), random(4, 2 * 344, 256) / 16, random(4, 256, 344) / 18
    x, gate_up, down = (tensor.to(dtype) for tensor in (x, gate_up, down))
    gated = ops.gate(random(tokens, 4, seed=1), 2, statistics=False)
    given = (x, gated.experts, gated.weights, gate_up, down, x)
    on_gpu = tuple(tensor.cuda() for tensor in given)
    out = ops.decode_ffn(*on_gpu)
    assert all(same(ops.decode_ffn(*on_gpu), out) for _ in range(5))
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    torch.testing.assert_close(out.cpu(), ops.decode_ffn(*given), rtol=limit, atol=limit)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_chain_compiles_in_one_graph(backend):
    given, again = leaves(), leaves()
    chain(*given).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(chain, fullgraph=True, backend=backend)(*again).square().sum().backward()
    for one, other in zip(given, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_chain_exports():
    class Chain(torch.nn.Module):
        def forward(self, *tensors):
            return chain(*tensors)

    given = tuple(tensor.detach() for tensor in leaves())
    torch.testing.assert_close(torch.export.export(Chain(), given).module()(*given), chain(*given))


@compiled_only
def test_tensor_on_another_device_is_refused_and_the_gpu_goes_on():
    x, order = torch.randn(4, 8, device="cuda"), torch.arange(4)
    ops.swiglu(x)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ops.medplib.permute(x, order, None, 1)
    torch.cuda.synchronize()
    assert torch.equal(ops.permute(x, order.cuda(), 1), x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_is_used_for_its_tensors():
    given = [tensor.detach() for tensor in leaves()]
    out = chain(*(tensor.to("cuda:1") for tensor in given))
    assert out.device.index == 1
    torch.testing.assert_close(out.cpu(), chain(*given).cpu())


# Routers and the model


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_router_on_the_second_device_waits_for_the_counts_of_that_device():
    torch.manual_seed(0)
    router, x = MoERouter(32, 4, hidden_dim=64), torch.randn(4096, 32)
    expected = router(x)
    router, x = router.to("cuda:1"), x.to("cuda:1")
    busy = torch.randn(8192, 8192, device="cuda:1")
    torch.cuda.synchronize(1)
    for _ in range(5):
        busy = busy @ busy.T * 1e-4  # the counts come late
    torch.testing.assert_close(router(x).cpu(), expected, atol=1e-5, rtol=1e-4)


def test_router_on_cuda_chooses_and_answers_as_on_cpu():
    torch.manual_seed(0)
    router = MoERouter(32, experts=["a", "b", "c"], hidden_dim=64, top_k=2)
    x = torch.randn(5, 7, 32)
    expected = router(x)
    torch.testing.assert_close(router.cuda()(x.cuda()).cpu(), expected, atol=1e-5, rtol=1e-4)


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
                    reason="grouped products wait for this device")  # fmt: skip
def test_compiled_router_reads_packed_weights_where_they_lie():
    router = MoERouter(1024, 2, hidden_dim=1024).cuda().bfloat16().eval()
    x = random(1, 1024, dtype=torch.bfloat16).cuda()
    run = torch.compile(router, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), router(x), rtol=3e-2, atol=3e-2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
    copies = sum(p.numel() * p.element_size() for p in router.experts.parameters())
    assert torch.cuda.max_memory_allocated() - before < copies / 4


def test_random_drops_are_those_of_the_cpu_and_of_a_recomputation():
    def drops(device: str, repeated: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        router = MoERouter(16, 4, hidden_dim=8, capacity_factor=0.5, drop="random", seed=3).to(device)
        x = random(64, 16).to(device).requires_grad_()
        with record_routing(router) as trace:
            out = checkpoint(router, x, use_reentrant=False) if repeated else router(x)
            out.square().sum().backward()
        return [trace[0].served[0], x.grad.cpu()]

    served, grad = drops("cpu", False)
    for repeated in (False, True):
        got, gradient = drops("cuda", repeated)
        assert torch.equal(got, served)
        torch.testing.assert_close(gradient, grad, rtol=1e-4, atol=1e-5)


def test_captured_gate_is_counted_at_every_replay():
    router = MoERouter(16, 4, hidden_dim=8, top_k=2).cuda()
    x = random(32, 16).cuda()
    with count_routing(router, remember=32) as statistics, torch.no_grad():
        layer = statistics.layers["router"]
        layer.add(router.gate(x))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.add(router.gate(x))
        before = int(layer.tokens)
        for _ in range(3):
            graph.replay()
        assert int(layer.tokens) == before + 96
        assert torch.equal(layer.recent.sort(0).values, router.gate(x).experts.sort(0).values)


def test_tiny_model_on_cuda_gives_the_text_and_masks_of_the_cpu():
    image = Path(__file__).parents[1] / "examples" / "images" / "chest_ct.png"
    model = MedPLIB.from_pretrained("medplib-tiny")
    expected = model.segment(image, ["right lung", "body"])
    answer = model.cuda().segment(image, ["right lung", "body"])
    assert answer.text == expected.text
    assert len(answer.findings) == len(expected.findings)
    for a, b in zip(answer.findings, expected.findings, strict=True):
        assert (a.mask != b.mask).mean() < 1e-3
