"""Equal experts as grouped products: each expert's weights meet its own rows, however many these are.

T tokens, D width, H hidden width, E experts, n rows in the order of the experts, r rank of LoRA.

What the products take: SwiGLU blocks (LLaMA's MLP) and GELUMLP, of equal sizes, with or without biases and
LoRA; in any type on a CPU, in bfloat16 or under autocast to it on a GPU whose grouped product waits for no
device. Experts of other classes, with hooks or with other activations are not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medplib import ops
from medplib.experts.mlp import GELUMLP, SwiGLU

Packed = Callable[[], "dict[str, Tensor] | None"]
Table = Tensor | list[Tensor]  # (E, H, D), as a GPU's grouped product wants it; or each expert's own (H, D)

# transformers' classes whose forward is down(silu(gate(x)) * up(x)), by name: transformers need not be there.
_SWIGLU = tuple(
    (f"transformers.models.{model.lower()}.modeling_{model.lower()}", f"{model}MLP")
    for model in ("Llama", "Mistral", "Qwen2", "Qwen3")
)


@dataclass
class Layer:
    """The same linear layer of all experts: weight E times (H, D); bias E times (H, 8), whose first column it
    is.

    LoRA: E times (r, D) and E times (H, r), the latter scaled; dropout: the chance to drop a number of its
    input.
    """

    weight: Table
    bias: Table | None = None
    lora: tuple[Table, Table] | None = None
    dropout: float = 0.0

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (n, D) of which expert e has those up to ends[e] -> (n, H)."""
        out = grouped_mm(rows, self.weight, ends)
        if self.bias is not None:
            one = F.pad(out.new_ones(rows.shape[0], 1), (0, 7))
            out = out + grouped_mm(one, self.bias, ends)
        if self.lora is not None:
            down, up = self.lora
            kept = F.dropout(rows.to(down[0].dtype), self.dropout)
            out = (out + grouped_mm(grouped_mm(kept, down, ends), up, ends)).to(out.dtype)
        return out


@dataclass
class PlainSwiGLU:
    """SwiGLU experts and no more, as tables: gate_up (E, 2H, D), gate first; down (E, D, H)."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (n, D), ends (E,) -> (n, D), anything in rows of nobody."""
        return grouped_mm(ops.swiglu(grouped_mm(rows, self.gate_up, ends)), self.down, ends)


@dataclass
class Layered:
    """Experts layer by layer: down(silu(gate(x)) * up(x)), without a gate down(gelu(up(x)))."""

    gate: Layer | None
    up: Layer
    down: Layer

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (n, D), ends (E,) -> (n, D), anything in rows of nobody."""
        hidden = self.up(rows, ends)  # (n, H)
        if self.gate is None:
            return self.down(F.gelu(hidden), ends)
        return self.down(F.silu(self.gate(rows, ends)) * hidden, ends)


def grouped_mm(rows: Tensor, weights: Table, ends: Tensor) -> Tensor:
    """rows (n, D), weights E times (H, D) -> (n, H); a table goes to torch's own product, for bfloat16."""
    if isinstance(weights, Tensor):
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    return ops.grouped_mm(rows, weights, ends)


def packed_swiglu(
    tokens: Tensor, modules: Mapping[str, nn.Module], packed: Packed | None
) -> PlainSwiGLU | None:
    """The experts without a copy and without gradient, if they are plain SwiGLU blocks, packed, that a
    grouped product takes as they are."""
    if packed is None:
        return None
    for expert in modules.values():
        if not _is_plain_swiglu(expert):
            return None
    views = packed()
    if views is None or not groupable(tokens, views["down_proj.weight"]):
        return None
    return PlainSwiGLU(views["gate_up_proj.weight"], views["down_proj.weight"])


def group_experts(
    tokens: Tensor, modules: Mapping[str, nn.Module], packed: Packed | None
) -> PlainSwiGLU | Layered | None:
    """The experts for grouped products on tokens (T, D) of `product_type`, None if these take them not.

    On a CPU each expert's weights are taken as they are, and frozen ones cost no gradient. On a GPU weights
    that train are copied side by side; others are taken where they lie if they are packed.
    """
    kind, layers = product_type(tokens), _layers(modules)
    if layers is None or not all(_alike(row) for row in layers.values()):
        return None
    parts = [one for row in layers.values() for one in row]
    if not all(_takes(tokens, kind, one) for one in parts):
        return None
    if not tokens.is_cuda:
        return _layered(layers, None, kind, stacked=False)
    trained = torch.is_grad_enabled() and any(one.weight.requires_grad for one in parts)
    kept = packed is not None and not trained and not is_exporting()
    return _tables(layers, packed() if kept else None, kind)


