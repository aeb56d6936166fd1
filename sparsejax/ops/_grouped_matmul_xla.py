"""Grouped products as plain GEMMs in loops: the CPU product, right everywhere.

Rows are sorted by group; group g holds rows ``ends[g] - sizes[g] .. ends[g] - 1``:

    product   y[i] = x[i] @ w[g], or x[i] @ w[g].T      for each row i of group g
    sampled   dw[g] = sum over rows i of group g of the outer product of x[i] and y[i]

One loop over the groups, in it one over a group's tiles of rows. Trip counts are
traced: other sizes never recompile. Rows of other groups that a tile covers are left
out by selection, so that nothing leaks from them, NaN included. Not differentiable in
reverse mode; it sits inside the operator's ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._block_sparse_xla import _bits, _cut, _dot, _put, _values
from sparsejax.ops._checks import accumulator

# Rows that one step multiplies.
_TILE = 128


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
    x_bits, w_bits = _bits(x), _bits(w)

    def group(g, start, end, y):
        w_g = _cut(w_bits, (g, 0, 0), (1, *sides), w.dtype)[0]

        def tile(row, mine, y):
            x_i = _cut(x_bits, (row, 0), (mine.shape[0], x.shape[1]), x.dtype)
            y_i = _dot(x_i, w_g, (1, 1 if transpose else 0)).astype(x.dtype)
            other = _cut(y, (row, 0), y_i.shape, x.dtype)
            return _put(y, jnp.where(mine, y_i, other), (row, 0))

        return _over_tiles(tile, x.shape[0], start, end, y)

    y = jnp.zeros((x.shape[0], sides[0 if transpose else 1]), x.dtype)
    y = _over_groups(group, sizes, _bits(vary_alike(y, x, w, sizes)[0]))
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
    x_bits, y_bits = _bits(x), _bits(y)

    def group(g, start, end, dw):
        def tile(row, mine, dw_g):
            rows = lambda bits, a: jnp.where(
                mine, _cut(bits, (row, 0), (mine.shape[0], a.shape[1]), a.dtype), 0
            ).astype(a.dtype)
            return dw_g + _dot(rows(x_bits, x), rows(y_bits, y), (0, 0))

        dw_g = jnp.zeros((k, n), accumulator(x.dtype))
        dw_g = _over_tiles(tile, m, start, end, vary_alike(dw_g, x, y, sizes)[0])
        return _put(dw, dw_g[None].astype(dtype), (g, 0, 0))

    dw = jnp.zeros((sizes.shape[0], k, n), dtype)
    dw = _over_groups(group, sizes, _bits(vary_alike(dw, x, y, sizes)[0]))
    return _values(dw, dtype)


def _over_groups(body, sizes, carry):
    """Folds ``body(g, start, end, carry)`` over the groups."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    step = lambda g, carry: body(g, ends[g] - sizes[g], ends[g], carry)
    return lax.fori_loop(0, sizes.shape[0], step, carry)


def _over_tiles(body, m, start, end, carry):
    """Folds ``body(first row, which rows are the group's, carry)`` over its tiles."""
    tile = min(m, _TILE)

    def step(i, carry):
        first = start + i * tile
        row = jnp.minimum(first, m - tile)  # the last tile of x may overlap another
        at = row + jnp.arange(tile, dtype=jnp.int32)
        mine = (at >= first) & (at < end)
        return body(row, mine[:, None], carry)

    return lax.fori_loop(0, -((start - end) // tile), step, carry)
