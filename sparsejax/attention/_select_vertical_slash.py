"""MInference's vertical and slash lines, found by the last queries."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count, check_counts
from sparsejax.attention._chosen import chosen_blocks
from sparsejax.attention._expressions import Expression
from sparsejax.attention._lines import (
    by_block,
    by_distance,
    crossed_blocks,
    mask_of_lines,
    probe,
)
from sparsejax.attention._selection import Offset, prepare
from sparsejax.attention._stats import BlockStats


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
      Dynamic Sparse Attention <https://arxiv.org/abs/2407.02490>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, capacity)
    check_counts(vertical=vertical, slash=slash, last=last)
    check_count("initial", initial, least=0)
    bk, t, s = block_shape[1], query.shape[1], key.shape[1]
    last = min(last, t)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    positions = jnp.arange(t, dtype=jnp.int32)
    probs, _ = probe(query, key, positions[t - last :], expr, scale)

    columns = jnp.arange(s, dtype=jnp.int32)
    worth = jnp.where(columns < initial, jnp.inf, probs.sum(axis=2))
    keys = _first(worth, vertical)[1]

    own = (positions + offset) // bk
    mass = by_distance(by_block(probs, bk), own[t - last :])
    mass = mass.at[..., 0].set(jnp.inf)
    slashes, distances = _first(mass, slash)

    # [b, h, t, n]: the block that each slash has for a query; none before the first.
    choices = own[:, None] - slashes[:, :, None, :]
    return mask_of_lines(
        query,
        key,
        keys,
        chosen_blocks(choices, bk),
        crossed_blocks(distances, t, block_shape, offset),
        expr=expr,
        block_shape=block_shape,
        capacity=capacity,
        scale=scale,
    )


def _first(worth, count):
    """The best entries: their places, and a map of them."""
    index = jnp.argsort(-worth, axis=-1, stable=True)[..., :count].astype(jnp.int32)
    out = jnp.zeros(worth.shape, bool)
    return index, jnp.put_along_axis(out, index, True, axis=-1, inplace=False)
