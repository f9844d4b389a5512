"""Frozen means bit-identical: a hash of every closed tensor, taken before a stage and compared after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from medplib.errors import CheckpointError
from medplib.lora import lora_layers
from medplib.parts import module_parts


class Frozen:
    """The closed parameters of a model, and the buffers beside them such as running statistics, by hash.

    hashes    {name in the plain model: sha256}
    adapted   names whose layer carries LoRA: closed while the stage runs, changed when it is merged
    """

    def __init__(self, model: nn.Module) -> None:
        self.hashes = {name: sha256(tensor) for name, tensor in closed_tensors(model)}
        self.adapted = {f"{layer}.{leaf}" for layer in lora_layers(model) for leaf in ("weight", "bias")}
        self.parts = _owners(model)

    def by_part(self) -> dict[str, str]:
        """{part: first 12 digits of one hash over its closed tensors}, for people to compare."""
        digests: dict[str, hashlib._Hash] = {}
        for name in sorted(self.hashes):
            if name not in self.adapted:
                digests.setdefault(self.parts.get(name, "other"), hashlib.sha256()).update(
                    self.hashes[name].encode()
                )
        return {part: digest.hexdigest()[:12] for part, digest in digests.items()}

    @property
    def total(self) -> str:
        """One hash over all of them."""
        return hashlib.sha256("".join(f"{k}{v}" for k, v in sorted(self.hashes.items())).encode()).hexdigest()

    def check(self, model: nn.Module) -> None:
        """Raise CheckpointError, naming tensors, if a closed one moved. Call it before LoRA is merged."""
        self._compare({name: sha256(tensor) for name, tensor in closed_tensors(model)}, set())

    def check_files(self, folder: Path) -> int:
        """The same for a saved model, whose adapters are merged; returns how many tensors were compared."""
        found = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in self.hashes and name not in self.adapted:
                        found[name] = sha256(file.get_tensor(name))
        self._compare(found, self.adapted)
        return len(found)

    def _compare(self, found: Mapping[str, str], except_for: set[str]) -> None:
        wrong = [k for k, v in self.hashes.items() if k not in except_for and found.get(k) != v]
        if wrong:
            shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise CheckpointError(
                f"{len(wrong)} closed tensors are not what they were when the stage began: {shown}. "
                "Something outside the stage changed them; the model was not written."
            )


def closed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name without LoRA's wrapping, tensor) of each closed parameter and of the buffers beside one."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        closed = [(name, p) for name, p in own if not p.requires_grad]
        if len(closed) == len(own) and own:
            closed += [
                (n, b)
                for n, b in module.named_buffers(recurse=False)
                if n not in module._non_persistent_buffers_set
            ]
        for name, tensor in closed:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                full = f"{path}.{name}" if path else name
                yield full.replace(".base_layer.", "."), tensor


def sha256(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _owners(model: nn.Module) -> dict[str, str]:
    """{tensor name: the smallest part that holds it}."""
    parts = {
        name: {id(m) for root in roots for m in root.modules()} for name, roots in module_parts(model).items()
    }
    order = sorted(parts, key=lambda name: -len(parts[name]))
    owners = {}
    for path, module in model.named_modules():
        held = [name for name in order if id(module) in parts[name]]
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            owners[full.replace(".base_layer.", ".")] = held[-1] if held else "other"
    return owners
