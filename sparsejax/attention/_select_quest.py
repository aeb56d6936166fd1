"""Quest: pages by the largest logit that their keys could have."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import panels
from sparsejax.attention._pages import PageSummary, check_pages, summarize_pages
from sparsejax.attention._selection import Offset, prepare, select
from sparsejax.attention._stats import BlockStats


def quest(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (1, 16),
    budget: Budget,
    pages: PageSummary | None = None,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query block attends the pages with the highest upper bound on their logits.

    .. math::
      S_{IJ} = \mathrm{scale} \max_{i \in I} \sum_{\mathrm{heads}} \sum_c
        \max(q_{ic}\, \min_{j \in J} k_{jc},\ q_{ic}\, \max_{j \in J} k_{jc})

    summed over the query heads of a group, which share the pages that they read. A
    decoder keeps the two extremes beside its cache, by `update_pages`. Costs 2 t nk d
    products, a panel of block_q queries at a time: made for the single query of a
    decoder.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``.
      block_shape: (block_q, block_k); a page is block_k keys. The last of each may be
        short.
      budget: Pages per query block, an int; their share of the nk pages, a float in
        (0, 1]; or ``TopP``, ``Threshold``, ``Tokens``. More than there are means all.
      pages: From `summarize_pages` or `update_pages`: under jit no key is read then,
        unless the recall is used. None: made from all keys.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.

    Returns:
      A ``BlockMask`` of ``[b, h_kv, nq, ...]`` lists (of all heads where those of a
      group differ in ``expr``), the query's own page always in them, out of the budget,
      ties to the lowest index; and a ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1.

    Example:
      >>> key = jnp.array([1.0, -3.0, 2.0, 2.0, 0.0, 0.0]).reshape(1, 6, 1, 1)
      >>> query = jnp.array([-1.0]).reshape(1, 1, 1, 1)
      >>> select = jax.jit(lambda *x: sparsejax.attention.quest(
      ...     *x, block_shape=(1, 2), budget=2, offset=5)[0])
      >>> mask = select(query, key)
      >>> print(mask.to_blocks()[0, 0])  # bounds 3, -2 and, its own, 0
      [[ True False  True]]

    References:
      Tang et al., `Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference
      <https://arxiv.org/abs/2406.10774>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    (bq, bk), (b, t, h, d), g = block_shape, query.shape, key.shape[2]
    scale = d**-0.5 if scale is None else scale
    if pages is None:
        pages = summarize_pages(key, bk)
    check_pages(pages, key, bk)
    # An empty page has no bound, where infinite extremes would make products of 0.
    some = pages.count[:, None] > 0
    low, high = (jnp.where(some[..., None], x, 0.0) for x in (pages.low, pages.high))
    queries = panels(query, bq).reshape(-1, b, bq, g, h // g, d)
    exact = jax.lax.Precision.HIGHEST

    def panel(x):
        index, q = x
        # max(q m, q M) is max(q, 0) M + min(q, 0) m, and the heads' sum that of these.
        above, below = (part(q, 0.0).sum(axis=3) for part in (jnp.maximum, jnp.minimum))
        bound = jnp.einsum("bqgd,bgnd->bgqn", above, high, precision=exact)
        bound += jnp.einsum("bqgd,bgnd->bgqn", below, low, precision=exact)
        real = index * bq + jnp.arange(bq) < t
        bound = jnp.where(real[:, None], bound, -jnp.inf).max(axis=2)
        return jnp.where(some, bound, -jnp.inf)

    scores = jax.lax.map(panel, (jnp.arange(len(queries)), queries))
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
