"""Layer maths without a framework: a frozen spec, ``init_`` and ``apply_`` per layer.

``nnx`` and ``linen`` wrap these and add no arithmetic, so both have the same parameter
names and shapes: ``kernel`` and ``bias``, with the topology beside them as
``kernel_mask`` or ``kernel_layout``.
"""

from sparsejax.layers._convert import convert as convert
from sparsejax.layers._iso_flop import apply_iso_flop as apply_iso_flop
from sparsejax.layers._iso_flop import init_iso_flop as init_iso_flop
from sparsejax.layers._iso_flop import iso_flop as iso_flop
from sparsejax.layers._iso_flop import iso_flop_chain as iso_flop_chain
from sparsejax.layers._iso_flop_specs import SparseDopedSpec as SparseDopedSpec
from sparsejax.layers._iso_flop_specs import (
    SparseFactorizedSpec as SparseFactorizedSpec,
)
from sparsejax.layers._iso_flop_specs import SparseParallelSpec as SparseParallelSpec
from sparsejax.layers._iso_flop_specs import SparseWideSpec as SparseWideSpec
from sparsejax.layers._linear import BlockSparseLinearSpec as BlockSparseLinearSpec
from sparsejax.layers._linear import MaskedLinearSpec as MaskedLinearSpec
from sparsejax.layers._linear import (
    apply_block_sparse_linear as apply_block_sparse_linear,
)
from sparsejax.layers._linear import apply_masked_linear as apply_masked_linear
from sparsejax.layers._linear import (
    init_block_sparse_linear as init_block_sparse_linear,
)
from sparsejax.layers._linear import init_masked_linear as init_masked_linear

__all__ = [
    "BlockSparseLinearSpec",
    "MaskedLinearSpec",
    "SparseDopedSpec",
    "SparseFactorizedSpec",
    "SparseParallelSpec",
    "SparseWideSpec",
    "apply_block_sparse_linear",
    "apply_iso_flop",
    "apply_masked_linear",
    "convert",
    "init_block_sparse_linear",
    "init_iso_flop",
    "init_masked_linear",
    "iso_flop",
    "iso_flop_chain",
]
