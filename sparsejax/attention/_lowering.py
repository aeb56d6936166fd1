"""From expressions to conditions: operands are gathered, blocks are bounded.

Contents that are concrete stay in numpy, so that a mask of them is made without
compiling anything; what is traced is computed by jnp. The operators are the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import _predicates as pred

# An int, or one per head, where they are static; else an int32 array [b|1, h|1].
Number = Any
# What is given as ids or masks: an array of either library, or nested lists.
Given: TypeAlias = jax.Array | np.ndarray | Sequence[Any]


class Lowered(NamedTuple):
    """An expression for given lengths: what a kernel needs to ask it of elements.

    ``predicate(i, j, rows, cols, scalars, dense) -> bool`` is elementwise. i int32
    ``[bq, 1]`` and j int32 ``[1, bk]`` are positions in the arrays at hand; of the
    operands it takes, in tuples, the part for these: ``[bq, 1]`` of rows, ``[1, bk]``
    of cols, one number of scalars, ``[bq, bk]`` of dense. It holds no array, compares
    int32 (with ``i - j`` its only arithmetic, unless a ``from_function`` is in it),
    and is hashable: equal structures have equal predicates.

    Attributes:
      predicate: The function.
      rows: int32 arrays ``[b|1, h|1, t]``.
      cols: int32 arrays ``[b|1, h|1, s]``.
      scalars: int32 arrays ``[b|1, h|1]``.
      dense: Boolean arrays ``[b|1, h|1, t, s]``.
    """

    predicate: Callable
    rows: tuple[Any, ...]
    cols: tuple[Any, ...]
    scalars: tuple[Any, ...]
    dense: tuple[Any, ...]


@dataclasses.dataclass
class Gathered:
    """Operands found so far; beside each, whether it follows from static ints alone."""

    t: int
    s: int
    rows: list[tuple[Any, bool]] = dataclasses.field(default_factory=list)
    cols: list[tuple[Any, bool]] = dataclasses.field(default_factory=list)
    scalars: list[tuple[Any, bool]] = dataclasses.field(default_factory=list)
    dense: list[Any] = dataclasses.field(default_factory=list)
    given: list[tuple[Callable, bool]] = dataclasses.field(default_factory=list)
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class View:
    """The positions an expression is asked about: 0..t-1 and 0..s-1, shifted."""

    gathered: Gathered
    queries: Number = 0
    keys: Number = 0
    shifted: bool = False

    @property
    def t(self) -> int:
        """Number of queries."""
        return self.gathered.t

    @property
    def s(self) -> int:
        """Number of keys."""
        return self.gathered.s

    @property
    def i(self) -> Any:
        """Shifted positions of the queries, int32 ``[b|1, 1, t]``."""
        return along(self.queries) + np.arange(self.t, dtype=np.int32)[None, None]

    @property
    def j(self) -> Any:
        """Shifted positions of the keys, int32 ``[b|1, 1, s]``."""
        return along(self.keys) + np.arange(self.s, dtype=np.int32)[None, None]

    def row(self, values: Any, *of: Any) -> pred.Operand:
        """Adds a number per query, int32 ``[b|1, h|1, t]``, made of parameters."""
        self.gathered.rows.append((values, known(self.queries, *of)))
        return pred.Operand("rows", len(self.gathered.rows) - 1)

    def col(self, values: Any, *of: Any) -> pred.Operand:
        """Adds a number per key, int32 ``[b|1, h|1, s]``, made of parameters."""
        self.gathered.cols.append((values, known(self.keys, *of)))
        return pred.Operand("cols", len(self.gathered.cols) - 1)

    def number(self, value: Any, *of: Any) -> pred.Term:
        """A constant if ``value`` is an int, else a scalar operand ``[b|1, h|1]``."""
        if isinstance(value, int):
            return min(max(value, pred.LOWEST), pred.HIGHEST)
        self.gathered.scalars.append((value, known(*of)))
        return pred.Operand("scalars", len(self.gathered.scalars) - 1)

    def given(self, condition, bounds: Callable, *of: Any) -> pred.Given:
        """Bounds the blocks of a condition by ``bounds(blocks) -> (some, every)``."""
        certain = known(self.queries, self.keys, *of)
        self.gathered.given.append((bounds, certain))
        return pred.Given(condition, len(self.gathered.given) - 1)


def known(*parameters: Any) -> bool:
    """Whether all are static: ints, or tuples of one int per head."""
    return all(isinstance(p, int | tuple) for p in parameters)


def value(number: Number) -> Any:
    """An int, or int32 ``[b|1, h|1]``: numpy where it is concrete."""
    if isinstance(number, tuple):
        return np.array(number, np.int32)[None]
    return number if isinstance(number, int) else host(number)


def along(number: Number) -> Any:
    """``value`` with an axis for positions: int32 ``[b|1, h|1, 1]``, or an int."""
    found = value(number)
    return np.int32(found) if isinstance(found, int) else found[..., None]


def as_array(name: str, given: Any) -> Any:
    """What has been given, an array: what is none, such as a list, becomes numpy's."""
    if hasattr(given, "dtype"):
        return given
    try:
        return np.asarray(given)
    except ValueError as error:
        raise ValueError(f"{name}: got {given!r}, needed an array") from error