def _tables(
    layers: Mapping[str, list[_Linear]], views: dict[str, Tensor] | None, kind: torch.dtype
) -> PlainSwiGLU | Layered:
    """The experts as a GPU's grouped product wants them: packed (`views`), or copied side by side."""
    if not _are_plain_swiglu(layers):
        return _layered(layers, views, kind, stacked=True)
    if views is not None:
        return PlainSwiGLU(views["gate_up_proj.weight"].to(kind), views["down_proj.weight"].to(kind))
    pairs = zip(layers["gate_proj"], layers["up_proj"], strict=True)
    gate_up = torch.stack([torch.cat([gate.weight.to(kind), up.weight.to(kind)]) for gate, up in pairs])
    return PlainSwiGLU(gate_up, torch.stack([one.weight.to(kind) for one in layers["down_proj"]]))


def _are_plain_swiglu(layers: Mapping[str, list[_Linear]]) -> bool:
    return len(layers) == 3 and all(one.plain for row in layers.values() for one in row)


def _alike(row: list[_Linear]) -> bool:
    """Whether the experts' layers differ in their numbers and in nothing else; each may lack LoRA."""
    sizes = {(one.weight.shape, one.bias is None) for one in row}
    adapters = {(one.dropout, one.matrices[0].dtype) for one in row if one.lora}
    return len(sizes) == 1 and len(adapters) <= 1


def _layered(
    layers: Mapping[str, list[_Linear]], views: dict[str, Tensor] | None, kind: torch.dtype, stacked: bool
) -> Layered:
    found = {name: _layer(name, row, views, kind, stacked) for name, row in layers.items()}
    return Layered(found.get("gate_proj"), found["up_proj"], found["down_proj"])


def _layer(
    name: str, row: list[_Linear], views: dict[str, Tensor] | None, kind: torch.dtype, stacked: bool
) -> Layer:
    bias = None
    if views is None:
        weight = _table([one.weight.to(kind) for one in row], stacked)
    else:
        weight = _view(views, name).to(kind)
    if row[0].bias is not None:
        bias = _table([F.pad(one.bias.to(kind)[:, None], (0, 7)) for one in row], stacked)
    dropout = next((one.dropout for one in row if one.lora), 0.0)
    return Layer(weight, bias, _lora_tables(row, kind, stacked), dropout)


def _table(tensors: list[Tensor], stacked: bool) -> Table:
    return torch.stack(tensors) if stacked else tensors


def _view(views: dict[str, Tensor], name: str) -> Tensor:
    """A layer's packed weights (E, H, D): gate and up projections are one tensor there."""
    if f"{name}.weight" in views:
        return views[f"{name}.weight"]
    gate, up = views["gate_up_proj.weight"].chunk(2, dim=1)
    return gate if name == "gate_proj" else up


