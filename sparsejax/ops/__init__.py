"""Products with sparse matrices: validated, differentiable, one per equation.

Signatures name their arguments' axes but bind none of them (``_k``): each operator
checks its shapes itself, so that a user without a type checker gets the same error.
"""

from sparsejax.ops._block_sparse_attention import (
    block_sparse_attention as block_sparse_attention,
)
from sparsejax.ops._block_sparse_attention import (
    block_sparse_attention_reference as block_sparse_attention_reference,
)
from sparsejax.ops._block_sparse_matmul import (
    block_sparse_matmul as block_sparse_matmul,
)
from sparsejax.ops._block_sparse_matmul import (
    block_sparse_matmul_reference as block_sparse_matmul_reference,
)
from sparsejax.ops._block_sparse_matmul import sampled_matmul as sampled_matmul
from sparsejax.ops._block_sparse_matmul import (
    sampled_matmul_reference as sampled_matmul_reference,
)
from sparsejax.ops._butterfly_matmul import butterfly_matmul as butterfly_matmul
from sparsejax.ops._butterfly_matmul import (
    butterfly_matmul_reference as butterfly_matmul_reference,
)
from sparsejax.ops._combiner_attention import combiner_attention as combiner_attention
from sparsejax.ops._context_parallel import (
    context_parallel_attention as context_parallel_attention,
)
from sparsejax.ops._expert_parallel import (
    expert_parallel_moe_mlp as expert_parallel_moe_mlp,
)
from sparsejax.ops._fan_in_matmul import fan_in_matmul as fan_in_matmul
from sparsejax.ops._fan_in_matmul import (
    fan_in_matmul_reference as fan_in_matmul_reference,
)
from sparsejax.ops._grouped_matmul import grouped_matmul as grouped_matmul
from sparsejax.ops._grouped_matmul import (
    grouped_matmul_reference as grouped_matmul_reference,
)
from sparsejax.ops._grouped_matmul import (
    transposed_grouped_matmul as transposed_grouped_matmul,
)
from sparsejax.ops._grouped_matmul import (
    transposed_grouped_matmul_reference as transposed_grouped_matmul_reference,
)
from sparsejax.ops._kronecker_sparse_matmul import (
    kronecker_sparse_matmul as kronecker_sparse_matmul,
)
from sparsejax.ops._kronecker_sparse_matmul import (
    kronecker_sparse_matmul_reference as kronecker_sparse_matmul_reference,
)
from sparsejax.ops._long_conv import long_conv as long_conv
from sparsejax.ops._long_conv import long_conv_reference as long_conv_reference
from sparsejax.ops._masked_matmul import masked_matmul as masked_matmul
from sparsejax.ops._merge_attention import merge_attention as merge_attention
from sparsejax.ops._moe_mlp import moe_mlp as moe_mlp
from sparsejax.ops._moe_mlp import moe_mlp_reference as moe_mlp_reference
from sparsejax.ops._monarch_matmul import monarch_matmul as monarch_matmul
from sparsejax.ops._monarch_matmul import (
    monarch_matmul_reference as monarch_matmul_reference,
)
from sparsejax.ops._native_sparse_attention import (
    native_sparse_attention as native_sparse_attention,
)
from sparsejax.ops._nm_matmul import nm_matmul as nm_matmul
from sparsejax.ops._nm_matmul import nm_matmul_reference as nm_matmul_reference
from sparsejax.ops._routing_attention import routing_attention as routing_attention
from sparsejax.ops._scatterbrain_attention import (
    scatterbrain_attention as scatterbrain_attention,
)

__all__ = [
    "block_sparse_attention",
    "block_sparse_attention_reference",
    "block_sparse_matmul",
    "block_sparse_matmul_reference",
    "butterfly_matmul",
    "butterfly_matmul_reference",
    "combiner_attention",
    "context_parallel_attention",
    "expert_parallel_moe_mlp",
    "fan_in_matmul",
    "fan_in_matmul_reference",
    "grouped_matmul",
    "grouped_matmul_reference",
    "kronecker_sparse_matmul",
    "kronecker_sparse_matmul_reference",
    "long_conv",
    "long_conv_reference",
    "masked_matmul",
    "merge_attention",
    "moe_mlp",
    "moe_mlp_reference",
    "monarch_matmul",
    "monarch_matmul_reference",
    "native_sparse_attention",
    "nm_matmul",
    "nm_matmul_reference",
    "routing_attention",
    "sampled_matmul",
    "sampled_matmul_reference",
    "scatterbrain_attention",
    "transposed_grouped_matmul",
    "transposed_grouped_matmul_reference",
]
