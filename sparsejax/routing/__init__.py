"""Which token goes to which expert, and the losses that keep experts busy.

Pure functions of router logits ``[t, e]``; all arithmetic in float32 whatever the
model's dtype, ties to the expert of lowest index. Every router returns a ``Routing``,
which ``ops.moe_mlp`` computes.

Glossary:

choice
    One token at one expert. A router makes k choices per token, or c per expert.
capacity
    How many choices an expert may take; what is beyond it is turned away, and counted.
demand
    Choices made before any was turned away.
load
    Choices that an expert serves.
"""

from sparsejax.routing._balance import update_bias as update_bias
from sparsejax.routing._capacity import capacity as capacity
from sparsejax.routing._losses import entropy as entropy
from sparsejax.routing._losses import importance_loss as importance_loss
from sparsejax.routing._losses import load_balance_loss as load_balance_loss
from sparsejax.routing._losses import load_loss as load_loss
from sparsejax.routing._losses import z_loss as z_loss
from sparsejax.routing._metrics import RoutingMetrics as RoutingMetrics
from sparsejax.routing._metrics import routing_metrics as routing_metrics
from sparsejax.routing._routing import Routing as Routing
from sparsejax.routing._top_k import top_k as top_k

__all__ = [
    "Routing",
    "RoutingMetrics",
    "capacity",
    "entropy",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "routing_metrics",
    "top_k",
    "update_bias",
    "z_loss",
]
