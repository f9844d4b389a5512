"""Every operator: what it means, the same bits from every kernel, its gradient, compile and export.

T tokens, D width, H hidden width, E experts, K experts per token. Run with MEDPLIB_OPS=cpu the same tests
check the compiled kernels (.ci/run does so).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from medplib import ops
from medplib.errors import InputError
from medplib.ops import _loader, functions, reference

LIB = torch.ops.medplib
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    ),
]
# name: T, D, H, E, K, how the logits are made
CASES = {
    "plain": (37, 24, 16, 4, 2, "normal"),
    "no token": (0, 8, 8, 3, 2, "normal"),
    "one token": (1, 40, 24, 2, 1, "normal"),
    "an expert without a token": (19, 8, 8, 4, 1, "avoid 2"),
    "all on one expert": (33, 16, 8, 3, 1, "only 1"),
    "one expert": (9, 16, 8, 1, 1, "normal"),
    "64 experts": (300, 8, 8, 64, 6, "normal"),
    "K = E": (6, 7, 5, 5, 5, "normal"),
    "ties": (50, 8, 8, 6, 3, "few values"),
    "several blocks": (2500, 4, 4, 3, 2, "normal"),
    "two experts, many tokens": (515, 16, 4, 2, 1, "normal"),
    "wide rows": (5, 2304, 8, 3, 2, "normal"),  # rows and weights that a warp takes in several steps
    "wide experts": (2, 16, 1048, 2, 1, "normal"),
}


def logits_of(case: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Seeded logits (T, E) of a case, the same on every device."""
    tokens, _, _, experts, _, kind = CASES[case]
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(len(case)))
    if kind == "few values":
        logits = logits.round()
    elif kind != "normal":
        which = int(kind.split()[1])
        logits[:, which] = 50.0 if kind.startswith("only") else -50.0
    return logits.to(device, dtype)


def setting(case: str, dtype: torch.dtype, device: str = "cpu") -> dict:
    """Everything the operators need for a case: tokens, weights, a plan with some assignments dropped."""
    tokens, dim, hidden, experts, k, _ = CASES[case]
    generator = torch.Generator().manual_seed(len(case) + 1)

    def random(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=generator)
        return (numbers / shape[-1] ** 0.5 if len(shape) == 3 else numbers).to(device, dtype)

    chosen = ops.gate(logits_of(case, device=device), k, statistics=False)
    kept = chosen.experts.masked_fill(
        (torch.rand(tokens, k, generator=generator) < 0.2).to(device), experts
    )  # some dropped
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    plan = ops.plan(kept, experts)
    return {
        "tokens": random(tokens, dim), "weight": random(experts, dim), "rows": random(tokens * k, dim),
        "residual": random(tokens, dim), "gate_up": random(experts, 2 * hidden, dim),
        "down": random(experts, dim, hidden), "experts": kept, "weights": chosen.weights.to(precise),
        "order": plan.order, "position": plan.position, "ends": plan.ends, "k": k, "num_experts": experts,
    }  # fmt: skip


def same(left, right) -> bool:
    """The same bits, types and shapes, where any NaN equals any other."""
    if not isinstance(left, torch.Tensor):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if left.dtype != right.dtype or left.shape != right.shape or not torch.equal(left.isnan(), right.isnan()):
        return False
    left, right = left.nan_to_num(7.0), right.nan_to_num(7.0)
    return torch.equal(left, right) and torch.equal(left.signbit(), right.signbit())


