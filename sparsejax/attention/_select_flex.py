"""FlexPrefill: as many lines as a head needs, or blocks where its queries differ."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count, check_range, fewest
from sparsejax.attention._expressions import Expression
from sparsejax.attention._lines import by_block, by_distance, crossed_blocks, probe
from sparsejax.attention._select_pooled import pooled_scores
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    first_blocks,
    of_heads,
    prepare,
)
from sparsejax.attention._softmax import softmax_over
from sparsejax.attention._stats import BlockStats, block_stats


def flex_prefill(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    alpha: ArrayLike = 0.9,
    min_budget: int = 1,
    tau: ArrayLike = 0.1,
    last: int | None = None,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Each head takes the fewest lines, or the fewest blocks, that hold its attention.

    .. math::
      v_J = \frac1l \sum_{i \ge t - l} \sum_{j \in J} p_{ij}, \qquad
      s_D = \frac1l \sum_{i \ge t - l} \sum_{j:\, I_i - J_j = D} p_{ij}

    .. math::
      \mathrm{lines} = \mathrm{fewest}\Big\{\sum_{J \in V} v_J \ge \alpha\Big\},\
        \mathrm{fewest}\Big\{\sum_{D \in S} s_D \ge \alpha\Big\}, \qquad
      \mathrm{blocks} = \mathrm{fewest}\Big\{\frac{1}{n_q} \sum_{(I, J) \in B}
        a_{IJ} \ge \alpha\Big\}

    where p is the attention of the last l queries, in key blocks, and :math:`a_I =
    \mathrm{softmax}_J(\mathrm{scale}\, \bar q_I^\top \bar k_J)`. A head takes the
    blocks, query by query, where means can be trusted: where the mean of the last
    queries on the means of the keys foretells v,

    .. math::
      \sqrt{\mathrm{JS}(\hat a, v)} < \tau, \qquad
      \hat a = \mathrm{softmax}_J(\mathrm{scale}\, \bar q_\mathrm{last}^\top \bar k_J)

    and the lines elsewhere. The first key block and the query's own are always kept, as
    the first line of either kind; slashes run through the past alone. The published
    code counts single lines and takes blocks of them; here blocks of lines are counted.
    Costs l s d + nq nk d products and a sort of nq nk numbers.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      block_shape: (block_q, block_k); slashes are block_k wide. The last of each may be
        short.
      alpha: Share of the attention, gamma of the paper, in (0, 1]; may be traced.
      min_budget: Lines of each kind at least, in blocks, also of heads that take
        blocks.
      tau: In [0, 1]; at 0 all heads take lines. May be traced.
      last: l, queries that tell; None: block_q. More than there are means all.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks the first are
        kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; ``alpha`` or ``tau`` is out of range; a
        count is below 1.

    Example:
      >>> x = jnp.zeros((1, 8, 1, 1)).at[0, 2].set(9.0).at[0, 7].set(3.0)
      >>> select = jax.jit(lambda x: sparsejax.attention.flex_prefill(
      ...     x, x, block_shape=(2, 2), tau=0.0, last=1)[0])
      >>> mask = select(x)
      >>> print(mask.to_blocks()[0, 0].astype(int))  # block 1, and distance 2
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 0 1]]

    References:
      Lai et al., `FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
      Long-Sequence Inference <https://arxiv.org/abs/2502.20766>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, capacity)
    check_range("alpha", alpha, "(0, 1]", lambda a: 0 < a <= 1)
    check_range("tau", tau, "[0, 1]", lambda x: 0 <= x <= 1)
    check_count("min_budget", min_budget)
    last = block_shape[0] if last is None else last
    check_count("last", last)
    bk, (b, t, h, d), s = block_shape[1], query.shape, key.shape[1]
    rows = jnp.arange(max(0, t - last), t, dtype=jnp.int32)
    scale = d**-0.5 if scale is None else scale
    allowed = of_heads(allowed_blocks(expr, t, s, block_shape), h)
    probs, seen = probe(query, key, rows, expr, scale)

    # Lines, the first of each kind before all others.
    blocks = by_block(probs, bk)
    vertical = _of_one(blocks.sum(axis=2))
    slash = _of_one(by_distance(blocks, (rows + offset) // bk))
    first = lambda x: x.at[..., 0].set(jnp.inf)
    line = lambda x, p: fewest(x, p, first(x), least=min_budget)
    lines = lambda p: (
        line(vertical, p)[:, :, None]
        | crossed_blocks(line(slash, p), t, block_shape, offset)
    )

    # Blocks, the best of all queries of a head.
    scores = pooled_scores(query, key, block_shape=block_shape, scale=scale)
    flat = _of_one(softmax_over(scores, allowed).reshape(b, h, -1))
    best = fewest(flat, alpha).reshape(scores.shape)

    told = pooled_scores(query[:, rows], key, block_shape=(len(rows), bk), scale=scale)[
        :, :, 0
    ]
    told = softmax_over(told, by_block(seen.astype(jnp.float32), bk).sum(axis=2) > 0)
    alike = _divergence(told, vertical) < jnp.asarray(tau, jnp.float32)
    kept = jnp.where(alike[..., None, None], best | lines(0.0), lines(alpha))
    kept, overflow = first_blocks(kept & allowed, capacity)
    mask = BlockMask.from_blocks(
        kept, shape=(t, s), block_shape=block_shape, expr=expr, capacity=capacity
    )
    return mask, block_stats(query, key, mask, expr, overflow=overflow, scale=scale)


def _of_one(mass):
    """Shares of the sum over the last axis."""
    total = mass.sum(axis=-1, keepdims=True)
    return mass / jnp.where(total > 0, total, 1.0)


def _divergence(p, q):
    """The root of the Jensen-Shannon divergence, over the last axis."""
    middle = (p + q) / 2
    terms = lambda x: jnp.where(
        x > 0,
        x * jnp.log(jnp.where(x > 0, x, 1.0) / jnp.where(x > 0, middle, 1.0)),
        0.0,
    )
    total = (terms(p) + terms(q)).sum(axis=-1) / 2
    return jnp.sqrt(jnp.maximum(total, 0.0))
