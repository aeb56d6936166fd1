"""XAttention: blocks by the sums along their antidiagonals."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, check_count
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import panels
from sparsejax.attention._lines import by_block
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    most_own,
    of_heads,
    own_blocks,
    prepare,
    select,
)
from sparsejax.attention._softmax import softmax_over
from sparsejax.attention._stats import BlockStats


def xattention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    budget: Budget,
    stride: int = 8,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query block attends the blocks that hold most of a coarse attention.

    .. math::
      z_{IJ} = \frac{\mathrm{scale}}{\sigma} \sum_{r=0}^{\sigma - 1}
        q_{I \sigma + \sigma - 1 - r}^\top k_{J \sigma + r}, \qquad
      w_{AB} = \sum_{I \in A} \sum_{J \in B} \mathrm{softmax}_J(z_{IJ})

    in tiles of :math:`\sigma \times \sigma`, each by the logits on its antidiagonal:
    whatever runs down a column or along a diagonal of the attention crosses it. With
    ``TopP`` the fewest blocks that hold p of a row's w are kept; the first block and
    the query's own in any case, out of the budget. Costs t s d / stride products, and a
    panel of block_q / stride by s / stride logits at a time.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      block_shape: (block_q, block_k), multiples of ``stride``; the last of each may be
        short, its missing rows 0.
      budget: Of w: ``TopP(0.9)`` is the paper's; or blocks per query block, an int;
        their share of the nk blocks, a float in (0, 1]; or ``Threshold``, ``Tokens``.
      stride: Sigma.
      expr: What may be attended at all; None: `causal`, from ``offset``. A tile takes
        part where anything in it may be.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1;
        ``stride`` does not divide the sides of a block.

    Example:
      >>> x = jnp.zeros((1, 8, 1, 1)).at[0, 2].set(9.0).at[0, 7].set(3.0)
      >>> at = sparsejax.attention
      >>> select = jax.jit(lambda x: at.xattention(
      ...     x, x, block_shape=(2, 2), budget=at.TopP(0.9), stride=2)[0])
      >>> mask = select(x)
      >>> print(mask.to_blocks()[0, 0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 0 1]]

    References:
      Xu et al., `XAttention: Block Sparse Attention with Antidiagonal Scoring
      <https://arxiv.org/abs/2503.16428>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    check_count("stride", stride)
    (bq, bk), (b, t, h, d), (_, s, g, _) = block_shape, query.shape, key.shape
    if bq % stride or bk % stride:
        raise ValueError(
            f"block_shape: got {block_shape}, needed multiples of the stride {stride}"
        )
    scale = d**-0.5 if scale is None else scale
    nq, nk, tiles = -(-t // bq), -(-s // bk), -(-s // stride)

    # Rows of tiles: [tile, b, stride, g, d]; of queries, turned round, in panels.
    keys = panels(key, stride)
    queries = panels(query, bq).reshape(nq, b, bq // stride, stride, g, h // g, d)
    queries = queries[:, :, :, ::-1]

    def panel(x):
        index, q = x
        logits = jnp.einsum(
            "bIrgnd,Jbrgd->bgnIJ", q, keys, precision=jax.lax.Precision.HIGHEST
        ).reshape(b, h, bq // stride, tiles)
        seen = expr.shift(queries=index * bq)
        seen = of_heads(allowed_blocks(seen, bq, s, (stride, stride)), h)
        probs = softmax_over(logits * (scale / stride), seen)
        real = index * bq + jnp.arange(0, bq, stride) < t
        mass = jnp.where(real[:, None], probs, 0.0).sum(axis=2)
        return by_block(mass, bk // stride)

    index = jnp.arange(nq, dtype=jnp.int32)
    mass = jax.lax.map(panel, (index, queries))
    mass = jnp.moveaxis(mass, 0, 2)
    first = jnp.arange(nk) == 0
    return select(
        query,
        key,
        jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf),
        block_shape=block_shape,
        budget=budget,
        expr=expr,
        forced=own_blocks(t, s, block_shape, offset) | first,
        most_forced=most_own(block_shape) + 1,
        offset=offset,
        scale=scale,
        capacity=capacity,
    )
