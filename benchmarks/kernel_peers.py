"""Other people's kernels for a mixture of experts, as peers of `peers.py`. Each needs its own package.

    pip install --no-deps liger-kernel moe-ops grouped-mm-bf16 fms-acceleration-moe megatron-core \\
        sgl-deep-gemm

All but Megatron's need a GPU. T tokens, D width, H hidden width, E experts, K experts per token, n = T*K.

Their calls were compared with the reference on a CPU in float32 under TRITON_INTERPRET=1 (liger-kernel
0.8.5, moe-ops 0.1.0, fms-acceleration-moe 0.4.6) or as they are (megatron-core 0.16.1): output, gradients of
input, gate and weights within 1e-6. grouped-mm-bf16 and sgl-deep-gemm take no CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import Absent, Gated, Weights
from torch import Tensor


def _swiglu(both: Tensor) -> Tensor:
    """(n, 2H), gate first -> (n, H), in plain PyTorch."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _needs_gpu(w: Weights) -> None:
    if not w.down.is_cuda:
        raise Absent("needs a GPU")


class KernelPeer(Gated):
    """One that needs the module called `package`, kept as `_library`, and a GPU unless it says otherwise."""

    package: str
    needs_gpu = True

    def __init__(self, w: Weights) -> None:
        if self.needs_gpu:
            _needs_gpu(w)
        super().__init__(w)
        self._library = importlib.import_module(self.package)


class Sorted(KernelPeer):
    """Rows sorted, gathered, weighed and added up by plain PyTorch; `product` is the package's own.

    Weights are kept as the packages take them: gate_up (E, 2H, D), down (E, D, H).
    """

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        order = experts.reshape(-1).argsort(stable=True)  # (n,)
        counts = torch.histc(experts.reshape(-1).float(), len(self.down), 0, len(self.down) - 1)  # (E,)
        ends = counts.cumsum(0).to(torch.int32)
        token = order // experts.shape[1]
        hidden = _swiglu(self.product(x[token], self.gate_up, ends))  # (n, H)
        answers = self.product(hidden, self.down, ends) * weights.reshape(-1)[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, answers)

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """rows (n, D) by expert, weights (E, H, D), ends (E,) -> (n, H)."""
        raise NotImplementedError


class TritonGrouped(Sorted):
    """grouped-mm-bf16: F.grouped_mm's contract in Triton."""

    package = "grouped_mm_bf16"

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return self._library.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


class DeepGemm(Sorted):
    """sgl-deep-gemm: bf16 grouped product on rows padded, per expert, to its alignment. Forward only."""

    package = "deep_gemm"

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        if self.training:
            raise Absent("it has no backward")
        place, owner = padded_places(ends, len(rows), self._library.get_mk_alignment_for_contiguous_layout())
        padded = rows.new_zeros(len(owner), rows.shape[1]).index_copy(0, place, rows)
        out = rows.new_empty(len(owner), weights.shape[1])
        self._library.m_grouped_bf16_gemm_nt_contiguous(padded, weights.detach(), out, owner)
        return out[place]


def padded_places(ends: Tensor, rows: int, alignment: int) -> tuple[Tensor, Tensor]:
    """ends (E,) -> where each row goes when every expert begins at a multiple of `alignment` (rows,), and the
    expert of each place, -1 where it is padding (rows + E * alignment rounded up,) int32. Host-free."""
    sizes = ends.diff(prepend=ends.new_zeros(1))
    rounded = (sizes + alignment - 1) // alignment * alignment  # (E,)
    starts = rounded.cumsum(0) - rounded
    expert = torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)
    place = starts[expert] + torch.arange(rows, device=ends.device) - (ends - sizes)[expert]
    total = -(-(rows + len(ends) * alignment) // alignment) * alignment
    owner = torch.full((total,), -1, dtype=torch.int32, device=ends.device)
    return place, owner.index_copy(0, place, expert.to(torch.int32))


class Liger(KernelPeer):
    """Liger's fused mixture: gather, product and SwiGLU in one Triton kernel."""

    package = "liger_kernel.ops.fused_moe"

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        function = self._library.LigerFusedMoEFunction
        return function.apply(x, self.gate_up, self.down, experts.to(torch.int32), weights.to(x.dtype))


class MoEOps(KernelPeer):
    """moe-ops: permute by counting sort, grouped products and unpermute, all in Triton."""

    package = "moe_ops"

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        num_tokens, k = experts.shape
        rows, places, offsets = self._library.permute(x, experts, 0, len(self.down))
        hidden = _swiglu(self._library.grouped_gemm(rows, self.gate_up, offsets, True))
        answers = self._library.grouped_gemm(hidden, self.down, offsets, True)
        return self._library.unpermute(answers, places, weights, num_tokens, k)


class ScatterMoE(Gated):
    """ScatterMoE's kernels as fms-acceleration-moe ships them: rows are read scattered, never permuted."""

    def __init__(self, w: Weights) -> None:
        _needs_gpu(w)
        super().__init__(w)
        self._ops = _scattermoe()

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        num_experts, k = len(self.down), experts.shape[1]
        owners, order = experts.reshape(-1).sort()
        with torch.no_grad():
            blocks, ends = self._ops.padded_block_indices(owners, num_experts)
        shared = (owners, order, blocks, ends)
        both = self._ops.scattered_experts(x, self.gate_up.transpose(1, 2), k, *shared, grouped_out=True)
        return self._ops.scattered_experts(
            _swiglu(both), self.down.transpose(1, 2), 1, *shared, gates=weights.to(x.dtype), grouped_in=True
        )


@functools.cache
def _scattermoe():
    """The kernels' module alone: the package around it would import the rest of its project."""
    spec = importlib.util.find_spec("fms_acceleration_moe")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'fms_acceleration_moe'")
    folder = Path(next(iter(spec.submodule_search_locations)))
    name = "fms_acceleration_moe"
    for part in ("", "utils", "scattermoe_utils", "khd"):
        name, folder = (f"{name}.{part}", folder / part) if part else (name, folder)
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    return importlib.import_module(f"{name}.kernels.ops")


class Megatron(KernelPeer):
    """Megatron Core's permute and unpermute without TransformerEngine, around F.grouped_mm (a loop on the
    CPU)."""

    package, needs_gpu = "megatron.core.transformer.moe.moe_utils", False

    def mix(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        shape = (len(x), len(self.down))
        chosen = torch.zeros(shape, dtype=torch.bool, device=x.device).scatter(1, experts, True)
        shares = torch.zeros(shape, device=x.device).scatter(1, experts, weights)
        rows, _, order = self._library.permute(x, chosen)
        ends = chosen.sum(0).cumsum(0).to(torch.int32)
        hidden = _swiglu(self.product(rows, self.gate_up, ends))
        answers = self.product(hidden, self.down, ends)
        return self._library.unpermute(answers, order, x.shape, probs=shares.to(x.dtype), routing_map=chosen)

    def product(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """rows (n, D) by expert, weights (E, H, D), ends (E,) -> (n, H)."""
        if rows.is_cuda:
            return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        parts = rows.tensor_split(ends[:-1].long())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])


KERNEL_PEERS = {
    "liger": Liger,
    "moe-ops": MoEOps,
    "grouped-mm-bf16": TritonGrouped,
    "scattermoe (fms)": ScatterMoE,
    "megatron unfused": Megatron,
    "deep_gemm": DeepGemm,
}
