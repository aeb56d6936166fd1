"""At what unit a weight is sparse, and which units share a count.

A structure cuts a weight into groups of units. Every group keeps the same number of
its units, so that a density means a count: `round(density * units of a group)`.

    Unstructured   units: entries                  one group: the weight
    Blocks         units: tiles                    groups: matrices
    Rows, Columns  units: rows or columns          groups: matrices
    NM             units: entries                  groups: m in a row down a column
    FanIn          units: entries                  groups: columns

A weight is [..., in, out]; axes before the last two enumerate matrices.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.masks._columns import top_of_columns
from sparsejax.masks._distribution import exact_count
from sparsejax.masks._select import topk_mask


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Single entries, anywhere in the weight."""


@dataclasses.dataclass(frozen=True)
class NM:
    """N of every M consecutive entries along the contraction axis, axis -2.

    Attributes:
      n: How many of each group are KEPT.
      m: Group size.

    Raises:
      ValueError: Not integers, 1 <= n <= m.
    """

    n: int
    m: int

    def __post_init__(self):
        whole = isinstance(self.n, int) and isinstance(self.m, int)
        if not whole or not 1 <= self.n <= self.m:
            raise ValueError(
                f"n and m must be integers, 1 <= n <= m, got {self.n}:{self.m}"
            )


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Whole blocks of a matrix; every matrix of a stack keeps as many.

    Attributes:
      block_shape: (bk, bn), rows and columns of a block.

    Raises:
      ValueError: A size is below 1.
    """

    block_shape: tuple[int, int]

    def __post_init__(self):
        sizes = self.block_shape
        pair = isinstance(sizes, tuple | list) and len(sizes) == 2
        if not pair or min(sizes) < 1:
            raise ValueError(
                f"block_shape must be two sizes of at least 1, got {self.block_shape}"
            )


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Single entries, equally many in every column: each output has as many inputs."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Whole rows: inputs that no output uses. Every matrix of a stack keeps as many."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Whole columns: outputs. Every matrix of a stack keeps as many."""


Structure = Unstructured | NM | Blocks | FanIn | Rows | Columns


def structured_mask(scores: Any, density: float, structure: Any = None) -> Any:
    """Keeps the units of largest score, whole units and the same number per group.

    Each group of `g` units keeps `round(density * g)`. The score of a block, row or
    column is the sum of |scores| over it, in float32 or wider; of an entry, |score|.
    Ties go to the lowest index.

    Args:
      scores: Floating array, such as a weight; rank 2 or more unless unstructured.
      density: Fraction of units to keep, in [0, 1]; n / m for `NM(n, m)`.
      structure: `Unstructured()`, `NM(n, m)`, `Blocks((bk, bn))`, `FanIn()`,
        `Rows()` or `Columns()`. None: `Unstructured()`.

    Returns:
      A boolean array shaped like `scores`.

    Raises:
      ValueError: `density` is outside [0, 1] or not that of `NM`, the structure is
        unknown, or it does not divide the shape.

    Example:
      >>> scores = jnp.array([[5.0, 0.0], [3.0, 3.0], [1.0, 1.0]])
      >>> print(structured_mask(scores, 1 / 3, Rows()))
      [[False False]
       [ True  True]
       [False False]]
    """
    structure = check_structure(structure, density)
    shape = tuple(scores.shape)
    check_shape(structure, shape)
    count = exact_count(density, group_size(structure, shape))
    return expand(structure, largest_units(structure, scores, count), shape)


def check_structure(structure: Any, density: float | None = None) -> Structure:
    """The structure, `Unstructured()` for None.

    Raises:
      ValueError: It is unknown, or an N:M that has not the final density.
    """
    if structure is None:
        return Unstructured()
    if not isinstance(structure, Structure):
        raise ValueError(
            "structure must be Unstructured, NM, Blocks, FanIn, Rows or Columns, got "
            f"{structure!r}"
        )
    if isinstance(structure, NM) and density is not None:
        if abs(density - structure.n / structure.m) > 1e-6:
            raise ValueError(
                f"sparsity must be 1 - n/m = {1 - structure.n / structure.m:g} for "
                f"structure {structure}, got {1 - density:g}"
            )
    return structure


def check_shape(structure: Structure, shape: tuple[int, ...], name: str = "") -> None:
    """Raises ValueError unless the structure cuts the shape evenly."""
    if isinstance(structure, Unstructured):
        return
    where = f" at {name!r}" if name else ""
    if len(shape) < 2:
        raise ValueError(
            f"structure {structure} needs weights of rank 2 or more, got shape "
            f"{shape}{where}"
        )
    cut = (structure.m, 1) if isinstance(structure, NM) else _tile(structure, shape)
    if any(size % max(tile, 1) for size, tile in zip(shape[-2:], cut, strict=True)):
        raise ValueError(
            f"structure {structure} must divide the last axes of every weight, got "
            f"shape {shape}{where}"
        )


