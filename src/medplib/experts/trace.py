"""Looking at routing: which expert each token went to, per layer, with how much certainty.

T tokens, S tokens of one sample, E experts, K experts per token.

    with record_routing(model) as trace:
        model(x)
    print(trace.table())
    trace.expert_map("layers.3.mlp", slice(1, 577), (24, 24))  # (24, 24), the image tokens' experts

Nothing is returned through the model: the recorder listens while the block is open. Blocks may be nested, and
models that run in other threads are not heard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from medplib.errors import CheckpointError, InputError, UnknownNameError
from medplib.experts.context import named_routers, observe

if TYPE_CHECKING:
    from medplib.experts.router import MoERouter, Routing

RECORDED = ("experts", "served", "weights", "probabilities")


@dataclass
class LayerTrace:
    """What one router did while it was recorded, one entry per call; `...` is the token shape of that call.

    experts [(..., K)] chosen indices, best first, -1 for masked tokens; served [(..., K)] the same with -1
    also where a capacity dropped the token; weights [(..., K)]; probabilities [(..., E)], NaN for masked
    tokens.
    """

    names: tuple[str, ...]
    experts: list[Tensor] = field(default_factory=list)
    served: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def choices(self) -> Tensor:
        """Chosen experts of all calls: (..., S, K) joined along the sequence, as in cached generation.

        Calls whose other sizes differ are flattened and joined: (T, K).
        """
        return _join(self.experts)

    def scores(self) -> Tensor:
        """Probabilities of all calls, joined as `choices` are: (..., S, E)."""
        return _join(self.probabilities)

    def counts(self) -> Tensor:
        """How many (token, choice) pairs chose each expert, before any drop: (E,)."""
        return self._count(self.experts)

    def dropped(self) -> Tensor:
        """How many of those pairs each expert dropped: (E,)."""
        return self._count(self.experts) - self._count(self.served)

    def _count(self, calls: list[Tensor]) -> Tensor:
        chosen = _join(calls).reshape(-1)
        return torch.bincount(chosen[chosen >= 0], minlength=len(self.names))  # (E,)

    def summary(self) -> dict[str, Any]:
        """Numbers of this layer: tokens, counts, shares, drops, mean probability, entropy (nats), margin.

        The margin is the best probability minus the second best, both averaged over tokens. Counts and shares
        are of the choices, before any drop.
        """
        counts = self.counts()
        scores = self.scores().reshape(-1, len(self.names))  # (T, E)
        scores = scores[~scores[:, 0].isnan()]
        normal = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        best = torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=-1).sort(descending=True).values
        empty = not len(scores)
        return {
            "tokens": len(scores),
            "counts": dict(zip(self.names, counts.tolist(), strict=True)),
            "shares": dict(zip(self.names, (counts / counts.sum().clamp_min(1)).tolist(), strict=True)),
            "dropped": dict(zip(self.names, self.dropped().tolist(), strict=True)),
            "probability": dict(
                zip(self.names, (scores.sum(0) if empty else scores.mean(0)).tolist(), strict=True)
            ),
            "entropy": 0.0 if empty else float(-torch.xlogy(normal, normal).sum(-1).mean()),
            "margin": 0.0 if empty else float((best[:, 0] - best[:, 1]).mean()),
        }


class RoutingTrace:
    """The recorded routing of a model: `layers` holds one LayerTrace per MoERouter, by qualified name."""

    def __init__(self, routers: Mapping[str, MoERouter]) -> None:
        self._keys = {id(router): name or "router" for name, router in routers.items()}
        self.layers = {name or "router": LayerTrace(router.names) for name, router in routers.items()}

    def save(self, path: str | Path) -> None:
        """Write the recording to a safetensors file, to be compared or replayed elsewhere."""
        from safetensors.torch import save_file

        tensors, names = {}, {}
        for layer, trace in self.layers.items():
            names[layer] = list(trace.names)
            for kind in RECORDED:
                for call, tensor in enumerate(getattr(trace, kind)):
                    tensors[f"{call}.{kind}.{layer}"] = tensor.cpu().contiguous()
        save_file(tensors, path, metadata={"experts": json.dumps(names)})

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what `save` wrote. Raises CheckpointError for another file."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            experts = json.loads((file.metadata() or {}).get("experts", "{}"))
            trace = cls({})
            trace.layers = {layer: LayerTrace(tuple(names)) for layer, names in experts.items()}
            places = [(*key.partition(".")[::2], key) for key in file.keys()]  # noqa: SIM118
            known = {f"{kind}.{layer}" for kind in RECORDED for layer in experts}
            if not experts or not all(call.isdigit() and place in known for call, place, _ in places):
                raise CheckpointError(f"{path} is no recording of routing; RoutingTrace.save writes one.")
            for _, place, key in sorted(places, key=lambda entry: int(entry[0])):
                kind, _, layer = place.partition(".")
                getattr(trace.layers[layer], kind).append(file.get_tensor(key))
        return trace

    def receive(self, router: MoERouter, routing: Routing, shape: torch.Size, kept: Tensor | None) -> None:
        """Keep what a router decided (called by the router)."""
        name = self._keys.get(id(router))
        if name is None:
            return
        layer = self.layers[name]
        nobody = router.num_experts
        served = routing.experts if routing.served is None else routing.served
        for calls, chosen in ((layer.experts, routing.experts), (layer.served, served)):
            calls.append(_spread(chosen.masked_fill(chosen == nobody, -1), shape, kept, -1))
        layer.weights.append(_spread(routing.weights, shape, kept, float("nan")))
        scores = routing.probabilities
        if routing.real is not None:
            scores = scores.masked_fill(~routing.real.unsqueeze(1), float("nan"))
        layer.probabilities.append(_spread(scores, shape, kept, float("nan")))

    def __getitem__(self, layer: str | int) -> LayerTrace:
        """A layer by name or by position (negative from the end)."""
        names = list(self.layers)
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            return self.layers[names[layer]]
        if layer not in self.layers:
            raise UnknownNameError(f"No recorded layer {layer!r}. Recorded: {', '.join(names) or 'none'}.")
        return self.layers[layer]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per layer: its name and `LayerTrace.summary()`."""
        return [{"layer": name, **layer.summary()} for name, layer in self._run()]

    def table(self) -> str:
        """The rows as text, to be printed."""
        lines = [("layer", "tokens", "entropy", "margin", "share of each expert")]
        for row in self.rows():
            shares = "  ".join(f"{name} {share:6.1%}" for name, share in row["shares"].items())
            lines.append(
                (row["layer"], str(row["tokens"]), f"{row['entropy']:.3f}", f"{row['margin']:.3f}", shares)
            )
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}"
            for a, b, c, d, e in lines
        )

    def by_expert(self) -> dict[str, dict[str, float]]:
        """Share of the choices that each expert got: {layer: {expert: share}}."""
        return {row["layer"]: row["shares"] for row in self.rows()}

    def by_token_type(
        self, types: Tensor | np.ndarray | Sequence, rest: str | None = None
    ) -> dict[str, dict[Any, dict[str, float]]]:
        """Share of each expert among the tokens of each type: {layer: {type: {expert: share}}}.

        types (..., S) has one label (a number or a text) per recorded token; for MedPLIB
        `config.tokens.types(input_ids)` tells image, region, <SEG> and text. It may be shorter than the
        recorded sequence if `rest` names the tokens beyond it ("generated", say). Masked tokens are not
        counted.
        """
        labels = types.detach().cpu().numpy() if isinstance(types, Tensor) else np.asarray(types)
        result = {}
        for name, layer in self._run():
            choices = layer.choices()  # (..., S, K)
            here = _fit_labels(labels, tuple(choices.shape[:-1]), rest, name).reshape(-1)  # (T,)
            flat = choices.reshape(len(here), choices.shape[-1]).numpy()  # (T, K)
            result[name] = {}
            for label in sorted(set(here.tolist()), key=str):
                chosen = flat[here == label]
                counts = np.bincount(chosen[chosen >= 0].reshape(-1), minlength=len(layer.names))
                shares = counts / max(counts.sum(), 1)
                result[name][label] = dict(zip(layer.names, shares.tolist(), strict=True))
        return result

    def expert_map(
        self,
        layer: str | int,
        tokens: slice | Sequence[int] | Tensor,
        grid: tuple[int, int],
        sample: int = 0,
        expert: str | None = None,
    ) -> np.ndarray:
        """The routing of one sample's image tokens laid out as the image: (height, width) of the patch grid.

        `tokens` picks them from the sequence (a slice, positions, or a boolean mask), row by row. Without
        `expert` the map holds the index of the first choice; with an expert's name, that expert's
        probability.
        """
        trace = self[layer]
        if expert is not None and expert not in trace.names:
            raise UnknownNameError(
                f"No expert named {expert!r} in layer {layer!r}. Known: {', '.join(trace.names)}."
            )
        values = trace.choices()[..., 0] if expert is None else trace.scores()[..., trace.names.index(expert)]
        if values.ndim > 1:
            if not 0 <= sample < len(values):
                raise InputError(f"sample must be between 0 and {len(values) - 1}, got {sample}.")
            values = values[sample]
        values = values.reshape(-1)[tokens]  # (h*w,)
        height, width = grid
        if values.numel() != height * width:
            raise InputError(
                f"{values.numel()} tokens were picked, but a grid of {height} x {width} has {height * width}."
            )
        return values.reshape(height, width).numpy()

    def plot(self, ax: Any = None) -> Any:
        """Draw layers x experts, each cell the share of the choices; returns the matplotlib figure.

        Needs matplotlib: pip install "medplib[notebook]".
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'Drawing the routing needs matplotlib: pip install "medplib[notebook]"'
            ) from error
        shares = self.by_expert()
        experts = list(dict.fromkeys(name for layer in shares.values() for name in layer))
        if not experts:
            raise InputError("Nothing was recorded: run the model inside `with record_routing(model)`.")
        grid = np.array([[layer.get(name, np.nan) for name in experts] for layer in shares.values()])
        if ax is None:
            size = (1.2 + 1.1 * len(experts), 1.2 + 0.28 * len(shares))
            ax = Figure(figsize=size, layout="constrained").add_subplot()
        image = ax.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        ax.set_xticks(range(len(experts)), experts)
        ax.set_yticks(range(len(shares)), list(shares))
        ax.set_title("share of tokens per expert")
        ax.figure.colorbar(image, ax=ax)
        return ax.figure

    def _run(self) -> list[tuple[str, LayerTrace]]:
        """The layers that ran while recording."""
        return [(name, layer) for name, layer in self.layers.items() if layer.experts]

    def _to_cpu(self) -> None:
        for layer in self.layers.values():
            for kind in RECORDED:
                calls = getattr(layer, kind)
                calls[:] = [call.cpu() for call in calls]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record every forward of every MoERouter in `model` inside the block; read the trace after it.

    Tensors stay on their device until the block ends. A forward that gradient checkpointing repeats counts
    once. Raises InputError if the model has no MoERouter.
    """
    routers = named_routers(model)
    if not routers:
        raise InputError(
            f"There is no MoERouter in this {type(model).__name__}, so there is nothing to record."
        )
    trace = RoutingTrace(routers)
    try:
        with observe(trace):
            yield trace
    finally:
        trace._to_cpu()


