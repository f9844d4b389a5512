"""From dense networks to a mixture: `upcycle` makes routers of FFNs, `assemble_mixture` joins two runs,
`init_expert` lets one expert start from another.

All check everything first and change nothing when something does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.experts.checks import expert_names
from medplib.experts.context import named_routers
from medplib.experts.router import MoERouter

PUBLISHED_OVERRIDES = {"seg_projector": "grounding", "mask_decoder": "grounding"}
"""What MedPLIB takes from its grounding run; all else outside the experts comes from the vqa run."""


def upcycle(
    model: nn.Module,
    layers: str | Sequence[str],
    experts: Sequence[str] = ("grounding", "vqa"),
    *,
    dim: int | None = None,
    **router_args: Any,
) -> list[str]:
    """Replace the feed-forward blocks at `layers` by MoERouters whose experts are copies of the block.

    `layers` is one or several dotted paths from `model`; `*` stands for one step, `**` for any number:
    "layers.*.mlp", "model.layers.[02].mlp", "**.mlp". `dim` is the width of the blocks' input (default: the
    in_features of their first nn.Linear). `router_args` go to MoERouter (top_k, score, capacity_factor, ...).
    Returns the paths replaced, in the order of the model.

    Just after it, all experts being equal, a top-1 mixture gives p_best * FFN(x). (Komatsuzaki et al., Sparse
    Upcycling, 2023.)
    """
    layers = [layers] if isinstance(layers, str) else layers
    if (
        not isinstance(layers, list | tuple)
        or not layers
        or not all(isinstance(path, str) for path in layers)
    ):
        raise InputError(f"layers must be a dotted path or a list of them, got {layers!r}.")
    paths, names = _find(model, list(layers)), expert_names(experts)
    routers = {}
    for path in paths:
        block = model.get_submodule(path)
        if any(isinstance(module, MoERouter) for module in block.modules()):
            raise InputError(f"{path} is or holds a MoERouter already; choose dense blocks.")
        copies = {name: copy.deepcopy(block) for name in names}
        router = MoERouter(_width(block, path) if dim is None else dim, copies, **router_args)
        weight = next(block.parameters(), None)
        if weight is not None:
            router.gate.to(device=weight.device, dtype=weight.dtype)
            if router.drop_noise is not None:
                router.drop_noise.to(weight.device)
        routers[path] = router.train(block.training)
    for path, router in routers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, router)
    return list(routers)


def init_expert(router: MoERouter, name: str, source: str | nn.Module) -> None:
    """Copy into an expert the weights of another one of the router, by name, or of a dense FFN.

        init_expert(router, "grounding", "vqa")

    The expert's parameters stay the same objects. Raises CheckpointError, before anything is copied, if the
    two do not have the same weights.
    """
    target, values = check_source(router, name, source)
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(values[key])


def check_source(
    router: MoERouter, name: str, source: str | nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the expert and of what it is to start from, if they fit."""
    target = router.experts[router.names[router.index_of(name)]].state_dict()
    if source is router.experts[name] or source == name:
        raise InputError(f"The expert '{name}' cannot start from itself.")
    origin = router.experts[router.names[router.index_of(source)]] if isinstance(source, str) else source
    values = origin.state_dict()
    shapes = [{key: tuple(tensor.shape) for key, tensor in table.items()} for table in (target, values)]
    different = [key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)]
    if different:
        key, label = different[0], source if isinstance(source, str) else type(source).__name__
        raise CheckpointError(
            f"The expert '{name}' cannot start from {label}: {key} is "
            f"{shapes[0].get(key, 'absent')} in it and {shapes[1].get(key, 'absent')} there."
        )
    return target, values


