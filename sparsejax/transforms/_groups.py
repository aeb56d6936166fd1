"""Groups of weights on a grid of blocks: their sums, and values given back to entries.

A group is a block of the trailing axes of a weight; None for the size along an axis
stands for the whole of it, and leading axes that are not named have groups of their
own. Blocks that reach over the end are cut there.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.masks import Blocks, Columns, Rows

Groups = Rows | Columns | Blocks | tuple[int | None, ...]


def full_blocks(shape: tuple[int, ...], groups: Groups) -> tuple[int, ...]:
    """The size of a group along each axis of a weight.

    Raises:
      ValueError: More sizes than axes, or a size below 1.
    """
    sizes = _sizes(groups)
    if not 1 <= len(sizes) <= len(shape):
        raise ValueError(
            f"groups must name 1 to {len(shape)} axes of a weight of shape {shape}, "
            f"got {groups}"
        )
    if any(size is not None and size < 1 for size in sizes):
        raise ValueError(f"groups must have sizes of at least 1, or None, got {groups}")
    leading = (1,) * (len(shape) - len(sizes))
    pairs = zip(shape, (*leading, *sizes), strict=True)
    # A block larger than its axis is the whole axis; an empty axis has no block.
    return tuple(max(min(n, n if b is None else b), 1) for n, b in pairs)


def _sizes(groups: Groups) -> tuple[int | None, ...]:
    if isinstance(groups, Rows):
        return 1, None
    if isinstance(groups, Columns):
        return None, 1
    return groups.block_shape if isinstance(groups, Blocks) else groups


def grid_shape(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """How many groups there are along each axis."""
    return tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True))


def group_sums(x: Any, blocks: tuple[int, ...]) -> Any:
    """The sum over each group, an array of `grid_shape`."""
    grid = grid_shape(x.shape, blocks)
    tails = [g * b - n for g, b, n in zip(grid, blocks, x.shape, strict=True)]
    x = jnp.pad(x, [(0, tail) for tail in tails])
    split = [size for pair in zip(grid, blocks, strict=True) for size in pair]
    return x.reshape(split).sum(tuple(range(1, len(split), 2)))


def group_sizes(shape: tuple[int, ...], blocks: tuple[int, ...], dtype: Any) -> Any:
    """How many entries each group has, an array of `grid_shape`."""
    sizes = jnp.ones((), dtype)
    for axis, (n, b) in enumerate(zip(shape, blocks, strict=True)):
        starts = jnp.arange(0, n, b)
        along = jnp.minimum(n - starts, b).astype(dtype)
        sizes = sizes * jnp.expand_dims(along, tuple(range(1, len(shape) - axis)))
    return sizes


def spread(values: Any, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Any:
    """Gives each entry of a weight the value of its group."""
    rank = len(shape)
    grid = values.shape
    values = jnp.expand_dims(values, tuple(range(1, 2 * rank, 2)))
    split = [size for pair in zip(grid, blocks, strict=True) for size in pair]
    values = jnp.broadcast_to(values, split)
    values = values.reshape([g * b for g, b in zip(grid, blocks, strict=True)])
    return values[tuple(slice(n) for n in shape)]


def widest(*dtypes: Any) -> Any:
    """The dtype that holds all of them, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, map(jnp.dtype, dtypes))


def safe_sqrt(squares: Any) -> Any:
    """The root, with gradient 0 at 0, where that of the plain root is infinite."""
    positive = squares != 0  # NaN is, and stays NaN
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def count_groups(shape: tuple[int, ...], blocks: tuple[int, ...]) -> int:
    """How many groups a weight has."""
    return math.prod(grid_shape(shape, blocks))
