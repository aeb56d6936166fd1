"""Sparsifiner: a low-rank attention predicts which keys the full one needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, check_counts
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import (
    check_pair,
    largest_by_block,
    panels,
    to_heads,
)
from sparsejax.attention._selection import Offset, prepare, select
from sparsejax.attention._stats import BlockStats


class Connectivity(NamedTuple):
    """Parameters of the prediction, for s keys: `sparsifiner_logits`.

    Attributes:
      down: ``[rank, s]``: keys become this many.
      up: ``[rank, s]``: attention to these becomes that to the keys.
    """

    down: Float[Array, "..."]
    up: Float[Array, "..."]


def sparsifiner_init(key: Array, *, length: int, rank: int = 32) -> Connectivity:
    """Parameters of a prediction, of variance 1 / fan-in.

    Args:
      key: A PRNG key.
      length: s, number of keys.
      rank: Number of keys that stand for them.

    Returns:
      A ``Connectivity`` of float32 arrays.

    Raises:
      ValueError: A size is below 1.

    Example:
      >>> found = sparsejax.attention.sparsifiner_init(
      ...     jax.random.key(0), length=64, rank=8)
      >>> found.down.shape, found.up.shape
      ((8, 64), (8, 64))
    """
    check_counts(length=length, rank=rank)
    one, two = jax.random.split(key)
    return Connectivity(
        jax.random.normal(one, (rank, length)) * length**-0.5,
        jax.random.normal(two, (rank, length)) * rank**-0.5,
    )


def sparsifiner_logits(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    connectivity: Connectivity,
    *,
    block_shape: tuple[int, int] = (128, 128),
    scale: float | None = None,
) -> Float[Array, "b h nq nk"]:
    r"""The predicted attention, its largest entry per block, with its gradient.

    .. math::
      \tilde A = \mathrm{softmax}(\mathrm{scale}\, Q (W_d K)^\top)\, W_u, \qquad
      S_{IJ} = \max_{i \in I,\, j \in J} \tilde A_{ij}

    Costs (d + s) rank products per query, a panel of block_q queries at a time.

    Args:
      query: ``[b, t, h, d]``, floating; computed in float32.
      key: ``[b, s, h_kv, d]``.
      connectivity: Parameters for s keys; the gradient goes to them.
      block_shape: (block_q, block_k); the last of each may be short.
      scale: None: ``d ** -0.5``.

    Returns:
      float32 ``[b, h, nq, nk]``.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> x = jnp.zeros((1, 2, 1, 4))
      >>> found = sparsejax.attention.Connectivity(
      ...     jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 3.0]]))
      >>> print(sparsejax.attention.sparsifiner_logits(
      ...     x, x, found, block_shape=(2, 1))[0, 0])
      [[0.5 1.5]]
    """
    check_pair(query, key, block_shape)
    (bq, bk), (_, t, h, d), s = block_shape, query.shape, key.shape[1]
    down, up = (w.astype(jnp.float32) for w in connectivity)
    if down.ndim != 2 or down.shape != up.shape or down.shape[1] != s:
        raise ValueError(
            f"connectivity: got down {down.shape} and up {up.shape}, needed [rank, {s}]"
        )
    scale = d**-0.5 if scale is None else scale
    exact = jax.lax.Precision.HIGHEST
    few = jnp.einsum("rs,bsgd->bgrd", down, key.astype(jnp.float32), precision=exact)
    few = to_heads(few, h)
    queries = panels(query, bq)

    def panel(x):
        index, q = x
        logits = jnp.einsum("bqhd,bhrd->bhqr", q, few, precision=exact) * scale
        probs = jax.nn.softmax(logits, axis=-1)
        predicted = jnp.einsum("bhqr,rs->bhqs", probs, up, precision=exact)
        return largest_by_block(predicted, index * bq + jnp.arange(bq) < t, bk)

    scores = jax.lax.map(panel, (jnp.arange(len(queries)), queries))
    return jnp.moveaxis(scores, 0, 2)


def sparsifiner(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    connectivity: Connectivity,
    *,
    block_shape: tuple[int, int] = (128, 128),
    budget: Budget,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    """A query block attends the blocks of the largest predicted connectivity.

    The blocks are ranked by `sparsifiner_logits`; with blocks of one this is the
    published choice of keys by each query. A query block's own blocks are always kept,
    out of the budget. The prediction learns through `straight_through`, or from
    `attention_block_probabilities`.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      connectivity: Parameters for s keys.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: Blocks per query block, an int; their share of the nk blocks, a float in
        (0, 1]; or ``TopP``, ``Threshold``, ``Tokens``. More than there are means all.
      expr: What may be attended at all; None: `causal`, from ``offset``. Published for
        images, which attend `everything`.
      offset: Position of the first query among the keys; may be traced.
      scale: None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1.

    Example:
      >>> at = sparsejax.attention
      >>> found = at.sparsifiner_init(jax.random.key(0), length=8, rank=2)
      >>> x = jax.random.normal(jax.random.key(1), (1, 8, 1, 4))
      >>> select = jax.jit(lambda x, found: at.sparsifiner(
      ...     x, x, found, block_shape=(2, 2), budget=2)[0])
      >>> print(select(x, found).kv_cnt[0, 0])
      [1 2 2 2]

    References:
      Wei et al., `Sparsifiner: Learning Sparse Instance-Dependent Attention for
      Efficient Vision Transformers <https://arxiv.org/abs/2303.13755>`_, 2023.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    connectivity = jax.lax.stop_gradient(connectivity)
    scores = sparsifiner_logits(
        query, key, connectivity, block_shape=block_shape, scale=scale
    )
    return select(
        query,
        key,
        scores,
        block_shape=block_shape,
        budget=budget,
        expr=expr,
        forced="own",
        offset=offset,
        scale=scale,
        capacity=capacity,
    )
