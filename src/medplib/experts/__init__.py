"""Mixtures of named experts: the router, its gates, the experts, their losses, upcycling and tracing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medplib.experts.bias import update_biases
from medplib.experts.compare import compare_experts, compare_routing
from medplib.experts.cost import CostReport, measure_cost
from medplib.experts.deepspeed import DeepSpeedGate
from medplib.experts.expert_choice import ExpertChoiceGate
from medplib.experts.force import force_expert, replay_routing
from medplib.experts.losses import balance_loss, collect_aux_losses, sequence_balance_loss, z_loss
from medplib.experts.mlp import GELUMLP, SwiGLU
from medplib.experts.router import MoERouter, Routing, TopKGate, routing_mask
from medplib.experts.schedule import ExpertSchedule, Phase, check_optimizer, train_experts
from medplib.experts.statistics import count_routing
from medplib.experts.trace import RoutingTrace, record_routing
from medplib.experts.upcycle import assemble_mixture, init_expert, upcycle

if TYPE_CHECKING:  # imported on first use: they need torch.distributed
    from medplib.experts.parallel import (
        average_expert_gradients,
        distribute_experts,
        expert_parameters,
        gather_experts,
        gathered_state_dict,
        ignore_experts_in_ddp,
    )

__all__ = [
    "GELUMLP",
    "CostReport",
    "DeepSpeedGate",
    "ExpertChoiceGate",
    "ExpertSchedule",
    "MoERouter",
    "Phase",
    "Routing",
    "RoutingTrace",
    "SwiGLU",
    "TopKGate",
    "assemble_mixture",
    "average_expert_gradients",
    "balance_loss",
    "check_optimizer",
    "collect_aux_losses",
    "compare_experts",
    "compare_routing",
    "count_routing",
    "distribute_experts",
    "expert_parameters",
    "force_expert",
    "gather_experts",
    "gathered_state_dict",
    "ignore_experts_in_ddp",
    "init_expert",
    "measure_cost",
    "record_routing",
    "replay_routing",
    "routing_mask",
    "sequence_balance_loss",
    "train_experts",
    "upcycle",
    "update_biases",
    "z_loss",
]

_PARALLEL = (
    "average_expert_gradients",
    "distribute_experts",
    "expert_parameters",
    "gather_experts",
    "gathered_state_dict",
    "ignore_experts_in_ddp",
)


def __getattr__(name: str) -> Any:
    if name in _PARALLEL:
        return getattr(importlib.import_module("medplib.experts.parallel"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
