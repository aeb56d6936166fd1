"""Flax Linen modules: variables around ``sparsejax.layers``, no arithmetic.

Collections: "params" for kernel and bias, "topology" for ``kernel_mask``,
``kernel_layout`` and ``kernel_indices``, "probes" for the zeros whose gradient is the
growth score; the last may be left out when a module is applied.
"""

from sparsejax.layers import structure as structure
from sparsejax.linen._attention import SparseAttention as SparseAttention
from sparsejax.linen._condensed import FanInLinear as FanInLinear
from sparsejax.linen._condensed import NMLinear as NMLinear
from sparsejax.linen._iso_flop import SparseDoped as SparseDoped
from sparsejax.linen._iso_flop import SparseFactorized as SparseFactorized
from sparsejax.linen._iso_flop import SparseParallel as SparseParallel
from sparsejax.linen._iso_flop import SparseWide as SparseWide
from sparsejax.linen._linear import BlockSparseLinear as BlockSparseLinear
from sparsejax.linen._linear import MaskedLinear as MaskedLinear
from sparsejax.linen._long_conv import LongConv as LongConv
from sparsejax.linen._moe import GroupedProjection as GroupedProjection
from sparsejax.linen._moe import MoE as MoE
from sparsejax.linen._structured import ButterflyLinear as ButterflyLinear
from sparsejax.linen._structured import KroneckerSparseLinear as KroneckerSparseLinear
from sparsejax.linen._structured import LowRankLinear as LowRankLinear
from sparsejax.linen._structured import MonarchLinear as MonarchLinear
from sparsejax.linen._structured import PixelflyLinear as PixelflyLinear

__all__ = [
    "BlockSparseLinear",
    "ButterflyLinear",
    "FanInLinear",
    "GroupedProjection",
    "KroneckerSparseLinear",
    "LongConv",
    "LowRankLinear",
    "MaskedLinear",
    "MoE",
    "MonarchLinear",
    "NMLinear",
    "PixelflyLinear",
    "SparseAttention",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "SparseWide",
    "structure",
]
