"""SpargeAttn: means speak for blocks that are alike inside; the others are kept."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, check_range
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import pair_heads, pool_blocks, to_heads
from sparsejax.attention._selection import Offset, prepare, select
from sparsejax.attention._stats import BlockStats


def sparge(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 64),
    budget: Budget,
    similarity: ArrayLike = 0.6,
    sink: bool = False,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Pooled scores choose among blocks whose rows are alike; the rest is always kept.

    .. math::
      S_{IJ} = \mathrm{scale} \cdot \bar q_I^\top \bar k_J, \qquad
      \mathrm{sim}(X) = \frac1{n^2} \sum_{a,b} \hat x_a^\top \hat x_b

    .. math::
      \mathrm{kept} = \mathrm{best}_{J:\, \mathrm{sim}(k_J) > \theta} S_{IJ}
        \ \cup\ \{\mathrm{sim}(k_J) \le \theta\}
        \ \cup\ \{\mathrm{sim}(q_I) \le \theta\}

    with hats for rows of length 1. The mean of a block of dissimilar keys says little:
    such columns take no part in the softmax and are kept; so is all of a row of
    dissimilar queries. ``TopP(0.98)`` is the paper's choice by cumulative probability.
    Costs t d reads and nq nk d products.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: What is chosen among the blocks that are alike: blocks per query block, an
        int; their share of the nk blocks, a float in (0, 1]; or ``TopP``,
        ``Threshold``, ``Tokens``. The guarded blocks come on top.
      similarity: Theta, from -1 to 1; below 0 there is no guard. One number, or one per
        query head ``[h]``; may be traced.
      sink: Whether the first key block is always kept.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of S, and of the logits in ``recall``; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks the guarded are
        kept first, then the best; ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, one block at least in a query block
      that may attend any, ties to the lowest index, and a ``BlockStats``.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1;
        ``similarity`` is not from -1 to 1.

    Example:
      >>> one, other = jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])
      >>> x = jnp.stack([one, one, one, other, one, one])[None, :, None]
      >>> select = jax.jit(lambda x: sparsejax.attention.sparge(
      ...     x, x, block_shape=(2, 2), budget=1)[0])
      >>> mask = select(x)
      >>> print(mask.to_blocks()[0, 0].astype(int))  # block 1 is mixed
      [[1 0 0]
       [1 1 0]
       [1 1 0]]

    References:
      Zhang et al., `SpargeAttention: Accurate and Training-free Sparse Attention
      Accelerating Any Model Inference <https://arxiv.org/abs/2502.18137>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    theta = jnp.asarray(similarity, jnp.float32)
    h = query.shape[2]
    if theta.shape not in ((), (h,)):
        raise ValueError(f"similarity: got shape {theta.shape}, needed [] or [{h}]")
    if not theta.ndim:
        check_range("similarity", similarity, "[-1, 1]", lambda x: -1 <= x <= 1)
    theta = theta.reshape(1, -1, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (bq, bk), nk = block_shape, -(-key.shape[1] // block_shape[1])
    alike_q = _likeness(query, bq) > theta
    alike_k = to_heads(_likeness(key, bk), h) > theta
    scores = pair_heads(pool_blocks(query, bq), pool_blocks(key, bk)) * scale
    scores = jnp.where(alike_k[:, :, None], scores, -jnp.inf)
    guarded = ~alike_k[:, :, None] | ~alike_q[..., None]
    if sink:
        guarded = guarded | (jnp.arange(nk) == 0)
    return select(
        query,
        key,
        scores,
        block_shape=block_shape,
        budget=budget,
        expr=expr,
        added=guarded,
        most_added=None,
        offset=offset,
        scale=scale,
        capacity=capacity,
    )


def _likeness(x, size):
    """Mean of the cosines of all pairs of rows in each block: [b, heads, n]."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt((x * x).sum(axis=-1, keepdims=True))
    # The sum over all pairs is the squared length of the sum of the rows.
    mean = pool_blocks(x / jnp.where(norm > 0, norm, 1.0), size)
    return (mean * mean).sum(axis=-1)
