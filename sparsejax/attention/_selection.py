"""What selectors share: their arguments, blocks pooled, the mask and its figures."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import (
    Budget,
    block_count,
    check_budget,
    check_count,
    choose,
    is_counted,
)
from sparsejax.attention._expressions import Expression, causal, gather
from sparsejax.attention._heads import check_pair, to_heads
from sparsejax.attention._lowering import status
from sparsejax.attention._stats import BlockStats, block_stats

Offset = int | Int[Array, ""]


def prepare(query, key, block_shape, budget, expr, offset, capacity):
    """Checks what all selectors take; query and key without gradients, and ``expr``."""
    check_pair(query, key, block_shape)
    check_budget(budget)
    if capacity is not None:
        check_count("capacity", capacity)
    if expr is None:
        expr = causal().shift(queries=offset)
    return jax.lax.stop_gradient(query), jax.lax.stop_gradient(key), expr


def allowed_blocks(
    expr: Expression, t: int, s: int, block_shape: tuple[int, int]
) -> Bool[Array, "_b _h nq nk"]:
    """Blocks in which the expression may allow something, for the heads it has."""
    return jnp.asarray(status(*gather(expr, t, s), block_shape)[0])


def unlisted_blocks(
    mask: BlockMask, expr: Expression | None
) -> Bool[Array, "_b _h nq nk"]:
    """Blocks that the mask leaves out, though all of them is allowed."""
    expr = causal() if expr is None else expr
    _, every = status(*gather(expr, *mask.shape), mask.block_shape)
    return ~mask.to_blocks() & every


def of_heads(blocks: Bool[Array, "b m nq nk"], heads: int) -> Bool[Array, "b _h nq nk"]:
    """For 1 or ``heads`` heads: any of a group's, or the same for all of a group."""
    b, m = blocks.shape[:2]
    if m > heads:
        return blocks.reshape(b, heads, m // heads, *blocks.shape[2:]).any(axis=2)
    return to_heads(blocks, heads)


def first_blocks(
    blocks: Bool[Array, "b m nq nk"], capacity: int | None
) -> tuple[Bool[Array, "b m nq nk"], Int[Array, "b m"]]:
    """The first blocks of each query block, and how many more there were per head."""
    kept = blocks
    if capacity is not None:
        kept = blocks & (jnp.cumsum(blocks, axis=-1) <= capacity)
    return kept, (blocks & ~kept).sum(axis=(-2, -1), dtype=jnp.int32)


def own_blocks(
    t: int, s: int, block_shape: tuple[int, int], offset: Offset
) -> Bool[Array, "1 1 nq nk"]:
    """Key blocks that hold the positions of a query block."""
    bq, bk = block_shape
    first = jnp.arange(0, t, bq, dtype=jnp.int32)
    last = jnp.minimum(first + bq, t) - 1
    column = jnp.arange(-(-s // bk), dtype=jnp.int32)
    offset = jnp.asarray(offset, jnp.int32)
    own = (column >= ((first + offset) // bk)[:, None]) & (
        column <= ((last + offset) // bk)[:, None]
    )
    return own[None, None]


def most_own(block_shape: tuple[int, int]) -> int:
    """Bound on the key blocks that hold the positions of one query block."""
    bq, bk = block_shape
    return -(-(bq - 1) // bk) + 1


def select(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    scores: Float[Array, "b m nq nk"],
    *,
    block_shape: tuple[int, int],
    budget: Budget,
    expr: Expression,
    forced: Bool[Array, "#b #m nq nk"] | str | None = None,
    most_forced: int = 0,
    added: Bool[Array, "#b #m nq nk"] | bool = False,
    most_added: int | None = 0,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    """The mask of the best blocks under ``expr``, and its figures.

    Args:
      query: For the figures.
      key: For the figures.
      scores: What is ranked, for the query heads or for the key heads.
      block_shape: (block_q, block_k).
      budget: What `check_budget` lets through.
      expr: What may be attended at all.
      forced: Blocks kept whatever their score, out of the budget; "own": `own_blocks`.
      most_forced: Bound on those of one query block; not asked for "own".
      added: Blocks kept on top of the budget.
      most_added: Bound on those of one query block; None: all.
      offset: Position of the first query among the keys.
      scale: Of the logits, for the figures.
      capacity: Most blocks of a query block.
    """
    t, s, nk = query.shape[1], key.shape[1], scores.shape[-1]
    allowed, m = allowed_blocks(expr, t, s, block_shape), scores.shape[1]
    if isinstance(forced, str):
        forced, most_forced = (
            own_blocks(t, s, block_shape, offset),
            most_own(block_shape),
        )
    most = nk
    if is_counted(budget) and most_added is not None:
        most = max(block_count(budget, nk, block_shape[1]), most_forced) + most_added
    most = min(most, nk, *(() if capacity is None else (capacity,)))
    choice = choose(
        scores,
        of_heads(allowed, m),
        budget,
        block_k=block_shape[1],
        forced=False if forced is None else forced,
        most_forced=most_forced,
        added=added,
        capacity=most,
    )
    mask = BlockMask.from_blocks(
        to_heads(choice.blocks, max(m, allowed.shape[1])),
        shape=(t, s),
        block_shape=block_shape,
        expr=expr,
        capacity=most,
    )
    return mask, block_stats(
        query, key, mask, expr, overflow=choice.overflow, scale=scale
    )
