"""Layer maths without a framework: a frozen spec, ``init_`` and ``apply_`` per layer.

``nnx`` and ``linen`` wrap these and add no arithmetic, so both have the same parameter
names and shapes: ``kernel`` and ``bias``, with the topology beside them as
``kernel_mask``, ``kernel_layout`` or ``kernel_indices``. Structured layers have
``factor_0``, ``factor_1``, ..., or ``down``, ``up`` and ``blocks``, for the kernel;
attention has ``query``, ``key``, ``value`` and ``out``.
"""

from sparsejax.layers._attention import AttentionMask as AttentionMask
from sparsejax.layers._attention import apply_sparse_attention as apply_sparse_attention
from sparsejax.layers._attention import (
    decode_sparse_attention as decode_sparse_attention,
)
from sparsejax.layers._attention import mask_holds_arrays as mask_holds_arrays
from sparsejax.layers._attention_spec import SparseAttentionSpec as SparseAttentionSpec
from sparsejax.layers._attention_spec import (
    init_sparse_attention as init_sparse_attention,
)
from sparsejax.layers._condense import CondensedChoice as CondensedChoice
from sparsejax.layers._condense import CondenseReport as CondenseReport
from sparsejax.layers._condense import condense as condense
from sparsejax.layers._condensed import CondensedBlocks as CondensedBlocks
from sparsejax.layers._condensed import CondensedFanIn as CondensedFanIn
from sparsejax.layers._condensed import CondensedMasked as CondensedMasked
from sparsejax.layers._condensed import CondensedNM as CondensedNM
from sparsejax.layers._condensed import CondensedRegion as CondensedRegion
from sparsejax.layers._condensed import apply_condensed as apply_condensed
from sparsejax.layers._condensed import expand_condensed as expand_condensed
from sparsejax.layers._condensed_linear import FanInLinearSpec as FanInLinearSpec
from sparsejax.layers._condensed_linear import NMLinearSpec as NMLinearSpec
from sparsejax.layers._condensed_linear import (
    apply_fan_in_linear as apply_fan_in_linear,
)
from sparsejax.layers._condensed_linear import apply_nm_linear as apply_nm_linear
from sparsejax.layers._condensed_linear import init_fan_in_linear as init_fan_in_linear
from sparsejax.layers._condensed_linear import init_nm_linear as init_nm_linear
from sparsejax.layers._convert import convert as convert
from sparsejax.layers._grouped_projection import (
    GroupedProjectionSpec as GroupedProjectionSpec,
)
from sparsejax.layers._grouped_projection import (
    apply_grouped_projection as apply_grouped_projection,
)
from sparsejax.layers._grouped_projection import (
    init_grouped_projection as init_grouped_projection,
)
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
from sparsejax.layers._kv_cache import KVCache as KVCache
from sparsejax.layers._kv_cache import init_kv_cache as init_kv_cache
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
from sparsejax.layers._long_conv import LongConvSpec as LongConvSpec
from sparsejax.layers._long_conv import apply_long_conv as apply_long_conv
from sparsejax.layers._long_conv import init_long_conv as init_long_conv
from sparsejax.layers._moe import MoEAux as MoEAux
from sparsejax.layers._moe import apply_moe as apply_moe
from sparsejax.layers._moe_spec import MoESpec as MoESpec
from sparsejax.layers._moe_spec import init_moe as init_moe
from sparsejax.layers._structure import StructuredLayer as StructuredLayer
from sparsejax.layers._structure import StructureReport as StructureReport
from sparsejax.layers._structure import structure as structure
from sparsejax.layers._structured import (
    KroneckerSparseLinearSpec as KroneckerSparseLinearSpec,
)
from sparsejax.layers._structured import LowRankLinearSpec as LowRankLinearSpec
from sparsejax.layers._structured import PixelflyLinearSpec as PixelflyLinearSpec
from sparsejax.layers._structured import (
    apply_kronecker_sparse_linear as apply_kronecker_sparse_linear,
)
from sparsejax.layers._structured import apply_low_rank_linear as apply_low_rank_linear
from sparsejax.layers._structured import apply_pixelfly_linear as apply_pixelfly_linear
from sparsejax.layers._structured import (
    init_kronecker_sparse_linear as init_kronecker_sparse_linear,
)
from sparsejax.layers._structured import init_low_rank_linear as init_low_rank_linear
from sparsejax.layers._structured import init_pixelfly_linear as init_pixelfly_linear

__all__ = [
    "BlockSparseLinearSpec",
    "CondenseReport",
    "CondensedBlocks",
    "CondensedChoice",
    "CondensedFanIn",
    "CondensedMasked",
    "CondensedNM",
    "CondensedRegion",
    "FanInLinearSpec",
    "GroupedProjectionSpec",
    "KVCache",
    "KroneckerSparseLinearSpec",
    "LongConvSpec",
    "LowRankLinearSpec",
    "MaskedLinearSpec",
    "MoEAux",
    "MoESpec",
    "NMLinearSpec",
    "PixelflyLinearSpec",
    "SparseAttentionSpec",
    "SparseDopedSpec",
    "SparseFactorizedSpec",
    "SparseParallelSpec",
    "SparseWideSpec",
    "StructureReport",
    "StructuredLayer",
    "apply_block_sparse_linear",
    "apply_condensed",
    "apply_fan_in_linear",
    "apply_grouped_projection",
    "apply_iso_flop",
    "apply_kronecker_sparse_linear",
    "apply_long_conv",
    "apply_low_rank_linear",
    "apply_masked_linear",
    "apply_moe",
    "apply_nm_linear",
    "apply_pixelfly_linear",
    "apply_sparse_attention",
    "condense",
    "convert",
    "decode_sparse_attention",
    "expand_condensed",
    "init_block_sparse_linear",
    "init_fan_in_linear",
    "init_grouped_projection",
    "init_iso_flop",
    "init_kronecker_sparse_linear",
    "init_kv_cache",
    "init_long_conv",
    "init_low_rank_linear",
    "init_masked_linear",
    "init_moe",
    "init_nm_linear",
    "init_pixelfly_linear",
    "init_sparse_attention",
    "iso_flop",
    "iso_flop_chain",
    "mask_holds_arrays",
    "structure",
]
