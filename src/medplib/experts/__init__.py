"""Mixtures of named experts: the router, its gates, the experts, their losses, upcycling and tracing."""

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
    "balance_loss",
    "check_optimizer",
    "collect_aux_losses",
    "compare_experts",
    "compare_routing",
    "count_routing",
    "force_expert",
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