# What the operators mean, against slow and obvious versions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gate_chooses_the_best_logits_lowest_index_first_and_counts_them(case, score, device):
    logits, k = logits_of(case, device=device), CASES[case][4]
    gated = ops.gate(logits, k, score, renormalize=k > 1)
    expected = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    torch.testing.assert_close(gated.probabilities, expected, rtol=1e-6, atol=1e-30)
    counts = [0] * logits.shape[1]
    for token, row in enumerate(logits.tolist()):
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        assert gated.experts[token].tolist() == best
        chosen = expected[token, best]
        torch.testing.assert_close(gated.weights[token], chosen / chosen.sum() if k > 1 else chosen)
        for expert in best:
            counts[expert] += 1
    assert gated.counts.tolist() == counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gate_statistics_leave_masked_tokens_out(score, device):
    logits = logits_of("plain", device=device)
    mask = torch.arange(len(logits), device=device) % 3 > 0
    gated = ops.gate(logits, 2, score, mask=mask)
    alone = ops.gate(logits[mask], 2, score)
    assert (gated.experts[~mask] == 4).all()
    assert (gated.weights[~mask] == 0).all()
    assert (gated.probabilities[~mask] == 0).all()
    assert torch.equal(gated.experts[mask], alone.experts)
    assert torch.equal(gated.counts, alone.counts)
    torch.testing.assert_close(gated.sums, alone.sums)
    best = alone.probabilities.sort(descending=True).values
    shares = alone.probabilities / alone.probabilities.sum(-1, keepdim=True)
    expected = [
        *alone.probabilities.sum(0).tolist(),
        -(shares * shares.log()).sum().item(),
        (best[:, 0] - best[:, 1]).sum().item(),
        logits[mask].exp().sum(-1).log().square().sum().item(),
    ]
    torch.testing.assert_close(gated.sums.tolist(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_gate_may_choose_on_other_numbers_than_the_logits(device):
    logits = logits_of("plain", device=device)
    gated = ops.gate(logits, 2, selection=-logits)
    assert torch.equal(gated.experts, ops.choose_top_k(-logits, 2))
    assert torch.equal(gated.weights, gated.probabilities.gather(1, gated.experts))


@pytest.mark.parametrize("device", DEVICES)
def test_gate_puts_nan_first_as_a_sort_does_and_signed_zeros_together(device):
    logits = torch.tensor([[0.0, math.nan, 3.0], [-0.0, 0.0, -0.0], [math.inf, -math.inf, math.nan]])
    selection = logits.to(device)
    assert ops.gate(selection, 3).experts.tolist() == [[1, 2, 0], [0, 1, 2], [2, 0, 1]]


def slow_plan(experts: list[list[int]], num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """order, position and counts, by lists of members."""
    flat = [expert for row in experts for expert in row]
    members = [[a for a, expert in enumerate(flat) if expert == e] for e in range(num_experts)]
    order = [a for group in members for a in group]
    position = [order.index(a) if a in order else -1 for a in range(len(flat))]
    return order + [-1] * (len(flat) - len(order)), position, [len(group) for group in members]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [name for name in CASES if "several" not in name and "many" not in name])
def test_plan_lists_each_experts_assignments_in_the_order_of_tokens(case, device):
    given = setting(case, torch.float32, device)
    plan = ops.plan(given["experts"], given["num_experts"])
    order, position, counts = slow_plan(given["experts"].tolist(), given["num_experts"])
    assert plan.order.tolist() == order
    assert plan.position.reshape(-1).tolist() == position
    assert plan.counts.tolist() == counts
    assert plan.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert plan.ends.dtype == torch.int32
    assert torch.equal(ops.invert(plan.order, *given["experts"].shape), plan.position)
    short, _ = ops.sort_by_expert(given["experts"], given["num_experts"])
    assert short.tolist() == order[: sum(counts)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "count", [1023, 1024, 1025, 8192, 8193]
)  # a kernel's tiles have 1024, a block 8 of them
def test_plan_holds_where_a_kernels_tiles_and_blocks_end(count, device):
    experts = torch.randint(-1, 4, (count, 1), generator=torch.Generator().manual_seed(count))
    plan = ops.plan(experts.to(device), 3)
    assert all(same(a.cpu(), b) for a, b in zip(plan, reference.plan(experts, 3), strict=True))


def test_plan_counts_an_index_out_of_range_as_dropped():
    plan = ops.plan(torch.tensor([[7, -3, 1, 0]]), 2)
    assert plan.order.tolist() == [3, 2, -1, -1]
    assert plan.position.tolist() == [[-1, -1, 1, 0]]


def slow_drop(experts, num_experts, capacity, key) -> list[list[int]]:
    """Serve the assignments by falling key, then by choice, then by token, until an expert is full."""
    kept = [[num_experts] * len(row) for row in experts]
    room = [capacity] * num_experts
    places = [(choice, token) for choice in range(len(experts[0])) for token in range(len(experts))]
    for choice, token in sorted(places, key=lambda place: (-key[place[1]][place[0]], *place)):
        expert = experts[token][choice]
        if expert < num_experts and room[expert]:
            room[expert] -= 1
            kept[token][choice] = expert
    return kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["position", "priority", "ties", "random"])
@pytest.mark.parametrize("capacity", [0, 1, 5, 1000])
def test_drop_keeps_the_first_the_best_or_a_random_few(policy, capacity, device):
    experts = setting("ties", torch.float32, device)["experts"]
    priority = torch.rand(experts.shape, generator=torch.Generator().manual_seed(3))
    if policy == "ties":
        priority = priority.round()
    given = {"priority": priority.to(device)}
    options = {"position": {}, "priority": given, "ties": given, "random": {"seed": 11}}[policy]
    key = torch.zeros(experts.shape) if policy == "position" else priority
    if policy == "random":
        key = torch.tensor([hash_of(11, a) for a in range(experts.numel())]).view(experts.shape)
    kept = ops.drop_overflow(experts, 6, capacity, **options)
    assert kept.tolist() == slow_drop(experts.tolist(), 6, capacity, key.tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_sigmoids_that_are_all_zero_are_zero(device):
    logits = torch.full((3, 4), -160.0, device=device, requires_grad=True)
    gated = ops.gate(logits, 2, "sigmoid", True)
    assert not gated.weights.any()
    gated.weights.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["priority", "seed"])
def test_drop_of_many_is_that_of_few(given, device, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    experts = torch.randint(0, 5, (700, 2), generator=generator).to(device)  # 4 is nobody
    priority = torch.rand(experts.shape, generator=generator).mul(50).round().to(device)
    options = {"priority": priority} if given == "priority" else {"seed": 7}
    few = ops.drop_overflow(experts, 4, 150, **options)
    monkeypatch.setattr(functions, "COUNTED", 100)
    assert torch.equal(ops.drop_overflow(experts, 4, 150, **options), few)
    assert (few == 4).sum() > (experts == 4).sum()


def hash_of(seed: int, counter: int) -> int:
    """splitmix64 in whole numbers, without its lowest bit."""

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    return mix((mix(seed % 2**64) + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 1


@pytest.mark.parametrize("device", DEVICES)
def test_hash_is_splitmix64_the_same_everywhere(device):
    assert hash_of(0, 0) == 0xE220A8397B1DCDAF >> 1  # its published first output
    for seed in (0, 1, -5, 2**62):
        bits = LIB.counter_bits(torch.tensor(seed, device=device), 100)
        assert bits.tolist() == [hash_of(seed, counter) for counter in range(100)]
    numbers = ops.uniform(20_000, 5, device)
    assert 0 <= float(numbers.min()) < 0.01 < 0.99 < float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert torch.equal(numbers[:100], ops.uniform(100, torch.tensor(5, device=device)))
    assert not torch.equal(numbers[:100], ops.uniform(100, 6, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [name for name in CASES if "several" not in name and "many" not in name])
def test_combine_undoes_permute_with_weights(case, device):
    given = setting(case, torch.float32, device)
    tokens, order, k = given["tokens"], given["order"], given["k"]
    rows = ops.permute(tokens, order, k, given["position"])
    zero = torch.zeros(tokens.shape[1], device=device)
    for row, assignment in zip(rows, order.tolist(), strict=True):
        assert torch.equal(row, zero if assignment < 0 else tokens[assignment // k])
    out = ops.combine(rows * 2, order, given["weights"], given["position"], given["residual"])
    share = (given["weights"] * (given["position"] >= 0)).sum(1, keepdim=True)
    torch.testing.assert_close(out, 2 * share * tokens + given["residual"])
    assert torch.equal(out, ops.combine(rows * 2, order, given["weights"], residual=given["residual"]))


@pytest.mark.parametrize("device", DEVICES)
def test_combine_is_exactly_the_rounded_sum_choice_0_first(device):
    given = setting("K = E", torch.bfloat16, device)
    out = ops.combine(given["rows"], given["order"], given["weights"], given["position"])
    for token, places in enumerate(given["position"].tolist()):
        total = torch.zeros(7, device=device)
        for choice, place in enumerate(places):
            if place >= 0:
                total = total + given["weights"][token, choice] * given["rows"][place].float()
        assert torch.equal(out[token], total.bfloat16())


def test_a_dropped_assignment_adds_nothing_even_with_an_infinite_weight():
    rows, order = torch.full((1, 2), math.nan), torch.tensor([0])
    weights, position = torch.tensor([[1.0], [math.inf]]), torch.tensor([[0], [-1]])
    assert ops.combine(rows, order, weights, position)[1].tolist() == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu_is_silu_of_the_first_half_times_the_second(dtype, device):
    gate_up = torch.randn(3, 5, 14, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = (gate / (1 + torch.exp(-gate)) * up).to(dtype)
    torch.testing.assert_close(ops.swiglu(gate_up), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        *("plain", "no token", "one token", "all on one expert", "one expert", "64 experts", "K = E"),
        *("wide rows", "wide experts"),
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_decode_ffn_is_the_mixture_of_the_chosen_experts(case, dtype, device):
    given = setting(case, dtype, device)
    names = ("tokens", "experts", "weights", "gate_up", "down")
    out = ops.decode_ffn(*(given[name] for name in names), given["residual"])
    expected = given["residual"].double()
    for token, chosen in enumerate(given["experts"].tolist()):
        for weight, expert in zip(given["weights"][token], chosen, strict=True):
            if expert < given["num_experts"]:
                gate, up = (given["gate_up"][expert].double() @ given["tokens"][token].double()).chunk(2)
                expected[token] += weight * (given["down"][expert].double() @ (F.silu(gate) * up))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chosen", [[[5, 2], [2, 2]], [[8, -1], [3, 8]], [[8, 8]]])
def test_decode_ffn_runs_an_expert_once_for_all_that_chose_it_and_none_for_no_expert(chosen, device):
    generator = torch.Generator().manual_seed(0)
    tokens, gate_up, down, weights = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((len(chosen), 4), (8, 6, 4), (8, 4, 3), (len(chosen), 2))
    )
    expected = torch.zeros_like(tokens)
    for token, experts in enumerate(chosen):
        for choice, expert in enumerate(experts):
            if 0 <= expert < 8:
                gate, up = (gate_up[expert] @ tokens[token]).chunk(2)
                expected[token] += weights[token, choice] * (down[expert] @ (F.silu(gate) * up))
    given = (tokens, torch.tensor(chosen), weights, gate_up, down)
    out = ops.decode_ffn(*(tensor.to(device) for tensor in given))
    torch.testing.assert_close(out.cpu(), expected)


# The same bits from every kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_bits_of_the_reference(case, dtype, device):
    given = setting(case, dtype, device)
    cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    calls = {
        "plan": ("experts", "num_experts"),
        "permute": ("tokens", "order", "position", "k"),
        "permute_backward": ("rows", "position"),
        "combine": ("rows", "order", "position", "weights", "residual"),
    }
    for name, arguments in calls.items():
        got = getattr(LIB, name)(*(given[argument] for argument in arguments))
        got = got.cpu() if isinstance(got, torch.Tensor) else [part.cpu() for part in got]
        expected = getattr(reference, name)(*(cpu[argument] for argument in arguments))
        assert same(got, expected), name
    names = ("residual", "rows", "order", "position", "weights")
    got = LIB.combine_backward(*(given[name] for name in names))
    expected = reference.combine_backward(*(cpu[name] for name in names))
    assert same(got[0].cpu(), expected[0])  # the other is a long sum, whose order is the kernel's own
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits, k = logits_of(case, wide), given["k"]
    got = [part.cpu() for part in LIB.gate(logits.to(device), None, None, k, False, False, True)]
    expected = reference.gate(logits, None, None, k, False, False, True)
    assert same(got[1], expected[1])
    assert same(got[3], expected[3])
    torch.testing.assert_close([got[0], got[2], got[4]], [expected[0], expected[2], expected[4]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_scores_of_the_experts_and_their_gradients_are_those_of_matrix_products(case, dtype, device):
    given = setting(case, dtype, device)
    few = slice(None) if case.startswith("two") else slice(50)
    tokens, weight = given["tokens"][few], given["weight"]
    grad = logits_of(case, given["weights"].dtype, device)[few]
    left, right, above = tokens.double(), weight.double(), grad.double()
    limits = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-4, 1e-4)}
    rtol, atol = limits.get(dtype, (2e-2, 2e-2))
    for kind in {dtype, grad.dtype}:  # the weight may stay in float32
        got = LIB.gate_logits(tokens, weight.to(kind))
        torch.testing.assert_close(got.double(), left @ right.T, rtol=1e-4, atol=1e-3)
        for wanted in ((True, True), (True, False), (False, True)):
            grads = LIB.gate_logits_backward(grad, tokens, weight.to(kind), *wanted)
            expected = (above @ right, above.T @ left)
            for part, full, asked in zip(grads, expected, wanted, strict=True):
                assert part.shape == (full.shape if asked else (0,))
                if asked:
                    torch.testing.assert_close(part.double(), full, rtol=rtol, atol=atol * len(tokens) ** 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", ["strided", "unaligned"])
def test_kernels_take_tensors_that_are_not_contiguous_or_not_aligned(place, dtype, device):
    given = setting("plain", dtype, device)

    def spread(tensor):
        """The same values with strides that no kernel would choose, or beginning at an odd address."""
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim:
            return tensor
        if place == "unaligned":
            view = tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)
        else:
            wide = tensor.new_zeros(*(2 * size for size in tensor.shape))
            view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        view.copy_(tensor)
        return view

    logits = torch.randn(37, 4, device=device)
    calls = {
        "gate_logits": (given["tokens"], given["weight"]),
        "gate_logits_backward": (
            logits.to(given["weights"].dtype),
            given["tokens"],
            given["weight"],
            True,
            True,
        ),
        "gate": (logits, None, logits[:, 0] > -1, 2, False, True, True),
        "gate_backward": (logits, logits[:, :2], logits.softmax(-1), logits[:, :2].long(), False, True),
        "plan": (given["experts"], 4),
        "drop": (given["experts"], given["weights"], None, 4, 3),
        "permute": (given["tokens"], given["order"], given["position"], 2),
        "permute_backward": (given["rows"], given["position"]),
        "combine": tuple(given[n] for n in ("rows", "order", "position", "weights", "residual")),
        "combine_backward": tuple(given[n] for n in ("residual", "rows", "order", "position", "weights")),
        "swiglu": (given["tokens"],),
        "swiglu_backward": (given["tokens"][:, :12], given["tokens"]),
        "decode_ffn": tuple(
            given[n] for n in ("tokens", "experts", "weights", "gate_up", "down", "residual")
        ),
    }
    for name, arguments in calls.items():
        op = getattr(LIB, name)
        got, expected = op(*map(spread, arguments)), op(*arguments)
        if name == "combine_backward":
            assert same(got[0], expected[0])  # the other is a long sum
        if name in ("plan", "drop", "permute", "permute_backward", "combine"):
            assert same(got, expected), name
        else:  # sums in another order; a vectorised loop may round its tail differently
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_grouped_product_is_each_experts_product_with_its_rows(case, dtype):
    given = setting(case, dtype)
    rows, weights, ends = given["rows"], given["gate_up"], given["ends"].tolist()
    out = ops.grouped_mm(rows, weights, given["ends"])
    for weight, start, end in zip(weights, [0, *ends], ends, strict=False):
        assert same(out[start:end], rows[start:end] @ weight.T)
    assert not out[ends[-1] :].any()  # the dropped ones
    with torch.autocast("cpu", torch.bfloat16):
        assert same(ops.grouped_mm(rows, weights, given["ends"]), out)


def test_grouped_product_refuses_what_does_not_fit():
    rows, weights, ends = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([1, 3])
    for call, message in (
        (
            (rows, weights[:, :, :3], ends),
            r"rows \(R, D\) and weights \(E, H, D\), got \(3, 4\) and \(2, 5, 3\)",
        ),
        ((rows, weights, ends[:1]), r"one per expert, \(2,\), got \(1,\)"),
        ((rows.half(), weights, ends), "one type, got rows torch.float16 and weights torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            ops.grouped_mm(*call)


# Gradients


def differentiable(case: str) -> list:
    """(function, inputs) in float64 for every operator that has a gradient."""
    given = setting(case, torch.float64)
    order, position, k = given["order"], given["position"], given["k"]
    logits = logits_of(case, torch.float64)
    mask = torch.arange(len(logits)) % 4 > 0
    gates = [
        lambda x, s=score, r=renormalize, m=mask_: ops.gate(x, k, s, r, mask=m)[0:3:2]
        for score in ("softmax", "sigmoid")
        for renormalize in ({False, k > 1})
        for mask_ in (None, mask)
    ]
    return [
        (ops.gate_logits, (given["tokens"], given["weight"])),
        *[(gate, (logits,)) for gate in gates],
        (lambda x: ops.permute(x, order, k, position), (given["tokens"],)),
        (lambda x: ops.permute(x, order, k), (given["tokens"],)),
        (
            lambda r, w, x: ops.combine(r, order, w, position, x),
            (given["rows"], given["weights"], given["residual"]),
        ),
        (lambda r, w: ops.grouped_mm(r, w, given["ends"]), (given["rows"], given["gate_up"])),
        (lambda r, *w: ops.grouped_mm(r, w, given["ends"]), (given["rows"], *given["gate_up"].clone())),
        (ops.swiglu, (given["gate_up"][0].T,)),
    ]


@pytest.mark.parametrize("case", ["one token", "an expert without a token", "K = E", "no token"])
def test_gradients_are_those_of_finite_differences(case):
    for function, inputs in differentiable(case):
        inputs = tuple(x.clone().requires_grad_() for x in inputs)
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_are_the_same_bits_on_every_run(dtype, device):
    given = setting("64 experts", dtype, device)

    def run() -> list:
        leaves = [given[n].clone().requires_grad_() for n in ("tokens", "weight", "gate_up", "residual")]
        tokens, weight, gate_up, residual = leaves
        gated = ops.gate(ops.gate_logits(tokens, weight), 6, renormalize=True)
        plan = ops.plan(gated.experts, 64)
        rows = ops.permute(tokens, plan.order, 6, plan.position)
        rows = ops.swiglu(rows @ gate_up[0].T)
        out = ops.combine(rows, plan.order, gated.weights, plan.position, residual[:, : rows.shape[1]])
        (out.float().square().sum() + gated.probabilities.square().sum()).backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    first = run()
    assert all(same(run(), first) for _ in range(2))


@pytest.mark.parametrize("device", DEVICES)
def test_decode_gives_the_same_bits_on_every_run_and_alone_as_among_others(device):
    given = setting("64 experts", torch.float32, device)
    tables = (given["gate_up"], given["down"])

    def run(rows: slice) -> torch.Tensor:
        return ops.decode_ffn(given["tokens"][rows], given["experts"][rows], given["weights"][rows], *tables)

    first = run(slice(0, 40))
    assert torch.equal(run(slice(0, 40)), first)
    torch.testing.assert_close(run(slice(7, 8)), first[7:8])


def test_gradient_of_expanded_and_of_absent_outputs():
    logits = logits_of("plain").requires_grad_()
    gated = ops.gate(logits, 2)
    gated.weights.sum().backward()  # an expanded gradient; none for the probabilities
    again = logits.detach().clone().requires_grad_()
    again.softmax(-1).gather(1, gated.experts).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert not gated.sums.requires_grad


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(ops.swiglu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()
    tokens, weights = torch.randn(1, 4, requires_grad=True), torch.ones(1, 1)
    out = ops.decode_ffn(
        tokens, torch.zeros(1, 1).long(), weights, torch.randn(1, 6, 4), torch.randn(1, 4, 3)
    )
    with pytest.raises(RuntimeError, match="for inference"):
        out.sum().backward()


# torch.library, torch.compile, torch.export


def opcheck_calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments for every operator; those with a gradient require it."""
    given = setting("plain", dtype)
    grad = {name: given[name].clone().requires_grad_() for name in ("tokens", "weight", "rows", "weights")}
    wide = given["weights"].dtype
    logits = logits_of("plain", wide)
    plan = (given["order"], given["position"])
    grouped = (given["rows"], list(given["gate_up"]), given["ends"])
    asked = [True, False, True, False]
    return {
        "gate_logits": (grad["tokens"], grad["weight"]),
        "gate_logits_backward": (logits, given["tokens"], given["weight"], True, False),
        "gate": (logits.clone().requires_grad_(), None, logits[:, 0] > 0, 2, False, True, True),
        "gate_backward": (logits, given["weights"], logits.softmax(-1), given["experts"], True, False),
        "plan": (given["experts"], 4),
        "counter_bits": (torch.tensor(3), 5),
        "drop": (given["experts"], None, torch.tensor(3), 4, 2),
        "permute": (grad["tokens"], *plan, 2),
        "permute_backward": (given["rows"], plan[1]),
        "combine": (grad["rows"], *plan, grad["weights"], given["residual"].clone().requires_grad_()),
        "combine_backward": (given["residual"], given["rows"], *plan, given["weights"]),
        "grouped_mm": (grad["rows"], [w.clone().requires_grad_() for w in given["gate_up"]], given["ends"]),
        "grouped_mm_backward": (given["rows"] @ given["gate_up"][0].T, *grouped, True, asked),
        "swiglu": (grad["tokens"],),
        "swiglu_backward": (given["tokens"][:, :12], given["tokens"]),
        "decode_ffn": (*(given[n] for n in ("tokens", "experts", "weights", "gate_up", "down")), None),
    }


@pytest.mark.parametrize("name", list(opcheck_calls(torch.float32)))
def test_opcheck(name):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(LIB, name).default, opcheck_calls(dtype)[name])


def test_opcheck_covers_every_operator():
    from medplib.ops.library import SCHEMAS

    assert set(opcheck_calls(torch.float32)) == set(SCHEMAS)


class Mixture(torch.nn.Module):
    """A mixture of two-layer experts that asks the device for no number: every operator, static shapes."""

    def __init__(self, dim: int = 8, num_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k, self.num_experts = k, num_experts
        self.gate = torch.nn.Parameter(torch.randn(num_experts, dim))
        self.gate_up = torch.nn.Parameter(torch.randn(num_experts, 12, dim))
        self.down = torch.nn.Parameter(torch.randn(num_experts, dim, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = ops.gate(ops.gate_logits(x, self.gate), self.k)
        experts = ops.drop_overflow(gated.experts, self.num_experts, 9, seed=7)
        plan = ops.plan(experts, self.num_experts)
        rows = ops.permute(x, plan.order, self.k, plan.position)
        member = torch.arange(rows.shape[0]).unsqueeze(1) >= plan.ends  # (R, E)
        expert = member.sum(1).clamp_max(self.num_experts - 1)  # (R,)
        hidden = ops.swiglu(torch.einsum("rd,rhd->rh", rows, self.gate_up[expert]))
        rows = torch.einsum("rh,rdh->rd", hidden, self.down[expert])
        return ops.combine(rows, plan.order, gated.weights, plan.position, residual=x)


def test_compiled_in_one_graph_the_answer_and_the_gradients_are_the_same():
    torch.manual_seed(0)
    mixture, x = Mixture(), torch.randn(15, 8)
    expected = mixture(x)
    expected.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in mixture.parameters()]
    mixture.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager", dynamic=True)
    got = compiled(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([parameter.grad for parameter in mixture.parameters()], wanted)
    longer = torch.randn(21, 8)
    torch.testing.assert_close(compiled(longer), mixture(longer))


def test_exported_programs_run_with_other_numbers_of_tokens():
    mixture = Mixture().eval()
    program = torch.export.export(
        mixture, (torch.randn(15, 8),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2, max=512)}}
    )
    for tokens in (15, 3, 40):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(program.module()(x), mixture(x))
    kinds = {str(node.target) for node in program.graph.nodes if "medplib" in str(node.target)}
    assert kinds >= {f"medplib.{name}.default" for name in ("gate", "drop", "plan", "permute", "combine")}


def test_decode_compiles_and_exports():
    given = setting("one token", torch.float32)
    arguments = tuple(given[n] for n in ("tokens", "experts", "weights", "gate_up", "down"))

    class Decode(torch.nn.Module):
        def forward(self, *tensors):
            return ops.decode_ffn(*tensors)

    torch._dynamo.reset()
    expected = Decode()(*arguments)
    assert torch.equal(torch.compile(Decode(), fullgraph=True, backend="aot_eager")(*arguments), expected)
    assert torch.equal(torch.export.export(Decode(), arguments).module()(*arguments), expected)


def test_autocast_changes_neither_scores_nor_decode():
    given = setting("plain", torch.float32)
    arguments = tuple(given[n] for n in ("tokens", "experts", "weights", "gate_up", "down"))
    logits, out = ops.gate_logits(given["tokens"], given["weight"]), ops.decode_ffn(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.gate_logits(given["tokens"], given["weight"]), logits)
        assert torch.equal(ops.decode_ffn(*arguments), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("other", TYPES)
def test_weights_of_another_type_are_taken(dtype, other, device):
    given, precise = setting("plain", dtype, device), max(dtype, other, key=lambda kind: kind.itemsize)
    tokens = given["tokens"].requires_grad_(True)
    weight = given["weight"].to(other).requires_grad_(True)
    logits = ops.gate_logits(tokens, weight)
    torch.testing.assert_close(
        logits, (tokens.double() @ weight.double().T).to(logits.dtype), rtol=1e-5, atol=1e-5
    )
    assert logits.dtype == (torch.float64 if precise == torch.float64 else torch.float32)
    logits.sum().backward()
    assert tokens.grad.dtype == dtype
    assert weight.grad.dtype == other
    weights = given["weights"].to(other)
    placed = (given["rows"], given["order"], weights, given["position"])
    assert ops.combine(*placed).dtype == dtype
    chosen = (given["tokens"].detach(), given["experts"], weights, given["gate_up"], given["down"])
    assert ops.decode_ffn(*chosen).dtype == dtype


def test_scores_on_a_gpu_come_from_the_operator_from_the_first_call_on(monkeypatch):
    """It loads the kernels; the first scores by PyTorch and the next by a kernel would differ in bits."""
    called = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.append(operator)
            return operator(*args, **(kwargs or {}))

    monkeypatch.setattr(_loader, "_state", _loader._State())
    with FakeTensorMode():
        tokens, weight = torch.empty(3, 4, device="cuda"), torch.empty(2, 4, device="cuda")
        with Listen():
            ops.gate_logits(tokens, weight)
    assert called == [LIB.gate_logits.default]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", TYPES)
def test_without_gradients_the_same_numbers_come_without_a_history(without, dtype):
    given = setting("plain", dtype)
    tokens, weight = given["tokens"].requires_grad_(True), given["weight"].requires_grad_(True)

    def run():
        logits = ops.gate_logits(tokens, weight)
        _, experts, weights = ops.route(logits, 2)
        plan = ops.plan(experts, logits.shape[1])
        rows = ops.swiglu(ops.permute(tokens, plan.order, 2, plan.position))
        return logits, experts, weights, rows, ops.combine(rows, plan.order, weights, plan.position)

    wanted = run()
    with without():
        got = run()
    assert wanted[-1].requires_grad
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


# Wrong arguments


def test_wrong_arguments_are_refused_with_what_was_given():
    x, order = torch.randn(5, 4), torch.arange(5)
    one = torch.zeros(5, 1)
    wrong = [
        (lambda: ops.gate_logits(x, torch.randn(2, 3)), r"\(5, 4\) and \(2, 3\)"),
        (lambda: ops.gate(x, 5), "and 5"),
        (lambda: ops.gate(x, 1, "softmin"), "softmin"),
        (lambda: ops.gate(x, 1, selection=x[:2]), r"\(2, 4\)"),
        (lambda: ops.gate(x, 1, mask=torch.ones(4)), r"\(4,\)"),
        (lambda: ops.plan(order, 2), r"\(5,\)"),
        (lambda: ops.drop_overflow(one.long(), 2, -1), "-1"),
        (lambda: ops.drop_overflow(one.long(), 2, 1, priority=one, seed=1), "not both"),
        (lambda: ops.drop_overflow(one.long(), 2, 1, priority=x), r"\(5, 4\)"),
        (lambda: ops.uniform(3, torch.tensor(0.5)), "float32"),
        (lambda: ops.permute(x[0], order, 1), r"\(4,\)"),
        (lambda: ops.permute(x, order, 0), "and 0"),
        (lambda: ops.choose_top_k(x, 5), r"\(5, 4\) and 5"),
        (lambda: ops.combine(x, order[:3], one), r"\(3,\)"),
        (lambda: ops.combine(x, order, one, residual=x[:3]), r"\(3, 4\)"),
        (lambda: ops.swiglu(torch.randn(2, 3)), r"\(2, 3\)"),
        (
            lambda: ops.decode_ffn(x, one.long(), one, torch.randn(2, 6, 4), torch.randn(2, 4, 4)),
            r"\(2, 4, 4\)",
        ),
        (
            lambda: ops.decode_ffn(x, one.long(), x, torch.randn(2, 6, 4), torch.randn(2, 4, 3)),
            r"\(5, 1\) and \(5, 4\)",
        ),
        (
            lambda: ops.decode_ffn(x.half(), one.long(), one, torch.randn(2, 6, 4), torch.randn(2, 4, 3)),
            "float16",
        ),
    ]
    for call, words in wrong:
        with pytest.raises(InputError, match=words):
            call()


def test_status_says_for_each_device_which_kernels_run_and_why():
    status = ops.status()
    assert set(status) == {"cpu", "cuda"}
    assert all(text.startswith(("PyTorch (", "compiled ", "not used yet")) for text in status.values())
