"""Sparse training as optax transforms.

tx = sparsify(optax.adamw(3e-4), rigl(sparsity=0.9, end=75_000, key=key))
opt_state = tx.init(params)
params = sparsejax.masks.apply_masks(params, get_masks(opt_state))
...  # the loop stays as it was: tx.update, optax.apply_updates
"""

from sparsejax.transforms._anneal import AnnealState as AnnealState
from sparsejax.transforms._anneal import anneal as anneal
from sparsejax.transforms._anneal import get_annealed as get_annealed
from sparsejax.transforms._dynamic import rigl as rigl
from sparsejax.transforms._dynamic import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from sparsejax.transforms._exploration import (
    exploration_exploitation as exploration_exploitation,
)
from sparsejax.transforms._factors import scale_by_factors as scale_by_factors
from sparsejax.transforms._fixed import fixed as fixed
from sparsejax.transforms._fixed import gradual_magnitude as gradual_magnitude
from sparsejax.transforms._fixed import gradual_magnitude_over as gradual_magnitude_over
from sparsejax.transforms._fixed import static as static
from sparsejax.transforms._granet import granet as granet
from sparsejax.transforms._leaves import default_leaf_filter as default_leaf_filter
from sparsejax.transforms._penalties import HypersparseState as HypersparseState
from sparsejax.transforms._penalties import add_hypersparse as add_hypersparse
from sparsejax.transforms._penalties import (
    hypersparse_coefficient as hypersparse_coefficient,
)
from sparsejax.transforms._penalties import hypersparse_penalty as hypersparse_penalty
from sparsejax.transforms._penalties import (
    mask_sparsity_penalty as mask_sparsity_penalty,
)
from sparsejax.transforms._plots import mask_change as mask_change
from sparsejax.transforms._plots import plot_density as plot_density
from sparsejax.transforms._plots import plot_mask_change as plot_mask_change
from sparsejax.transforms._proximal import ProximalState as ProximalState
from sparsejax.transforms._proximal import group_envelope as group_envelope
from sparsejax.transforms._proximal import group_lasso as group_lasso
from sparsejax.transforms._proximal_operators import (
    group_envelope_penalty as group_envelope_penalty,
)
from sparsejax.transforms._proximal_operators import (
    group_lasso_penalty as group_lasso_penalty,
)
from sparsejax.transforms._proximal_operators import (
    prox_group_envelope as prox_group_envelope,
)
from sparsejax.transforms._proximal_operators import (
    prox_group_lasso as prox_group_lasso,
)
from sparsejax.transforms._report import ReportRow as ReportRow
from sparsejax.transforms._report import SparsityReport as SparsityReport
from sparsejax.transforms._report import report as report
from sparsejax.transforms._shrinkage import ShrinkageState as ShrinkageState
from sparsejax.transforms._shrinkage import (
    iterative_soft_shrinkage as iterative_soft_shrinkage,
)
from sparsejax.transforms._sparse_momentum import sparse_momentum as sparse_momentum
from sparsejax.transforms._sparsify import SparsifyState as SparsifyState
from sparsejax.transforms._sparsify import get_masks as get_masks
from sparsejax.transforms._sparsify import is_update_step as is_update_step
from sparsejax.transforms._sparsify import sparsify as sparsify
from sparsejax.transforms._srigl import srigl as srigl
from sparsejax.transforms._updater import MaskUpdate as MaskUpdate
from sparsejax.transforms._updater import Updater as Updater

__all__ = (
    "AnnealState",
    "HypersparseState",
    "MaskUpdate",
    "ProximalState",
    "ReportRow",
    "ShrinkageState",
    "SparsifyState",
    "SparsityReport",
    "Updater",
    "add_hypersparse",
    "anneal",
    "default_leaf_filter",
    "exploration_exploitation",
    "fixed",
    "get_annealed",
    "get_masks",
    "gradual_magnitude",
    "gradual_magnitude_over",
    "granet",
    "group_envelope",
    "group_envelope_penalty",
    "group_lasso",
    "group_lasso_penalty",
    "hypersparse_coefficient",
    "hypersparse_penalty",
    "is_update_step",
    "iterative_soft_shrinkage",
    "mask_change",
    "mask_sparsity_penalty",
    "plot_density",
    "plot_mask_change",
    "prox_group_envelope",
    "prox_group_lasso",
    "report",
    "rigl",
    "scale_by_factors",
    "sparse_evolutionary_training",
    "sparse_momentum",
    "sparsify",
    "srigl",
    "static",
)
