"""combiner_attention: near keys one by one, the others by the block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax import attention as at
from sparsejax._dispatch import Choice
from sparsejax.ops._attention_arguments import check_heads
from sparsejax.ops._block_sparse_attention import block_sparse_attention
from sparsejax.ops._merge_attention import merge_attention


def combiner_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    *,
    size: int = 128,
    causal: bool = True,
    scale: float | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    r"""Attends to all keys, those of other blocks through what stands for their block.

    .. math::
      o_i = \sum_{j \in \mathrm{own}} p(j | i)\, v_j
        + \sum_{R \ne \mathrm{own}} p(R | i) \sum_{j \in R} p(j | R)\, v_j

    where one softmax over the keys of the query's own block and the summaries of the
    others gives :math:`p(j|i) \propto e^{q_i^\top k_j}`, :math:`p(R|i) \propto
    e^{q_i^\top \max_R k}`, and each block has one of its own, :math:`p(j|R) \propto
    e^{(\max_R q)^\top k_j}`, with the scale in all of them. Every key has a probability
    and a gradient; t (size + t / size) products.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, t, h_kv, d]``, of the same length.
      value: ``[b, t, h_kv, dv]``.
      size: Keys per block; the last block may be short.
      causal: Whether a query attends only to keys up to its own and to past blocks.
      scale: Of the logits; None: ``1 / sqrt(d)``.
      implementation: As `block_sparse_attention` has it.

    Returns:
      ``[b, t, h, dv]`` of the query's dtype.

    Raises:
      ValueError: Shapes or dtypes do not fit, or ``size`` is below 1.
      NotImplementedError: The named implementation does not serve this.

    Example:
      >>> x = jnp.zeros((1, 4, 1, 2))
      >>> value = jnp.array([1.0, 3.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
      >>> attend = jax.jit(
      ...     lambda x, v: sparsejax.ops.combiner_attention(x, x, v, size=2))
      >>> print(attend(x, value).ravel())  # the third: (2 + 4) / 2
      [1. 2. 3. 4.6666665]

    References:
      Ren et al., `Combiner: Full Attention Transformer with Sparse Computation Cost
      <https://arxiv.org/abs/2107.05768>`_, 2021.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: got {size!r}, needed a positive int")
    check_heads(query, key, value)
    b, t, h, d = query.shape
    if key.shape[:2] != (b, t):
        raise ValueError(
            f"key: got shape {key.shape}, needed the query's batch and length, {(b, t)}"
        )
    scale = d**-0.5 if scale is None else scale
    n = -(-t // size)
    near = at.block_diagonal(size)
    if causal:
        near = near & at.causal()
    sides = (min(size, 128),) * 2
    attend = lambda key, value, mask: block_sparse_attention(
        query,
        key,
        value,
        mask,
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    parts = [attend(key, value, at.block_mask(near, t, t, block_shape=sides))]
    if n > 1:
        summary_key, summary_value = _summaries(query, key, value, size, scale)
        block = jnp.arange(n, dtype=jnp.int32)[None, None]
        own = jnp.arange(t, dtype=jnp.int32)[None, None] // size
        far = at.in_order(own - 1, block)
        if not causal:
            far = far | ~at.in_order(own, block)
        mask = at.block_mask(far, t, n, block_shape=sides)
        parts.append(attend(summary_key, summary_value, mask))
    out, _ = merge_attention(*zip(*parts, strict=True))
    return out.astype(query.dtype)


def _summaries(query, key, value, size, scale):
    """A key ``[b, n, h, d]`` and a value ``[b, n, h, dv]`` for each block."""
    t, h = query.shape[1:3]
    short = -t % size

    def blocks(x, fill):
        x = jnp.repeat(x, h // x.shape[2], axis=2).astype(jnp.float32)
        pad = [(0, 0), (0, short), (0, 0), (0, 0)]
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    most = blocks(query, -jnp.inf).max(axis=2)
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bnhd,bnjhd->bnhj", most, blocks(key, 0.0), precision=exact)
    real = jnp.arange(t + short).reshape(1, -1, 1, size) < t
    probs = jax.nn.softmax(jnp.where(real, logits * scale, -jnp.inf), axis=-1)
    mean = jnp.einsum("bnhj,bnjhv->bnhv", probs, blocks(value, 0.0), precision=exact)
    summary = blocks(key, -jnp.inf).max(axis=2)
    return summary.astype(key.dtype), mean.astype(value.dtype)
