"""Load balance without an auxiliary loss: a bias on each expert's score that follows its load.

E experts.

    router = MoERouter(512, 8, top_k=2, score="sigmoid", gate_args={"bias_rate": 0.001})

The bias takes part in choosing the experts and not in their weights, and it gets no gradient: after each
training step it rises by `rate` for experts below the mean load and falls for those above. (Wang et al.,
2024; DeepSeek-V3.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medplib import ops
from medplib.errors import InputError, is_number
from medplib.experts.noise import first_run
from medplib.experts.recomputation import Past

UPDATES = ("forward", "call")


class LoadBias(nn.Module):
    """The bias of E experts, kept as whole numbers of steps, so that bfloat16 models do not round it away.

    update  "forward": at the start of a training forward, by the load since the last one. Gradient
            checkpointing repeats a forward with the bias it had (around compiled code, the latest forward).
            "call": only when `update()` is called, for instance after each optimiser step; set the attribute
            to this to hold the bias still.

    The buffers `steps` and `load` are saved with the model. Under torch.distributed the load is summed over
    all processes, so every one of them must update.
    """

    steps: Tensor
    load: Tensor

    def __init__(self, num_experts: int, rate: float = 0.001, update: str = "forward") -> None:
        super().__init__()
        if not is_number(rate) or rate <= 0:
            raise InputError(f"bias_rate must be a finite number above 0, or None for no bias; got {rate!r}.")
        if update not in UPDATES:
            raise InputError(f"bias_update must be one of {', '.join(UPDATES)}; got {update!r}.")
        self.rate, self.when = float(rate), update
        self.register_buffer("steps", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64))
        self._past: Past[Tensor] = Past()

    def forward(self) -> Tensor:
        """What is added to the scores: (E,) float32."""
        steps = self._past.of_this_forward(self.steps.clone, keep=self.training)
        return steps.to(torch.float32) * self.rate

    def begin(self) -> None:
        """Called by the gate at the start of a training forward."""
        if self.when == "forward":
            self._step(first_run(self.load))

    @torch.no_grad()
    def count(self, experts: Tensor) -> None:
        """Add the choices of a forward, experts (T, K), to the load."""
        self.load += ops.count_choices(experts, len(self.load)) * first_run(self.load)

    @torch.no_grad()
    def update(self) -> None:
        """Move the bias one step against the load counted since the last update, and start counting anew."""
        self._step(1)

    @torch.no_grad()
    def _step(self, times: Tensor | int) -> None:
        """Once or, with 0, not at all."""
        if isinstance(times, int) and not times:
            return
        load = self.load.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        self.steps += torch.sign(load.sum() - load * len(load)) * times
        self.load *= 1 - times

    def extra_repr(self) -> str:
        return f"{len(self.steps)}, rate={self.rate}, update={self.when!r}"


def update_biases(model: nn.Module) -> None:
    """Update every LoadBias of the model; for gates with bias_update="call"."""
    for module in model.modules():
        if isinstance(module, LoadBias):
            module.update()
