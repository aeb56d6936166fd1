"""Which token goes to which expert, and the losses that keep experts busy.

Pure functions of router logits ``[t, e]``; all arithmetic in float32 whatever the
model's dtype, ties to the expert of lowest index. Every router returns a ``Routing``,
which ``ops.moe_mlp`` computes.

An expert at -inf is not chosen, and a token that has no other goes nowhere. NaN in a
token's logits shows in its weights, and in those of no other token where tokens are not
rivals for places. Padding, where a mask says so, may be anything.

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

from sparsejax.routing._anneal import dense_to_sparse as dense_to_sparse
from sparsejax.routing._balance import update_bias as update_bias
from sparsejax.routing._capacity import capacity as capacity
from sparsejax.routing._expert_choice import expert_choice as expert_choice
from sparsejax.routing._hash import balanced_table as balanced_table
from sparsejax.routing._hash import hash_routing as hash_routing
from sparsejax.routing._losses import entropy as entropy
from sparsejax.routing._losses import importance_loss as importance_loss
from sparsejax.routing._losses import load_balance_loss as load_balance_loss
from sparsejax.routing._losses import load_loss as load_loss
from sparsejax.routing._losses import z_loss as z_loss
from sparsejax.routing._metrics import RoutingMetrics as RoutingMetrics
from sparsejax.routing._metrics import routing_metrics as routing_metrics
from sparsejax.routing._plots import plot_expert_load as plot_expert_load
from sparsejax.routing._relu import activation_locality_loss as activation_locality_loss
from sparsejax.routing._relu import chunk_sparsity as chunk_sparsity
from sparsejax.routing._relu import chunk_sparsity_loss as chunk_sparsity_loss
from sparsejax.routing._relu import relu as relu
from sparsejax.routing._relu import token_sparsity_loss as token_sparsity_loss
from sparsejax.routing._routing import Routing as Routing
from sparsejax.routing._sinkhorn import sinkhorn as sinkhorn
from sparsejax.routing._soft import SoftRouting as SoftRouting
from sparsejax.routing._soft import apply_soft as apply_soft
from sparsejax.routing._soft import soft as soft
from sparsejax.routing._soft import soft_logits as soft_logits
from sparsejax.routing._soft import soft_mlp as soft_mlp
from sparsejax.routing._threshold import threshold as threshold
from sparsejax.routing._top_k import top_k as top_k
from sparsejax.routing._top_p import top_p as top_p
from sparsejax.routing._tree import permutation_search as permutation_search
from sparsejax.routing._tree import round_permutation as round_permutation
from sparsejax.routing._tree import tree as tree
from sparsejax.routing._tree import tree_entropy as tree_entropy

__all__ = [
    "Routing",
    "RoutingMetrics",
    "SoftRouting",
    "activation_locality_loss",
    "apply_soft",
    "balanced_table",
    "capacity",
    "chunk_sparsity",
    "chunk_sparsity_loss",
    "dense_to_sparse",
    "entropy",
    "expert_choice",
    "hash_routing",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "permutation_search",
    "plot_expert_load",
    "relu",
    "round_permutation",
    "routing_metrics",
    "sinkhorn",
    "soft",
    "soft_logits",
    "soft_mlp",
    "threshold",
    "token_sparsity_loss",
    "top_k",
    "top_p",
    "tree",
    "tree_entropy",
    "update_bias",
    "z_loss",
]
