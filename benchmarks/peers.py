"""The layers that `routing.py` times side by side: same gate, same experts, same input, same answer.

T tokens, D width, H hidden width, E experts, K experts per token.

A peer is built from one set of weights (`Weights`) and maps (T, D) to (T, D): the sum over the K chosen
experts of the raw softmax probability times the expert's SwiGLU. What cannot be had here says why.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib.experts import MoERouter, SwiGLU


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass
class Weights:
    """gate (E, D) float32; gate_up (E, 2H, D), gate first; down (E, D, H)."""

    gate: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int

    @classmethod
    def draw(cls, dim, hidden, experts, top_k, device, dtype) -> Weights:
        make = dict(device=device)
        gate = torch.randn(experts, dim, **make) * dim**-0.5
        gate_up = (torch.randn(experts, 2 * hidden, dim, **make) * dim**-0.5).to(dtype)
        down = (torch.randn(experts, dim, hidden, **make) * hidden**-0.5).to(dtype)
        return cls(gate, gate_up, down, top_k)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, H, E."""
        return self.down.shape[1], self.down.shape[2], self.down.shape[0]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts (T, K) and their probabilities (T, K), by plain PyTorch."""
        probabilities = (x.float() @ self.gate.T).softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        return experts, weights

    def fill(self, experts) -> None:
        """Copy the experts' weights into SwiGLU modules."""
        _, hidden, _ = self.sizes
        with torch.no_grad():
            for e, expert in enumerate(experts):
                expert.gate_proj.weight.copy_(self.gate_up[e, :hidden])
                expert.up_proj.weight.copy_(self.gate_up[e, hidden:])
                expert.down_proj.weight.copy_(self.down[e])

    def expert(self) -> SwiGLU:
        """One SwiGLU of these sizes, device and type."""
        dim, hidden, _ = self.sizes
        with torch.device(self.down.device):
            return SwiGLU(dim, hidden).to(self.down.dtype)


def reference(w: Weights, x: Tensor) -> Tensor:
    """The answer, slowly, in float32: (T, D)."""
    _, hidden, num_experts = w.sizes
    experts, weights = w.choose(x)
    out = torch.zeros(x.shape, device=x.device)
    for e in range(num_experts):
        up = x.float() @ w.gate_up[e].float().T
        answer = (F.silu(up[:, :hidden]) * up[:, hidden:]) @ w.down[e].float().T
        share = (weights * (experts == e)).sum(-1, keepdim=True)
        out += share * answer
    return out


class Dense(nn.Module):
    """One expert's FFN on every token: what a mixture is measured against. LLaMA's block, three linears."""

    def __init__(self, w: Weights) -> None:
        super().__init__()
        self.ffn = w.expert()
        w.fill([self.ffn])

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


class MedPLIBRouter(MoERouter):
    """Ours."""

    def __init__(self, w: Weights, pack: bool = True) -> None:
        dim, hidden, experts = w.sizes
        with torch.device(w.down.device):
            super().__init__(dim, experts, hidden_dim=hidden, top_k=w.top_k)
        self.experts.to(w.down.dtype)
        w.fill(self.experts.values())
        with torch.no_grad():
            self.gate.weight.copy_(w.gate)
        if pack:
            self.pack()


class Gated(nn.Module):
    """A plain gate before somebody's `mix`. stacked: keep the experts' weights as two parameters."""

    def __init__(self, w: Weights, stacked: bool = True) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Parameter(w.gate.clone()), w.top_k
        if stacked:
            self.gate_up, self.down = nn.Parameter(w.gate_up.clone()), nn.Parameter(w.down.clone())

    def forward(self, x: Tensor) -> Tensor:
        probabilities = (x.float() @ self.gate.T).softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        return self.mix(x, experts, weights)

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (T, D), experts (T, K), weights (T, K) float32 -> (T, D)."""
        raise NotImplementedError


class Loop(Gated):
    """What most papers' code does: for each expert, the tokens that chose it, added up by index."""

    def __init__(self, w: Weights) -> None:
        super().__init__(w, stacked=False)
        self.experts = nn.ModuleList(w.expert() for _ in range(w.sizes[2]))
        w.fill(self.experts)

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(experts == e)
            if len(token):
                answer = expert(x[token]) * weights[token, choice, None].to(x.dtype)
                out = out.index_add(0, token, answer)
        return out


class Transformers(Gated):
    """transformers' Mixtral experts, with one of its implementations (or ours)."""

    def __init__(self, w: Weights, implementation: str) -> None:
        super().__init__(w, stacked=False)
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        if implementation == "medplib":
            from medplib.experts.backend import register_backend

            register_backend()
        dim, hidden, experts = w.sizes
        config = MixtralConfig(
            hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=w.top_k
        )
        config._experts_implementation = implementation
        with torch.device(w.down.device):
            self.experts = MixtralExperts(config).to(w.down.dtype)
        with torch.no_grad():
            self.experts.gate_up_proj.copy_(w.gate_up)
            self.experts.down_proj.copy_(w.down)

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, experts, weights.to(x.dtype))


