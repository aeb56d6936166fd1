"""The largest scores of every column, all columns searched at once.

As in `_search`, the k-th largest is found by counting, but bit by bit, because columns
do not end together: the threshold of each column is built from its highest bit down,
and a pass counts all columns. 32 passes for float32 whatever the data; none where no
column has more candidates than it may keep.

Columns know nothing of each other, so a CPU takes as many at a time as stay in cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.masks import _search

_IN_CACHE = 1 << 19  # entries
_LANES = 64  # columns at least: fewer are no vector code


@jax.jit
def top_of_columns(scores: Any, count: Any, where: Any) -> Any:
    """Marks in every column the `count` largest candidates; ties go to the first rows.

    Jitted so that eager calls compile once per set of shapes.

    Args:
      scores: [..., k, n], ordered by absolute value; NaN ranks lowest.
      count: int32, a scalar or one per column, [..., 1, n]; more than there are
        candidates marks all of them.
      where: Candidates, shaped like `scores`.

    Returns:
      A boolean array shaped like `scores`.
    """
    scores = lax.stop_gradient(scores)
    *stack, k, n = scores.shape
    count = jnp.broadcast_to(count, (*stack, 1, n))
    if not scores.size:
        return where
    strip = max(_LANES, _IN_CACHE * n // scores.size // _LANES * _LANES)
    # An axis that is sharded explicitly cannot be cut without saying where to.
    if n <= strip or any(jax.typeof(scores).sharding.spec):
        return _top(scores, count, where)
    in_strips = functools.partial(_top_by_strips, strip=strip)
    return lax.platform_dependent(scores, count, where, cpu=in_strips, default=_top)


def _top_by_strips(scores: Any, count: Any, where: Any, *, strip: int) -> Any:
    """`_top` of `strip` columns at a time; the last strip ends with the last column."""

    def mark(i, mask):
        # Both clamp a start that would lead past the end.
        cut = lambda x: lax.dynamic_slice_in_dim(x, i * strip, strip, x.ndim - 1)
        top = _top(*(cut(x) for x in (scores, count, where)))
        return lax.dynamic_update_slice_in_dim(mask, top, i * strip, mask.ndim - 1)

    strips = -(-scores.shape[-1] // strip)
    return lax.fori_loop(0, strips, mark, jnp.zeros(scores.shape, bool))


def _top(scores: Any, count: Any, where: Any) -> Any:
    k = scores.shape[-2]

    def keys(scores, where):
        return _search.only(where, _search.magnitude_keys(scores))

    def order(scores, where, low, rows):
        """The first of the rows that tie with the threshold has the largest key."""
        index = lax.broadcasted_iota(jnp.uint32, scores.shape, scores.ndim - 2)
        return jnp.where(keys(scores, where) == low, rows - index, jnp.uint32(0))

    limit = _search.key_limit(scores.dtype, by_magnitude=True)
    low, at_least = _thresholds(keys, (scores, where), count, limit)

    def without_ties():
        return (keys(scores, where) >= low) & (count > 0)

    def with_ties():
        operands = (scores, where, low, jnp.uint32(k))
        above = _per_column(keys(scores, where) > low)
        first, _ = _thresholds(order, operands, count - above, k + 1)
        operands, first = lax.optimization_barrier((operands, first))
        chosen = keys(*operands[:2]) > low
        return (chosen | (order(*operands) >= first)) & (count > 0)

    return lax.cond(jnp.any(at_least > count), with_ties, without_ties)


def _thresholds(make_keys: Any, operands: Any, count: Any, limit: int) -> Any:
    """Per column the largest t > 0 with `#(keys >= t) >= count`, or 1; and that number.

    Both [..., 1, n].
    """
    shape = operands[0].shape
    dtype = jnp.uint64 if limit >= 1 << 32 else jnp.uint32
    bits = (limit - 1).bit_length()
    one = jnp.ones((), dtype)

    def next_bit(i, state):
        t, at_least = state
        # Tied to the loop's state: else XLA stores the keys outside.
        inside, t = lax.optimization_barrier((operands, t))
        tried = t | (one << (bits - 1 - i).astype(dtype))
        counted = _per_column(make_keys(*inside) >= tried)
        high = counted >= count
        return jnp.where(high, tried, t), jnp.where(high, counted, at_least)

    positive = _per_column(make_keys(*operands) >= one)
    start = jnp.zeros((*shape[:-2], 1, shape[-1]), dtype), positive
    passes = jnp.where(jnp.any(positive > count), bits, 0)
    t, at_least = lax.fori_loop(0, passes, next_bit, start)
    return jnp.maximum(t, one), at_least


def _per_column(mask: Any) -> Any:
    """Number of True entries of every column, int32 [..., 1, n]."""
    *stack, k, n = mask.shape
    # Sums in bytes first: XLA's CPU code for int32 is several times as slow.
    run = next((run for run in (128, 64, 32) if k % run == 0), None)
    # An axis that is sharded explicitly cannot be reshaped without saying where to.
    if run is None or any(jax.typeof(mask).sharding.spec):
        return jnp.sum(mask, axis=-2, keepdims=True, dtype=jnp.int32)
    runs = mask.reshape(*stack, k // run, run, n).astype(jnp.uint8)
    runs = jnp.sum(runs, axis=-2, dtype=jnp.uint8)
    return jnp.sum(runs, axis=-2, keepdims=True, dtype=jnp.int32)
