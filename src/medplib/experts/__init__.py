"""Mixtures of named experts: the router, its gate, the experts, their losses, upcycling and tracing."""

from medplib.experts.losses import balance_loss, collect_aux_losses, z_loss
from medplib.experts.mlp import GELUMLP, SwiGLU
from medplib.experts.router import MoERouter, Routing, TopKGate, force_expert, routing_mask
from medplib.experts.trace import RoutingTrace, record_routing
from medplib.experts.upcycle import assemble_mixture, upcycle

__all__ = [
    "GELUMLP",
    "MoERouter",
    "Routing",
    "RoutingTrace",
    "SwiGLU",
    "TopKGate",
    "assemble_mixture",
    "balance_loss",
    "collect_aux_losses",
    "force_expert",
    "record_routing",
    "routing_mask",
    "upcycle",
    "z_loss",
]
