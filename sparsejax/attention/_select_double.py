"""Double Sparsity: logits of the few channels that matter rank all keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, check_count
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import (
    check_pair,
    largest_by_block,
    panels,
    to_heads,
)
from sparsejax.attention._lowering import Given, as_array
from sparsejax.attention._selection import Offset, prepare, select
from sparsejax.attention._stats import BlockStats


def label_channels(
    query: Shaped[Array, "..."], key: Float[Array, "..."], count: int
) -> Int[Array, "h count"]:
    r"""The channels that carry most of a head's logits, from calibration data.

    .. math::
      \mathrm{best}_c\ \sum_{i} |q_{ic}| \cdot \sum_j |k_{jc}|

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``.
      count: Channels per head, 1 to d.

    Returns:
      int32 ``[h, count]``, the largest first, ties to the lowest channel.

    Raises:
      ValueError: Shapes or dtypes do not fit, or ``count`` is not from 1 to d.

    Example:
      >>> x = jnp.array([0.1, -3.0, 2.0]).reshape(1, 1, 1, 3)
      >>> print(sparsejax.attention.label_channels(x, x, 2))
      [[1 2]]

    References:
      Yang et al., `Post-Training Sparse Attention with Double Sparsity
      <https://arxiv.org/abs/2408.07092>`_, 2024.
    """
    check_pair(query, key, (1, 1))
    check_count("count", count)
    if count > query.shape[3]:
        raise ValueError(f"count: got {count}, needed at most {query.shape[3]}")
    size = lambda x: jnp.abs(x.astype(jnp.float32)).mean(axis=1)
    products = size(query) * to_heads(size(key), query.shape[2])
    return jax.lax.top_k(products.mean(axis=0), count)[1].astype(jnp.int32)


def double_sparsity(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    channels: Given,
    *,
    block_shape: tuple[int, int] = (1, 16),
    budget: Budget,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query block attends the blocks with the largest logit over a few channels.

    .. math::
      S_{IJ} = \mathrm{scale} \max_{i \in I,\, j \in J} \sum_{c \in C_h} q_{ic} k_{jc}

    With blocks of one this is the published choice of keys; with larger ones, that of
    the blocks that hold the best keys. A cache keeps the label channels apart and reads
    only these. Costs t s products of ``count`` channels, a panel of block_q queries at
    a time.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      channels: Integers ``[h, count]``, from `label_channels`.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: Blocks per query block, an int; their share of the nk blocks, a float in
        (0, 1]; or ``TopP``, ``Threshold``, ``Tokens``. More than there are means all.
      expr: What may be attended at all; None: `causal`, from ``offset``. Inside a block
        the score does not ask it.
      offset: Position of the first query among the keys; may be traced.
      scale: None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, the query's own blocks always in
      them, out of the budget, ties to the lowest index; and a ``BlockStats``. No
      gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1.

    Example:
      >>> key = jnp.array([[9.0, 0], [0, 5], [0, 1], [0, 0]]).reshape(1, 4, 1, 2)
      >>> query = jnp.ones((1, 1, 1, 2))
      >>> select = jax.jit(lambda *x: sparsejax.attention.double_sparsity(
      ...     *x, block_shape=(1, 1), budget=2, offset=3)[0])
      >>> mask = select(query, key, jnp.array([[1]]))
      >>> print(mask.to_blocks()[0, 0])  # by the second channel alone
      [[False  True False  True]]

    References:
      Yang et al., `Post-Training Sparse Attention with Double Sparsity
      <https://arxiv.org/abs/2408.07092>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    (bq, bk), (_, t, h, d) = block_shape, query.shape
    channels = jnp.asarray(as_array("channels", channels))
    if (
        channels.ndim != 2
        or channels.shape[0] != h
        or not jnp.issubdtype(channels.dtype, jnp.integer)
    ):
        raise ValueError(
            f"channels: got {channels.dtype} {channels.shape}, needed integers [{h}, "
            "count]"
        )
    scale = d**-0.5 if scale is None else scale
    pick = lambda x: jnp.take_along_axis(
        jnp.repeat(x, h // x.shape[2], axis=2).astype(jnp.float32),
        channels[None, None],
        axis=-1,
    )
    labels, keys = panels(pick(query), bq), pick(key)

    def panel(x):
        index, q = x
        logits = jnp.einsum(
            "bqhc,bshc->bhqs", q, keys, precision=jax.lax.Precision.HIGHEST
        )
        return largest_by_block(logits, index * bq + jnp.arange(bq) < t, bk)

    scores = jax.lax.map(panel, (jnp.arange(len(labels)), labels))
    return select(
        query,
        key,
        jnp.moveaxis(scores, 0, 2) * scale,
        block_shape=block_shape,
        budget=budget,
        expr=expr,
        forced="own",
        offset=offset,
        scale=scale,
        capacity=capacity,
    )
