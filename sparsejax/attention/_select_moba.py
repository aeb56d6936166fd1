"""MoBA: each query chooses its blocks, as a token its experts."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, block_count
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import pair_heads, pool_blocks
from sparsejax.attention._pages import PageSummary, check_pages
from sparsejax.attention._per_token import best_per_query, mask_of_choices
from sparsejax.attention._selection import Offset, prepare
from sparsejax.attention._stats import BlockStats


def moba(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    budget: Budget,
    pages: PageSummary | None = None,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Each query attends its own block and the past ones whose mean key suits it best.

    .. math::
      s_{iJ} = q_i^\top \bar k_J, \qquad
      \mathrm{kept}_i = \{J_i\} \cup \mathrm{best}_{J < J_i}\, s_{iJ}, \qquad
      J_i = \lfloor i / \mathrm{block}_k \rfloor

    Exact for every query: the lists of a query block hold what any of its queries
    chose, and the element predicate what each of them did, with one comparison per
    block of the budget. So the operator's work is that of the union, up to block_q
    times the budget: `pooled_blocks` chooses once per query block. Costs t nk d
    products, a panel of block_q queries at a time.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; a group of h // h_kv query heads shares a key head.
        Each query head chooses for itself.
      block_shape: (block_q, block_k); MoBA's chunk is block_k. The last of each may be
        short.
      budget: Blocks per query, its own among them: an int; their share of the nk
        blocks, a float in (0, 1], rounded and one at least; or ``Tokens``.
      pages: From `summarize_pages` or `update_pages`, for a decoder; None: made from
        all keys.
      expr: What may be attended at all; None: `causal`, from ``offset``. Blocks after
        a query's own are never chosen.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits in ``recall``; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks those that most
        queries chose are kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``: its density is that of the queries' own choices, within the
      budget, its work that of the union. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, a share above 1, or one
        that is no count.

    Example:
      >>> x = jnp.array([1.0, 3.0, -2.0, 0.5, -1.0, 1.0]).reshape(1, 6, 1, 1)
      >>> select = jax.jit(
      ...     lambda x: sparsejax.attention.moba(x, x, block_shape=(2, 2), budget=2)[0])
      >>> mask = select(x)
      >>> print(mask.to_mask().astype(int))
      [[1 0 0 0 0 0]
       [1 1 0 0 0 0]
       [1 1 1 0 0 0]
       [1 1 1 1 0 0]
       [0 0 1 1 1 0]
       [1 1 0 0 1 1]]

    References:
      Lu et al., `MoBA: Mixture of Block Attention for Long-Context LLMs
      <https://arxiv.org/abs/2502.13189>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    bk = block_shape[1]
    if pages is not None:
        check_pages(pages, key, bk)
    means = pool_blocks(key, bk) if pages is None else pages.mean
    nk = means.shape[2]
    heads = lambda q: jnp.moveaxis(q.astype(jnp.float32), 1, 2)
    choices = best_per_query(
        lambda position, q: pair_heads(heads(q), means),
        query,
        nk=nk,
        block_shape=block_shape,
        count=block_count(budget, nk, bk),
        forced=lambda own, column: column == own,
        offset=offset,
    )
    return mask_of_choices(
        query,
        key,
        choices,
        expr=expr,
        block_shape=block_shape,
        capacity=capacity,
        scale=scale,
    )
