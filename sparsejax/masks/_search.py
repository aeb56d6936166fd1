"""The k-th largest of many numbers, found by counting instead of sorting.

A float's bits, read as an integer and flipped where the sign is set, are ordered as
the float is. The k-th largest score is then an integer that a bracketing search
finds: each pass counts how many keys are at least `t`, for two `t` at once, placed by
interpolation, and keeps the part that holds the k-th. A handful of passes replace a
sort, and only scalars cross shards.

Keys are worked out anew in every pass, from the operands of the search: written out
once they would take as much memory as the scores, and fresh memory costs more than a
pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

# Below this size the search needs no help from a sample.
_SAMPLE_FROM = 1 << 17
_SAMPLE_SIZE = 1 << 14
_INTERPOLATIONS = 8
MAX_SIZE = 1 << 31  # counts and indices are int32


@functools.partial(jax.jit, static_argnames=("by_magnitude", "marks_nan"))
def largest(
    leaves: Any, count: Any, where: Any, *, by_magnitude: bool, marks_nan: bool
) -> list[Any]:
    """Masks of the `count` largest entries of all `leaves`, of one dtype.

    Ties go by the order of leaves, then by rising flat index. Jitted so that eager
    calls, as when masks are first drawn, compile once per set of shapes.

    Args:
      leaves: Floating arrays of one dtype.
      count: int32 scalar.
      where: Candidates, shaped like `leaves`; or None.
      by_magnitude: Whether entries are ordered by their absolute value.
      marks_nan: Whether NaN is marked where nothing else is left, or never.
    """
    leaves = lax.stop_gradient(leaves)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def make_keys(leaves, where):
        keys = []
        for i, leaf in enumerate(leaves):
            key = magnitude_keys(leaf) if by_magnitude else ordered_keys(leaf)
            if where is not None:
                key = only(where[i], key)
            keys.append(key if marks_nan else only(~jnp.isnan(leaf), key))
        return keys

    def make_order(leaves, where, low, unit):
        """Of the entries that equal the threshold, the first have the largest key."""
        order = []
        for key, start in zip(make_keys(leaves, where), starts, strict=True):
            rest = jnp.uint32(sum(sizes) - start) - flat_index(key.shape, unit)
            order.append(jnp.where(key == low, rest, jnp.uint32(0)))
        return order

    limit = key_limit(leaves[0].dtype, by_magnitude)
    low, at_least, above = find_threshold(make_keys, (leaves, where), count, limit)

    def without_ties():
        return [(key >= low) & (count > 0) for key in make_keys(leaves, where)]

    def with_ties():
        # The one is an operand so that the indices, too, are worked out in each pass.
        operands = (leaves, where, low, jnp.uint32(1))
        end, room, tied = sum(sizes) + 1, count - above, at_least - above
        first, _, _ = find_threshold(make_order, operands, room, end, tied)
        operands, first = lax.optimization_barrier((operands, first))
        both = zip(make_keys(*operands[:2]), make_order(*operands), strict=True)
        return [((k > low) | (order >= first)) & (count > 0) for k, order in both]

    return lax.cond(at_least > count, with_ties, without_ties)


def find_threshold(
    make_keys: Callable[..., list[Any]],
    operands: Any,
    count: Any,
    limit: int,
    positive: Any = None,
) -> tuple[Any, Any, Any]:
    """Largest t > 0 with `#(keys >= t) >= count`, or any t with equality.

    Args:
      make_keys: `(*operands) -> [keys, ...]`, elementwise: unsigned integers of one
        dtype below `limit`, in arrays of any shapes that share the threshold.
      operands: Arrays.
      count: int32 scalar.
      limit: One more than the largest key.
      positive: How many keys are positive, where that is known; int32 scalar.

    Returns:
      `(t, #(keys >= t), #(keys > t))`; the last is only meant where the first count
      exceeds `count`. Where fewer than `count` keys are positive, t is 1.
    """
    keys = make_keys(*operands)
    one = jnp.ones((), keys[0].dtype)
    high = jnp.array(limit, one.dtype)
    guesses = _bracket_from_sample(keys, count, limit)
    if positive is None:
        positive = sum((count_true(k >= one) for k in keys if k.size), jnp.int32(0))

    def counted(low, high):
        # Tied to the loop's state: else XLA moves the keys out of it, and stores them.
        inside, low, high = lax.optimization_barrier((operands, low, high))
        pairs = [count_two(k, low, high) for k in make_keys(*inside) if k.size]
        return jax.tree.map(lambda *n: sum(n), *pairs) if pairs else (jnp.int32(0),) * 2

    def narrow(state):
        low, high, at_least, above, step = state
        lower, upper = _place(low, high, at_least, above, count, step)
        if guesses:
            lower = jnp.where(step < 0, guesses[0], lower)
            upper = jnp.where(step < 0, guesses[1], upper)
        lower = jnp.clip(lower, low + one, high - one)
        upper = jnp.clip(upper, lower, high - one)
        at_lower, at_upper = counted(lower, upper)
        # The k-th is above `upper`, between the two, or below `lower`.
        up, middle = at_upper >= count, at_lower >= count
        return (
            jnp.where(up, upper, jnp.where(middle, lower, low)),
            jnp.where(up, high, jnp.where(middle, upper, lower)),
            jnp.where(up, at_upper, jnp.where(middle, at_lower, at_least)),
            jnp.where(up, above, jnp.where(middle, at_upper, at_lower)),
            step + 1,
        )

    def unfinished(state):
        low, high, at_least, _, _ = state
        return (at_least > count) & (high - low > one)

    start = (one, high, positive, jnp.int32(0), jnp.int32(-1 if guesses else 0))
    low, _, at_least, above, _ = lax.while_loop(unfinished, narrow, start)
    return low, at_least, above


def _place(
    low: Any, high: Any, at_least: Any, above: Any, count: Any, step: Any
) -> tuple[Any, Any]:
    """Two thresholds that likely hold the k-th key between them."""
    width = (high - low).astype(jnp.float32)
    inside = jnp.maximum(at_least - above, 1).astype(jnp.float32)
    share = (at_least - count).astype(jnp.float32) / inside
    # Were the keys spread evenly at random, this is how far off `share` would be.
    spread = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / inside) / inside)
    spread = jnp.minimum(1.5 * spread, 0.2)
    # That ends in a few steps on smooth data and may creep on others: past the first
    # steps every second one cuts the bracket in three, which bounds the whole.
    cut = (step >= _INTERPOLATIONS) & (step % 2 == 0)
    shares = (
        jnp.where(cut, 1 / 3, share - spread),
        jnp.where(cut, 2 / 3, share + spread),
    )

    def at(share):
        share = jnp.clip(share, 0.0, 1.0)
        # At most half the width is jumped, from the nearer end: more would round.
        jump = (jnp.minimum(share, 1 - share) * width).astype(low.dtype)
        return jnp.where(share <= 0.5, low + jump, high - jump)

    return at(shares[0]), at(shares[1])


def _bracket_from_sample(keys: list[Any], count: Any, limit: int) -> tuple[Any, ...]:
    """Two thresholds that likely bracket the right one, by ranks in a sample."""
    size = sum(math.prod(k.shape) for k in keys)
    if size < _SAMPLE_FROM:
        return ()
    samples = [_every(k, size // _SAMPLE_SIZE) for k in keys if k.size]
    n = sum(math.prod(s.shape) for s in samples)
    rank = count.astype(jnp.float32) * jnp.float32(n / size)
    spread = 3 * jnp.sqrt(jnp.maximum(rank * (1 - rank / n), 1)) + 1
    ranks = [jnp.clip(rank + s, 1, n).astype(jnp.int32) for s in (spread, -spread)]
    same = lambda *samples: list(samples)
    return tuple(find_threshold(same, samples, r, limit)[0] for r in ranks)


def _every(keys: Any, rate: int) -> Any:
    """About one entry in `rate`, by a stride per axis, so that shards stay in place."""
    strides = []
    for length in keys.shape[:-1]:
        strides.append(max(1, min(rate, length // 8, math.isqrt(rate) | 1)))
        rate //= strides[-1]
    strides += [max(1, min(rate, length)) for length in keys.shape[-1:]]
    return keys[tuple(slice(None, None, stride) for stride in strides)]


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


def count_two(keys: Any, lower: Any, upper: Any) -> Any:
    """`(#(keys >= lower), #(keys >= upper))` in one pass, as int32 scalars."""

    def on_cpu(keys, lower, upper):
        # Both counts share a byte, a nibble each: the sum of 8 is at most 0x88.
        byte = lambda mask: mask.astype(jnp.uint8)
        both = byte(keys >= lower) + 16 * byte(keys >= upper)
        both = jnp.sum(both.reshape(8, -1), axis=0, dtype=jnp.uint8)
        parts = both & 15, both >> 4
        rows = [jnp.sum(p.reshape(16, -1), axis=0, dtype=jnp.uint8) for p in parts]
        return jnp.sum(rows[0], dtype=jnp.int32), jnp.sum(rows[1], dtype=jnp.int32)

    def total(keys, lower, upper):
        count = lambda t: jnp.sum(keys >= t, dtype=jnp.int32)
        return count(lower), count(upper)

    if keys.size % 128 or any(jax.typeof(keys).sharding.spec):
        return total(keys, lower, upper)
    return lax.platform_dependent(keys, lower, upper, cpu=on_cpu, default=total)


def ordered_keys(scores: Any) -> Any:
    """Unsigned integers ordered as the scores are; NaN is 1, nothing is 0."""
    bits = _bits(scores.dtype)
    raw = lax.bitcast_convert_type(scores, bits)
    sign = jnp.array(1 << (8 * scores.dtype.itemsize - 1), bits)
    keys = jnp.where(raw >= sign, ~raw, raw | sign)
    # -0 ties with 0; by its bits, since chips may flush subnormals in a comparison.
    keys = jnp.where(raw == sign, sign, keys)
    keys = jnp.where(jnp.isnan(scores), jnp.ones((), bits), keys)
    # 16-bit arithmetic is emulated on most chips.
    return keys if bits == jnp.uint64 else keys.astype(jnp.uint32)


def magnitude_keys(scores: Any) -> Any:
    """Unsigned integers ordered as |scores| are; NaN is 1, nothing is 0."""
    bits = _bits(scores.dtype)
    sign = 1 << (8 * scores.dtype.itemsize - 1)
    raw = lax.bitcast_convert_type(scores, bits) & jnp.array(sign - 1, bits)
    one = jnp.ones((), bits)
    keys = jnp.where(raw > jnp.array(_infinity(scores.dtype), bits), one, raw + 2 * one)
    return keys if bits == jnp.uint64 else keys.astype(jnp.uint32)


def only(where: Any, keys: Any) -> Any:
    """The keys of candidates, 0 elsewhere; by bits, which is quicker than a select."""
    return keys & -where.astype(keys.dtype)


def key_limit(dtype: Any, by_magnitude: bool = False) -> int:
    """One more than the largest key: that of infinity."""
    if by_magnitude:
        return _infinity(dtype) + 3
    return (1 << 8 * dtype.itemsize) - 1


def _bits(dtype: Any) -> Any:
    bits = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}.get(dtype.itemsize)
    if bits is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"scores must be float32, bfloat16, float16 or float64, got {dtype}"
        )
    return bits


def _infinity(dtype: Any) -> int:
    """The bits of infinity."""
    size = dtype.itemsize
    return int(np.asarray(np.inf, dtype).view(f"u{size}"))


def flat_index(shape: tuple[int, ...], unit: Any) -> Any:
    """The row-major index of each entry, without a reshape that would move shards."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = unit * jnp.uint32(math.prod(shape[axis + 1 :]))
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index
