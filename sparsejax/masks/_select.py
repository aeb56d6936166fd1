"""Exact selection of the largest scores, without sorting.

A float's bits, read as an integer and flipped where the sign is set, are ordered as
the float is. The k-th largest score is then an integer that a bracketing search
finds by counting: each pass asks how many keys are at least `t`, and the answer
halves the bracket, or better, places the next `t` by interpolation. A handful of
passes over the data replace a sort, and only scalars cross shards.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Below this size the search needs no help from a sample.
_SAMPLE_FROM = 1 << 17
_SAMPLE_SIZE = 1 << 14
_INTERPOLATIONS = 8
_MAX_SIZE = 1 << 31  # counts and indices are int32


def topk_mask(
    scores: Float[Array, "..."],
    count: int | Int[Array, ""],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Bool[Array, "..."]:
    """Marks exactly the `count` largest scores.

    `mask[i] = rank(i) < count`, where `rank` orders all entries of the array by
    falling score and, among equal scores, by rising flat index. This is the order
    of a stable sort. Costs a few passes over `scores` (typically 6 to 10, at most
    eight and two per bit of the dtype), plus as many again where the last place is
    shared by equal scores. Not differentiable: the mask has no gradient.

    Signed scores are ordered by value, not by magnitude; -0 equals 0. NaN ranks
    below every number, -inf included, so it is marked only where nothing else is
    left.

    Args:
      scores: Scores of any shape; float32, bfloat16, float16, or float64 under x64.
      count: How many to mark: an int, or a traced int32 scalar. A traced count is
        clipped to what there is.
      where: Candidates; entries where it is False are never marked, and `count`
        beyond the candidates marks all of them. None: all entries.

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
    if size >= _MAX_SIZE:
        raise ValueError(f"scores must have fewer than 2**31 entries, got {size}")
    if isinstance(count, int) and not 0 <= count <= size:
        raise ValueError(f"count must be in [0, {size}], got {count}")
    if where is not None and where.shape != scores.shape:
        raise ValueError(
            f"where must be shaped like scores, {scores.shape}, got {where.shape}"
        )
    if size == 0:
        return jnp.zeros(scores.shape, bool)
    return _topk(scores, jnp.asarray(count).astype(jnp.int32), where)


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
    keys = _ordered_keys(scores).reshape(split)
    index = lax.broadcasted_iota(jnp.int32, split, axis + 1)
    rank = jnp.zeros(split, jnp.int32)
    for j in range(m):
        other = lax.index_in_dim(keys, j, axis + 1)
        wins = (other > keys) | ((other == keys) & (j < index))
        rank = rank + wins.astype(jnp.int32)
    return (rank < n).reshape(scores.shape)


def count_true(mask: Bool[Array, "..."]) -> Int[Array, ""]:
    """Number of True entries, as an int32 scalar."""

    def on_cpu(mask):
        # A full sum in int32 first writes the array out four times as wide on CPU;
        # a short first sum in int8 does not, and is four times as fast.
        flat = mask.astype(jnp.int8).reshape(16, -1)
        return jnp.sum(jnp.sum(flat, axis=0, dtype=jnp.int8), dtype=jnp.int32)

    total = lambda mask: jnp.sum(mask, dtype=jnp.int32)
    # An axis that is sharded explicitly cannot be reshaped without saying where to.
    if mask.size % 16 or any(jax.typeof(mask).sharding.spec):
        return total(mask)
    return lax.platform_dependent(mask, cpu=on_cpu, default=total)


@jax.jit  # so that eager calls, as when masks are first drawn, compile once per shape
def _topk(scores: Any, count: Any, where: Any) -> Any:
    keys = _ordered_keys(scores)
    if where is not None:
        keys = jnp.where(where, keys, jnp.zeros((), keys.dtype))
    low, at_least, above = _threshold(keys, count, _key_limit(scores.dtype))

    def without_ties():
        return keys >= low

    def with_ties():
        # Of the entries that equal the threshold, the first ones by flat index.
        tied = keys == low
        order = jnp.where(tied, jnp.uint32(keys.size) - _flat_index(keys.shape), 0)
        order = order.astype(jnp.uint32)
        first, _, _ = _threshold(order, count - above, keys.size + 1)
        return (keys > low) | (tied & (order >= first))

    mask = lax.cond(at_least > count, with_ties, without_ties)
    return mask & (count > 0)


