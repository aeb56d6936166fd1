"""scatterbrain_attention: listed blocks exactly, the others at low rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax import attention as at
from sparsejax._dispatch import Choice
from sparsejax.attention._selection import unlisted_blocks
from sparsejax.ops._attention_arguments import check_block_mask, check_heads
from sparsejax.ops._block_sparse_attention import block_sparse_attention
from sparsejax.ops._merge_attention import merge_attention


def scatterbrain_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    block_mask: at.BlockMask,
    features: Shaped[Array, "..."],
    *,
    expr: at.Expression | None = None,
    scale: float | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    r"""Attention whose softmax is exact in the listed blocks and estimated elsewhere.

    .. math::
      a_{ij} = \begin{cases}
        e^{s\, q_i^\top k_j} & (i, j) \in \mathrm{block\_mask} \\
        \varphi(q_i)^\top \varphi(k_j) & \mathrm{elsewhere} \end{cases}, \qquad
      \varphi(x) = \frac1{\sqrt m} e^{\sqrt s W x - s |x|^2 / 2}, \qquad
      o_i = \frac{\sum_j a_{ij} v_j}{\sum_j a_{ij}}

    Positive random features: with rows of W from a Gaussian the estimate is unbiased.
    Each key block is summed up once, and a query block adds up the sums of the blocks
    that it does not list: the listed blocks' products, and t m dv + nq nk m dv more.

    Args:
      query: ``[b, t, h, d]``, floating.
      key: ``[b, s, h_kv, d]``.
      value: ``[b, s, h_kv, dv]``.
      block_mask: What is computed exactly, for 1 or h heads, such as a selector's.
      features: W, ``[m, d]``, such as ``jax.random.normal(key, (m, d))``.
      expr: What may be attended at all; None: `attention.causal`. A block that it
        allows in part is computed exactly where it is listed, and left out otherwise:
        list those, as the selectors list a query block's own.
      scale: s, positive; None: ``1 / sqrt(d)``.
      implementation: As `block_sparse_attention` has it.

    Returns:
      ``[b, t, h, dv]`` of the query's dtype, with gradients to all but the features.

    Raises:
      ValueError: Shapes or dtypes do not fit.
      NotImplementedError: The named implementation does not serve this.

    Example:
      >>> at = sparsejax.attention
      >>> mask = at.block_mask(at.causal() & at.block_diagonal(2), 4, 4,
      ...                      block_shape=(2, 2))
      >>> x = jnp.zeros((1, 4, 1, 2))  # where the estimate is exact
      >>> value = jnp.array([1.0, 3.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
      >>> attend = jax.jit(sparsejax.ops.scatterbrain_attention)
      >>> print(attend(x, x, value, mask, jnp.ones((3, 2))).ravel())
      [1.        2.        2.6666667 4.       ]

    References:
      Chen et al., `Scatterbrain: Unifying Sparse and Low-rank Attention Approximation
      <https://arxiv.org/abs/2110.15343>`_, 2021.
    """
    check_heads(query, key, value)
    check_block_mask(block_mask)
    (b, t, h, d), g = query.shape, key.shape[2]
    if features.ndim != 2 or features.shape[1] != d:
        raise ValueError(f"features: got shape {features.shape}, needed [m, {d}]")
    if block_mask.kv_idx.shape[1] not in (1, h):
        raise ValueError(
            f"block_mask: got {block_mask.kv_idx.shape[1]} heads, needed 1 or {h}"
        )
    scale = d**-0.5 if scale is None else scale
    near, near_lse = block_sparse_attention(
        query,
        key,
        value,
        block_mask,
        scale=scale,
        return_lse=True,
        implementation=implementation,
    )
    bq, bk = block_mask.block_shape
    far_blocks = unlisted_blocks(block_mask, expr).astype(jnp.float32)

    weights = jax.lax.stop_gradient(features).astype(jnp.float32)
    q_log = _log_features(query, weights, scale)  # [b, t, h, m]
    k_log = _log_features(key, weights, scale)
    q_top = jax.lax.stop_gradient(q_log.max(axis=-1))
    k_top = jax.lax.stop_gradient(k_log.max(axis=(1, 3)))  # [b, g]
    q_phi = jnp.exp(q_log - q_top[..., None])
    k_phi = jnp.exp(k_log - k_top[:, None, :, None])
    exact = jax.lax.Precision.HIGHEST
    cut = lambda x, size: jnp.pad(
        x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    ).reshape(b, -1, size, *x.shape[2:])
    keys = cut(k_phi, bk)
    values = cut(value.astype(jnp.float32), bk)
    # The last column is that of the denominator: what is beyond s adds no feature.
    ones = jnp.ones((*values.shape[:-1], 1), jnp.float32)
    sums = jnp.einsum(
        "bnkgm,bnkgv->bgnmv",
        keys,
        jnp.concatenate([values, ones], axis=-1),
        precision=exact,
    )
    sums = jnp.repeat(sums, h // g, axis=1)
    far_blocks = jnp.broadcast_to(far_blocks, (b, h, *far_blocks.shape[2:]))
    states = jnp.einsum("bhqn,bhnmv->bhqmv", far_blocks, sums, precision=exact)
    total = jnp.einsum("bqihm,bhqmv->bqihv", cut(q_phi, bq), states, precision=exact)
    total = total.reshape(b, -1, h, total.shape[-1])[:, :t]
    some = total[..., -1] > 0
    mass = jnp.where(some, total[..., -1], 1.0)
    top = q_top + jnp.repeat(k_top, h // g, axis=1)[:, None]
    far_lse = jnp.where(some, jnp.log(mass) + top, -jnp.inf)
    far = (total[..., :-1] / mass[..., None]).astype(near.dtype)
    out, _ = merge_attention([near, far], [near_lse, far_lse])
    return out.astype(query.dtype)


def _log_features(x, weights, scale):
    """Logarithms of the features: [b, n, heads, m]."""
    x = x.astype(jnp.float32) * scale**0.5
    projected = jnp.einsum(
        "bnhd,md->bnhm", x, weights, precision=jax.lax.Precision.HIGHEST
    )
    square = (x * x).sum(axis=-1, keepdims=True) / 2
    return projected - square - jnp.log(jnp.float32(weights.shape[0])) / 2
