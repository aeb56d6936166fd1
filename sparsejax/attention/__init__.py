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
from sparsejax.attention._function import from_function as from_function
from sparsejax.attention._lowering import Lowered as Lowered
from sparsejax.attention._patterns import block_diagonal as block_diagonal
from sparsejax.attention._patterns import dilated as dilated
from sparsejax.attention._patterns import global_tokens as global_tokens
from sparsejax.attention._patterns import keys_below as keys_below
from sparsejax.attention._patterns import prefix as prefix
from sparsejax.attention._patterns import random_blocks as random_blocks
from sparsejax.attention._patterns import strided as strided
from sparsejax.attention._per_head import per_head as per_head
from sparsejax.attention._plots import plot_block_mask as plot_block_mask
from sparsejax.attention._plots import plot_heads as plot_heads

__all__ = [
    "BlockMask",
    "Expression",
    "Lowered",
    "TransposedLists",
    "block_diagonal",
    "block_mask",
    "causal",
    "dilated",
    "everything",
    "from_array",
    "from_function",
    "global_tokens",
    "keys_below",
    "per_head",
    "plot_block_mask",
    "plot_heads",
    "prefix",
    "random_blocks",
    "segments",
    "sliding_window",
    "strided",
]
