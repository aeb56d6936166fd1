"""Lines through the attention matrix: keys for all queries, distances of blocks."""

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._chosen import chosen_keys
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import pair_heads
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    first_blocks,
    most_own,
    of_heads,
)
from sparsejax.attention._softmax import softmax_over
from sparsejax.attention._stats import (
    BlockStats,
    block_stats,
    element_rows,
    key_density,
)


def probe(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    rows: Int[Array, " n"],
    expr: Expression,
    scale: float,
) -> tuple[Float[Array, "b h n s"], Bool[Array, "_b _h n s"]]:
    """Attention of some queries, and what they may attend."""
    heads = lambda x: jnp.moveaxis(x.astype(jnp.float32), 1, 2)
    logits = pair_heads(heads(query[:, rows]), heads(key)) * scale
    seen = element_rows(expr, query.shape[1], key.shape[1], query.shape[2])(rows)
    return softmax_over(logits, seen), seen


def by_block(probs: Float[Array, "*axes s"], block_k: int) -> Float[Array, "*axes nk"]:
    """Sums over blocks of keys."""
    pad = [(0, 0)] * (probs.ndim - 1) + [(0, -probs.shape[-1] % block_k)]
    return jnp.pad(probs, pad).reshape(*probs.shape[:-1], -1, block_k).sum(axis=-1)


def by_distance(
    blocks: Float[Array, "b h n nk"], own: Int[Array, " n"]
) -> Float[Array, "b h nk"]:
    """Sums over queries, by how many blocks before their own: 0 up to nk - 1."""
    nk = blocks.shape[-1]
    there = own[:, None] - jnp.arange(nk, dtype=jnp.int32)
    found = jnp.take_along_axis(blocks, jnp.clip(there, 0, nk - 1)[None, None], axis=-1)
    inside = (there >= 0) & (there < nk)
    return jnp.where(inside, found, 0.0).sum(axis=2)


def crossed_blocks(
    distances: Bool[Array, "b h nk"],
    t: int,
    block_shape: tuple[int, int],
    offset: Offset,
) -> Bool[Array, "b h nq nk"]:
    """Blocks at one of the distances from a query of the query block."""
    (bq, bk), nk = block_shape, distances.shape[-1]
    start = jnp.arange(0, t, bq, dtype=jnp.int32)
    last = (jnp.minimum(start + bq, t) - 1 + offset) // bk

    def crossed(n):
        own = (start + offset) // bk + n
        gap = own[:, None] - jnp.arange(nk, dtype=jnp.int32)
        inside = (gap >= 0) & (gap < nk) & (own <= last)[:, None]
        return distances[..., jnp.clip(gap, 0, nk - 1)] & inside

    return functools.reduce(operator.or_, map(crossed, range(most_own(block_shape))))


def mask_of_lines(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    keys: Bool[Array, "b h s"],
    near: Expression,
    near_blocks: Bool[Array, "#b #h nq nk"],
    *,
    expr: Expression,
    block_shape: tuple[int, int],
    capacity: int | None,
    scale: float,
) -> tuple[BlockMask, BlockStats]:
    """Keys that all queries attend, and what is near, with its blocks."""
    (t, h), s, bk = query.shape[1:3], key.shape[1], block_shape[1]
    lined = jnp.pad(keys, ((0, 0), (0, 0), (0, -s % bk)))
    lined = lined.reshape(*keys.shape[:2], 1, -1, bk).any(axis=-1)
    allowed = of_heads(allowed_blocks(expr, t, s, block_shape), h)
    blocks, overflow = first_blocks((near_blocks | lined) & allowed, capacity)
    mask = BlockMask.from_blocks(
        blocks,
        shape=(t, s),
        block_shape=block_shape,
        expr=expr & (chosen_keys(keys) | near),
        capacity=capacity,
    )
    return mask, block_stats(
        query,
        key,
        mask,
        expr,
        density=key_density(mask, h),
        overflow=overflow,
        scale=scale,
    )
