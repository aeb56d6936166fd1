"""routing_attention: attention inside clusters of equal size."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax import attention as at
from sparsejax._dispatch import Choice
from sparsejax.ops._attention_arguments import check_heads
from sparsejax.ops._block_sparse_attention import block_sparse_attention


def routing_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    centroids: Shaped[Array, "..."],
    *,
    window: int | None = None,
    causal: bool = True,
    block_shape: tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    r"""Attends inside each cluster; a query in several has the mean of what they give.

    .. math::
      o_i = \frac{1}{|C_i|} \sum_{c \in C_i} \mathrm{attention}(q_i, K_c, V_c), \qquad
      C_i = \{c : i \in Q_c\}

    for the clusters of `attention.balanced_clusters`. Tokens are gathered cluster by
    cluster, so that their attention is a block diagonal: c w^2 products, t^1.5 where c
    is the root of t. A cluster in which a query may see no key does not count among its
    clusters; a query without any has output 0.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, s, h_kv, d]``, repeated for a group's heads, whose clusters differ.
      value: ``[b, s, h_kv, dv]``.
      centroids: ``[h, c, d]``, of length 1; `attention.update_centroids` moves them.
      window: w, tokens per cluster; None: t // c.
      causal: Whether a query attends only keys of positions up to its own.
      block_shape: (block_q, block_k) among the gathered; None: window, 128 at most.
      scale: Of the logits; None: ``1 / sqrt(d)``.
      implementation: As `block_sparse_attention` has it.

    Returns:
      ``[b, t, h, dv]`` of the query's dtype. The clusters have no gradient.

    Raises:
      ValueError: Shapes or dtypes do not fit, or ``window`` is not from 1 to t and s.
      NotImplementedError: The named implementation does not serve this.

    Example:
      >>> x = jnp.array([[1.0, 0], [0, 1], [2, 1], [-1, 2]]).reshape(1, 4, 1, 2)
      >>> value = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
      >>> attend = jax.jit(lambda x, value, centroids:
      ...     sparsejax.ops.routing_attention(x, x, value, centroids, scale=0.0))
      >>> out = attend(x, value, jnp.eye(2)[None])
      >>> print(out.ravel())  # clusters 0, 2 and 1, 3
      [1. 2. 2. 3.]

    References:
      Roy et al., `Efficient Content-Based Sparse Attention with Routing Transformers
      <https://arxiv.org/abs/2003.05997>`_, 2020.
    """
    check_heads(query, key, value)
    found = at.balanced_clusters(query, key, centroids, window=window)
    b, h, c, w = found.queries.shape
    at_queries, at_keys = (x.reshape(b, h, c * w) for x in found)

    def gathered(x, index):
        x = jnp.repeat(x, h // x.shape[2], axis=2)
        return jnp.take_along_axis(x, jnp.moveaxis(index, 1, 2)[..., None], axis=1)

    expr = at.block_diagonal(w)
    if causal:
        expr = expr & at.in_order(at_queries, at_keys)
    size = min(w, 128)
    mask = at.block_mask(expr, c * w, c * w, block_shape=block_shape or (size, size))
    out, lse = block_sparse_attention(
        gathered(query, at_queries),
        gathered(key, at_keys),
        gathered(value, at_keys),
        mask,
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    member, head = jnp.arange(b)[:, None, None], jnp.arange(h)
    place = (member, jnp.moveaxis(at_queries, 1, 2), head)
    zeros = jnp.zeros(query.shape[:3], jnp.float32)
    counts = zeros.at[place].add((lse > -jnp.inf).astype(jnp.float32))
    total = jnp.zeros((*zeros.shape, out.shape[-1]), jnp.float32)
    total = total.at[place].add(out.astype(jnp.float32))
    return (total / jnp.maximum(counts, 1.0)[..., None]).astype(out.dtype)
