"""Exact selection of the largest scores of a whole model, without sorting or joining.

The search is that of `topk_mask`, on one threshold that all leaves share: each pass
counts leaf by leaf and adds the counts, so leaves keep their shapes and shards.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sparsejax.masks import _select
from sparsejax.masks._paths import named_leaves
from sparsejax.masks._select import count_true, topk_mask


def global_topk_masks(
    scores: Any, count: int | Int[Array, ""], *, where: Any = None
) -> Any:
    """Marks exactly the `count` largest scores of a tree, wherever they are.

    `mask[i] = rank(i) < count`, where `rank` orders all entries of all leaves by
    falling score and, among equal scores, by the order of leaves in the tree and
    then by rising flat index. Costs a few passes over the scores, as `topk_mask`
    does, and 4 bytes per entry (8 for float64). Nothing is joined or sorted, and
    only scalars cross shards.

    Leaves of several dtypes are compared exactly, in the widest. Signed scores are
    ordered by value; -0 equals 0. NaN is never marked: where it leaves fewer than
    `count` others, all of those are marked.

    Args:
      scores: Tree of floating arrays; None and empty nodes stay what they are.
      count: How many to mark: an int, or a traced int32 scalar, which is clipped to
        what there is.
      where: Tree with a boolean array for each leaf of `scores`, of the same path
        and shape: the candidates. `count` beyond them marks all of them. None: all
        entries.

    Returns:
      A tree like `scores` of boolean arrays, `count` entries True over all.

    Raises:
      ValueError: An int `count` outside [0, entries], 2**31 entries or more, a leaf
        that is not floating, or a `where` that lacks a leaf or has another shape.

    Example:
      >>> scores = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([[3.0], [1.0]])}
      >>> masks = global_topk_masks(scores, 3)
      >>> print(masks["a"], masks["b"].T)
      [ True  True] [[ True False]]
    """
    leaves = named_leaves(scores)
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    if total >= _select._MAX_SIZE:
        raise ValueError(
            f"scores must have fewer than 2**31 entries in all, got {total}"
        )
    if isinstance(count, int) and not 0 <= count <= total:
        raise ValueError(f"count must be in [0, {total}], got {count}")
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"scores must be floating, got {leaf.dtype} at {name!r}")
    candidates = None if where is None else _candidates(leaves, named_leaves(where))
    kept = _global_topk(
        tuple(leaves.values()), jnp.asarray(count).astype(jnp.int32), candidates
    )
    return jax.tree.unflatten(jax.tree.structure(scores), kept)


def _candidates(leaves: dict[str, Any], where: dict[str, Any]) -> tuple[Any, ...]:
    for name, leaf in leaves.items():
        if name not in where or where[name].shape != leaf.shape:
            got = where[name].shape if name in where else f"only {list(where)}"
            raise ValueError(
                f"where must have a leaf of shape {leaf.shape} at {name!r}, got {got}"
            )
    return tuple(where[name] for name in leaves)


@jax.jit  # so that eager calls compile once per set of shapes
def _global_topk(scores: Any, count: Any, where: Any) -> list[Any]:
    if not scores:
        return []
    dtype = _common_dtype([leaf.dtype for leaf in scores])
    keys = []
    for i, leaf in enumerate(scores):
        allowed = ~jnp.isnan(leaf)
        if where is not None:
            allowed &= where[i]
        key = _select._ordered_keys(leaf.astype(dtype))
        keys.append(jnp.where(allowed, key, jnp.zeros((), key.dtype)))
    low, at_least, above = _threshold(keys, count, _select._key_limit(dtype))

    def without_ties():
        return [key >= low for key in keys]

    def with_ties():
        # Of the entries that equal the threshold, the first ones: some leaves have
        # room for all of theirs, one for a part, the rest for none.
        masks, room = [], count - above
        for key in keys:
            tied = key == low
            here = jnp.minimum(room, _count([tied]))
            first = topk_mask(jnp.zeros(key.shape, jnp.float32), here, where=tied)
            masks.append((key > low) | first)
            room = room - here
        return masks

    return lax.cond(at_least > count, with_ties, without_ties)


def _threshold(keys: list[Any], count: Any, limit: int) -> tuple[Any, Any, Any]:
    """Largest t > 0 with `#(keys >= t) >= count` over all leaves, or any with equality.

    Returns `(t, #(keys >= t), #(keys > t))`; the last is only meant where the first
    count exceeds `count`. Where fewer than `count` keys are positive, t is 1.
    """
    counted = lambda t: _count([key >= t for key in keys])
    one = jnp.ones((), keys[0].dtype)
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
        bisect = (step >= _select._INTERPOLATIONS) & (step % 2 == 0)
        share = jnp.where(bisect, jnp.float32(0.5), share)
        # At most half the width is jumped, from the nearer end: more would round.
        jump = (jnp.minimum(share, 1 - share) * width).astype(low.dtype)
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

    high = jnp.array(limit, one.dtype)
    state = (one, high, counted(one), jnp.int32(0), jnp.int32(-len(guesses)))
    low, _, at_least, above, _ = lax.while_loop(unfinished, narrow, state)
    return low, at_least, above


def _bracket_from_sample(keys: list[Any], count: Any, limit: int) -> tuple[Any, ...]:
    """Two thresholds that likely bracket the right one, by ranks in a sample."""
    size = sum(key.size for key in keys)
    if size < _select._SAMPLE_FROM:
        return ()
    rate = size // _select._SAMPLE_SIZE
    sample = jnp.concatenate([_every(key, rate).ravel() for key in keys])
    rank = count.astype(jnp.float32) * jnp.float32(sample.size / size)
    spread = jnp.maximum(rank * (1 - rank / sample.size), 1)
    spread = 3 * jnp.sqrt(spread) + 1
    ranks = [
        jnp.clip(rank + s, 1, sample.size).astype(jnp.int32) for s in (spread, -spread)
    ]
    return tuple(_select._threshold(sample, r, limit)[0] for r in ranks)


def _every(key: Any, rate: int) -> Any:
    """About one entry in `rate`: by a stride per axis, so that shards stay in place."""
    strides = []
    for length in key.shape[:-1]:
        strides.append(max(1, min(rate, length // 8, math.isqrt(rate) | 1)))
        rate //= strides[-1]
    strides += [max(1, min(rate, length)) for length in key.shape[-1:]]
    return key[tuple(slice(None, None, stride) for stride in strides)]


def _count(masks: list[Any]) -> Any:
    return sum((count_true(mask) for mask in masks if mask.size), jnp.int32(0))


def _common_dtype(dtypes: list[Any]) -> Any:
    """The dtype itself where there is one, else one that holds all exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")
