"""How a loss reaches a selection: through the operator's block bias, by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.attention._block_mask import BlockMask
from sparsejax.attention._heads import to_heads


def list_scores(
    scores: Shaped[Array, "..."], mask: BlockMask
) -> Float[Array, "b h nq capacity"]:
    r"""A number per block, put where the mask's lists hold the block.

    .. math::
      \beta_{I n} = S_{I, \mathrm{kv\_idx}[I, n]}

    As ``block_bias`` of the operator it is added to the block's logits, and the
    gradient of the loss comes back to the scores of the listed blocks. Costs a gather.

    Args:
      scores: ``[b|1, h|1, nq, nk]``, such as `pooled_scores` or a gate's log
        probabilities.
      mask: The selection.

    Returns:
      ``[b|1, h|1, nq, capacity]``; what lies beyond the count is 0.

    Raises:
      ValueError: Not as many blocks as the mask has, or heads that do not divide.

    Example:
      >>> at = sparsejax.attention
      >>> mask = at.block_mask(at.causal(), 4, 4, block_shape=(2, 2))
      >>> scores = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, None]
      >>> print(at.list_scores(scores, mask)[0, 0])
      [[1. 0.]
       [3. 4.]]
    """
    if scores.ndim != 4 or scores.shape[2:] != mask.grid:
        raise ValueError(
            f"scores: got shape {scores.shape}, needed [b|1, h|1, nq, nk] with (nq, nk)"
            f" = {mask.grid}"
        )
    heads = max(scores.shape[1], mask.kv_idx.shape[1])
    if heads % scores.shape[1] or heads % mask.kv_idx.shape[1]:
        raise ValueError(
            f"scores: got {scores.shape[1]} heads beside {mask.kv_idx.shape[1]} in the "
            "mask, needed one to divide the other"
        )
    index, count = to_heads(mask.kv_idx, heads), to_heads(mask.kv_cnt, heads)
    scores = to_heads(scores, heads)
    lead = jnp.broadcast_shapes(scores.shape[:2], index.shape[:2])
    scores = jnp.broadcast_to(scores, (*lead, *scores.shape[2:]))
    index = jnp.broadcast_to(index, (*lead, *index.shape[2:]))
    listed = jnp.arange(mask.capacity, dtype=jnp.int32) < count[..., None]
    found = jnp.take_along_axis(scores, index, axis=-1)
    return jnp.where(listed, found, jnp.zeros_like(found))


def straight_through(
    scores: Shaped[Array, "..."], mask: BlockMask
) -> Float[Array, "b h nq capacity"]:
    r"""A block bias of value 0 whose gradient is that of the scores.

    .. math::
      \beta = S - \mathrm{stop\_gradient}(S)

    A gate of value 1 on each kept block, :math:`e^\beta`: the forward pass is the
    selection as it is, and the backward pass tells the scores of the kept blocks which
    of them the loss wants more of.

    Args:
      scores: ``[b|1, h|1, nq, nk]``, with the gradient that is wanted.
      mask: The selection.

    Returns:
      ``[b|1, h|1, nq, capacity]`` zeros, for ``block_bias`` of the operator.

    Raises:
      ValueError: Not as many blocks as the mask has, or heads that do not divide.

    Example:
      >>> at = sparsejax.attention
      >>> mask = at.block_mask(at.causal(), 4, 4, block_shape=(2, 2))
      >>> bias = lambda s: at.straight_through(s, mask).sum()
      >>> scores = jnp.ones((1, 1, 2, 2))
      >>> print(bias(scores), jax.grad(bias)(scores)[0, 0].astype(int))
      0.0 [[1 0]
           [1 1]]
    """
    listed = list_scores(scores, mask)
    return listed - jax.lax.stop_gradient(listed)