def assemble_mixture(
    mixture: nn.Module,
    sources: Mapping[str, nn.Module | Mapping[str, Tensor]],
    rest: str = "vqa",
    overrides: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Fill a mixture from the runs that trained its experts; returns {tensor name: source}.

    sources     one per expert, by the expert's name: a model or its state dict, either dense (its FFN at the
                router's place is taken) or a mixture itself (the expert of that name is taken)
    rest        the source of everything else
    overrides   {part: source} for parts that come from another one, such as PUBLISHED_OVERRIDES

        assemble_mixture(model, {"grounding": run_3, "vqa": run_2}, rest="vqa", overrides=PUBLISHED_OVERRIDES)

    The gates come from `rest` if it has them and else stay as they are. Raises CheckpointError, naming every
    tensor that is missing or has another shape, before anything is copied.
    """
    named_routers(mixture)  # refuses what is no module
    for name, value in (("sources", sources), ("overrides", overrides)):
        if not isinstance(value, Mapping) and not (name == "overrides" and value is None):
            raise InputError(f"{name} must be a dict by name, got {value!r:.80}.")
    overrides = dict(overrides or {})
    for name, source in sources.items():
        if not isinstance(source, nn.Module | Mapping):
            raise InputError(f"The source '{name}' must be a model or its state dict, got {source!r:.80}.")
    states = {
        name: source.state_dict() if isinstance(source, nn.Module) else source
        for name, source in sources.items()
    }
    target = mixture.state_dict()
    _check_sources(mixture, states, rest, overrides, target)
    routers = named_routers(mixture)
    taken: dict[str, str] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    problems: list[str] = []
    for key, tensor in target.items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module, not a weight
        source, candidates, optional = _origin(key, routers, rest, overrides)
        found = next((name for name in candidates if name in states[source]), None)
        if found is None:
            if not optional:
                problems.append(f"{key}: '{source}' has no {' or '.join(candidates)}")
        elif states[source][found].shape != tensor.shape:
            shapes = f"{tuple(states[source][found].shape)}, needed {tuple(tensor.shape)}"
            problems.append(f"{key}: {found} of '{source}' has shape {shapes}")
        else:
            taken[key] = source
            copies.append((tensor, states[source][found]))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"The sources do not fill this mixture: {shown}.")
    with torch.no_grad():
        for tensor, value in copies:
            tensor.copy_(value)
    return taken


def _find(model: nn.Module, patterns: list[str]) -> list[str]:
    """The module paths that match, in the order of the model; every pattern must match something."""
    if not isinstance(model, nn.Module):
        raise InputError(f"The model must be an nn.Module, got {model!r:.80}.")
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if _matches(name.split("."), pattern.split("."))]
        if not hits:
            last = pattern.rpartition(".")[2]
            similar = [name for name in names if fnmatchcase(name.rpartition(".")[2], last)][:3]
            hint = f" Modules that end so: {', '.join(similar)}." if similar else ""
            raise UnknownNameError(f"No module of this {type(model).__name__} matches '{pattern}'.{hint}")
        found.update(dict.fromkeys(hits))
    inner = [a for a in found for b in found if a.startswith(b + ".")]
    if inner:
        raise InputError(f"{inner[0]} lies inside another matched module; make the path more precise.")
    if len({id(model.get_submodule(name)) for name in found}) < len(found):
        raise InputError("Two of the matched paths are the same module; a shared block cannot be replaced.")
    return [name for name in names if name in found]


def matches_path(path: str, pattern: str) -> bool:
    """Whether a dotted path fits a pattern, in which `*` stands for one step and `**` for any number."""
    return _matches(*(text.split(".") if text else [] for text in (path, pattern)))


def _matches(steps: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not steps
    if pattern[0] == "**":
        return any(_matches(steps[i:], pattern[1:]) for i in range(len(steps) + 1))
    return bool(steps) and fnmatchcase(steps[0], pattern[0]) and _matches(steps[1:], pattern[1:])


def _width(block: nn.Module, path: str) -> int:
    """D, read from the block's first linear layer."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise InputError(f"{path} ({type(block).__name__}) has no nn.Linear to read its width from; give dim=.")


def _check_sources(
    mixture: nn.Module,
    states: dict[str, Mapping[str, Tensor]],
    rest: str,
    overrides: dict[str, str],
    target: Mapping[str, Tensor],
) -> None:
    routers = named_routers(mixture)
    if not routers:
        raise InputError(f"There is no MoERouter in this {type(mixture).__name__}; use `upcycle` first.")
    needed = {name for router in routers.values() for name in router.names} | {rest} | set(overrides.values())
    missing = sorted(needed - set(states))
    if missing:
        raise InputError(f"No source for {', '.join(missing)}; given: {', '.join(states) or 'none'}.")
    for part in overrides:
        if not any(_inside(key, part) for key in target):
            raise UnknownNameError(
                f"overrides names the part '{part}', but the mixture has no weights there."
            )
    for name, state in states.items():
        if any(".lora_A." in key or ".base_layer." in key for key in state):
            raise CheckpointError(
                f"The source '{name}' carries LoRA weights; merge them first (medplib.lora.merge_lora)."
            )


def _origin(
    key: str, routers: dict[str, MoERouter], rest: str, overrides: dict[str, str]
) -> tuple[str, list[str], bool]:
    """Where a tensor comes from: the source, its possible names there, whether it may be missing."""
    for path, name, inner in _places(key, routers):
        if name == "gate":
            return rest, [key], True
        return name, [key, f"{path}.{inner}" if path else inner], False
    best = max((part for part in overrides if _inside(key, part)), key=len, default=None)
    return (rest if best is None else overrides[best]), [key], False


def _places(key: str, routers: dict[str, MoERouter]) -> Iterator[tuple[str, str, str]]:
    """(router path, expert or "gate", the rest of the name) if the tensor lies inside a router."""
    for path, router in routers.items():
        if path and not _inside(key, path):
            continue
        inner = key[len(path) + 1 :] if path else key
        if inner.startswith("gate."):
            yield path, "gate", inner
        for name in router.names:
            if inner.startswith(f"experts.{name}."):
                yield path, name, inner[len(f"experts.{name}.") :]


def _inside(key: str, part: str) -> bool:
    return key == part or key.startswith(part + ".")
