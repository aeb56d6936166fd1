"""Exact selection of the largest scores: of an array, and of every M in a row."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sparsejax.masks import _search


def topk_mask(
    scores: Float[Array, "..."],
    count: int | Int[Array, ""],
    *,
    where: Bool[Array, "..."] | None = None,
    by_magnitude: bool = False,
) -> Bool[Array, "..."]:
    """Marks exactly the `count` largest scores.

    `mask[i] = rank(i) < count`, where `rank` orders all entries of the array by
    falling score and, among equal scores, by rising flat index. This is the order
    of a stable sort. Costs a few passes over `scores` (typically 6 to 8, at most
    eight and two per bit of the dtype), plus as many again where the last place is
    shared by equal scores, and no memory besides the mask. Not differentiable: the
    mask has no gradient.

    Signed scores are ordered by value, not by magnitude; -0 equals 0. NaN ranks
    below every number, -inf included, so it is marked only where nothing else is
    left.

    Args:
      scores: Scores of any shape; float32, bfloat16, float16, or float64 under x64.
      count: How many to mark: an int, or a traced int32 scalar. A traced count is
        clipped to what there is.
      where: Candidates; entries where it is False are never marked, and `count`
        beyond the candidates marks all of them. None: all entries.
      by_magnitude: Whether `abs(scores)` decides; taking it here saves a copy.

    Returns:
      A boolean array shaped like `scores` with `count` entries True.

    Raises:
      ValueError: An int `count` outside [0, size], a dtype that is not one of the
        above, or a shape of `where` unlike that of `scores`.

    Example:
      >>> scores = jnp.array([0.5, -2.0, 3.0, 0.5])
      >>> print(topk_mask(scores, 2))
      [ True False  True False]
    """
    size = math.prod(scores.shape)
    if size >= _search.MAX_SIZE:
        raise ValueError(f"scores must have fewer than 2**31 entries, got {size}")
    if isinstance(count, int) and not 0 <= count <= size:
        raise ValueError(f"count must be in [0, {size}], got {count}")
    if where is not None and where.shape != scores.shape:
        raise ValueError(
            f"where must be shaped like scores, {scores.shape}, got {where.shape}"
        )
    if size == 0:
        return jnp.zeros(scores.shape, bool)
    [mask] = _search.largest(
        (scores,),
        jnp.asarray(count).astype(jnp.int32),
        None if where is None else (where,),
        by_magnitude=by_magnitude,
        marks_nan=True,
    )
    return mask


def nm_mask(
    scores: Float[Array, "..."], n: int, m: int, axis: int | None = None
) -> Bool[Array, "..."]:
    """Keeps the `n` largest of every `m` consecutive scores along an axis.

    Exactly `n` entries of each group are marked; ties go to the lowest index, NaN
    ranks lowest. Costs `m` comparisons per entry.

    Args:
      scores: Scores of any shape with at least one dimension, such as `abs(w)`.
      n: How many of each group are KEPT.
      m: Group size.
      axis: The contraction axis of the product that the weight enters. None: axis
        -2, the input axis of a Flax kernel (in, out) and of a convolution
        (..., in, out); axis 0 for a vector.

    Returns:
      A boolean array shaped like `scores`.

    Raises:
      ValueError: `n` is outside [0, m], `m` is below 1, the axis does not exist, or
        `m` does not divide its size (N:M is not defined on part of a group).

    Example:
      >>> scores = jnp.array([[4.0], [1.0], [2.0], [3.0]])
      >>> print(nm_mask(scores, 2, 4)[:, 0])
      [ True False False  True]

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021.
    """
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"n and m must satisfy 0 <= n <= m, m >= 1, got {n}:{m}")
    if axis is None:
        axis = -2 if scores.ndim >= 2 else 0
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(f"axis must exist in shape {scores.shape}, got {axis}")
    axis = axis % scores.ndim
    size = scores.shape[axis]
    if size % m:
        raise ValueError(
            f"m must divide the size of axis {axis}, {size} of shape {scores.shape}, "
            f"got m={m}"
        )
    split = (*scores.shape[:axis], size // m, m, *scores.shape[axis + 1 :])
    keys = _search.ordered_keys(scores).reshape(split)
    index = lax.broadcasted_iota(jnp.int32, split, axis + 1)
    rank = jnp.zeros(split, jnp.int32)
    for j in range(m):
        other = lax.index_in_dim(keys, j, axis + 1)
        wins = (other > keys) | ((other == keys) & (j < index))
        rank = rank + wins.astype(jnp.int32)
    return (rank < n).reshape(scores.shape)
