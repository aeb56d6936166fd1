"""Selections of each query for itself, under the lists of its block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._chosen import chosen_blocks
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import panels, to_heads
from sparsejax.attention._selection import Offset, allowed_blocks, of_heads
from sparsejax.attention._stats import BlockStats, block_stats


def best_per_query(
    scores: Callable[[Int[Array, " bq"], Float[Array, "b bq h d"]], Array],
    query: Float[Array, "b t h d"],
    *,
    nk: int,
    block_shape: tuple[int, int],
    count: int,
    forced: Callable[[Array, Array], Array],
    offset: Offset,
) -> Int[Array, "b m t count"]:
    """The best past blocks of each query, a panel of queries at a time.

    Args:
      scores: (positions ``[bq]``, queries) -> ``[b, m, bq, nk]``.
      query: The queries.
      nk: Number of key blocks.
      block_shape: (block_q, block_k).
      count: Blocks per query.
      forced: (own block ``[bq, 1]``, block ``[nk]``) -> whether it is always kept.
      offset: Position of the first query among the keys.

    Returns:
      Blocks, forced ones first, then falling in score, ties to the lowest index; -1
      where a query has fewer than ``count`` to choose from.
    """
    (b, t), (bq, bk) = query.shape[:2], block_shape
    n = -(-t // bq)
    column = jnp.arange(nk, dtype=jnp.int32)

    def panel(x):
        index, q = x
        position = index * bq + jnp.arange(bq, dtype=jnp.int32) + offset
        own = (position // bk)[:, None]
        worth = jnp.where(forced(own, column), jnp.inf, scores(position, q))
        worth = jnp.where(column <= own, worth, -jnp.inf)
        value, blocks = jax.lax.top_k(worth, count)
        return jnp.where(value > -jnp.inf, blocks, -1)

    blocks = jax.lax.map(panel, (jnp.arange(n, dtype=jnp.int32), panels(query, bq)))
    blocks = jnp.moveaxis(blocks, 0, 2)  # [b, m, n, bq, count]
    return blocks.reshape(b, -1, n * bq, count)[:, :, :t].astype(jnp.int32)


def mask_of_choices(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    choices: Int[Array, "b m t count"],
    *,
    expr: Expression,
    block_shape: tuple[int, int],
    capacity: int | None,
    scale: float | None,
) -> tuple[BlockMask, BlockStats]:
    """Lists for the union over a block's queries; elements as each query chose.

    Where the union does not fit the capacity, the blocks that most queries chose stay.
    """
    (bq, bk), t, s = block_shape, query.shape[1], key.shape[1]
    b, m, _, count = choices.shape
    n, nk = -(-t // bq), -(-s // bk)
    votes = jnp.pad(
        choices, ((0, 0), (0, 0), (0, n * bq - t), (0, 0)), constant_values=-1
    ).reshape(b, m, n, bq * count)
    rows = jnp.indices(votes.shape, sparse=True)[:-1]
    votes = jnp.zeros((b, m, n, nk + 1), jnp.int32).at[(*rows, votes)].add(1)[..., :nk]
    votes = jnp.where(of_heads(allowed_blocks(expr, t, s, block_shape), m), votes, 0)
    blocks = votes > 0
    most = nk if capacity is None else min(capacity, nk)
    overflow = jnp.maximum(blocks.sum(axis=-1, dtype=jnp.int32) - most, 0)
    if most < nk:
        value, order = jax.lax.top_k(votes, most)
        blocks = jnp.put_along_axis(
            jnp.zeros_like(blocks), order, value > 0, axis=-1, inplace=False
        )
    mask = BlockMask.from_blocks(
        blocks,
        shape=(t, s),
        block_shape=block_shape,
        expr=expr & chosen_blocks(choices, bk),
        capacity=most,
    )
    return mask, block_stats(
        query,
        key,
        mask,
        expr,
        density=_given(choices, mask, expr),
        overflow=overflow.sum(axis=-1),
        scale=scale,
    )


def _given(choices, mask, expr):
    """Blocks that were chosen, listed, and may be attended, over all: [b, m]."""
    (t, s), (bq, bk), (n, nk) = mask.shape, mask.block_shape, mask.grid
    b, m, _, count = choices.shape
    rows = jnp.pad(
        choices, ((0, 0), (0, 0), (0, n * bq - t), (0, 0)), constant_values=-1
    )
    rows = jnp.moveaxis(rows.reshape(b, m, n, bq, count), 2, 0)
    listed = to_heads(mask.to_blocks(), m)

    def panel(x):
        index, blocks = x
        one = allowed_blocks(expr.shift(queries=index * bq), bq, s, (1, bk))
        one = to_heads(one, m) & listed[:, :, index, None]
        one = jnp.broadcast_to(one, (b, m, bq, nk))
        found = jnp.take_along_axis(one, jnp.maximum(blocks, 0), axis=-1)
        return (found & (blocks >= 0)).sum(axis=(-2, -1), dtype=jnp.int32)

    counts = jax.lax.map(panel, (jnp.arange(n, dtype=jnp.int32), rows)).sum(axis=0)
    return counts.astype(jnp.float32) / (t * nk)