def _spread(values: Tensor, shape: torch.Size, kept: Tensor | None, fill: float) -> Tensor:
    """Put routed tokens' values back at their places: (T, n) -> (..., n), `fill` where masked."""
    values = values.detach()
    if kept is not None:
        values = values.new_full((shape.numel(), values.shape[-1]), fill).index_copy(0, kept, values)
    return values.reshape(*shape, values.shape[-1])


def _join(calls: list[Tensor]) -> Tensor:
    """Join calls along the sequence when their other sizes agree, else flatten them first."""
    if not calls:
        raise InputError("This layer did not run while it was recorded.")
    width = max(call.shape[-1] for call in calls)  # K is 1 while an expert is forced
    calls = [
        call if call.shape[-1] == width else nn.functional.pad(call, (0, width - call.shape[-1]), value=-1)
        for call in (call.cpu() for call in calls)
    ]
    lead = calls[0].shape[:-2]
    if all(call.ndim == calls[0].ndim and call.shape[:-2] == lead for call in calls):
        return torch.cat(calls, dim=-2) if calls[0].ndim > 1 else torch.stack(calls)
    return torch.cat([call.reshape(-1, width) for call in calls])  # (T, n)


def _fit_labels(labels: np.ndarray, shape: tuple[int, ...], rest: str | None, name: str) -> np.ndarray:
    """The labels in the token shape, those beyond the given ones filled with `rest`."""
    if labels.shape == shape:
        return labels
    if rest is not None and labels.shape[:-1] == shape[:-1] and labels.shape[-1] < shape[-1]:
        filled = np.full(shape, rest, dtype=object)
        filled[..., : labels.shape[-1]] = labels
        return filled
    raise InputError(
        f"types must have one label per recorded token of {name}, shape {shape}, got {labels.shape}; "
        f"for labels of the prompt alone name the other tokens with rest='generated'."
    )
