"""Grouped products as plain GEMMs in loops: the CPU product, right everywhere.

Rows are sorted by group; group g holds rows ``ends[g] - sizes[g] .. ends[g] - 1``:

    product   y[i] = x[i] @ w[g], or x[i] @ w[g].T      for each row i of group g
    sampled   dw[g] = sum over rows i of group g of the outer product of x[i] and y[i]

One loop over the groups, in it one over a group's tiles of rows, all alike and as high
as their rows need, of some heights that are compiled. Trip counts are traced: other
sizes never recompile. Rows of other groups that a tile covers are left out by
selection, so that nothing leaks from them, NaN included. Not differentiable in reverse
mode; it sits inside the operator's ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._block_sparse_xla import _bits, _cut, _dot, _put, _values
from sparsejax.ops._checks import accumulator

# Entries of a tile that results of mean height have: 4 MiB of float32. A product packs
# its whole weight whatever its rows, which 64 rows take as long as 160 by.
_TILE = 2**20
# Heights of tiles in eighths of the mean rows of a group: near it they are as fine as
# the waste in a tile that is not full asks for, others are rare. A while loop costs
# nothing where it does not run, but compiling it does.
_EIGHTHS = (2, 4, 6, 7, 8, 9, 10, 12, 14, 16)
# With fewer rows in all, no tile is worth a program of its own.
_FEW = 64


def product(x, w, sizes, *, transpose):
    """Computes y[i] = x[i] @ w[g], or x[i] @ w[g].T, and zeros beyond the groups.

    Args:
      x: [m, k], or [m, n] with ``transpose``.
      w: [g, k, n].
      sizes: int32 [g], at least 0, in all at most m.
      transpose: Which of the two.

    Returns:
      [m, n], or [m, k] with ``transpose``; dtype of x.
    """
    groups, *sides = w.shape
    heights = tile_heights(x.shape[0], groups, max(sides))
    x_bits, w_bits = _bits(x), _bits(w)

    def group(g, start, end, y):
        w_g = _cut(w_bits, (g, 0, 0), (1, *sides), w.dtype)[0]

        def tile(row, mine, y):
            x_i = _cut(x_bits, (row, 0), (mine.shape[0], x.shape[1]), x.dtype)
            y_i = _dot(x_i, w_g, (1, 1 if transpose else 0)).astype(x.dtype)
            other = _cut(y, (row, 0), y_i.shape, x.dtype)
            return _put(y, jnp.where(mine, y_i, other), (row, 0))

        return over_tiles(tile, x.shape[0], heights, start, end, y)

    y = jnp.zeros((x.shape[0], sides[0 if transpose else 1]), x.dtype)
    y = over_groups(group, sizes, _bits(vary_alike(y, x, w, sizes)[0]))
    return _values(y, x.dtype)


def sampled(x, y, sizes, *, dtype):
    """Computes dw[g] = x[rows of g].T @ y[rows of g]; zeros of an empty group.

    Args:
      x: [m, k].
      y: [m, n], dtype of x.
      sizes: int32 [g], at least 0, in all at most m.
      dtype: That of the result.

    Returns:
      [g, k, n].
    """
    (m, k), n = x.shape, y.shape[1]
    heights, wide = tile_heights(m, sizes.shape[0], max(k, n)), accumulator(x.dtype)
    x_bits, y_bits = _bits(x), _bits(y)

    def group(g, start, end, dw):
        sums, at = open_sums(dw, g, dtype, wide)

        def tile(row, mine, sums):
            rows = lambda bits, a: jnp.where(
                mine, _cut(bits, (row, 0), (mine.shape[0], a.shape[1]), a.dtype), 0
            ).astype(a.dtype)
            return add(sums, at, _dot(rows(x_bits, x), rows(y_bits, y), (0, 0)))

        return close_sums(dw, g, dtype, over_tiles(tile, m, heights, start, end, sums))

    dw = jnp.zeros((sizes.shape[0], k, n), dtype)
    dw = over_groups(group, sizes, _bits(vary_alike(dw, x, y, sizes)[0]))
    return _values(dw, dtype)


# --- Loops ----------------------------------------------------------------------------


def tile_heights(m: int, groups: int, width: int) -> tuple[int, ...]:
    """Heights of tiles to compile, ascending, for m rows of results ``width`` wide."""
    if m <= _FEW:
        return (m,)
    mean = min(m / groups, max(_TILE // width, 2 * _FEW))
    unit = -(-mean // (8 * 16)) * 16
    return tuple(sorted({min(int(unit * i), m) for i in _EIGHTHS}))


def over_groups(body, sizes, carry):
    """Folds ``body(g, start, end, carry)`` over the groups."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    step = lambda g, carry: body(g, ends[g] - sizes[g], ends[g], carry)
    return lax.fori_loop(0, sizes.shape[0], step, carry)


def over_tiles(body, m, heights, start, end, carry):
    """Folds ``body(first row, which rows are the group's, carry)`` over its tiles.

    Of m rows in all, at least the greatest height. As few tiles as that allows share
    the group's rows equally. One loop per height, of which one runs: the branches of a
    ``lax.switch`` would copy the carry.
    """
    tiles = -((start - end) // heights[-1])
    rows = -((start - end) // jnp.maximum(tiles, 1))
    for lower, height in zip((0, *heights), heights, strict=False):

        def step(i, carry, height=height):
            first = start + i * rows
            # A tile that would go over the last row overlaps the one before it.
            row = jnp.minimum(first, m - height)
            at = row + jnp.arange(height, dtype=jnp.int32)
            mine = (at >= first) & (at < jnp.minimum(first + rows, end))
            return body(row, mine[:, None], carry)

        runs = (rows > lower) & (rows <= height)
        carry = lax.fori_loop(0, jnp.where(runs, tiles, 0), step, carry)
    return carry


# --- Sums of a group, of float32: in the result itself, or beside a narrower one ------


def open_sums(dw, g, dtype, wide):
    """What a group adds to, and where in it; dw [g, k, n] is as ``_bits`` makes it."""
    if dtype == wide:
        return dw, g
    return vary_alike(jnp.zeros((1, *dw.shape[1:]), wide), dw)[0], 0


def add(sums, at, part):
    """Adds a tile's part, in place."""
    so_far = _cut(sums, (at, 0, 0), (1, *part.shape), sums.dtype)
    return _put(sums, so_far + part[None], (at, 0, 0))


def close_sums(dw, g, dtype, sums):
    """The result with the group's sums in it."""
    return sums if sums.dtype == dtype else _put(dw, sums.astype(dtype), (g, 0, 0))
