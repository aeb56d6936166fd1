"""Condensed N:M products by XLA: right everywhere, and what a CPU runs.

    product   y = x @ w or x @ w.T, w the dense matrix of values and words
    sampled   values = (x.T @ dy) at the places

On a CPU y = x @ w has three forms, by the rows of x (``form``): with a few, the entries
of x are selected and w is never made; with some hundred, w is made a few hundred of its
rows at a time, while they are in cache; with more, one pass writes all of w, for one
dense product. The other two products are of the last form, as is ``x.T @ dy``: one
array of w's shape. Not differentiable in reverse mode at that cost; they sit inside the
operator's ``custom_vjp``.
"""

import math

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.layouts._nm import expand, index_bits, unpack_nm
from sparsejax.ops._block_sparse_xla import _dot
from sparsejax.ops._checks import accumulator


def product(x, values, words, *, n, m, transpose):
    """Computes x @ w, or x @ w.T; float32 sums, dtype of x.

    Args:
      x: [rows, k], or [rows, p] with ``transpose``.
      values: [k * n / m, p], dtype of x.
      words: uint32, the packed places.
      n: Kept of every m.
      m: Group size.
      transpose: Which of the two.

    Returns:
      [rows, p], or [rows, k] with ``transpose``.
    """
    contracted = 1 if transpose else 0

    def expanded(x, values, words):
        w = expand(values, words, n, m)
        return _dot(x, w, (1, contracted)).astype(x.dtype)

    by = "expand" if transpose else form(x.shape[0], x.shape[1], n, m)
    if by == "expand":
        return expanded(x, values, words)

    def on_cpu(x, values, words):
        run = _by_selection if by == "select" else _by_planes
        return run(x, values, words, n, m).astype(x.dtype)

    # Elsewhere a loop of small steps costs more than another pass over the weight.
    return lax.platform_dependent(x, values, words, cpu=on_cpu, default=expanded)


def form(rows, k, n, m):
    """How a CPU computes x @ w: "select", "planes" or "expand".

    A static rule, fitted to a 4096 x 4096 matrix in float32 on a CPU of two cores. A
    selection costs as much for each row of x and each of m as a multiply-add, and wins
    up to 16 of them; planes win until the sums that they go back and forth with cost as
    much as writing w.

    Args:
      rows: Rows of x.
      k: Columns of x.
      n: Kept of every m.
      m: Group size.

    Returns:
      The form's name.
    """
    side = _unit(n, m)[2]
    if k % side or m > 16:
        return "expand"
    if rows * m <= 16:
        return "select"
    # Planes of fewer rows are too small to be worth a product each.
    return "planes" if rows <= 256 and k // side >= 16 else "expand"


def _by_selection(x, values, words, n, m):
    """Runs down the units; of the m entries of x that a value may meet takes one."""
    side_v, side_q, side_w = _unit(n, m)
    bits = 32 * side_q // side_v
    wide = accumulator(x.dtype)

    def step(t, y):
        cut = lambda a, side, axis: lax.dynamic_slice_in_dim(a, t * side, side, axis)
        unit_v, unit_q = cut(values, side_v, 0), cut(words, side_q, 0)
        unit_x = cut(x, side_w, 1).astype(wide)
        for r in range(side_v):
            place = unit_q[r * bits // 32] >> jnp.uint32(r * bits % 32)
            entries = [unit_x[:, r // n * m + i, None] for i in range(m)]
            while len(entries) > 1:
                odd = (place & jnp.uint32(1)) != 0
                entries = [
                    jnp.where(odd, *pair[::-1]) if len(pair) == 2 else pair[0]
                    for pair in (entries[i : i + 2] for i in range(0, len(entries), 2))
                ]
                place = place >> jnp.uint32(1)
            y = y + entries[0] * unit_v[r].astype(wide)
        return y

    y = jnp.zeros((x.shape[0], values.shape[1]), wide)
    return lax.fori_loop(0, x.shape[1] // side_w, step, vary_alike(y, x, values)[0])


def _by_planes(x, values, words, n, m):
    """One group of all units at a time, a small product for each of its m places."""
    side_v, side_q, side_w = _unit(n, m)
    bits = 32 * side_q // side_v
    (rows, k), p = x.shape, values.shape[1]
    units = k // side_w
    x = x.reshape(rows, units, side_w).transpose(2, 0, 1)
    values, words = values.reshape(units, -1, p), words.reshape(units, -1, p)

    def step(group, y):
        places, kept = [], []
        for j in range(n):
            row = group * n + j
            word = lax.dynamic_index_in_dim(words, row * bits // 32, 1, keepdims=False)
            place = word >> (row * bits % 32).astype(jnp.uint32)
            places.append(place & jnp.uint32(2**bits - 1))
            kept.append(lax.dynamic_index_in_dim(values, row, 1, keepdims=False))
        for i in range(m):
            plane = jnp.zeros((units, p), x.dtype)
            for place, value in zip(places, kept, strict=True):
                plane = jnp.where(place == i, value, plane)
            x_i = lax.dynamic_index_in_dim(x, group * m + i, keepdims=False)
            y = y + _dot(x_i, plane, (1, 0))
        return y

    y = jnp.zeros((rows, p), accumulator(x.dtype))
    return lax.fori_loop(0, side_v // n, step, vary_alike(y, x, values)[0])


def _unit(n, m):
    """Rows of values, of words and of w that whole words and whole groups make up."""
    bits = index_bits(n, m)
    values = math.lcm(n, 32 // bits)
    return values, values * bits // 32, values // n * m


def sampled(x, dy, words, *, n, m, dtype):
    """Computes x.T @ dy at the places.

    Args:
      x: [rows, k].
      dy: [rows, p], dtype of x.
      words: uint32, the packed places.
      n: Kept of every m.
      m: Group size.
      dtype: That of the result.

    Returns:
      [k * n / m, p].
    """
    k, p = x.shape[1], dy.shape[1]
    rows = k // m * n
    dw = _dot(x, dy, (0, 0)).reshape(k // m, m, p)
    places = unpack_nm(words, rows, m=m).reshape(k // m, n, p)
    zero = jnp.zeros((), dw.dtype)
    values = zero
    for i in range(m):
        values = jnp.where(places == i, dw[:, i, None], values)
    return values.reshape(rows, p).astype(dtype)
