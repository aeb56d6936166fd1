"""Twilight: what another selector proposes, pruned to the mass that counts."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import TopP, check_count, choose
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import to_heads
from sparsejax.attention._selection import Offset, prepare
from sparsejax.attention._stats import BlockStats, block_mass, block_stats


def twilight(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    base: BlockMask,
    *,
    p: ArrayLike = 0.95,
    bits: int = 4,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
    capacity: int | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""Of a generous selection, the fewest blocks that hold p of the attention.

    .. math::
      w_{IJ} = \frac{1}{|I|} \sum_{i \in I} \sum_{j \in J}
        \mathrm{softmax}_{j \in \mathrm{base}_i}(q_i^\top \tilde k_j\, \mathrm{scale}),
      \qquad \mathrm{kept}_I = \mathrm{TopP}_p(w_{I \cdot})

    with k rounded to few bits, each key by a scale of its own: enough to rank by. The
    budget of the base selector need not fit the head: a flat distribution keeps what
    was proposed, a peaked one is cut to a few blocks. On a CPU, and until a kernel
    reads the rounded keys, it costs the products of dense attention.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``.
      base: The proposal, of any selector; its elements are what may be attended.
      p: Share of the estimated mass, in (0, 1]; may be traced.
      bits: Of the rounded keys, 2 to 8.
      expr: What dense attention allows, for ``recall``; None: `causal`, from
        ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.
      capacity: Slots per query block, static; None: as many as ``base`` has.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists within those of ``base``, ties to the
      lowest index, and a ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit, p or bits is out of range.

    Example:
      >>> at = sparsejax.attention
      >>> q = jnp.ones((1, 4, 1, 1))
      >>> k = jnp.array([9.0, 0.0, 9.0, 9.0]).reshape(1, 4, 1, 1)
      >>> base = at.block_mask(at.causal(), 4, 4, block_shape=(1, 1))
      >>> mask = jax.jit(lambda *x: at.twilight(*x, p=0.8)[0])(q, k, base)
      >>> print(mask.to_blocks()[0, 0].astype(int))
      [[1 0 0 0]
       [1 0 0 0]
       [1 0 1 0]
       [1 0 1 1]]

    References:
      Lin et al., `Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning
      <https://arxiv.org/abs/2502.02770>`_, 2025.
    """
    budget, shape = TopP(p), base.shape
    query, key, expr = prepare(
        query, key, base.block_shape, budget, expr, offset, capacity
    )
    if shape != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"base: got shape {shape}, needed {(query.shape[1], key.shape[1])}"
        )
    check_count("bits", bits, least=2)
    if bits > 8:
        raise ValueError(f"bits: got {bits}, needed 2 to 8")
    mass = block_mass(query, _rounded(key, bits), base, scale=scale)
    choice = choose(
        jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf),
        to_heads(base.to_blocks(), query.shape[2]),
        budget,
        block_k=base.block_shape[1],
        capacity=capacity or base.capacity,
    )
    mask = BlockMask.from_blocks(
        choice.blocks,
        shape=shape,
        block_shape=base.block_shape,
        expr=base.expr,
        capacity=capacity or base.capacity,
    )
    return mask, block_stats(
        query, key, mask, expr, overflow=choice.overflow, scale=scale
    )


def _rounded(key, bits):
    """Each key of each head by its own step, to 2 ** bits - 1 values around 0."""
    key = key.astype(jnp.float32)
    most = 2.0 ** (bits - 1) - 1
    step = jnp.abs(key).max(axis=-1, keepdims=True) / most
    return jnp.round(key / jnp.where(step > 0, step, 1.0)) * step
