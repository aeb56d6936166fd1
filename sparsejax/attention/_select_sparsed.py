"""SparseD: lists found once, from attention itself, and used for many steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._budget import (
    Budget,
    block_count,
    check_count,
    choose,
)
from sparsejax.attention._expressions import Expression
from sparsejax.attention._heads import to_heads
from sparsejax.attention._selection import Offset, allowed_blocks, of_heads, prepare
from sparsejax.attention._stats import (
    BlockStats,
    attention_block_probabilities,
    block_stats,
)


def sparsed(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    *,
    block_shape: tuple[int, int] = (128, 128),
    budget: Budget,
    prompt: int = 0,
    expr: Expression | None = None,
    offset: Offset = 0,
    scale: float | None = None,
) -> tuple[BlockMask, BlockStats]:
    r"""A query block attends the blocks that hold most of its attention, as measured.

    .. math::
      w_{IJ} = \frac{1}{|I|} \sum_{i \in I} \sum_{j \in J} p_{ij}, \qquad
      \mathrm{kept}_I = \mathrm{best}_{J \in \mathrm{prompt}}\, w_{IJ} \ \cup\
        \mathrm{best}_{J \in \mathrm{rest}}\, w_{IJ}

    The attention p is dense and so is its cost: it is to be paid once. The steps of a
    diffusion model attend alike, so that `reuse` keeps the lists for the next ones
    (diffusion models attend `everything`). Prompt and generated keys are chosen apart,
    lest the one crowd out the other. It is also the best that any selector of blocks
    could choose, for comparison.

    Args:
      query: ``[b, t, h, d]``, floating; scored in float32.
      key: ``[b, s, h_kv, d]``; each query head has lists of its own.
      block_shape: (block_q, block_k); the last of each may be short.
      budget: Blocks per query block, an int, which both parts share by their lengths;
        the share of each part's blocks, a float in (0, 1]; or ``Tokens``.
      prompt: Number of keys that are the prompt, a multiple of block_k; 0: one part.
      expr: What may be attended at all; None: `causal`, from ``offset``.
      offset: Position of the first query among the keys; may be traced.
      scale: Of the logits; None: ``d ** -0.5``.

    Returns:
      A ``BlockMask`` of ``[b, h, nq, ...]`` lists, one block at least of each part,
      ties to the lowest index, and a ``BlockStats``. No gradients.

    Raises:
      ValueError: Shapes or dtypes do not fit; a budget of 0, a share above 1, or one
        that is no count; ``prompt`` is no multiple of block_k below s.

    Example:
      >>> at = sparsejax.attention
      >>> x = jnp.zeros((1, 4, 1, 2)).at[:, 1].set(3.0).at[:, 3].set(4.0)
      >>> select = jax.jit(lambda x: at.sparsed(
      ...     x, x, block_shape=(1, 1), budget=0.5, prompt=2, expr=at.everything())[0])
      >>> mask = select(x)
      >>> print(mask.to_blocks()[0, 0, 3].astype(int))
      [0 1 0 1]

    References:
      Wang et al., `SparseD: Sparse Attention for Diffusion Language Models
      <https://arxiv.org/abs/2509.24014>`_, 2025.
    """
    query, key, expr = prepare(query, key, block_shape, budget, expr, offset, None)
    check_count("prompt", prompt, least=0)
    (_, bk), h, t, s = block_shape, query.shape[2], query.shape[1], key.shape[1]
    if prompt % bk or prompt >= s:
        raise ValueError(f"prompt: got {prompt}, needed a multiple of {bk} below {s}")
    mass = attention_block_probabilities(
        query, key, block_shape=block_shape, expr=expr, scale=scale, pool="sum"
    )
    nk = mass.shape[-1]
    allowed = allowed_blocks(expr, t, s, block_shape)
    whole = block_count(budget, nk, bk)
    share = budget if isinstance(budget, float) else whole / nk
    mine = of_heads(allowed, h)
    column, blocks, most = jnp.arange(nk), jnp.zeros(mass.shape, bool), 0
    for first, end in ((0, prompt // bk), (prompt // bk, nk)):
        if first == end:
            continue
        count = min(end - first, max(1, round(share * (end - first))))
        part = mine & (column >= first) & (column < end)
        blocks = blocks | choose(mass, part, count, block_k=bk).blocks
        most += count
    mask = BlockMask.from_blocks(
        to_heads(blocks, max(h, allowed.shape[1])),
        shape=(t, s),
        block_shape=block_shape,
        expr=expr,
        capacity=most,
    )
    return mask, block_stats(query, key, mask, expr, scale=scale)


def reuse(
    refresh: Bool[Array, ""] | bool, select: Callable[[], BlockMask], mask: BlockMask
) -> BlockMask:
    """A new selection, or the one before; the other is not computed.

    Args:
      refresh: Whether to select anew, such as ``step % 16 == 0``; may be traced.
      select: Makes the new mask, with lists of the capacity that ``mask`` has.
      mask: The one before, carried from step to step.

    Returns:
      One of the two.

    Example:
      >>> at = sparsejax.attention
      >>> old = at.block_mask(at.everything(), 4, 4, block_shape=(2, 2))
      >>> new = lambda: at.BlockMask.from_blocks(
      ...     jnp.eye(2, dtype=bool), shape=(4, 4), block_shape=(2, 2),
      ...     expr=at.everything(), capacity=2)
      >>> print(at.reuse(jnp.array(True), new, old).count)
      2

    References:
      Wang et al., `SparseD: Sparse Attention for Diffusion Language Models
      <https://arxiv.org/abs/2509.24014>`_, 2025.
    """
    return jax.lax.cond(refresh, select, lambda: mask)
