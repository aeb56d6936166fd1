"""Products with Kronecker-sparse factors by XLA: the CPU product, right everywhere.

    product   y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]       factor after factor
    sampled   factor[i, k, j, o] = sum of x[i, j, k] y[i, o, k] over the rows

On a CPU, a product goes block by block, the blocks outermost; one of several factors,
many rows and small blocks in a loop over tiles of rows that stay in cache from x to y,
where columns are arranged so that what is between two factors moves in runs. Bfloat16
and float16 become float32 there. Elsewhere, one einsum per factor. Not differentiable
in reverse mode; it sits inside the operators' ``custom_vjp``.
"""

import itertools

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._checks import accumulator
from sparsejax.ops._merged_factors import prefers_dense
from sparsejax.structured import Pattern

# Entries of a row times rows of a tile: x's, what is between and y's are in L2 and L3.
_TILE = 208 * 1024
# Rows from which, and sides of blocks up to which, that is the quicker form.
_MANY, _SMALL = 1024, 64
# Tiles that a step of the loop has at work: XLA runs what does not depend on each other
# at the same time, where a product of small blocks is one thread's.
_AT_WORK = 4


def product(x, *factors):
    """Multiplies every row by the factors, the first first.

    Args:
      x: [m, a * c * d], as the first factor takes.
      *factors: Each [a, d, c, b], of the dtype of x.

    Returns:
      y [m, a * b * d], as the last factor gives; dtype of x.
    """
    return lax.platform_dependent(x, *factors, cpu=_on_cpu, default=_einsum_by_einsum)


def sampled(x, y, *, pattern, dtype):
    """Computes the sum over the rows of x y at the places of a factor.

    Args:
      x: [m, a * c * d].
      y: [m, a * b * d], dtype of x.
      pattern: (a, b, c, d).
      dtype: That of the result.

    Returns:
      [a, d, c, b].
    """
    a, b, c, d = pattern
    wide = accumulator(x.dtype)

    def summed(x, y):
        x, y = x.reshape(-1, a, c, d), y.reshape(-1, a, b, d)
        return jnp.einsum("mijk,miok->ikjo", x, y, preferred_element_type=wide)

    on_cpu = lambda x, y: summed(x.astype(wide), y.astype(wide))
    return lax.platform_dependent(x, y, cpu=on_cpu, default=summed).astype(dtype)


def _einsum_by_einsum(x, *factors):
    for factor in factors:
        a, d, c, b = factor.shape
        x = jnp.einsum(
            "mijk,ikjo->miok",
            x.reshape(-1, a, c, d),
            factor,
            preferred_element_type=accumulator(x.dtype),
        )
        x = x.reshape(-1, a * b * d).astype(factor.dtype)
    return x


def _on_cpu(x, *factors):
    patterns = [Pattern.of(factor) for factor in factors]
    if prefers_dense(patterns, x.shape[0]):
        wide = accumulator(x.dtype)
        eye = jnp.eye(x.shape[1], dtype=wide)
        w = _einsum_by_einsum(eye, *(factor.astype(wide) for factor in factors))
        return (x.astype(wide) @ w).astype(x.dtype)
    side = max(max(p.b, p.c) for p in patterns)
    if len(factors) > 1 and x.shape[0] >= _MANY and side <= _SMALL:
        return _over_tiles(x, *factors)
    return _block_by_block(x, *factors)


def _block_by_block(x, *factors):
    """With the blocks outermost, whole rows: what XLA's CPU library takes as it is."""
    wide, dtype = accumulator(x.dtype), x.dtype
    for factor in factors:
        a, d, c, b = factor.shape
        x = x.reshape(-1, a, c, d).transpose(1, 3, 0, 2).astype(wide)
        y = lax.dot_general(x, factor.astype(wide), (((3,), (2,)), ((0, 1), (0, 1))))
        x = y.transpose(2, 0, 3, 1).reshape(-1, a * b * d)
    return x.astype(dtype)


def _over_tiles(x, *factors):
    """Block by block too, but a tile of rows at a time through all factors."""
    (m, n), (a, d, _, b) = x.shape, factors[-1].shape
    tile = tile_rows(m, n, *(Pattern.of(factor).out_size for factor in factors))
    pairs = itertools.pairwise(factors)
    factors = *(_in_runs(one, after) for one, after in pairs), factors[-1]
    # Before the loop: XLA writes a slice of bfloat16 by converting the whole array.
    wide, dtype = accumulator(x.dtype), x.dtype
    x, *factors = (array.astype(wide) for array in (x, *factors))

    def step(i, y):
        # The last tile overlaps the one before it and writes the same values again.
        first = i * _AT_WORK
        rows = [jnp.minimum((first + j) * tile, m - tile) for j in range(_AT_WORK)]
        tiles = [_tile(lax.dynamic_slice(x, (o, 0), (tile, n)), factors) for o in rows]
        for row, y_i in zip(rows, tiles, strict=True):
            y = lax.dynamic_update_slice(y, y_i, (row, 0))
        return y

    y = vary_alike(jnp.zeros((m, a * b * d), wide), x)[0]
    y = lax.fori_loop(0, -(-m // (tile * _AT_WORK)), step, y)
    return y.astype(dtype)


def tile_rows(m: int, *widths: int) -> int:
    """Tiles of a step share the rows; an odd number puts columns in many cache sets."""
    steps = -(-m * max(widths) // (_TILE * _AT_WORK))
    return min(m, -(-m // (steps * _AT_WORK)) | 1)


def _tile(x, factors):
    """All factors' product of a few rows, the blocks outermost on the way.

    The columns of all factors but the last are those of ``_in_runs``.
    """
    a, d, c, _ = factors[0].shape
    y = _blocks(x.reshape(-1, a, c, d).transpose(1, 3, 0, 2), factors[0])
    for one, after in itertools.pairwise(factors):
        y = _blocks(_regrouped(y, one, after), after)
    return y.transpose(2, 0, 3, 1).reshape(x.shape[0], -1)


def _blocks(x, factor):
    """[a, d, rows, b]: each block's product, of x [a, d, rows, c]."""
    return lax.dot_general(x, factor, (((3,), (2,)), ((0, 1), (0, 1))))


def _regrouped(y, one, after):
    """What a factor gave, [a, d, rows, b], as the next takes it, [i, j, rows, c]."""
    (a, d, _, b), (i, j, c, _) = one.shape, after.shape
    if runs := _runs(one, after):
        y = y.reshape(i, a // i, d, -1, runs, b // runs).transpose(0, 4, 2, 3, 1, 5)
        return y.reshape(i, j, -1, c)
    return y.transpose(2, 0, 3, 1).reshape(-1, i, c, j).transpose(1, 3, 0, 2)


def _in_runs(one, after):
    """A factor, those columns of a block side by side that go to one block of the next.

    What is between the two products then moves in runs, not an entry at a time.
    """
    a, d, c, b = one.shape
    runs = _runs(one, after) or 1
    return one.reshape(a, d, c, b // runs, runs).swapaxes(3, 4).reshape(one.shape)


def _runs(one, after):
    """How many blocks of the next factor a block's columns go to; 0: in no such order.

    Entries (a, b, d) of a row, a = (i, g) and b = (h, run), are to be the next factor's
    (i, c, j) with c = (g, h) and j = (run, d).
    """
    (a, d, _, b), (i, j, _, _) = one.shape, after.shape
    fits = a % i == 0 and j % d == 0 and b % (j // d) == 0
    return j // d if fits else 0
