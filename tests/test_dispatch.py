"""Dispatch: every way of giving tokens to experts gives the same sum; compiled, it is one graph."""

import peft
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from medplib.errors import InputError
from medplib.experts import (
    MoERouter,
    collect_aux_losses,
    context,
    count_routing,
    dispatch,
    grouped,
    record_routing,
    routing_mask,
)
from medplib.experts.context import Padding
from medplib.experts.dispatch import mix
from medplib.experts.grouped import group_experts, packed_swiglu
from medplib.experts.mlp import GELUMLP, SwiGLU

DIM = 6


def slow(tokens, experts, weights, modules):
    """One token and one choice at a time."""
    out = torch.zeros_like(tokens, dtype=weights.dtype)
    for t in range(len(tokens)):
        for k in range(experts.shape[1]):
            if experts[t, k] < len(modules):
                out[t] += weights[t, k] * list(modules.values())[experts[t, k]](tokens[t : t + 1])[0]
    return out


def draw(num_tokens, top_k, kind=torch.float32, dim=DIM, hidden=5):
    """Tokens, experts (0 to 3, 4 for nobody), weights and four experts."""
    torch.manual_seed(num_tokens)
    modules = MoERouter(dim, 4, hidden_dim=hidden).to(kind).experts
    tokens = torch.randn(num_tokens, dim, dtype=kind, requires_grad=True)
    experts = torch.stack([torch.randperm(5)[:top_k] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, top_k, dtype=torch.promote_types(kind, torch.float32))
    return tokens, experts, weights.requires_grad_(), modules


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("way", ["_mix_few", "_mix_sorted", "_mix_everywhere"])
@pytest.mark.parametrize("num_tokens", [1, 2, 30])
def test_every_way_gives_the_slow_sum_and_its_gradients(way, num_tokens, top_k):
    tokens, experts, weights, modules = draw(num_tokens, top_k, torch.float64)
    results = []
    for run in (slow, getattr(dispatch, way)):
        out = run(tokens, experts, weights, modules)
        inputs = (tokens, weights, *modules.parameters())
        wanted = out.square().sum() + 0 * tokens.sum()
        results.append((out, *torch.autograd.grad(wanted, inputs, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        if ours is None or theirs is None:  # an expert without tokens
            assert (0 if ours is None else ours.abs().sum()) == (0 if theirs is None else theirs.abs().sum())
        else:
            torch.testing.assert_close(ours, theirs)


def test_grouped_products_of_any_size_give_the_slow_sum_and_its_gradients():
    tokens, experts, weights, modules = draw(30, 2, torch.float64)
    out = dispatch._mix_tables(tokens, experts, weights, group_experts(tokens, modules, None), 4)
    wanted = slow(tokens, experts, weights, modules)
    torch.testing.assert_close(out, wanted)
    inputs = (tokens, weights, *modules.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad(x.square().sum(), inputs) for x in (out, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_grouped_products_in_bfloat16_give_the_slow_sum_and_its_gradients():
    tokens, experts, weights, modules = draw(30, 2, torch.bfloat16, 16, 24)
    out = dispatch._mix_tables(tokens, experts, weights, group_experts(tokens, modules, None), 4)
    wanted = slow(tokens, experts, weights, modules)
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=5e-2)
    inputs = (tokens, weights, *modules.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(out.float().square().sum(), inputs),
        torch.autograd.grad(wanted.float().square().sum(), inputs),
        strict=True,
    ):
        assert (ours - theirs).float().norm() < 0.03 * theirs.float().norm()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("top_k", [1, 3])
def test_few_tokens_give_what_they_give_among_many(kind, top_k):
    tokens, experts, weights, modules = draw(3, top_k, kind)
    few = mix(tokens, experts, weights, modules)
    fill = dispatch.FEW  # more tokens, which no expert gets
    many = mix(
        torch.cat([tokens, tokens[:1].expand(fill, -1)]),
        torch.cat([experts, torch.full((fill, top_k), 4)]),
        torch.cat([weights, weights[:1].expand(fill, -1)]),
        modules,
    )
    assert few.dtype == kind
    assert torch.equal(few, many[:3])


def test_tokens_without_an_expert_give_zero():
    for count in (1, 100):
        tokens, experts, weights, modules = draw(count, 1)
        assert (mix(tokens, torch.full_like(experts, 4), weights, modules) == 0).all()


def test_expert_with_a_hook_or_an_activation_of_its_own_is_called_and_not_bypassed():
    modules = draw(1, 1, torch.bfloat16, 16, 24)[3]
    tokens = torch.randn(2, 16, dtype=torch.bfloat16)
    assert group_experts(tokens, modules, None) is not None
    hook = modules["expert_1"].register_forward_pre_hook(lambda *_: None)
    assert group_experts(tokens, modules, None) is None
    hook.remove()
    hook = modules["expert_1"].up_proj.register_forward_hook(lambda *_: None)
    assert group_experts(tokens, modules, None) is None
    hook.remove()
    assert group_experts(tokens.float(), modules, None) is None
    hook = modules["expert_1"].register_full_backward_hook(lambda *_: None)
    assert group_experts(tokens, modules, None) is None
    hook.remove()
    for module in (modules["expert_1"], modules["expert_1"].up_proj):
        module.forward = lambda x: x  # as accelerate's hooks do
        assert group_experts(tokens, modules, None) is None
        del module.forward
    assert group_experts(tokens, modules, None) is not None
    modules["expert_1"].up_proj = nn.Linear(16, 24, bias=True, dtype=torch.bfloat16)
    assert group_experts(tokens, modules, None) is None
    modules["expert_1"] = GELUMLP(16, 24).to(torch.bfloat16)
    assert group_experts(tokens, modules, None) is None


def test_only_plain_swiglu_experts_that_lie_together_are_streamed():
    router, tokens = MoERouter(16, 2, hidden_dim=24), torch.randn(1, 16)
    expert = router.experts["expert_1"]

    def streamed():
        return packed_swiglu(tokens, router.experts, router.packed_weights) is not None

    assert streamed()
    assert packed_swiglu(tokens, router.experts, None) is None
    assert packed_swiglu(tokens.double(), router.experts, router.packed_weights) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not streamed()
    for module in (expert, expert.down_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *_: None)
            assert not streamed()
            hook.remove()
        module.forward = lambda x: x
        assert not streamed()
        del module.forward
    assert streamed()
    plain = expert.up_proj
    expert.up_proj = nn.Linear(16, 24)
    assert not streamed()
    expert.up_proj = nn.Linear(16, 24, bias=False)  # plain, but elsewhere in memory
    assert not streamed()
    expert.up_proj = plain
    assert streamed()
    plain.weight.data = plain.weight.data.clone()
    assert not streamed()
    router.pack()
    assert streamed()
    add_lora(router.experts, 4)
    assert router.packed_weights() is not None
    assert not streamed()


# torch.compile: the same answers from one graph


def make_router(pack=True, **options):
    """In bfloat16, with sizes that grouped products take."""
    torch.manual_seed(0)
    return MoERouter(16, 3, hidden_dim=24, top_k=2, pack=pack, **options).to(torch.bfloat16).eval()


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def padded():
    torch.manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randn(2, 7, 16).to(torch.bfloat16), mask


@pytest.mark.parametrize("traced", [context.TRACED, False])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_compiled_router_is_one_graph_with_and_without_a_mask(pack, gradient, traced, monkeypatch):
    monkeypatch.setattr(context, "TRACED", traced)
    router, (x, mask) = make_router(pack), padded()
    run = compiled(router)
    with torch.set_grad_enabled(gradient):
        for given in (None, mask, None):
            with routing_mask(given):
                wanted, got = router(x), run(x)
            torch.testing.assert_close(got, wanted, atol=5e-3, rtol=2e-2)
    assert given is None
    with routing_mask(mask):
        assert (run(x)[0, :3] == 0).all()


def test_compiled_router_with_experts_of_any_kind_is_one_graph():
    router = MoERouter(DIM, {"a": nn.Linear(DIM, DIM), "b": nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())})
    x = torch.randn(20, DIM)
    torch.testing.assert_close(compiled(router)(x), router(x))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [dispatch.STREAMED + 1, 300])
def test_compiled_experts_get_their_own_rows_and_no_others(kind, tokens):
    router = MoERouter(16, 2, hidden_dim=24).to(kind).eval()
    x, run = torch.randn(tokens, 16).to(kind), compiled(router)
    with torch.no_grad():
        run(x)
        with torch.profiler.profile(record_shapes=True) as profile:
            run(x)
    products = [event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    for weight, times in (([16, 24], 2), ([24, 16], 1)):  # gate and up projection, down projection
        assert sum(shapes[0][0] for shapes in products if shapes[1] == weight) == times * tokens
    assert len(products) <= 1 + 6  # the router's gate, and three of each expert


def add_lora(module, rank, targets=("gate_proj", "up_proj", "down_proj"), dropout=0.0, **settings):
    """Adapters whose B is not zero."""
    present = {name.split(".")[-1] for name, _ in module.named_modules()}
    settings |= {"r": rank, "lora_alpha": 3, "lora_dropout": dropout}
    config = peft.LoraConfig(target_modules=sorted(present & set(targets)), **settings)
    peft.inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter)


def experts_of(kind):
    """A router whose experts are more than plain SwiGLU blocks."""
    torch.manual_seed(0)
    block, *rest = kind.split(", ")
    options = {
        "SwiGLU": {},
        "SwiGLU with biases": {"bias": True},
        "GELU": {},
        "GELU without biases": {"bias": False},
    }
    make = GELUMLP if block.startswith("GELU") else SwiGLU
    router = MoERouter(16, {name: make(16, 24, **options[block]) for name in ("a", "b", "c")}, top_k=2)
    experts = router.experts
    for word in rest:
        if word == "LoRA":
            add_lora(experts, 4)
        elif word == "LoRA on one":
            add_lora(experts["b"], 4)
        elif word == "LoRA of other ranks":
            add_lora(experts["a"], 2), add_lora(experts["c"], 5, ("up_proj",))
        elif word == "DoRA":
            add_lora(experts, 4, use_dora=True)
        elif word == "packed":
            router.pack()
    return router


GROUPED = [
    "SwiGLU with biases", "GELU", "GELU without biases, packed", "SwiGLU, LoRA", "SwiGLU, packed, LoRA",
    "SwiGLU with biases, LoRA on one", "SwiGLU, LoRA of other ranks", "GELU, LoRA",
]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [*GROUPED, "SwiGLU"])
def test_compiled_experts_give_what_they_give_uncompiled_and_their_gradients(kind, autocast):
    router, x = experts_of(kind), torch.randn(40, 16)
    limit = 6e-2 if autocast else 1e-5
    found = []
    for run in (router, compiled(router)):
        tokens = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(tokens)
        inputs = [tokens, *(p for p in router.parameters() if p.requires_grad)]
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), inputs)))
    assert found[0][0].dtype == found[1][0].dtype
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).float().norm() <= limit * wanted.float().norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, wanted = compiled(router)(x[:2]), router(x[:2])
    assert (got - wanted).float().norm() <= limit * wanted.float().norm()


