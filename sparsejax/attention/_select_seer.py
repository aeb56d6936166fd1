"""SeerAttention: a small learned gate says which blocks matter, taught by attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import Budget, check_counts
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import check_pair, pair_heads, pool_blocks
from sparsejax.attention._selection import (
    Offset,
    allowed_blocks,
    of_heads,
    prepare,
    select,
)
from sparsejax.attention._stats import BlockStats


class SeerGate(NamedTuple):
    """Parameters of SeerAttention's gate.

    Attributes:
      query: ``[h, d, gate_dim]``: applied to the mean of a block of queries.
      key: ``[h_kv, 3 d, gate_dim]``: to maxima, minima and means of a block of keys.
    """

    query: Shaped[Array, "..."]
    key: Shaped[Array, "..."]


def seer_init(
    key: Array, *, heads: int, kv_heads: int, head_dim: int, gate_dim: int = 128
) -> SeerGate:
    """Parameters of a gate, of variance 1 / fan-in.

    Args:
      key: A PRNG key.
      heads: Query heads.
      kv_heads: Key heads, a divisor of ``heads``.
      head_dim: Size of a head.
      gate_dim: Size of a head in the gate; even.

    Returns:
      A ``SeerGate`` of float32 arrays.

    Raises:
      ValueError: A size is below 1, ``gate_dim`` is odd, or heads do not divide.

    Example:
      >>> gate = sparsejax.attention.seer_init(
      ...     jax.random.key(0), heads=4, kv_heads=2, head_dim=8, gate_dim=16)
      >>> gate.query.shape, gate.key.shape
      ((4, 8, 16), (2, 24, 16))
    """
    check_counts(heads=heads, kv_heads=kv_heads, head_dim=head_dim, gate_dim=gate_dim)
    if heads % kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, needed a divisor of {heads}")
    if gate_dim % 2:
        raise ValueError(f"gate_dim: got {gate_dim}, needed an even number")
    one, two = jax.random.split(key)
    d = head_dim
    return SeerGate(
        jax.random.normal(one, (heads, d, gate_dim)) * d**-0.5,
        jax.random.normal(two, (kv_heads, 3 * d, gate_dim)) * (3 * d) ** -0.5,
    )


def seer_logits(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    gate: SeerGate,
    *,
    block_shape: tuple[int, int] = (64, 64),
    offset: Offset = 0,
    rotary_base: float | None = 10_000.0,
) -> Float[Array, "b h nq nk"]:
    r"""What the gate says of each block, before the softmax, with its gradient.

    .. math::
      S_{IJ} = \frac{\mathrm{rope}(W_q\, \mathrm{mean}_{i \in I}\, q_i)^\top
        \mathrm{rope}(W_k [\max_J k;\ \min_J k;\ \mathrm{mean}_J k])}{\sqrt{d_g}}

    Costs t d reads, (nq + nk) d d_g and nq nk d_g products per head.

    Args:
      query: ``[b, t, h, d]``, floating, before rotary embedding; computed in float32.
      key: ``[b, s, h_kv, d]``, before rotary embedding.
      gate: Parameters; the gradient goes to them, and to query and key.
      block_shape: (block_q, block_k); the last of each may be short.
      offset: Position of the first query among the keys; may be traced.
      rotary_base: Of the rotary embedding of the pooled rows, at the position of their
        block's first row; None: none, where query and key have theirs.

    Returns:
      float32 ``[b, h, nq, nk]``.

    Raises:
      ValueError: Shapes or dtypes do not fit.

    Example:
      >>> gate = sparsejax.attention.seer_init(
      ...     jax.random.key(0), heads=1, kv_heads=1, head_dim=4, gate_dim=2)
      >>> x = jax.random.normal(jax.random.key(1), (1, 8, 1, 4))
      >>> score = jax.jit(lambda x, gate: sparsejax.attention.seer_logits(
      ...     x, x, gate, block_shape=(4, 2)))
      >>> score(x, gate).shape
      (1, 1, 2, 4)
    """
    check_pair(query, key, block_shape)
    h, g, d = query.shape[2], key.shape[2], query.shape[3]
    dim = gate.query.shape[-1]
    if gate.query.shape != (h, d, dim) or gate.key.shape != (g, 3 * d, dim):
        raise ValueError(
            f"gate: got query {gate.query.shape} and key {gate.key.shape}, needed "
            f"{(h, d, dim)} and {(g, 3 * d, dim)}"
        )
    bq, bk = block_shape
    exact = jax.lax.Precision.HIGHEST
    project = lambda x, w: jnp.einsum(
        "bhnd,hdg->bhng", x, w.astype(jnp.float32), precision=exact
    )
    pooled = [pool_blocks(key, bk, how) for how in ("max", "min", "mean")]
    q = project(pool_blocks(query, bq), gate.query)
    k = project(jnp.concatenate(pooled, axis=-1), gate.key)
    if rotary_base is not None:
        q = _rotate(q, jnp.arange(q.shape[2]) * bq + offset, rotary_base)
        k = _rotate(k, jnp.arange(k.shape[2]) * bk, rotary_base)
    return pair_heads(q, k) * dim**-0.5


def seer(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    gate: SeerGate,
    *,
    block_shape: tuple[int, int] = (64, 64),
    budget: Budget,
    expr: Expression | None = None,
    offset: Offset = 0,
    rotary_base: float | None = 10_000.0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    """A query block attends the key blocks that a learned gate names.

    The gate's `seer_logits` are ranked; the key blocks at a query block's own positions
    are always kept, out of the budget. The paper takes a ``Threshold`` of 5e-4 to 5e-3,
    or a count. The gate is taught by `seer_loss`, the model left as it is.

    Args:
      query: ``[b, t, h, d]``, floating, before rotary embedding.
      key: ``[b, s, h_kv, d]``, before rotary embedding; each query head has lists of
        its own.
      gate: Parameters.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: Blocks per query block, an int; their share of the nk blocks, a float in
        (0, 1]; or ``TopP``, ``Threshold``, ``Tokens``. More than there are means all.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      rotary_base: As `seer_logits` has it.
      scale: Of the logits in ``recall``, which is that of query and key as they are
        here; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as the budget can ask for.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, ties to the lowest index, and a
      ``BlockStats``. No gradients: see `seer_loss`, or `straight_through`.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, or a share above 1.

    Example:
      >>> at = sparsejax.attention
      >>> gate = at.seer_init(
      ...     jax.random.key(0), heads=1, kv_heads=1, head_dim=4, gate_dim=2)
      >>> x = jax.random.normal(jax.random.key(1), (1, 8, 1, 4))
      >>> select = jax.jit(
      ...     lambda x, gate: at.seer(x, x, gate, block_shape=(2, 2), budget=2)[0])
      >>> mask = select(x, gate)
      >>> print(mask.kv_cnt[0, 0])
      [1 2 2 2]

    References:
      Gao et al., `SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs
      <https://arxiv.org/abs/2410.13276>`_, 2024.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, capacity)
    gate = jax.lax.stop_gradient(gate)
    scores = seer_logits(
        query,
        key,
        gate,
        block_shape=block_shape,
        offset=offset,
        rotary_base=rotary_base,
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


def seer_loss(
    logits: Float[Array, "b h nq nk"],
    target: Float[Array, "b h nq nk"],
    *,
    shape: tuple[int, int],
    block_shape: tuple[int, int] = (64, 64),
    expr: Expression,
) -> Float[Array, ""]:
    r"""How far the gate's probabilities are from those of attention.

    .. math::
      \mathrm{KL}(P_I \,\|\, \mathrm{softmax}_J S_{IJ}) =
      \sum_J P_{IJ} (\log P_{IJ} - \log \mathrm{softmax}_J S_{IJ})

    the mean over query blocks, heads and batch, with P the target, made to sum to 1.
    The softmax is over the blocks in which ``expr`` allows something.

    Args:
      logits: From `seer_logits`; the gradient goes here.
      target: From `attention_block_probabilities` (pooled by "max"), with the same
        blocks and expression; non-negative. It has no gradient.
      shape: (t, s), the lengths behind the blocks.
      block_shape: (block_q, block_k).
      expr: What may be attended at all.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: Shapes do not fit.

    Example:
      >>> at = sparsejax.attention
      >>> target = jnp.array([[1.0, 0.0], [0.2, 0.6]])[None, None]
      >>> loss = lambda s: at.seer_loss(
      ...     s, target, shape=(4, 4), block_shape=(2, 2), expr=at.causal())
      >>> print(loss(jnp.zeros((1, 1, 2, 2))))  # (0 + log(27 / 16) / 4) / 2
      0.06540...
      >>> bool(loss(jnp.log(target + 1e-30)) < 1e-6)
      True

    References:
      Gao et al., `SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs
      <https://arxiv.org/abs/2410.13276>`_, 2024.
    """
    (t, s), (bq, bk) = shape, block_shape
    if logits.shape != target.shape or logits.shape[2:] != (-(-t // bq), -(-s // bk)):
        raise ValueError(
            f"logits: got shape {logits.shape} beside target {target.shape}, needed "
            f"[b, h, {-(-t // bq)}, {-(-s // bk)}] both"
        )
    allowed = of_heads(allowed_blocks(expr, t, s, block_shape), logits.shape[1])
    allowed = jnp.broadcast_to(allowed, logits.shape)
    target = jnp.where(allowed, jax.lax.stop_gradient(target), 0.0).astype(jnp.float32)
    total = target.sum(axis=-1, keepdims=True)
    target = target / jnp.where(total > 0, total, 1.0)
    kept = jnp.where(allowed, logits.astype(jnp.float32), -1e30)
    log_gate = jax.nn.log_softmax(kept, axis=-1)
    log_target = jnp.log(jnp.where(target > 0, target, 1.0))
    terms = jnp.where(target > 0, target * (log_target - log_gate), 0.0)
    return terms.sum(axis=-1).mean()


def _rotate(x, positions, base):
    """Rotary embedding of rows ``[b, h, n, g]``: pairs are the two halves."""
    half = x.shape[-1] // 2
    rates = jnp.float32(base) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * rates
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
