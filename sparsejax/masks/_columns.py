"""The largest scores of every column, all columns searched at once.

As in `_search`, the k-th largest is found by counting, but bit by bit, because columns
do not end together: the threshold of each column is built from its highest bit down,
and a pass counts all columns. 32 passes for float32 whatever the data.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.masks import _search


def top_of_columns(scores: Any, count: Any, where: Any) -> Any:
    """Marks in every column the `count` largest candidates; ties go to the first rows.

    Args:
      scores: [..., k, n], ordered by absolute value; NaN ranks lowest.
      count: int32, a scalar or one per column, [..., 1, n]; more than there are
        candidates marks all of them.
      where: Candidates, shaped like `scores`.

    Returns:
      A boolean array shaped like `scores`.
    """
    scores = lax.stop_gradient(scores)
    k = scores.shape[-2]

    def keys(scores, where):
        return _search.only(where, _search.magnitude_keys(scores))

    def order(scores, where, low, rows):
        """The first of the rows that tie with the threshold has the largest key."""
        index = lax.broadcasted_iota(jnp.uint32, scores.shape, scores.ndim - 2)
        return jnp.where(keys(scores, where) == low, rows - index, jnp.uint32(0))

    limit = _search.key_limit(scores.dtype, by_magnitude=True)
    low = _thresholds(keys, (scores, where), count, limit)
    at_least = _per_column(keys(scores, where) >= low)

    def without_ties():
        return (keys(scores, where) >= low) & (count > 0)

    def with_ties():
        operands = (scores, where, low, jnp.uint32(k))
        above = _per_column(keys(scores, where) > low)
        first = _thresholds(order, operands, count - above, k + 1)
        operands, first = lax.optimization_barrier((operands, first))
        chosen = keys(*operands[:2]) > low
        return (chosen | (order(*operands) >= first)) & (count > 0)

    return lax.cond(jnp.any(at_least > count), with_ties, without_ties)


def _thresholds(make_keys: Any, operands: Any, count: Any, limit: int) -> Any:
    """Per column the largest t with `#(keys >= t) >= count`, or 1; [..., 1, n]."""
    shape = operands[0].shape
    dtype = jnp.uint64 if limit >= 1 << 32 else jnp.uint32
    bits = (limit - 1).bit_length()

    def next_bit(i, t):
        # Tied to the loop's state: else XLA stores the keys outside.
        inside, t = lax.optimization_barrier((operands, t))
        tried = t | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        return jnp.where(_per_column(make_keys(*inside) >= tried) >= count, tried, t)

    start = jnp.zeros((*shape[:-2], 1, shape[-1]), dtype)
    t = lax.fori_loop(0, bits, next_bit, start)
    return jnp.maximum(t, jnp.ones((), dtype))


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
