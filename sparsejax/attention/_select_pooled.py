"""Blocks by the products of their means: block top-k, block top-p."""

from jaxtyping import Array, Float, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import check_pair, pair_heads, pool_blocks
from sparsejax.attention._selection import Offset, prepare, select
from sparsejax.attention._stats import BlockStats


def pooled_scores(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    scale: float | None = None,
) -> Float[Array, "b h nq nk"]:
    r"""Products of the means of query blocks and key blocks.

    .. math::
      S_{IJ} = \mathrm{scale} \cdot \bar q_I^\top \bar k_J

    What `pooled_blocks` ranks, with its gradient: handed to the operator through
    `list_scores`, it is how a loss reaches a selection. Costs t d + nq nk d products.

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``; a group of h // h_kv query heads shares a key head.
      block_shape: (block_q, block_k); the last of each may be short, and its mean is
        that of its own rows.
      scale: None: ``d ** -0.5``.

    Returns:
      float32 ``[b, h, nq, nk]``.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> x = jnp.array([1.0, 3.0, -2.0]).reshape(1, 3, 1, 1)
      >>> score = jax.jit(
      ...     lambda x: sparsejax.attention.pooled_scores(x, x, block_shape=(2, 2)))
      >>> print(score(x)[0, 0])
      [[ 4. -4.]
       [-4.  4.]]
    """
    check_pair(query, key, block_shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    means = pool_blocks(query, block_shape[0]), pool_blocks(key, block_shape[1])
    return pair_heads(*means) * scale


def pooled_blocks(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    budget: Budget,
    expr: Expression | None = None,
    offset: Offset = 0,
    keep_own: bool = True,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query block attends the key blocks whose mean is nearest to its own.

    .. math::
      S_{IJ} = \mathrm{scale} \cdot \bar q_I^\top \bar k_J, \qquad
      \mathrm{kept}_I = \mathrm{best}_J\, S_{IJ}

    With a count as budget this is block top-k; with ``TopP`` block top-p, the fewest
    blocks that reach p in the softmax over J of S. Costs t d + nq nk d products and a
    sort of nk per query block, about one hundredth of the attention.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; a group of h // h_kv query heads shares a key head.
        Each query head has lists of its own.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: Blocks per query block, an int; their share of the nk blocks, a float in
        (0, 1], rounded to whole blocks and one at least; or ``TopP``, ``Threshold``,
        ``Tokens``. More than there are means all.
      expr: What may be attended at all; None: `causal`, from ``offset``. Blocks in
        which it allows nothing are not chosen.
      offset: Position of the first query among the keys; may be traced.
      keep_own: Whether the key blocks at a query block's own positions are always kept.
        They take their places out of the budget.
      scale: Of S, and of the logits in ``recall``; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.
        Of more blocks the best are kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``. No gradients: see `pooled_scores`.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1.

    Example:
      >>> at = sparsejax.attention
      >>> x = jnp.array([1.0, 3.0, -2.0, 0.5]).reshape(1, 4, 1, 1)
      >>> select = jax.jit(
      ...     lambda x: at.pooled_blocks(x, x, block_shape=(1, 1), budget=2))
      >>> mask, stats = select(x)
      >>> print(mask.to_mask().astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 0 1 0]
       [0 1 0 1]]
      >>> print(stats.density)  # 7 of 16 blocks
      [[0.4375]]

    References:
      Jiang et al., `MInference 1.0 <https://arxiv.org/abs/2407.02490>`_, 2024 (its
      block-sparse heads). Sadhukhan et al., `Kinetics: Rethinking Test-Time Scaling
      Laws <https://arxiv.org/abs/2506.05333>`_, 2025 (block top-k).
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    scores = pooled_scores(query, key, block_shape=block_shape, scale=scale)
    return select(
        query,
        key,
        scores,
        block_shape=block_shape,
        budget=budget,
        expr=expr,
        forced="own" if keep_own else None,
        offset=offset,
        scale=scale,
        capacity=capacity,
    )