def host(array: Any) -> Any:
    """As numpy, where the array is concrete."""
    if isinstance(array, jax.core.Tracer):
        return array
    if isinstance(array, jax.Array) and jnp.issubdtype(
        array.dtype, jax.dtypes.prng_key
    ):
        return array
    return np.asarray(array)


def space(*arrays: Any) -> Any:
    """Numpy, or jnp where any of the arrays is JAX's."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def pick(array: Any, index: Any, axis: int) -> Any:
    """``array`` at positions ``index [b|1, 1, n]`` of its axis 2 or 3."""
    if axis == 2 and array.ndim == 4:
        index = index[..., None]
    elif array.ndim == 4:
        index = index[:, :, None]
    return space(array, index).take_along_axis(array, index, axis)


def grid(t: int, s: int, block_shape: tuple[int, int]) -> tuple[int, int]:
    """(nq, nk): number of blocks along each axis, rounded up."""
    return -(-t // block_shape[0]), -(-s // block_shape[1])


def status(
    condition: pred.Condition,
    found: Gathered,
    block_shape: tuple[int, int],
    *,
    static: bool = False,
) -> tuple[Any, Any]:
    """(some, every) of every block, bool ``[b|1, h|1, nq, nk]``.

    Args:
      condition: What is asked.
      found: Its operands.
      block_shape: (bq, bk).
      static: Whether to trust static parameters alone, and take every other operand
        for unknown.

    Returns:
      some: False only where no element of the block is allowed.
      every: True only where all are.
    """
    bq, bk = block_shape

    def scalar(array):
        return array[..., None, None], array[..., None, None]

    def ranges(operands, bounds):
        wide = np.int32(pred.LOWEST), np.int32(pred.HIGHEST)
        return [wide if static and not sure else bounds(a) for a, sure in operands]

    maybe = np.bool_(True), np.bool_(False)
    at = pred.Blocks(
        i=_extent(found.t, bq, 1),
        j=_extent(found.s, bk, 0),
        rows=ranges(found.rows, lambda a: _extremes(a, bq, -1)),
        cols=ranges(found.cols, lambda a: _extremes(a, bk, -2)),
        scalars=ranges(found.scalars, scalar),
        given=[
            (lambda _: maybe) if static and not sure else bounds
            for bounds, sure in found.given
        ],
        block_shape=block_shape,
    )
    some, every = condition.blocks(at)
    shape = (1, found.heads, *grid(found.t, found.s, block_shape))
    xp = space(some, every)
    shape = np.broadcast_shapes(shape, some.shape, every.shape)
    return xp.broadcast_to(some, shape), xp.broadcast_to(every, shape)


def _extent(size: int, block: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of each block, int32, with ``after`` axes behind."""
    first = np.arange(0, size, block, dtype=np.int32)
    last = np.minimum(first + (block - 1), np.int32(size - 1))
    axes = tuple(range(1, 1 + after))
    return np.expand_dims(first, axes), np.expand_dims(last, axes)


def _extremes(array: Any, block: int, axis: int) -> tuple[Any, Any]:
    """Least and greatest entry of each block of the last axis; ``axis`` is put in."""
    short = -array.shape[-1] % block
    xp = space(array)
    if short:  # the edge again: changes neither
        array = xp.concatenate([array, *[array[..., -1:]] * short], axis=-1)
    tiles = array.reshape(*array.shape[:-1], -1, block)
    return (
        xp.expand_dims(tiles.min(-1), axis),
        xp.expand_dims(tiles.max(-1), axis),
    )