def _lora_tables(row: list[_Linear], kind: torch.dtype, stacked: bool) -> tuple[Table, Table] | None:
    """The adapters of one layer, filled up with zeros to one rank, on a GPU a multiple of 8."""
    matrices = [matrix for one in row for matrix in one.matrices]
    if not matrices:
        return None
    rank = max(sum(down.shape[0] for down, _, _ in one.lora) for one in row)
    rank = -(-rank // 8) * 8 if stacked else rank
    of = kind if torch.is_autocast_enabled(matrices[0].device.type) else matrices[0].dtype
    downs, ups = [], []
    for one in row:
        height, width = one.weight.shape
        down = torch.cat([one.weight.new_zeros(0, width, dtype=of), *(a.to(of) for a, _, _ in one.lora)])
        up = [one.weight.new_zeros(height, 0, dtype=of), *((b * scale).to(of) for _, b, scale in one.lora)]
        downs.append(F.pad(down, (0, 0, 0, rank - down.shape[0])))
        ups.append(F.pad(torch.cat(up, dim=1), (0, rank - down.shape[0])))
    return _table(downs, stacked), _table(ups, stacked)


# -- what a module is ----------------------------------------------------------------------------------------


@dataclass
class _Linear:
    """One linear layer of one expert: weight (H, D), bias (H,), LoRA's [(A (r, D), B (H, r), scale)]."""

    weight: Tensor
    bias: Tensor | None
    lora: list[tuple[Tensor, Tensor, float]]
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        return self.bias is None and not self.lora

    @property
    def matrices(self) -> list[Tensor]:
        """LoRA's, which share a type."""
        return [matrix for a, b, _ in self.lora for matrix in (a, b)]


def _layers(modules: Mapping[str, nn.Module]) -> dict[str, list[_Linear]] | None:
    """{layer: [of expert 0, of expert 1, ...]}, None where an expert is more than its linear layers."""
    kinds = {_layer_names(expert) for expert in modules.values()}
    if len(kinds) != 1 or None in kinds:
        return None
    found: dict[str, list[_Linear]] = {}
    for name in kinds.pop():
        row = [_read(getattr(expert, name)) for expert in modules.values()]
        if any(one is None for one in row):
            return None
        found[name] = row
    return found


def _layer_names(expert: nn.Module) -> tuple[str, ...] | None:
    if _has_more(expert):
        return None
    if type(expert) is SwiGLU:
        return ("gate_proj", "up_proj", "down_proj")
    if type(expert) is GELUMLP:
        return ("up_proj", "down_proj")
    if (type(expert).__module__, type(expert).__name__) not in _SWIGLU:
        return None
    activation = expert._modules.get("act_fn")
    if not is_silu(activation) or _has_more(activation):
        return None
    return ("gate_proj", "up_proj", "down_proj")


def _is_plain_swiglu(expert: nn.Module) -> bool:
    """Whether it is a SwiGLU block of three plain linear layers: what `_layers` would find, in less time,
    which counts where one token runs through many layers."""
    names = _layer_names(expert)
    if names is None or len(names) != 3:
        return False
    for name in names:
        layer = expert._modules.get(name)
        if type(layer) is not nn.Linear or _has_more(layer):
            return False
        if layer._parameters.get("bias", layer) is not None:  # one, or kept elsewhere
            return False
    return True


def _has_more(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _read(layer: nn.Module) -> _Linear | None:
    """An nn.Linear, or peft's LoRA on one, as numbers; None for anything else."""
    if _has_more(layer):
        return None
    if type(layer) is nn.Linear:
        return _Linear(layer.weight, layer.bias, [])
    if type(layer).__name__ != "Linear" or type(layer).__module__ != "peft.tuners.lora.layer":
        return None
    base = _read(layer.base_layer)
    if base is None or layer.fan_in_fan_out or (layer.disable_adapters and layer.merged):
        return None
    if layer.lora_variant:  # DoRA and the like
        return None
    if layer.disable_adapters or layer.merged:
        return base
    dropouts = set()
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, dropout = _read(layer.lora_A[name]), _read(layer.lora_B[name]), layer.lora_dropout[name]
        if down is None or up is None or not (down.plain and up.plain) or _has_more(dropout):
            return None
        base.lora.append((down.weight, up.weight, layer.scaling[name]))
        dropouts.add(dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
    if len(dropouts) > 1 or len({matrix.dtype for matrix in base.matrices}) > 1:
        return None
    base.dropout = dropouts.pop() if dropouts else 0.0
    return base


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which in torch 2.11 says True to all compiled code."""
    return torch.compiler._is_exporting_flag


def is_silu(activation: object) -> bool:
    """Whether this is a module for x * sigmoid(x), torch's or transformers'."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def groupable(tokens: Tensor, weight: Tensor) -> bool:
    """Whether a grouped product takes tokens (T, D) and weights (..., H, D) as they are, and waits for no
    device."""
    if torch.is_autocast_enabled(tokens.device.type) or weight.dtype != tokens.dtype:
        return False
    return type(weight.data) is Tensor and _waits_for_nothing(tokens, tokens.dtype, weight)


def product_type(tokens: Tensor) -> torch.dtype:
    """The type in which F.linear would compute: that of the tokens, or autocast's."""
    device = tokens.device.type
    if torch.is_autocast_enabled(device) and tokens.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tokens.dtype


def _takes(tokens: Tensor, kind: torch.dtype, layer: _Linear) -> bool:
    """Whether a grouped product in `kind` takes a layer as F.linear would."""
    numbers = [layer.weight, *([] if layer.bias is None else [layer.bias]), *layer.matrices]
    if any(type(tensor.data) is not Tensor for tensor in numbers):
        return False
    if not torch.is_autocast_enabled(tokens.device.type):
        if any(tensor.dtype != kind for tensor in numbers[: len(numbers) - len(layer.matrices)]):
            return False
        if tokens.is_cuda and any(matrix.dtype != kind for matrix in layer.matrices):
            return False
    return _waits_for_nothing(tokens, kind, layer.weight)


def _waits_for_nothing(tokens: Tensor, kind: torch.dtype, weight: Tensor) -> bool:
    """Whether the host need not read how many rows each expert has: weight (..., H, D)."""
    if not tokens.is_cuda:
        return True
    height, width = weight.shape[-2:]
    if kind != torch.bfloat16 or height % 8 or width % 8:  # rows of whole 16 bytes
        return False
    return _generation(tokens.device.index) in (9, 10)  # on others torch reads the offsets in a loop


_capabilities: dict[int, int] = {}  # by device; torch takes longer to say


@torch.compiler.assume_constant_result
def _generation(device: int) -> int:
    """The major compute capability of a GPU."""
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)[0]
    return _capabilities[device]
