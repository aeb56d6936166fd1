"""Flax Linen modules: variables around ``sparsejax.layers``, no arithmetic.

Collections: "params" for kernel and bias, "topology" for ``kernel_mask`` and
``kernel_layout``, "probes" for the zeros whose gradient is the growth score; the last
may be left out when a module is applied.
"""

from sparsejax.linen._iso_flop import SparseDoped as SparseDoped
from sparsejax.linen._iso_flop import SparseFactorized as SparseFactorized
from sparsejax.linen._iso_flop import SparseParallel as SparseParallel
from sparsejax.linen._iso_flop import SparseWide as SparseWide
from sparsejax.linen._linear import BlockSparseLinear as BlockSparseLinear
from sparsejax.linen._linear import MaskedLinear as MaskedLinear

__all__ = [
    "BlockSparseLinear",
    "MaskedLinear",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "SparseWide",
]
