"""Sparse training as optax transforms.

tx = sparsify(optax.adamw(3e-4), rigl(sparsity=0.9, end=75_000, key=key))
opt_state = tx.init(params)
params = sparsejax.masks.apply_masks(params, get_masks(opt_state))
...  # the loop stays as it was: tx.update, optax.apply_updates
"""

from sparsejax.transforms._dynamic import rigl as rigl
from sparsejax.transforms._dynamic import (
    sparse_evolutionary_training as sparse_evolutionary_training,
)
from sparsejax.transforms._fixed import gradual_magnitude as gradual_magnitude
from sparsejax.transforms._fixed import static as static
from sparsejax.transforms._leaves import default_leaf_filter as default_leaf_filter
from sparsejax.transforms._plots import mask_change as mask_change
from sparsejax.transforms._plots import plot_density as plot_density
from sparsejax.transforms._plots import plot_mask_change as plot_mask_change
from sparsejax.transforms._report import ReportRow as ReportRow
from sparsejax.transforms._report import SparsityReport as SparsityReport
from sparsejax.transforms._report import report as report
from sparsejax.transforms._sparsify import SparsifyState as SparsifyState
from sparsejax.transforms._sparsify import get_masks as get_masks
from sparsejax.transforms._sparsify import is_update_step as is_update_step
from sparsejax.transforms._sparsify import sparsify as sparsify
from sparsejax.transforms._updater import MaskUpdate as MaskUpdate
from sparsejax.transforms._updater import Updater as Updater

__all__ = (
    "MaskUpdate",
    "ReportRow",
    "SparsifyState",
    "SparsityReport",
    "Updater",
    "default_leaf_filter",
    "get_masks",
    "gradual_magnitude",
    "is_update_step",
    "mask_change",
    "plot_density",
    "plot_mask_change",
    "report",
    "rigl",
    "sparse_evolutionary_training",
    "sparsify",
    "static",
)