@pytest.mark.parametrize("kind", GROUPED)
def test_compiled_experts_of_any_taken_kind_get_their_own_rows(kind):
    router, x = experts_of(kind).eval(), torch.randn(40, 16)
    run = compiled(router)
    with torch.no_grad():
        run(x)
        with torch.profiler.profile(record_shapes=True) as profile:
            run(x)
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    inward = 1 if kind.startswith("GELU") else 2
    assert sum(one[0][0] for one in shapes if one[1] == [16, 24]) == inward * 80  # 2 experts per token
    assert sum(one[0][0] for one in shapes if one[1] == [24, 16]) == 80


def test_compiled_adapters_drop_only_while_they_train():
    router = experts_of("SwiGLU")
    add_lora(router.experts, 4, dropout=0.5)
    x, run = torch.randn(40, 16), compiled(router)
    assert not torch.equal(run(x), run(x))
    router.eval()
    torch.testing.assert_close(run(x), router(x))
    for layer in router.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.enable_adapters(False)
    torch.testing.assert_close(run(x), router(x))


def test_adapters_that_are_more_than_low_rank_are_called_and_not_bypassed():
    router, x = experts_of("SwiGLU, LoRA"), torch.randn(3, 16)
    assert group_experts(x, router.experts, None) is not None
    assert group_experts(x, experts_of("SwiGLU, DoRA").experts, None) is None
    layer = router.experts["a"].up_proj
    layer.lora_B["default"].register_forward_hook(lambda *_: None)
    assert group_experts(x, router.experts, None) is None
    layer.merge()  # then they are not called
    assert group_experts(x, router.experts, None) is not None


