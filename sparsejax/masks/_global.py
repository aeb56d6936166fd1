"""Exact selection of the largest scores of a whole model, without sorting or joining.

The search is that of `topk_mask`, on one threshold that all leaves share: each pass
counts leaf by leaf and adds the counts, so leaves keep their shapes and shards.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsejax.masks import _search
from sparsejax.masks._paths import named_leaves


def global_topk_masks(
    scores: Any,
    count: int | Int[Array, ""],
    *,
    where: Any = None,
    by_magnitude: bool = False,
) -> Any:
    """Marks exactly the `count` largest scores of a tree, wherever they are.

    `mask[i] = rank(i) < count`, where `rank` orders all entries of all leaves by
    falling score and, among equal scores, by the order of leaves in the tree and
    then by rising flat index. Costs a few passes over the scores, as `topk_mask`
    does. Nothing is joined or sorted, and only scalars cross shards.

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
      by_magnitude: Whether absolute values decide; taking them here saves a copy.

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
    if total >= _search.MAX_SIZE:
        raise ValueError(
            f"scores must have fewer than 2**31 entries in all, got {total}"
        )
    if isinstance(count, int) and not 0 <= count <= total:
        raise ValueError(f"count must be in [0, {total}], got {count}")
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"scores must be floating, got {leaf.dtype} at {name!r}")
    candidates = None if where is None else _candidates(leaves, named_leaves(where))
    if not leaves:
        return scores
    dtype = _common_dtype([leaf.dtype for leaf in leaves.values()])
    kept = _search.largest(
        tuple(leaf.astype(dtype) for leaf in leaves.values()),
        jnp.asarray(count).astype(jnp.int32),
        candidates,
        by_magnitude=by_magnitude,
        marks_nan=False,
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


def _common_dtype(dtypes: list[Any]) -> Any:
    """The dtype itself where there is one, else one that holds all exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")
