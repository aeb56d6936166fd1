"""Which query attends to which key: mask expressions, and the blocks they leave.

Positions: i of the query, j of the key. A mask is True where attention is allowed, as
``jax.nn.dot_product_attention`` has it. Axes: b batch, h heads, t queries, s keys, nq
and nk blocks of these; ``b|1`` may be 1 and then holds for all.
"""

from sparsejax.attention._block_mask import BlockMask as BlockMask
from sparsejax.attention._block_mask import TransposedLists as TransposedLists
from sparsejax.attention._block_mask import block_mask as block_mask
from sparsejax.attention._expressions import Expression as Expression
from sparsejax.attention._expressions import causal as causal
from sparsejax.attention._expressions import everything as everything
from sparsejax.attention._expressions import from_array as from_array
from sparsejax.attention._expressions import segments as segments
from sparsejax.attention._expressions import sliding_window as sliding_window
from sparsejax.attention._lowering import Lowered as Lowered

__all__ = [
    "BlockMask",
    "Expression",
    "Lowered",
    "TransposedLists",
    "block_mask",
    "causal",
    "everything",
    "from_array",
    "segments",
    "sliding_window",
]
