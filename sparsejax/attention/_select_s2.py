"""S2-Attention: each head attends a local band and its own shard of the past."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count, check_counts
from sparsejax.attention._expressions import Expression
from sparsejax.attention._selection import Offset, allowed_blocks, of_heads, prepare
from sparsejax.attention._stats import BlockStats, block_stats


def s2_shards(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (64, 64),
    local: int = 16,
    stride: int = 8,
    phase: int = 0,
    dense_heads: int = 0,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Head h attends the last blocks, and every stride-th of all from its own on.

    .. math::
      m^h_{IJ} = (0 \le I - J < l) \ \vee\
      \big(J \le I \wedge (J + \sigma h + c) \bmod v = 0\big), \qquad
      \sigma = \max(1, \lfloor v / n_\mathrm{heads} \rfloor)

    in blocks, where I is any of the key blocks at a query block's positions. Together
    the heads see all of the past, each a v-th of it: the same blocks for all queries,
    so that what has left the band of a head, and is not in its shard, need not be
    cached. It depends on no data, and nothing is computed but the lists.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, s, h_kv, d]``.
      block_shape: (block_q, block_k); the last of each may be short.
      local: l, blocks in the band, 1 at least: the query's own is always kept.
      stride: v, blocks from one strided block to the next.
      phase: c, which shifts the shards of all heads.
      dense_heads: So many heads, the first, attend everything.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits in ``recall``; None: ``d ** -0.5``.

    Returns:
      A ``BlockMask`` of ``[1, h, nq, ...]`` lists (``[b, ...]`` where ``expr`` differs
      over the batch) and a ``BlockStats``.

    Raises:
      ValueError: Shapes or dtypes do not fit; ``local`` or ``stride`` is below 1;
        ``dense_heads`` is not from 0 to h.

    Example:
      >>> x = jnp.zeros((1, 5, 2, 4))
      >>> select = jax.jit(lambda x: sparsejax.attention.s2_shards(
      ...     x, x, block_shape=(1, 1), local=1, stride=2)[0])
      >>> mask = select(x)
      >>> print(mask.to_blocks()[0].astype(int))
      [[[1 0 0 0 0]
        [1 1 0 0 0]
        [1 0 1 0 0]
        [1 0 1 1 0]
        [1 0 1 0 1]]
       [[1 0 0 0 0]
        [0 1 0 0 0]
        [0 1 1 0 0]
        [0 1 0 1 0]
        [0 1 0 1 1]]]

    References:
      Lin et al., `S2-Attention: Hardware-Aware Context Sharding Among Attention Heads
      <https://arxiv.org/abs/2407.17678>`_, 2024.
    """
    check_counts(local=local, stride=stride)
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, None)
    (bq, bk), heads, t, s = block_shape, query.shape[2], query.shape[1], key.shape[1]
    check_count("dense_heads", dense_heads, least=0)
    if dense_heads > heads:
        raise ValueError(f"dense_heads: got {dense_heads}, needed 0 to {heads}")
    nk = -(-s // bk)
    start = jnp.arange(0, t, bq, dtype=jnp.int32) + offset
    first = (start // bk)[:, None]
    last = ((jnp.minimum(start + bq, t + offset) - 1) // bk)[:, None]
    column = jnp.arange(nk, dtype=jnp.int32)
    head = np.arange(heads)[:, None, None]
    shift = head * max(1, stride // heads) + phase
    strided = (np.arange(nk) + shift) % stride == 0
    near = column > first - local
    blocks = ((near | strided) & (column <= last)) | (head < dense_heads)
    blocks = blocks[None] & of_heads(allowed_blocks(expr, t, s, block_shape), heads)
    mask = BlockMask.from_blocks(
        blocks, shape=(t, s), block_shape=block_shape, expr=expr
    )
    return mask, block_stats(query, key, mask, expr, scale=scale)