class DeepSpeed(nn.Module):
    """DeepSpeed's MoE layer as the published model sets it: capacity 2 in evaluation, 1.5 in training.

    folder: an unpacked release, of which `deepspeed/moe` alone is imported (its communication is replaced by
    a plain copy, as on one device); None: the installed release.
    """

    def __init__(self, w: Weights, folder: Path | None = None) -> None:
        super().__init__()
        if w.top_k > 1:
            raise Absent("its top-2 gate renormalises and adds noise: another function")
        gate_class, layer_class, experts_class = _deepspeed(folder)
        dim, _, experts = w.sizes
        with torch.device(w.down.device):
            gate = gate_class(dim, experts, 1, 1.5, 2.0, 0, None, True, True)
        with torch.no_grad():
            gate.wg.weight.copy_(w.gate)
        bundle = experts_class(w.expert(), experts)
        w.fill(bundle.deepspeed_experts)
        self.layer = layer_class(gate, bundle, "ep", 1, experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)


def _deepspeed(folder: Path | None):
    """TopKGate, MOELayer and Experts of a release."""
    if folder is None:
        try:
            from deepspeed.moe.experts import Experts
            from deepspeed.moe.sharded_moe import MOELayer, TopKGate
        except Exception as error:  # a package that fails in many ways where no GPU or compiler is
            raise Absent(f"deepspeed cannot be imported ({type(error).__name__}: {error})") from error
        return TopKGate, MOELayer, Experts
    source = folder / "deepspeed" / "moe"
    if not (source / "sharded_moe.py").is_file():
        raise Absent(f"no deepspeed/moe/sharded_moe.py in {folder.name}")
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "deepspeed"}
    for name in kept:
        del sys.modules[name]
    try:
        for name, content in _STUBS.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            module.__path__ = []
            sys.modules[name] = module
        found = {}
        for name in ("sharded_moe", "experts"):
            spec = importlib.util.spec_from_file_location(f"deepspeed.moe.{name}", source / f"{name}.py")
            found[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update(kept)
    return found["sharded_moe"].TopKGate, found["sharded_moe"].MOELayer, found["experts"].Experts


class _Timer:
    """Stands in for DeepSpeed's timers, which are off."""


def _same(tensor: Tensor, dim: int = 0) -> Tensor:
    return tensor


_groups = types.SimpleNamespace(_get_expert_model_parallel_world_size=lambda: 1)
_comm = types.SimpleNamespace(all_to_all_single=lambda output, input, group=None: output.copy_(input))
_STUBS = {
    "deepspeed": {"comm": _comm},
    "deepspeed.comm": vars(_comm),
    "deepspeed.utils": {"logger": None, "groups": _groups},
    "deepspeed.utils.timer": {"SynchronizedWallClockTimer": _Timer},
    "deepspeed.moe": {},
    "deepspeed.moe.mappings": {"drop_tokens": _same, "gather_tokens": _same},
}


def build_peers(w: Weights, deepspeed_pin: Path | None, only: list[str] | None) -> tuple[dict, dict]:
    """{name: module} of those that can be had, and {name: why not} of the others; "dense" comes first."""
    from kernel_peers import KERNEL_PEERS

    makers = {
        "dense": lambda: Dense(w),
        "medplib": lambda: MedPLIBRouter(w),
        "loop": lambda: Loop(w),
        "transformers eager": lambda: Transformers(w, "eager"),
        "transformers grouped_mm": lambda: Transformers(w, "grouped_mm"),
        "transformers batched_mm": lambda: Transformers(w, "batched_mm"),
        "transformers medplib": lambda: Transformers(w, "medplib"),
        "deepspeed 0.13.1": lambda: _pinned(w, deepspeed_pin),
        "deepspeed installed": lambda: DeepSpeed(w),
        **{name: partial(make, w) for name, make in KERNEL_PEERS.items()},
    }
    peers, absent = {}, {}
    for name, make in makers.items():
        if only and name != "dense" and not any(word in name for word in only):
            continue
        try:
            peers[name] = make()
        except (Absent, ImportError) as error:
            absent[name] = str(error)[:160]
        except Exception as error:  # another's package may fail in any way
            absent[name] = f"fails: {type(error).__name__}: {str(error)[:120]}"
    return peers, absent


def _pinned(w: Weights, folder: Path | None) -> DeepSpeed:
    if folder is None:
        raise Absent(
            "give --deepspeed-pin FOLDER (pip download --no-deps --no-binary :all: deepspeed==0.13.1)"
        )
    return DeepSpeed(w, folder)
