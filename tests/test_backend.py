"""transformers' mixtures on our operators: outputs and gradients are those of its own loop."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from medplib.experts.backend import experts_forward, register_backend  # noqa: E402

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def make_model(kind):
    register_backend()
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_local_experts=4)
    elif kind == "qwen2":
        config = transformers.Qwen2MoeConfig(
            **SMALL, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=8
        )
    else:
        config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "qwen3"])
def test_output_and_gradients_are_those_of_eager(kind):
    eager = make_model(kind)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("medplib")
    ids = torch.randint(0, 40, (2, 7))
    results = []
    for model in (eager, ours):
        logits = model(ids).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (wanted, wanted_grads), (got, grads) = results
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert any("experts" in name for name in grads)
    for name, gradient in wanted_grads.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_generation_is_that_of_eager():
    eager = make_model("mixtral")
    ids = torch.randint(0, 40, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = eager.generate(ids, **settings)
    eager.set_experts_implementation("medplib")
    assert torch.equal(eager.generate(ids, **settings), wanted)


def test_model_can_be_loaded_with_the_backend(tmp_path):
    eager = make_model("mixtral")
    eager.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="medplib")
    ids = torch.randint(0, 40, (1, 5))
    torch.testing.assert_close(ours(ids).logits, eager(ids).logits, atol=1e-5, rtol=1e-5)


class Experts(nn.Module):
    """Experts of every layout that transformers knows."""

    def __init__(self, has_gate, has_bias, is_transposed, norm):
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.has_gate, self.has_bias = 3, has_gate, has_bias
        self.is_transposed, self.has_post_expert_norm = is_transposed, norm
        width = 10 if has_gate else 5
        shapes = {"gate_up_proj" if has_gate else "up_proj": (width, 4), "down_proj": (4, 5)}
        for name, (out, into) in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.randn(3, *((into, out) if is_transposed else (out, into))))
            )
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, out)))
        self.act_fn, self.post_expert_norm = nn.SiLU(), nn.LayerNorm(4)

    def _apply_gate(self, x):
        return self.act_fn(x[:, ::2]) * x[:, 1::2]  # interleaved, as some models have it

    def slow(self, x, index, weights):
        out = torch.zeros_like(x)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        for t, k in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).tolist():
            e = int(index[t, k])
            if e == 3:
                continue
            value = x[t][None]
            for name in (first, "down_proj"):
                weight = getattr(self, name)[e]
                value = value @ (weight if self.is_transposed else weight.T)
                if self.has_bias:
                    value = value + getattr(self, f"{name}_bias")[e]
                if name == first:
                    value = self._apply_gate(value) if self.has_gate else self.act_fn(value)
            value = self.post_expert_norm(value) if self.has_post_expert_norm else value
            out[t] += weights[t, k] * value[0]
        return out


@pytest.mark.parametrize(
    "layout",
    [
        (True, False, False, False),
        (True, True, True, False),
        (False, True, False, False),
        (False, False, False, True),
    ],
)
def test_every_layout_of_weights_gives_the_slow_result(layout):
    experts = Experts(*layout)
    x, index = torch.randn(9, 4), torch.stack([torch.randperm(4)[:2] for _ in range(9)])  # 3: nobody here
    weights = torch.rand(9, 2)
    torch.testing.assert_close(experts_forward(experts, x, index, weights), experts.slow(x, index, weights))
    nobody = torch.full_like(index, 3)
    assert (experts_forward(experts, x, nobody, weights) == 0).all()


def test_compiled_model_gives_the_same_output():
    model = make_model("mixtral")
    ids = torch.randint(0, 40, (2, 7))
    wanted = model(ids).logits
    model.set_experts_implementation("medplib")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "taken"), [((60, 64, 24), True), ((8, 64, 12), False), ((8, 12, 24), False)]
)
def test_on_a_gpu_widths_decide_what_a_grouped_product_takes_not_how_many_experts(monkeypatch, shape, taken):
    from types import SimpleNamespace

    from medplib.experts import grouped

    monkeypatch.setattr(grouped, "_generation", lambda device: 9)
    tokens = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    weight = torch.empty(shape, dtype=torch.bfloat16)
    assert grouped._waits_for_nothing(tokens, weight.dtype, weight) == taken