def _ordered_keys(scores: Any) -> Any:
    """Unsigned integers ordered as the scores are; NaN is 1, nothing is 0."""
    bits = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}.get(scores.dtype.itemsize)
    if bits is None or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"scores must be float32, bfloat16, float16 or float64, got {scores.dtype}"
        )
    scores = lax.stop_gradient(scores)
    raw = lax.bitcast_convert_type(scores, bits)
    sign = jnp.array(1 << (8 * scores.dtype.itemsize - 1), bits)
    keys = jnp.where(raw >= sign, ~raw, raw | sign)
    # -0 ties with 0; by its bits, since chips may flush subnormals in a comparison.
    keys = jnp.where(raw == sign, sign, keys)
    keys = jnp.where(jnp.isnan(scores), jnp.ones((), bits), keys)
    # 16-bit arithmetic is emulated on most chips.
    return keys if bits == jnp.uint64 else keys.astype(jnp.uint32)


def _key_limit(dtype: Any) -> int:
    """One more than the largest key: that of infinity, with the sign bit set."""
    return (1 << 8 * dtype.itemsize) - 1


def _flat_index(shape: tuple[int, ...]) -> Any:
    """The row-major index of each entry, without a reshape that would move shards."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def _threshold(keys: Any, count: Any, limit: int) -> tuple[Any, Any, Any]:
    """Largest t > 0 with `#(keys >= t) >= count`, or any t with equality.

    All keys are below `limit`. Returns `(t, #(keys >= t), #(keys > t))`; the last is
    only meant where the first count exceeds `count`. Where fewer than `count` keys
    are positive, t is 1.
    """
    counted = lambda t: count_true(keys >= t)
    one = jnp.ones((), keys.dtype)
    guesses = _bracket_from_sample(keys, count, limit)

    def unfinished(state):
        low, high, at_least, _, _ = state
        return (at_least > count) & (high - low > one)

    def narrow(state):
        low, high, at_least, above, step = state
        width = (high - low).astype(jnp.float32)
        share = (at_least - count).astype(jnp.float32)
        share = share / jnp.maximum(at_least - above, 1).astype(jnp.float32)
        # Interpolation ends in a few steps on smooth data and may creep on others:
        # past the first steps every second one bisects, which bounds the whole.
        bisect = (step >= _INTERPOLATIONS) & (step % 2 == 0)
        share = jnp.where(bisect, jnp.float32(0.5), share)
        # At most half the width is jumped, from the nearer end: more would round.
        jump = (jnp.minimum(share, 1 - share) * width).astype(keys.dtype)
        t = jnp.where(share <= 0.5, low + jump, high - jump)
        for i, guess in enumerate(guesses):
            t = jnp.where(step == i - len(guesses), guess, t)
        t = jnp.clip(t, low + one, high - one)
        now = counted(t)
        enough = now >= count
        return (
            jnp.where(enough, t, low),
            jnp.where(enough, high, t),
            jnp.where(enough, now, at_least),
            jnp.where(enough, above, now),
            step + 1,
        )

    high = jnp.array(limit, keys.dtype)
    state = (one, high, counted(one), jnp.int32(0), jnp.int32(-len(guesses)))
    low, _, at_least, above, _ = lax.while_loop(unfinished, narrow, state)
    return low, at_least, above


def _bracket_from_sample(keys: Any, count: Any, limit: int) -> tuple[Any, ...]:
    """Two thresholds that likely bracket the right one, by ranks in a sample."""
    size = math.prod(keys.shape)
    if size < _SAMPLE_FROM:
        return ()
    # A stride per axis, because flattening would gather an array that is sharded.
    strides, left = [], size // _SAMPLE_SIZE
    for length in keys.shape[:-1]:
        strides.append(max(1, min(left, length // 8, math.isqrt(left) | 1)))
        left //= strides[-1]
    strides.append(max(1, min(left, keys.shape[-1])))
    sample = keys[tuple(slice(None, None, stride) for stride in strides)]
    n = math.prod(sample.shape)
    rank = count.astype(jnp.float32) * jnp.float32(n / size)
    spread = 3 * jnp.sqrt(jnp.maximum(rank * (1 - rank / n), 1)) + 1
    ranks = [jnp.clip(rank + s, 1, n).astype(jnp.int32) for s in (spread, -spread)]
    return tuple(_threshold(sample, r, limit)[0] for r in ranks)