@pytest.mark.parametrize("kind", [*GROUPED, "SwiGLU", "SwiGLU, packed"])
def test_tables_as_a_gpu_takes_them_give_what_the_experts_give(kind):
    router, x = experts_of(kind).to(torch.bfloat16), torch.randn(40, 16).to(torch.bfloat16)
    experts, weights = torch.randint(0, 4, (40, 2)), torch.rand(40, 2)  # 3 is nobody
    views = router.packed_weights()
    assert (views is not None) == ("packed" in kind)
    tables = grouped._tables(grouped._layers(router.experts), views, torch.bfloat16)
    assert isinstance(tables, grouped.PlainSwiGLU) == (kind in ("SwiGLU", "SwiGLU, packed"))
    out = dispatch._mix_tables(x, experts, weights, tables, 3)
    wanted = slow(x, experts, weights, router.experts)
    assert (out.float() - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize(("experts", "width", "taken"), [(2, 16, True), (60, 24, True), (8, 12, False)])
def test_tables_for_a_gpu_have_rows_of_whole_16_bytes_and_any_number_of_experts(
    experts, width, taken, monkeypatch
):
    monkeypatch.setattr(grouped, "_generation", lambda device: 9)
    with FakeTensorMode():
        tokens = torch.empty(5, width, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(experts, 32, width, dtype=torch.bfloat16, device="cuda")
    assert grouped._waits_for_nothing(tokens, torch.bfloat16, table) == taken


def test_compiled_code_is_not_taken_for_an_export_which_may_keep_no_packed_weights():
    class Asks(nn.Module):
        def forward(self, x):
            return x + (1 if grouped.is_exporting() else 0)

    zero = torch.zeros(1)
    assert torch.compile(Asks(), backend="eager", fullgraph=True)(zero) == 0
    for strict in (True, False):
        assert torch.export.export(Asks(), (zero,), strict=strict).module()(zero) == 1


class Namesake(SwiGLU):
    """Other people's classes of a known name."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Module):
    """The name without the layers."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(16, 16)

    def forward(self, x):
        return self.w1(x)


Namesake.__name__ = Renamed.__name__ = "SwiGLU"


@pytest.mark.parametrize("make", [lambda: Namesake(16, 24), Renamed])
def test_compiled_experts_that_only_share_a_name_are_called(make):
    torch.manual_seed(0)
    router, x = MoERouter(16, {"a": make(), "b": make()}), torch.randn(40, 16)
    torch.testing.assert_close(compiled(router)(x), router(x))


def test_compiled_weights_are_those_of_the_moment_however_they_were_put_there():
    router, x = make_router().float(), torch.randn(40, 16)
    run = compiled(router)
    with torch.no_grad():
        run(x)
        for parameter in router.experts.parameters():
            parameter.data = parameter * 2  # as merging, flattening and sharding do
        torch.testing.assert_close(run(x), router(x))
        assert router.packed_weights() is None
        assert torch.compile(router.packed_weights, fullgraph=True, backend="eager")() is None


def test_compiled_frozen_expert_costs_no_gradient():
    def products(run, router):
        """Multiplications of all matrix products, forward and backward."""
        with torch.profiler.profile(record_shapes=True) as profile:
            run(x).sum().backward()
        router.zero_grad(set_to_none=True)
        shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
        return sum(left[0] * left[1] * right[1] for left, right, *_ in shapes)

    router, x = MoERouter(16, 2, hidden_dim=24), torch.randn(40, 16, requires_grad=True)
    run = compiled(router)
    run(x).sum().backward()
    whole = products(run, router)
    router.freeze("expert_0")
    run = compiled(router)
    run(x).sum().backward()
    assert products(run, router) == products(router, router) < whole
    assert all(p.grad is None for p in router.experts["expert_0"].parameters())


def test_compiled_router_counts_the_rows_it_gives():
    router, x = MoERouter(16, 3, hidden_dim=24), torch.randn(80, 16)
    router.compile(fullgraph=True, backend="aot_eager")
    router(x)
    assert router.cost_report(x).layers["router"].rows == 80


@pytest.mark.parametrize("experts", [2, {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}])
def test_compiled_padding_that_is_no_number_reaches_no_gradient(experts):
    router, x = MoERouter(16, experts, hidden_dim=24), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    x[~mask] = float("nan")
    found = []
    for run in (router, compiled(router)):
        run(x, mask)[mask].sin().sum().backward()
        found.append([p.grad.clone() for p in router.parameters()])
        router.zero_grad()
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "options", [{"capacity_factor": 1.25}, {"capacity_factor": 1.5, "parity": "deepspeed"}]
)
def test_compiled_capacity_follows_the_number_of_tokens(options):
    router = MoERouter(16, 2, hidden_dim=24, **options)
    run = compiled(router)
    for count in (40, 30, 20, 40):
        x = torch.randn(count, 16)
        if "parity" in options:  # it drops at random, by its own count of the forwards
            assert run(x).shape == x.shape
        else:
            torch.testing.assert_close(run(x), router(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["SwiGLU", "GELU", "SwiGLU, LoRA", "SwiGLU, packed"])
def test_exported_router_takes_any_number_of_tokens(kind, strict):
    router = experts_of(kind).eval()
    shapes = {"x": {0: torch.export.Dim("tokens", min=2, max=4096)}}
    with torch.no_grad():
        exported = torch.export.export(router, (torch.randn(40, 16),), dynamic_shapes=shapes, strict=strict)
        for count in (2, 5, 40, 300):
            x = torch.randn(count, 16)
            torch.testing.assert_close(exported.module()(x), router(x))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_compiled_few_tokens_give_what_they_give_uncompiled(kind, tokens):
    router = MoERouter(16, 2, hidden_dim=24).to(kind).eval()
    x, run = torch.randn(tokens, 16).to(kind), compiled(router)
    with torch.no_grad():
        torch.testing.assert_close(run(x), router(x), atol=5e-3, rtol=2e-2)
    with torch.enable_grad():
        torch.testing.assert_close(run(x), router(x), atol=5e-3, rtol=2e-2)


def test_packed_weights_are_used_by_compiled_code_and_follow_the_parameters():
    router, (x, _) = make_router(), padded()
    run = compiled(router)
    with torch.no_grad():
        run(x)
        router.experts["expert_0"].down_proj.weight.zero_()
        router.experts["expert_1"].down_proj.weight.zero_()
        router.experts["expert_2"].down_proj.weight.zero_()
        assert (run(x) == 0).all()
        other = make_router(pack=False)
        router.load_state_dict(other.state_dict(), assign=True)  # now they lie apart
        torch.testing.assert_close(run(x), other(x), atol=5e-3, rtol=2e-2)


def test_padding_that_is_routed_along_is_in_no_statistic_and_no_loss():
    router, (x, mask) = make_router(), padded()
    seen = []
    for run in (router, compiled(router)):
        with routing_mask(mask), count_routing(router) as statistics:
            run(x)
            seen.append(statistics.rows()[0])
    assert seen[0]["tokens"] == seen[1]["tokens"] == 11
    assert seen[0]["counts"] == seen[1]["counts"]
    assert seen[0]["probability"] == pytest.approx(seen[1]["probability"])
    assert seen[0]["entropy"] == pytest.approx(seen[1]["entropy"])
    assert seen[0]["margin"] == pytest.approx(seen[1]["margin"])

    heard = []
    for run in (router, lambda x: router._mix(x.flatten(0, 1), None, x.shape[:2], None, mask.flatten() > 0)):
        with routing_mask(mask), collect_aux_losses(router) as losses, record_routing(router) as trace:
            run(x)
        heard.append((losses.balance(), losses.sequence(), losses.z(), trace.layers["router"]))
    for ours, theirs in zip(heard[0][:3], heard[1][:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(heard[0][3].choices(), heard[1][3].choices().view(2, 7, 2))
    torch.testing.assert_close(heard[0][3].summary()["probability"], heard[1][3].summary()["probability"])


def test_capacity_with_padding_is_refused_where_the_number_of_tokens_is_not_known():
    router, (x, mask) = make_router(eval_capacity_factor=1.0), padded()
    with routing_mask(mask), pytest.raises(InputError, match="run this router eagerly"):
        router._mix(x.flatten(0, 1), None, x.shape[:2], None, mask.flatten() > 0)


def test_places_of_the_real_tokens_are_looked_up_once_for_all_layers():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    padding = Padding(mask)
    first = padding.positions(mask.shape, mask.device)
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert padding.positions(mask.shape, mask.device) is first
    mask[0, 0] = 1  # as a cache that grows in place does
    assert padding.positions(mask.shape, mask.device) is None
