"""Dense attention as selectors are measured by: panel by panel, never T x T."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._expressions import Expression, everything
from sparsejax.attention._heads import check_pair, panels, to_heads
from sparsejax.attention._softmax import softmax_over


class BlockStats(NamedTuple):
    """How much a selection gives each query, keeps of the attention, and computes.

    Attributes:
      density: float32 ``[b, h]``, the share of the sequence that a query was given, the
        mean over the queries, in the unit of the selector's budget: key blocks, where
        blocks are chosen, for a block of queries or for each of them; keys, where
        single keys are (`vertical_slash`, `sample_attention`, `routing`).
      recall: float32 ``[b, h]``, share of dense attention's probability on the allowed
        elements, the mean over the queries: ``exp(lse_masked - lse_dense)``. A query
        that dense attention leaves empty too loses nothing and counts as 1. It costs
        the products of dense attention; under jit it is not computed unless used.
      overflow: int32 ``[b, h]``, blocks that were wanted beyond the capacity.
      work: float32 ``[b, h]``, listed blocks over all blocks: what the operator
        computes. The same as ``density`` where a block of queries chooses as one; where
        each query does, that of all their choices together.
    """

    density: Any
    recall: Any
    overflow: Any
    work: Any


def block_stats(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    mask: BlockMask,
    dense: Expression,
    *,
    density: Float[Array, "_b _h"] | None = None,
    overflow: Int[Array, "_b _h"] | None = None,
    scale: float | None = None,
) -> BlockStats:
    r"""How much a mask keeps of the blocks, and of dense attention's probability.

    .. math::
      \mathrm{recall} = \frac1t \sum_i \sum_j m_{ij} p_{ij}, \qquad
      p = \mathrm{softmax}_{j:\, d_{ij}}(q_i^\top k_j \, \mathrm{scale})

    with m the mask and d what dense attention allows. One panel of block_q queries is
    in memory at a time: :math:`O(t s d)` work, :math:`O(\mathrm{block}_q s)` floats.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, s, h_kv, d]``.
      mask: The selection. What it allows outside ``dense`` counts for nothing.
      dense: What dense attention allows.
      density: Handed on; None: listed blocks over all blocks, as ``work``.
      overflow: Handed on; None: zeros.
      scale: Of the logits; None: ``d ** -0.5``.

    Returns:
      A ``BlockStats`` of ``[b, h]``. No gradients.

    Example:
      >>> at = sparsejax.attention
      >>> q = jnp.zeros((1, 4, 1, 2))
      >>> mask = at.block_mask(at.sliding_window(2) & at.causal(), 4, 4,
      ...                      block_shape=(2, 2))
      >>> stats = at.block_stats(q, q, mask, at.causal())
      >>> print(stats.density, stats.recall)  # (1 + 1 + 2/3 + 1/2) / 4
      [[0.75]] [[0.7916667]]
    """
    query, key = jax.lax.stop_gradient((query, key))
    b, t, h, _ = query.shape
    nk = mask.grid[1]

    def kept(panel):
        probs = softmax_over(panel.logits, panel.dense)
        share = jnp.where(panel.mask, probs, 0.0).sum(axis=-1)
        share = jnp.where(panel.dense.any(axis=-1), share, 1.0)
        return jnp.where(panel.queries, share, 0.0).sum(axis=-1)

    recall = _over_panels(kept, query, key, mask, dense, scale).sum(axis=0) / t
    work = mask.kv_cnt.astype(jnp.float32).mean(axis=-1) / nk
    density = work if density is None else density
    lost = jnp.zeros((1, 1), jnp.int32) if overflow is None else overflow
    density, lost, work = (
        jnp.broadcast_to(to_heads(x, h), (b, h)) for x in (density, lost, work)
    )
    return BlockStats(density, recall, lost, work)


def key_density(mask: BlockMask, heads: int) -> Float[Array, "_b heads"]:
    """Share of the keys that a query may attend, the mean over the queries."""
    (t, s), bq = mask.shape, mask.block_shape[0]
    elements = _mask_panels(mask, heads)

    def share(index):
        queries = index * bq + jnp.arange(bq) < t
        allowed = elements(index) & queries[:, None]
        return allowed.astype(jnp.float32).sum(axis=(-2, -1))

    index = jnp.arange(mask.grid[0], dtype=jnp.int32)
    total = jax.lax.map(share, index).sum(axis=0)
    return total / (t * s)


def attention_block_probabilities(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    *,
    block_shape: tuple[int, int] = (128, 128),
    expr: Expression | None = None,
    scale: float | None = None,
    pool: str = "max",
) -> Float[Array, "b h nq nk"]:
    r"""Dense attention's probabilities, pooled over blocks.

    .. math::
      P_{IJ} = \max_{i \in I, j \in J} p_{ij}
      \quad \text{or} \quad \frac{1}{|I|} \sum_{i \in I} \sum_{j \in J} p_{ij}, \qquad
      p = \mathrm{softmax}_j(q_i^\top k_j \, \mathrm{scale})

    The target that a learned gate is distilled towards. One panel of block_q queries is
    in memory at a time: :math:`O(t s d)` work, :math:`O(\mathrm{block}_q s)` floats.

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``; a group of h // h_kv query heads shares a key head.
      block_shape: (block_q, block_k); the last of each may be short.
      expr: What may be attended; None: everything.
      scale: Of the logits; None: ``d ** -0.5``.
      pool: "max": the largest probability in the block, as SeerAttention pools. "sum":
        what the block's keys have together, the mean over its queries.

    Returns:
      float32 ``[b, h, nq, nk]``, without a gradient; 0 where nothing is allowed.

    Raises:
      ValueError: Shapes do not fit, or an unknown ``pool``.

    Example:
      >>> q = jnp.zeros((1, 4, 1, 2))
      >>> at = sparsejax.attention
      >>> print(at.attention_block_probabilities(
      ...     q, q, block_shape=(2, 2), expr=at.causal())[0, 0])
      [[1.         0.        ]
       [0.33333334 0.33333334]]

    References:
      Gao et al., `SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs
      <https://arxiv.org/abs/2410.13276>`_, 2024.
    """
    check_pair(query, key, block_shape)
    if pool not in ("max", "sum"):
        raise ValueError(f"pool: got {pool!r}, needed 'max' or 'sum'")
    query, key = jax.lax.stop_gradient((query, key))
    bk = block_shape[1]
    t, s = query.shape[1], key.shape[1]
    mask = BlockMask.from_blocks(
        jnp.ones((1, 1, -(-t // block_shape[0]), -(-s // bk)), bool),
        shape=(t, s),
        block_shape=block_shape,
    )

    def pooled(panel):
        tiles = _tiles(softmax_over(panel.logits, panel.dense), panel, bk)
        if pool == "max":
            return tiles.max(axis=(-3, -1))
        return tiles.sum(axis=(-3, -1)) / panel.queries.sum().astype(jnp.float32)

    dense = everything() if expr is None else expr
    out = _over_panels(pooled, query, key, mask, dense, scale)
    return jnp.moveaxis(out, 0, 2)


def block_mass(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    mask: BlockMask,
    *,
    scale: float | None = None,
) -> Float[Array, "b h nq nk"]:
    """What attention under a mask gives to each block, the mean over its queries."""

    def mass(panel):
        tiles = _tiles(
            softmax_over(panel.logits, panel.mask), panel, mask.block_shape[1]
        )
        return tiles.sum(axis=(-3, -1)) / panel.queries.sum().astype(jnp.float32)

    out = _over_panels(mass, query, key, mask, everything(), scale)
    return jnp.moveaxis(out, 0, 2)


class _Panel(NamedTuple):
    """A block of queries against all keys."""

    logits: Float[Array, "b h bq s"]
    dense: Bool[Array, "#b #h bq s"]
    mask: Bool[Array, "#b #h bq s"]
    queries: Bool[Array, " bq"]  # False beyond the last query


def _over_panels(fn, query, key, mask, dense, scale):
    """``fn`` of each block of queries, stacked in front."""
    (t, s), bq = mask.shape, mask.block_shape[0]
    b, _, h, d = query.shape
    g = key.shape[2]
    scale = d**-0.5 if scale is None else scale
    n = -(-t // bq)
    query = panels(query, bq).reshape(n, b, bq, g, h // g, d)
    key = key.astype(jnp.float32)
    allows, chosen = element_rows(dense, t, s, h), _mask_panels(mask, h)

    def panel(x):
        index, q = x
        logits = jnp.einsum(
            "bqgrd,bsgd->bgrqs", q, key, precision=jax.lax.Precision.HIGHEST
        )
        logits = logits.reshape(b, h, bq, s) * scale
        i = index * bq + jnp.arange(bq, dtype=jnp.int32)
        allowed, queries = allows(i), i < t
        return fn(_Panel(logits, allowed, chosen(index) & allowed, queries))

    index = jnp.arange(n, dtype=jnp.int32)
    return jax.lax.map(panel, (index, query))


def _mask_panels(mask, h):
    """A function from the number of a block of queries to what the mask allows."""
    (t, s), (bq, bk) = mask.shape, mask.block_shape
    inside = element_rows(mask.expr, t, s, h)
    listed, full = (to_heads(x, h) for x in (mask.to_blocks(), mask.full_blocks()))

    def allows(index):
        wide = lambda x: jnp.repeat(x[:, :, index, None], bk, axis=-1)[..., :s]
        i = index * bq + jnp.arange(bq, dtype=jnp.int32)
        return wide(listed) & (wide(full) | inside(i))

    return allows


def element_rows(
    expr: Expression | None, t: int, s: int, h: int
) -> Callable[[Int[Array, " n"]], Bool[Array, "_b _h n s"]]:
    """A function from queries to what an expression allows them."""
    if expr is None:
        return lambda i: jnp.ones((1, 1, len(i), s), bool)
    lowered = expr.lower(t, s)
    rows = [to_heads(x, h) for x in lowered.rows]
    dense = [to_heads(x, h) for x in lowered.dense]
    cols = tuple(to_heads(x, h)[:, :, None, :] for x in lowered.cols)
    scalars = tuple(to_heads(x, h)[:, :, None, None] for x in lowered.scalars)
    j = jnp.arange(s, dtype=jnp.int32)[None, :]

    def allows(i):
        cut = lambda x: jnp.take(x, i, axis=2, mode="clip")
        ok = lowered.predicate(
            i[:, None],
            j,
            tuple(cut(x)[..., None] for x in rows),
            cols,
            scalars,
            tuple(cut(x) for x in dense),
        )
        return jnp.broadcast_to(ok, (*(1,) * (4 - ok.ndim), *ok.shape[:-2], len(i), s))

    return allows


def _tiles(probs, panel, bk):
    """[b, h, bq, nk, bk], zeros beyond the last query and key."""
    probs = jnp.where(panel.queries[:, None], probs, 0.0)
    probs = jnp.pad(probs, [(0, 0)] * 3 + [(0, -probs.shape[-1] % bk)])
    return probs.reshape(*probs.shape[:3], -1, bk)
