"""RigL on blocks: drop the weakest, grow where the gradient is largest."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.layouts import BlockLayout
from sparsejax.layouts._block import check_blocks
from sparsejax.masks import topk_mask


def rigl_blocks(
    blocks: Shaped[Array, "..."],
    layout: BlockLayout,
    scores: Shaped[Array, "..."],
    *,
    fraction: Any,
    moments: Any = (),
) -> tuple[Float[Array, "capacity bk bn"], BlockLayout, Any]:
    """Moves a fraction of the stored blocks to where the gradient is largest.

    With c stored blocks, e empty places and ``d = min(round(fraction c), e)``: drops
    the d blocks of smallest Frobenius norm, then grows, among the places that were
    empty before, the d of largest score. So nothing dropped is grown again in the same
    step, and the count stays. Of equals the first is kept, the first is grown. Grown
    blocks and their moments are zero; all others keep their values bit for bit. Costs
    one pass over the blocks.

    Args:
      blocks: Stored blocks ``[capacity, bk, bn]``.
      layout: Their places.
      scores: ``[kb, nb]``: norms of the dense gradient's blocks, from
        ``block_scores`` or the gradient of a ``growth_probe``.
      fraction: Of the stored blocks to move, in [0, 1]; a number or a traced scalar.
      moments: Pytree of arrays ``[capacity, ...]`` that belong to the blocks, such as
        an optimizer's moments; they move along.

    Returns:
      (blocks, layout, moments) of equal shapes. Where a score or a block is not finite
      nothing moves.

    Raises:
      ValueError: Shapes do not fit, or a concrete fraction is outside [0, 1].

    Example:
      >>> layout = sparsejax.layouts.BlockLayout.from_mask(
      ...     jnp.array([[True, True, False]]), (8, 8))
      >>> blocks = jnp.stack([jnp.ones((8, 8)), 2 * jnp.ones((8, 8))])
      >>> _, moved, _ = sparsejax.topology.rigl_blocks(
      ...     blocks, layout, jnp.array([[9.0, 9.0, 1.0]]), fraction=0.5)
      >>> print(moved.to_mask())
      [[False  True  True]]

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    check_blocks(blocks, layout)
    if scores.shape != layout.grid:
        raise ValueError(f"scores: got shape {scores.shape}, needed {layout.grid}")
    if isinstance(fraction, int | float) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, needed a number in [0, 1]")
    for leaf in jax.tree.leaves(moments):
        if leaf.shape[:1] != (layout.capacity,):
            raise ValueError(
                f"moments: got a leaf of shape {leaf.shape}, needed [capacity, ...] "
                f"with capacity {layout.capacity}"
            )
    if layout.capacity == 0:
        return blocks, layout, moments

    (kb, nb), slots = layout.grid, jnp.arange(layout.capacity, dtype=jnp.int32)
    stored = layout.cols < nb
    norms = jnp.sqrt(jnp.sum(jnp.square(blocks.astype(jnp.float32)), axis=(1, 2)))
    scores = scores.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(scores)) & jnp.all(jnp.isfinite(norms) | ~stored)

    count = layout.count
    drop = jnp.round(jnp.asarray(fraction, jnp.float32) * count.astype(jnp.float32))
    drop = jnp.minimum(drop.astype(jnp.int32), kb * nb - count)
    drop = jnp.where(finite, drop, 0)

    kept = topk_mask(norms, count - drop, where=stored)
    grown = topk_mask(scores, drop, where=~layout.to_mask())

    # Slot of each place, one past the end where a place has none.
    none = layout.capacity
    slot = jnp.full((kb, nb), none, jnp.int32)
    slot = slot.at[layout.rows, layout.cols].set(
        jnp.where(kept, slots, none), mode="drop"
    )
    new = BlockLayout.from_mask(
        (slot < none) | grown,
        layout.block_shape,
        capacity=layout.capacity,
        shape=layout.shape,
    )
    old_slot = slot.at[new.rows, new.cols].get(mode="fill", fill_value=none)
    move = lambda a: a.at[old_slot].get(mode="fill", fill_value=0)
    return move(blocks), new, jax.tree.map(move, moments)