def unit_shape(structure: Structure, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an array with one value per unit."""
    if not _is_pooled(structure):
        return shape
    bk, bn = _tile(structure, shape)
    return (*shape[:-2], shape[-2] // max(bk, 1), shape[-1] // max(bn, 1))


def group_size(structure: Structure, shape: tuple[int, ...]) -> int:
    """Units in a group: what a density is a fraction of."""
    if isinstance(structure, Unstructured):
        return math.prod(shape)
    if isinstance(structure, NM):
        return structure.m
    if isinstance(structure, FanIn):
        return shape[-2]
    return math.prod(unit_shape(structure, shape)[-2:])


def pool(structure: Structure, x: Any) -> Any:
    """Scores of units: sums of |x| over each, |x| itself for entries."""
    if not _is_pooled(structure):
        return jnp.abs(x)
    sizes = jnp.abs(_split(structure, x)).astype(at_least_float32(x.dtype))
    return jnp.sum(sizes, axis=(-3, -1))


def units_of(structure: Structure, mask: Any) -> Any:
    """The mask with one value per unit."""
    if not _is_pooled(structure):
        return mask
    return jnp.any(_split(structure, mask), axis=(-3, -1))


def expand(structure: Structure, units: Any, shape: tuple[int, ...]) -> Any:
    """The mask of entries from that of units."""
    if not _is_pooled(structure):
        return units
    bk, bn = _tile(structure, shape)
    *stack, kb, nb = units.shape
    tiles = jnp.broadcast_to(units[..., :, None, :, None], (*stack, kb, bk, nb, bn))
    return tiles.reshape(shape)


def largest_units(structure: Structure, x: Any, count: Any, where: Any = None) -> Any:
    """Marks, in every group, the `count` units of largest pooled |x|."""
    if isinstance(structure, Unstructured):
        return topk_mask(x, count, where=where, by_magnitude=True)
    return top_units(structure, pool(structure, x), count, where)


def top_units(structure: Structure, scores: Any, count: Any, where: Any = None) -> Any:
    """Marks, in every group, the `count` units of largest score among candidates.

    Args:
      structure: The structure.
      scores: One nonnegative value per unit.
      count: Of every group; an int or a traced int32 scalar.
      where: Candidates, one boolean per unit.

    Returns:
      A boolean array shaped like `scores`.
    """
    if isinstance(structure, Unstructured):
        return topk_mask(scores, count, where=where)
    if where is None:
        where = jnp.ones(scores.shape, bool)
    if isinstance(structure, NM):
        return _top_of_runs(scores, count, structure.m, where)
    if isinstance(structure, FanIn):
        return top_of_columns(scores, jnp.asarray(count).astype(jnp.int32), where)
    top = lambda s, w: topk_mask(s, count, where=w)
    for _ in scores.shape[:-2]:
        top = jax.vmap(top)
    return top(scores, where)


def _top_of_runs(scores: Any, count: Any, m: int, where: Any) -> Any:
    """The `count` largest of every m along axis -2, by counting who is larger."""
    *stack, k, n = scores.shape
    split = lambda x: x.reshape(*stack, k // m, m, n)
    scores = split(jnp.where(where, scores, -jnp.ones((), scores.dtype)))
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 2)
    rank = jnp.zeros(scores.shape, jnp.int32)
    for j in range(m):
        other = scores[..., j : j + 1, :]
        wins = (other > scores) | ((other == scores) & (j < index))
        rank = rank + wins.astype(jnp.int32)
    return ((rank < count) & split(where)).reshape(*stack, k, n)


def at_least_float32(dtype: Any) -> Any:
    # jnp.promote_types refuses bfloat16 with float32 under strict promotion.
    return dtype if dtype == jnp.float64 else jnp.float32


def _is_pooled(structure: Structure) -> bool:
    return isinstance(structure, Blocks | Rows | Columns)


def _tile(structure: Structure, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a unit."""
    if isinstance(structure, Blocks):
        return structure.block_shape
    if isinstance(structure, Rows):
        return 1, shape[-1]
    if isinstance(structure, Columns):
        return shape[-2], 1
    return 1, 1


def _split(structure: Structure, x: Any) -> Any:
    """[..., k, n] as [..., k/bk, bk, n/bn, bn]."""
    bk, bn = _tile(structure, x.shape)
    kb, nb = unit_shape(structure, x.shape)[-2:]
    return x.reshape(*x.shape[:-2], kb, bk, nb, bn)
