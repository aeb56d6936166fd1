"""Condensed constant fan-in weights: every column keeps the same number of entries.

With i counting the kept entries of column j of ``w [k, n]`` (k, the contraction axis),

    values[j, i] = w[indices[j, i], j]

so values and indices are ``[n, fan_in]``, one row per neuron.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Int, Shaped


def condense_fan_in(
    w: Shaped[Array, "..."],
    mask: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
    *,
    fan_in: int | None = None,
) -> tuple[Float[Array, "n fan_in"], Int[Array, "n fan_in"]]:
    """Takes the kept entries out of a weight whose columns keep equally many.

    ``values[j, i] = w[indices[j, i], j]``, the indices of a column in rising order.
    Costs a sort of every column of the mask. Differentiable in w.

    A column that keeps fewer than ``fan_in``, such as an ablated neuron, is filled up
    with zeros at its first pruned rows, after the kept ones: no index comes twice in a
    column, so nothing is counted twice. They are entries of the condensed weight like
    the others, and get gradients.

    Args:
      w: Weight ``[k, n]``, k the contraction axis.
      mask: Boolean ``[k, n]``, True = kept.
      fan_in: Entries stored per column; default, the number that every column keeps.
        Needed where the mask is traced, since shapes are static; a traced mask that
        keeps more in a column loses the last ones.

    Returns:
      (values ``[n, fan_in]``, dtype of w; indices int32 ``[n, fan_in]``).

    Raises:
      ValueError: ``fan_in`` is missing for a traced mask, or for columns of unequal
        counts; it is larger than k, or smaller than what a column of a concrete mask
        keeps; the mask is not boolean and shaped like w.

    Example:
      >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
      >>> mask = jnp.array([[True, False], [False, True], [True, True]])
      >>> values, indices = sparsejax.layouts.condense_fan_in(w, mask)
      >>> print(values, indices)
      [[1. 5.]
       [4. 6.]] [[0 2]
       [1 2]]

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2023, for the condensed layer.
    """
    if w.ndim != 2:
        raise ValueError(f"w: got shape {w.shape}, needed [k, n]")
    if mask.shape != w.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"mask: got {mask.dtype} {mask.shape}, needed bool {w.shape} as w"
        )
    k, n = w.shape
    if fan_in is not None and not 0 <= fan_in <= k:
        raise ValueError(f"fan_in: got {fan_in}, needed an int in [0, {k}], k of w")
    if isinstance(mask, jax.core.Tracer):
        if fan_in is None:
            raise ValueError(
                "fan_in: got None with a traced mask, needed an int: it is a shape "
                "and must be known to jit"
            )
    else:
        fan_in = _fan_in_of(np.asarray(mask).sum(axis=0), fan_in)
    # Stable: kept rows come first, kept and pruned ones each in rising order.
    order = jnp.argsort(~jnp.asarray(mask), axis=0, stable=True)[:fan_in]
    kept = jnp.where(mask, w, jnp.zeros((), w.dtype))
    return jnp.take_along_axis(kept, order, axis=0).T, order.T.astype(jnp.int32)


def expand_fan_in(
    values: Shaped[Array, "..."], indices: Shaped[Array, "..."], k: int
) -> Float[Array, "k n"]:
    """Puts condensed values back into a dense weight of zeros.

    ``w[indices[j, i], j] = values[j, i]``. Differentiable in values.

    Args:
      values: ``[n, fan_in]``.
      indices: Integers ``[n, fan_in]`` in [0, k).
      k: Rows of the weight.

    Returns:
      w ``[k, n]``, dtype of values.

    Raises:
      ValueError: Shapes or dtypes do not fit; concrete indices are out of range, or
        come twice in a column; the fan-in is larger than k.

    Example:
      >>> values, indices = jnp.array([[1.0, 5.0]]), jnp.array([[0, 2]])
      >>> print(sparsejax.layouts.expand_fan_in(values, indices, 3)[:, 0])
      [1. 0. 5.]
    """
    check_condensed_fan_in(values, indices, k)
    return expand(values, indices.astype(jnp.int32), k)


def expand(values: Array, indices: Array, k: int) -> Array:
    """``expand_fan_in`` of operands known to be valid."""
    n = values.shape[0]
    column = jax.lax.broadcasted_iota(jnp.int32, indices.shape, 0)
    # Transposed, the entries of a column are near each other in memory.
    w_t = jnp.zeros((n, k), values.dtype)
    return w_t.at[column, indices].add(values, mode="drop").T


def check_fan_in(indices: Shaped[Array, "..."], k: int) -> None:
    """Raises where an index is not in [0, k) or comes twice in its column.

    Args:
      indices: Integers ``[n, fan_in]``, concrete, or traced inside a function that
        ``checkify.checkify`` wraps: the check is then part of its error value.
      k: Rows of the weight.

    Raises:
      ValueError: Concrete indices are not valid. The message names the first column
        at fault.
    """
    if isinstance(indices, jax.core.Tracer):
        rising = jnp.sort(indices, axis=1)
        repeated = jnp.any(rising[:, 1:] == rising[:, :-1])
        outside = jnp.any((indices < 0) | (indices >= k))
        checkify.check(
            ~(repeated | outside), "indices: out of range, or repeated in a column"
        )
        return
    if not getattr(indices, "is_fully_addressable", True):
        return  # no host has all of them
    places: Any = np.asarray(indices)
    n, fan_in = places.shape
    outside = (places < 0) | (places >= k)
    if outside.any():
        column, i = (int(at) for at in np.argwhere(outside)[0])
        raise ValueError(
            f"indices: column {column} has {int(places[column, i])}, needed "
            f"indices in [0, {k})"
        )
    seen = np.zeros((n, k), bool)
    np.put_along_axis(seen, places, True, axis=1)
    repeated = seen.sum(axis=1) < fan_in
    if repeated.any():
        column = int(np.argmax(repeated))
        raise ValueError(
            f"indices: column {column} has one twice in {places[column].tolist()}, "
            "needed distinct ones"
        )


def check_condensed_fan_in(values: Any, indices: Any, k: int) -> None:
    """Raises ValueError unless values and indices belong together, and to k rows."""
    if values.ndim != 2:
        raise ValueError(f"values: got shape {values.shape}, needed [n, fan_in]")
    if indices.shape != values.shape or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices: got {indices.dtype} {indices.shape}, needed integers "
            f"{values.shape} as values"
        )
    if values.shape[1] > k:
        raise ValueError(
            f"values: got shape {values.shape}, a fan-in of {values.shape[1]}, needed "
            f"at most {k}, the rows of the weight"
        )
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if not isinstance(indices, abstract):
        check_fan_in(indices, k)


def _fan_in_of(counts: Any, fan_in: int | None) -> int:
    """The capacity for columns that keep ``counts`` entries."""
    most = int(counts.max(initial=0))
    if fan_in is None:
        if counts.size and counts.min() < most:
            column = int(np.argmin(counts))
            raise ValueError(
                f"mask: column {column} keeps {int(counts[column])} and another "
                f"{most}, needed equal counts, or fan_in={most} to fill up with zeros"
            )
        return most
    if fan_in < most:
        column = int(np.argmax(counts))
        raise ValueError(
            f"fan_in: got {fan_in}, needed at least {most}, which column {column} of "
            "mask keeps"
        )
    return fan_in
