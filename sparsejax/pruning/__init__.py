"""Masks from a loss and a batch, from the weights, or from nothing but shapes.

masks = snip(loss, params, batch, sparsity=0.9)
params = sparsejax.masks.apply_masks(params, masks)
tx = transforms.sparsify(optax.adamw(3e-4), transforms.fixed(masks))

Masks are trees like the parameters: boolean arrays, True where a weight is kept, and
`optax.MaskedNode` at the leaves that are left alone. Scores have the same form, and the
largest are kept; `keep_largest` makes masks of any.
"""

from sparsejax.pruning._fisher import SparseFinetuneState as SparseFinetuneState
from sparsejax.pruning._fisher import fisher_mask as fisher_mask
from sparsejax.pruning._fisher import fisher_scores as fisher_scores
from sparsejax.pruning._fisher import sparse_finetune as sparse_finetune
from sparsejax.pruning._lottery import IterativeMagnitude as IterativeMagnitude
from sparsejax.pruning._lottery import (
    IterativeMagnitudeState as IterativeMagnitudeState,
)
from sparsejax.pruning._lottery import iterative_magnitude as iterative_magnitude
from sparsejax.pruning._lottery import (
    iterative_magnitude_init as iterative_magnitude_init,
)
from sparsejax.pruning._lottery import (
    iterative_magnitude_round as iterative_magnitude_round,
)
from sparsejax.pruning._one_shot import grasp as grasp
from sparsejax.pruning._one_shot import grasp_scores as grasp_scores
from sparsejax.pruning._one_shot import magnitude as magnitude
from sparsejax.pruning._one_shot import random as random
from sparsejax.pruning._one_shot import snip as snip
from sparsejax.pruning._one_shot import snip_scores as snip_scores
from sparsejax.pruning._scores import keep_largest as keep_largest
from sparsejax.pruning._synflow import synflow as synflow
from sparsejax.pruning._synflow import synflow_scores as synflow_scores

__all__ = (
    "IterativeMagnitude",
    "IterativeMagnitudeState",
    "SparseFinetuneState",
    "fisher_mask",
    "fisher_scores",
    "grasp",
    "grasp_scores",
    "iterative_magnitude",
    "iterative_magnitude_init",
    "iterative_magnitude_round",
    "keep_largest",
    "magnitude",
    "random",
    "snip",
    "snip_scores",
    "sparse_finetune",
    "synflow",
    "synflow_scores",
)
