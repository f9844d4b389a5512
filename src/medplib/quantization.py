"""Weights in 8 or 4 bits, made by torchao while they are loaded, and a report of what really became smaller.

Quantised are the linear layers of the language model, its experts included. Embeddings, `lm_head`, gates,
norms and the parts that see and draw stay as they are: they are small, or sensitive. int8: one scale per row,
at any dtype. int4: a scale and a zero per group of up to 128 weights; computed in bfloat16 by kernels that
differ between CPU and CUDA, so say with `device_map` where the model will run.

    model = MedPLIB.from_pretrained(name, quantize="int4", device_map="cuda")
    print(model.quantization)            # share of the weights, bytes before and after, what was left out
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medplib.errors import InputError

if TYPE_CHECKING:
    from medplib.configuration import MedPLIBConfig

KINDS = ("int8", "int4")
_GROUPS = (128, 64, 32)  # what the int4 kernels take
_NOT = (r"(?!language_model\.).*", r"language_model\.lm_head\..*", r"language_model\..*\.gate\..*")


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising did. parameters, quantized: counts of weights; left_out: how many by name, where `*`
    stands for the number of a layer, and a part without any quantised weight is one name."""

    kind: str
    parameters: int
    quantized: int
    bytes_before: int
    bytes_after: int
    left_out: dict[str, int]

    @property
    def share(self) -> float:
        """The quantised share of all weights."""
        return self.quantized / self.parameters

    def __str__(self) -> str:
        names = sorted(self.left_out.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} ({count:,})" for name, count in names[:8])
        return (
            f"{self.kind}: {self.share:.1%} of {self.parameters:,} weights quantised, "
            f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB; left as they are: "
            f"{listed}{f' and {len(names) - 8} more' if len(names) > 8 else ''}."
        )


def loading_options(kind: str, config: MedPLIBConfig, device_map: Any, dtype: Any) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for `quantize=kind`.

    dtype: as given by the user, or None. Raises InputError for an unknown kind, parts on the disk, and int4
    in another dtype than bfloat16, ImportError where torchao is missing or lacks the kernels.
    """
    if kind not in KINDS:
        raise InputError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}.")
    if kind == "int4" and dtype not in (None, "auto", "bfloat16", torch.bfloat16):
        raise InputError(f"int4 computes in bfloat16; leave dtype={str(dtype)!r} out, or take int8.")
    places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
    if "disk" in places:
        raise InputError(
            "Quantised weights cannot stay on the disk; give another device_map, or no quantize."
        )
    try:
        import torchao  # noqa: F401
        from transformers import TorchAoConfig
    except ImportError as error:
        raise ImportError('quantize needs torchao: pip install "medplib[quant]"') from error
    scheme = _int8() if kind == "int8" else _int4(_group_size(config.text_config), _on_cuda(device_map))

    class Config(TorchAoConfig):
        def get_apply_tensor_subclass(self) -> Any:  # asked for before each layer
            _trim()(0)
            return super().get_apply_tensor_subclass()

    options = {"quantization_config": Config(scheme, modules_to_not_convert=list(_NOT))}
    if places == {"cpu"}:  # transformers would quantise on an accelerator, as for parts that wait on the CPU
        options["device_map"] = "cpu"
    return options | ({"dtype": torch.bfloat16} if kind == "int4" else {})


def report(model: nn.Module, kind: str) -> QuantizationReport:
    """Count what is quantised in a loaded model. Raises InputError where no layer could be."""
    _trim()(0)
    total = quantized = before = after = 0
    left_out: Counter[str] = Counter()
    for name, value in model.named_parameters():  # each tied weight once
        count = value.numel()
        total, before = total + count, before + count * value.element_size()
        after += sum(part.numel() * part.element_size() for part in stored(value))
        if is_quantized(value):
            quantized += count
        elif name.startswith("language_model."):
            left_out[re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0])] += count
        else:
            left_out[name.partition(".")[0]] += count
    if not quantized:
        raise InputError(
            f"No layer of this model can be stored as {kind}: its widths must be multiples of {_GROUPS[-1]}. "
            "Load it without quantize."
        )
    return QuantizationReport(kind, total, quantized, before, after, dict(left_out))


def stored(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: itself, or numbers and scales."""
    value = value.data if isinstance(value, nn.Parameter) else value
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in stored(getattr(value, name))]


def is_quantized(value: Tensor) -> bool:
    """Whether a weight is kept in whole numbers, whatever dtype it computes in."""
    first = stored(value)[0]
    return not (first.is_floating_point() or first.is_complex())


@functools.cache
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim, which gives freed memory back to the system; elsewhere it does nothing.

    The intermediate results of quantising leave holes between the weights that stay: without it, int8 took
    2.3 GB for 0.6 GB of weights.
    """
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError, OSError):
        return lambda _: 0


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)  # True would change torch's global settings


def _int4(group_size: int, cuda: bool) -> Any:
    settings = {"group_size": group_size, "set_inductor_config": False}
    if cuda:
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **settings)
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise ImportError(
            "int4 on the CPU needs torchao 0.18, whose kernels it uses: pip install 'torchao>=0.18'; or take "
            "int8, or a CUDA device with device_map='cuda'."
        ) from error
    return PrototypeInt4WeightOnlyConfig(**settings)


def _group_size(text: Any) -> int:
    """The largest group that divides the input width of every layer; else the smallest there is."""
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    widths = (text.hidden_size, text.intermediate_size, heads * head_width)
    return next((size for size in _GROUPS if all(width % size == 0 for width in widths)), _GROUPS[-1])


def _on_cuda(device_map: Any) -> bool:
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.cuda.is_available()
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return any(isinstance(place, int) or str(place).startswith("cuda") for place in places)
