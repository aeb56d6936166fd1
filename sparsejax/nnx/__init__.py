"""Flax NNX modules: variables around ``sparsejax.layers``, no arithmetic.

Variables: ``nnx.Param`` for kernel and bias; ``Mask``, ``Layout`` and ``Indices`` hold
the topology, ``GrowthProbe`` the zeros whose gradient is the growth score. So
``nnx.split(model, nnx.Param, Layout, GrowthProbe, ...)`` gives what a topology step
needs.
"""

from sparsejax.nnx._attention import SparseAttention as SparseAttention
from sparsejax.nnx._condensed import FanInLinear as FanInLinear
from sparsejax.nnx._condensed import Indices as Indices
from sparsejax.nnx._condensed import NMLinear as NMLinear
from sparsejax.nnx._iso_flop import SparseDoped as SparseDoped
from sparsejax.nnx._iso_flop import SparseFactorized as SparseFactorized
from sparsejax.nnx._iso_flop import SparseParallel as SparseParallel
from sparsejax.nnx._iso_flop import SparseWide as SparseWide
from sparsejax.nnx._linear import BlockSparseLinear as BlockSparseLinear
from sparsejax.nnx._linear import MaskedLinear as MaskedLinear
from sparsejax.nnx._long_conv import LongConv as LongConv
from sparsejax.nnx._moe import Balance as Balance
from sparsejax.nnx._moe import GroupedProjection as GroupedProjection
from sparsejax.nnx._moe import MoE as MoE
from sparsejax.nnx._structure import structure as structure
from sparsejax.nnx._structured import ButterflyLinear as ButterflyLinear
from sparsejax.nnx._structured import KroneckerSparseLinear as KroneckerSparseLinear
from sparsejax.nnx._structured import LowRankLinear as LowRankLinear
from sparsejax.nnx._structured import MonarchLinear as MonarchLinear
from sparsejax.nnx._structured import PixelflyLinear as PixelflyLinear
from sparsejax.nnx._variables import GrowthProbe as GrowthProbe
from sparsejax.nnx._variables import Layout as Layout
from sparsejax.nnx._variables import Mask as Mask

__all__ = [
    "Balance",
    "BlockSparseLinear",
    "ButterflyLinear",
    "FanInLinear",
    "GroupedProjection",
    "GrowthProbe",
    "Indices",
    "KroneckerSparseLinear",
    "Layout",
    "LongConv",
    "LowRankLinear",
    "Mask",
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
