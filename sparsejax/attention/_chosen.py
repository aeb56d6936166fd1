"""Expressions of what was chosen: blocks by each query, keys, an order."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.attention import _predicates as pred
from sparsejax.attention._expressions import Expression, _taken, expression
from sparsejax.attention._lowering import Given, as_array, host


def chosen_blocks(choices: Given, size: int) -> Expression:
    """Each query's own list of key blocks: j // size is in ``choices[.., i, :]``.

    One comparison of elements per entry of the list, so it is for short ones.

    Args:
      choices: Integers ``[b|1, h|1, t, count]``, blocks of ``size`` keys; an entry
        that is no block, such as -1, chooses nothing. May be traced.
      size: Keys per block, static.

    Returns:
      The expression.

    Raises:
      ValueError: ``choices`` are not integers of four axes, or ``size`` is below 1.

    Example:
      >>> choices = jnp.array([[0, -1], [0, -1], [0, 1]]).reshape(1, 1, 3, 2)
      >>> sparsejax.attention.chosen_blocks(choices, 2).to_mask(3, 4).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 1]], dtype=int32)
    """
    array = as_array("choices", choices)
    if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"choices: got dtype {array.dtype} and shape {array.shape}, needed "
            "integers [b|1, h|1, t, count]"
        )
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"size: got {size!r}, needed a positive int")
    return _Chosen(array.astype(np.int32), int(size))


def chosen_keys(keys: Given) -> Expression:
    """Keys that all queries may attend to: ``keys[.., j]``.

    Args:
      keys: Boolean ``[b|1, h|1, s]``; may be traced.

    Returns:
      The expression.

    Raises:
      ValueError: ``keys`` is no boolean of three axes.

    Example:
      >>> keys = jnp.array([True, False, True]).reshape(1, 1, 3)
      >>> sparsejax.attention.chosen_keys(keys).to_mask(2, 3).astype(int)
      Array([[1, 0, 1],
             [1, 0, 1]], dtype=int32)
    """
    array = as_array("keys", keys)
    if array.ndim != 3 or array.dtype != np.bool_:
        raise ValueError(
            f"keys: got dtype {array.dtype} and shape {array.shape}, needed bool "
            "[b|1, h|1, s]"
        )
    return _ChosenKeys(array)


def in_order(query_positions: Given, key_positions: Given) -> Expression:
    """``causal`` for sequences that were permuted: a key is not after the query.

    Args:
      query_positions: Integers ``[b|1, h|1, t]``: where the queries come from.
      key_positions: Integers ``[b|1, h|1, s]``.

    Returns:
      The expression.

    Raises:
      ValueError: The positions are not integers of three axes.

    Example:
      >>> positions = jnp.array([2, 0, 1]).reshape(1, 1, 3)
      >>> sparsejax.attention.in_order(positions, positions).to_mask(3, 3).astype(int)
      Array([[1, 1, 1],
             [0, 1, 0],
             [0, 1, 1]], dtype=int32)
    """
    positions = []
    for name, given in (("query", query_positions), ("key", key_positions)):
        array = as_array(f"{name}_positions", given)
        if array.ndim != 3 or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name}_positions: got dtype {array.dtype} and shape {array.shape}, "
                "needed integers [b|1, h|1, length]"
            )
        positions.append(array.astype(np.int32))
    return _InOrder(*positions)


@expression
class _Chosen(Expression):
    choices: Any
    size: int

    def _lower(self, at):
        choices = _taken("choices", self.choices, at, "i", 2)
        block = at.col(at.j // np.int32(self.size))
        tests = [
            pred.Equal(at.row(choices[..., n], None), block)
            for n in range(choices.shape[-1])
        ]
        return functools.reduce(pred.Either, tests)


@expression
class _ChosenKeys(Expression):
    keys: Any

    def _lower(self, at):
        # As an integer per key: 1 equals 1.
        keys = _taken("keys", host(self.keys), at, "j", 2)
        return pred.Equal(at.col(keys.astype(np.int32), None), 1)


@expression
class _InOrder(Expression):
    query_positions: Any
    key_positions: Any

    def _lower(self, at):
        queries = _taken("query_positions", self.query_positions, at, "i", 2)
        keys = _taken("key_positions", self.key_positions, at, "j", 2)
        after = pred.Less(at.row(queries, None), at.col(keys, None))
        return pred.Not(after)
