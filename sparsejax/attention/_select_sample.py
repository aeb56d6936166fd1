"""SampleAttention: the columns that some queries need, and a window."""

import numbers

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import check_count, check_range, fewest
from sparsejax.attention._expressions import Expression, sliding_window
from sparsejax.attention._lines import mask_of_lines, probe
from sparsejax.attention._selection import Offset, allowed_blocks, prepare
from sparsejax.attention._stats import BlockStats


def sample_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (64, 64),
    alpha: ArrayLike = 0.95,
    window: int | float = 0.08,
    stride: int = 20,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""All queries attend the keys that a sample of them needs, and those around them.

    .. math::
      c_j = \frac{1}{|R|} \sum_{i \in R} p_{ij}, \qquad
      C = \mathrm{fewest}\Big\{\sum_{j \in C} c_j \ge \alpha\Big\}, \qquad
      m_{ij} = j \in C \ \vee\ |i - j| < w

    where p is the attention of the sampled queries R: the last one, and every stride-th
    before it. How many keys a head needs follows from how flat its attention is. A key
    is kept alone in its block, unless the window covers it. Costs t s d / stride
    products and as many probabilities.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has keys of its own.
      block_shape: (block_q, block_k); the last of each may be short.
      alpha: Share of the sampled attention, in (0, 1]; may be traced.
      window: w, keys around a query, its own among them: an int, or their share of s, a
        float in (0, 1].
      stride: Queries from one sampled query to the next.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: nk. Of more blocks the first are
        kept, ``overflow`` counts the others.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest key, and a
      ``BlockStats``, whose density is that of the keys. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; ``alpha`` or ``window`` is out of range;
        ``stride`` is below 1.

    Example:
      >>> x = jnp.zeros((1, 6, 1, 1)).at[0, 1].set(4.0)
      >>> select = jax.jit(lambda x: sparsejax.attention.sample_attention(
      ...     x + 1, x, block_shape=(2, 2), alpha=0.5, window=1, stride=2)[0])
      >>> mask = select(x)
      >>> print(mask.to_mask().astype(int))
      [[1 0 0 0 0 0]
       [0 1 0 0 0 0]
       [0 1 1 0 0 0]
       [0 1 0 1 0 0]
       [0 1 0 0 1 0]
       [0 1 0 0 0 1]]

    References:
      Zhu et al., `SampleAttention: Near-Lossless Acceleration of Long Context LLM
      Inference with Adaptive Structured Sparse Attention
      <https://arxiv.org/abs/2406.15486>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, 1, expr, offset, capacity)
    check_range("alpha", alpha, "(0, 1]", lambda a: 0 < a <= 1)
    check_count("stride", stride)
    t, s = query.shape[1], key.shape[1]
    if isinstance(window, numbers.Integral):
        check_count("window", window)
    else:
        check_range("window", window, "(0, 1] for a share", lambda w: 0 < w <= 1)
        window = max(1, round(float(window) * s))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    rows = jnp.arange((t - 1) % stride, t, stride, dtype=jnp.int32)
    probs, seen = probe(query, key, rows, expr, scale)
    total = jnp.maximum(seen.any(axis=-1).sum(axis=-1), 1).astype(jnp.float32)
    keys = fewest(probs.sum(axis=2) / total[..., None], alpha)
    near = sliding_window(int(window)).shift(queries=offset)
    return mask_of_lines(
        query,
        key,
        keys,
        near,
        allowed_blocks(near, t, s, block_shape),
        expr=expr,
        block_shape=block_shape,
        capacity=capacity,
        scale=scale,
    )
