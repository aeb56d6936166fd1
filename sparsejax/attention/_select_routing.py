"""Routing Transformer: queries and keys of the same cluster, clusters of equal size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from sparsejax.attention import _predicates as pred
from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count
from sparsejax.attention._expressions import Expression, _taken, expression
from sparsejax.attention._heads import check_pair, to_heads
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    first_blocks,
    of_heads,
    prepare,
)
from sparsejax.attention._stats import BlockStats, block_stats, key_density


class Clusters(NamedTuple):
    """Who is in which cluster: positions, ascending.

    Attributes:
      queries: int32 ``[b, h, c, w]``.
      keys: int32 ``[b, h, c, w]``.
    """

    queries: Int[Array, "b h c w"]
    keys: Int[Array, "b h c w"]


def balanced_clusters(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    centroids: Shaped[Array, "..."],
    *,
    window: int | None = None,
) -> Clusters:
    r"""Each centroid takes the ``window`` queries and keys that are most like it.

    .. math::
      Q_c = \mathrm{top}_{w}\, \mu_c^\top \hat q_i, \qquad
      K_c = \mathrm{top}_{w}\, \mu_c^\top \hat k_j

    with hats for rows of length 1. All clusters are of one size; a token may be in
    several of them, or in none. Costs (t + s) c d products and a sort of t per cluster.

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``. For a causal model the paper makes it the query itself,
        so that a query's cluster holds at least itself.
      centroids: ``[h, c, d]``, of length 1.
      window: Tokens per cluster, at most t and s; None: t // c.

    Returns:
      ``Clusters``; ties to the lowest position.

    Raises:
      ValueError: Shapes or dtypes do not fit, or ``window`` is not from 1 to t and s.

    Example:
      >>> x = jnp.array([[1.0, 0], [0, 1], [2, 1], [-1, 2]]).reshape(1, 4, 1, 2)
      >>> clusters = jax.jit(sparsejax.attention.balanced_clusters)(
      ...     x, x, jnp.eye(2)[None])
      >>> print(clusters.queries[0, 0])
      [[0 2]
       [1 3]]

    References:
      Roy et al., `Efficient Content-Based Sparse Attention with Routing Transformers
      <https://arxiv.org/abs/2003.05997>`_, 2020.
    """
    check_pair(query, key, (1, 1))
    t, s = query.shape[1], key.shape[1]
    h, d = query.shape[2], query.shape[3]
    if centroids.ndim != 3 or centroids.shape[::2] != (h, d):
        raise ValueError(
            f"centroids: got shape {centroids.shape}, needed [{h}, c, {d}]"
        )
    window = max(1, t // centroids.shape[1]) if window is None else window
    check_count("window", window)
    if window > min(t, s):
        raise ValueError(f"window: got {window}, needed at most {min(t, s)} tokens")

    def taken(x):
        _, index = jax.lax.top_k(_likeness(x, centroids), window)
        return jnp.sort(index.astype(jnp.int32), axis=-1)

    return Clusters(taken(query), taken(key))


def routing(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    centroids: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    window: int | None = None,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query attends the keys with which it shares a cluster.

    .. math::
      m_{ij} = \exists c:\ i \in Q_c \wedge j \in K_c

    for the clusters of `balanced_clusters`. Tokens stay where they are: blocks that
    share no cluster are left out, elements are told apart by 2 c comparisons. Clusters
    do not respect blocks, so that most blocks are listed at first; the operator's work
    falls to that of the clusters where tokens are permuted by them, `in_order` taking
    the place of `causal`. A query in several clusters has one softmax over all of them;
    one in none an empty row: the output is 0 there.

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``.
      centroids: ``[h, c, d]``, of length 1; `update_centroids` moves them.
      block_shape: (block_q, block_k); the last of each may be short.
      window: Tokens per cluster, at most t and s; None: t // c.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits in ``recall``; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks the first are
        kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists and a ``BlockStats``, whose density
      is that of the keys that share a cluster with a query. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit, or ``window`` is not from 1 to t and s.

    Example:
      >>> x = jnp.array([[1.0, 0], [0, 1], [2, 1], [-1, 2]]).reshape(1, 4, 1, 2)
      >>> select = jax.jit(
      ...     lambda x, c: sparsejax.attention.routing(x, x, c, block_shape=(2, 2))[0])
      >>> mask = select(x, jnp.eye(2)[None])
      >>> print(mask.to_mask().astype(int))
      [[1 0 0 0]
       [0 1 0 0]
       [1 0 1 0]
       [0 1 0 1]]

    References:
      Roy et al., `Efficient Content-Based Sparse Attention with Routing Transformers
      <https://arxiv.org/abs/2003.05997>`_, 2020.
    """
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, capacity)
    (bq, bk), t, s = block_shape, query.shape[1], key.shape[1]
    clusters = balanced_clusters(query, key, centroids, window=window)
    queries, keys = _members(clusters.queries, t), _members(clusters.keys, s)
    pieces = lambda x, size: (
        jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[3] % size)])
        .reshape(*x.shape[:3], -1, size)
        .any(axis=-1)
    )
    shared = jnp.einsum(
        "bhcn,bhcm->bhnm",
        pieces(queries, bq).astype(jnp.float32),
        pieces(keys, bk).astype(jnp.float32),
    )
    blocks = (shared > 0) & of_heads(
        allowed_blocks(expr, t, s, block_shape), shared.shape[1]
    )
    blocks, overflow = first_blocks(blocks, capacity)
    mask = BlockMask.from_blocks(
        blocks,
        shape=(t, s),
        block_shape=block_shape,
        expr=expr & _SharedCluster(queries, keys),
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


def update_centroids(
    centroids: Float[Array, "h c d"],
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    decay: ArrayLike = 0.999,
) -> Float[Array, "h c d"]:
    r"""Moves each centroid towards the queries and keys that are nearest to it.

    .. math::
      \mu_c \leftarrow \lambda \mu_c + (1 - \lambda)\, \frac{x_c}{|x_c|}, \qquad
      x_c = \sum_{i:\, \arg\max_{c'} \mu_{c'}^\top \hat q_i = c} \hat q_i
        + \sum_{j:\, \arg\max_{c'} \mu_{c'}^\top \hat k_j = c} \hat k_j

    k-means on rows of length 1, running: to call once per step, outside the gradient.
    A centroid that is nearest to nothing stays. Costs (t + s) c d products.

    Args:
      centroids: ``[h, c, d]``.
      query: ``[b, t, h, d]``; computed in float32.
      key: ``[b, s, h_kv, d]``.
      decay: Lambda, in [0, 1]; may be traced.

    Returns:
      The next centroids, of the same shape and dtype.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> x = jnp.array([0.0, 3.0]).reshape(1, 1, 1, 2)
      >>> start = jnp.array([[[1.0, 0.0], [0.5, 1.0]]])
      >>> update = jax.jit(sparsejax.attention.update_centroids)
      >>> print(update(start, x, x, decay=0.5)[0])
      [[1.   0.  ]
       [0.25 1.  ]]

    References:
      Roy et al., `Efficient Content-Based Sparse Attention with Routing Transformers
      <https://arxiv.org/abs/2003.05997>`_, 2020.
    """
    check_pair(query, key, (1, 1))
    c = centroids.shape[1]
    total = jnp.zeros(centroids.shape, jnp.float32)
    for x in (query, key):
        rows = _unit(x, centroids.shape[0])
        nearest = jnp.argmax(_likeness(x, centroids), axis=2)  # [b, h, n]
        member = jax.nn.one_hot(nearest, c, dtype=jnp.float32)
        total += jnp.einsum(
            "bhnc,bhnd->hcd", member, rows, precision=jax.lax.Precision.HIGHEST
        )
    length = jnp.sqrt((total * total).sum(axis=-1, keepdims=True))
    old, rate = centroids.astype(jnp.float32), jnp.asarray(decay, jnp.float32)
    moved = rate * old + (1 - rate) * total / jnp.where(length > 0, length, 1.0)
    return jnp.where(length > 0, moved, old).astype(centroids.dtype)


@expression
class _SharedCluster(Expression):
    """Members of clusters, bool ``[b, h, c, t]`` and ``[b, h, c, s]``."""

    queries: Any
    keys: Any

    def _lower(self, at):
        rows = jnp.moveaxis(self.queries, 2, 3).astype(jnp.int32)
        cols = jnp.moveaxis(self.keys, 2, 3).astype(jnp.int32)
        rows = _taken("queries", rows, at, "i", 2)
        cols = _taken("keys", cols, at, "j", 2)
        tests = [
            pred.Both(
                pred.Equal(at.row(rows[..., n], None), 1),
                pred.Equal(at.col(cols[..., n], None), 1),
            )
            for n in range(rows.shape[-1])
        ]
        return functools.reduce(pred.Either, tests)


def _members(index: Int[Array, "b h c w"], n: int) -> Bool[Array, "b h c n"]:
    out = jnp.zeros((*index.shape[:-1], n), bool)
    return jnp.put_along_axis(out, index, True, axis=-1, inplace=False)


def _unit(x, heads):
    """Rows of length 1, [b, heads, n, d] in float32."""
    x = to_heads(jnp.moveaxis(x.astype(jnp.float32), 1, 2), heads)
    x = jnp.broadcast_to(x, (x.shape[0], heads, *x.shape[2:]))
    norm = jnp.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def _likeness(x: Shaped[Array, "..."], centroids) -> Float[Array, "b h c n"]:
    return jnp.einsum(
        "bhnd,hcd->bhcn",
        _unit(x, centroids.shape[0]),
        centroids.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
