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

from sparsejax.routing._capacity import capacity as capacity
from sparsejax.routing._routing import Routing as Routing
from sparsejax.routing._top_k import top_k as top_k

__all__ = [
    "Routing",
    "capacity",
    "top_k",
]
