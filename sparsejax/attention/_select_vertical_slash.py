"""MInference's vertical and slash lines, found by the last queries."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count
from sparsejax.attention._chosen import chosen_blocks, chosen_keys
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import pair_heads
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    first_blocks,
    of_heads,
    prepare,
)
from sparsejax.attention._softmax import softmax_over
from sparsejax.attention._stats import BlockStats, block_stats, key_density


def vertical_slash(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (64, 64),
    vertical: int = 1000,
    slash: int = 16,
    last: int = 64,
    initial: int = 30,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""All queries attend some keys, and the blocks at some distances.

    .. math::
      v_j = \sum_{i \ge t - l} p_{ij}, \qquad
      s_D = \sum_{i \ge t - l} \sum_{j:\, I_i - J_j = D} p_{ij}, \qquad
      m_{ij} = j \in \mathrm{top}(v) \ \vee\ I_i - J_j \in \mathrm{top}(s)

    where p is the attention of the last l queries and I and J are key blocks: the
    published slashes, single diagonals covered by blocks as they are computed, are here
    ranked by these blocks. Distance 0 and the first keys are always chosen, out of the
    budgets. A vertical line is kept alone in its block, unless a slash crosses it.
    Costs l s d products; then a comparison of elements per slash.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lines of its own.
      block_shape: (block_q, block_k); slashes are block_k wide. The last of each may be
        short.
      vertical: Keys that all queries attend; more than there are means all.
      slash: Distances, in blocks; more than there are means all.
      last: l, queries that tell; more than there are means all.
      initial: So many of the first keys are always chosen.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks the first are
        kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``, whose density is that of the keys on a query's lines, at most
      ``(vertical + slash block_k) / s``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget or ``last`` is below 1.

    Example:
      >>> x = jnp.zeros((1, 6, 1, 4)).at[0, 1].set(1.0)
      >>> key = x.at[0, 5].set(0.5)
      >>> select = jax.jit(lambda q, k: sparsejax.attention.vertical_slash(
      ...     q, k, block_shape=(2, 2), vertical=1, slash=1, last=1, initial=0)[0])
      >>> mask = select(x.at[0, 5].set(3.0), key)
      >>> print(mask.to_mask().astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [0 1 1 0 0 0]
       [0 1 1 1 0 0]
       [0 1 0 0 1 0]
       [0 1 0 0 1 1]]

    References:
      Jiang et al., `MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
      Dynamic Sparse Attention <https://arxiv.org/abs/2407.02490>`_, 2024. Zhu et al.,
      `SampleAttention <https://arxiv.org/abs/2406.15486>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, capacity)
    for name, count in (("vertical", vertical), ("slash", slash), ("last", last)):
        check_count(name, count)
    check_count("initial", initial, least=0)
    (bq, bk), (b, t, h, d), s = block_shape, query.shape, key.shape[1]
    nk, last = -(-s // bk), min(last, t)
    scale = d**-0.5 if scale is None else scale
    heads = lambda x: jnp.moveaxis(x.astype(jnp.float32), 1, 2)
    logits = pair_heads(heads(query[:, t - last :]), heads(key)) * scale
    seen = expr.shift(queries=t - last).to_mask(last, s)
    probs = softmax_over(logits, seen)

    columns = jnp.arange(s, dtype=jnp.int32)
    worth = jnp.where(columns < initial, jnp.inf, probs.sum(axis=2))
    keys = _map_of(jnp.argsort(-worth, axis=-1, stable=True)[..., :vertical], s)

    # Mass by distance in key blocks, from 0 up to nk - 1 before the query's own.
    own = (jnp.arange(t, dtype=jnp.int32) + offset) // bk
    distance = jnp.arange(nk, dtype=jnp.int32)
    blocks = jnp.pad(probs, [(0, 0)] * 3 + [(0, nk * bk - s)])
    blocks = blocks.reshape(b, h, last, nk, bk).sum(axis=-1)
    there = own[t - last :, None] - distance
    at_distance = jnp.take_along_axis(
        blocks, jnp.clip(there, 0, nk - 1)[None, None], axis=-1
    )
    inside = (there >= 0) & (there < nk)
    mass = jnp.where(inside, at_distance, 0.0).sum(axis=2)
    mass = jnp.where(distance == 0, jnp.inf, mass)
    slashes = jnp.argsort(-mass, axis=-1, stable=True)[..., :slash].astype(jnp.int32)

    # [b, h, t, n]: the block that each slash has for a query; none before the first.
    choices = own[:, None] - slashes[:, :, None, :]
    n = -(-t // bq)
    crossed = jnp.pad(
        jnp.where(choices < 0, nk, jnp.minimum(choices, nk)),
        ((0, 0), (0, 0), (0, n * bq - t), (0, 0)),
        constant_values=nk,
    ).reshape(b, h, n, -1)
    crossed = _map_of(crossed, nk + 1)[..., :nk]
    lined = jnp.pad(keys, ((0, 0), (0, 0), (0, nk * bk - s)))
    lined = lined.reshape(b, h, 1, nk, bk).any(axis=-1)
    allowed = of_heads(allowed_blocks(expr, t, s, block_shape), h)
    blocks, overflow = first_blocks((crossed | lined) & allowed, capacity)
    mask = BlockMask.from_blocks(
        blocks,
        shape=(t, s),
        block_shape=block_shape,
        expr=expr & (chosen_keys(keys) | chosen_blocks(choices, bk)),
        capacity=capacity,
    )
    return mask, block_stats(
        query,
        key,
        mask,
        expr,
        density=key_density(mask, query.shape[2]),
        overflow=overflow,
        scale=scale,
    )


def _map_of(index, n):
    out = jnp.zeros((*index.shape[:-1], n), bool)
    return jnp.put_along_axis(out, index, True, axis=-1, inplace=False)
