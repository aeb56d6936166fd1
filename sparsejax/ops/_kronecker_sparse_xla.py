"""Products with Kronecker-sparse factors by XLA: the CPU product, right everywhere.

    product   y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]       factor after factor
    sampled   factor[i, k, j, o] = sum of x[i, j, k] y[i, o, k] over the rows

On a CPU, a product of several factors, many rows and small blocks goes in a loop over
tiles of rows that stay in cache, all factors within: a tile is turned by the first
product, so that what is between two factors moves in runs, and is turned back at the
end. Other products go factor by factor, the blocks outermost. Bfloat16 and float16
become float32 there. Elsewhere, one einsum per factor. Not differentiable in reverse
mode; it sits inside the operators' ``custom_vjp``.
"""

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
    (m, n), (a, d, _, b) = x.shape, factors[-1].shape
    wide = accumulator(x.dtype)
    factors = [factor.astype(wide) for factor in factors]
    tile = tile_rows(m, n, *(Pattern.of(factor).out_size for factor in factors))
    at_work = min(_AT_WORK, -(-m // tile))

    def step(i, y):
        # The last tile overlaps the one before it and writes the same values again.
        rows = [jnp.minimum((i * at_work + j) * tile, m - tile) for j in range(at_work)]
        tiles = [lax.dynamic_slice(x, (row, 0), (tile, n)) for row in rows]
        tiles = [_tile(x_i.astype(wide), factors).astype(x.dtype) for x_i in tiles]
        # Else each is written where it is turned, one after the other.
        for row, y_i in zip(rows, lax.optimization_barrier(tiles), strict=True):
            y = lax.dynamic_update_slice(y, y_i, (row, 0))
        return y

    y = vary_alike(jnp.zeros((m, a * b * d), x.dtype), x)[0]
    return lax.fori_loop(0, -(-m // (tile * at_work)), step, y)


def tile_rows(m: int, *widths: int) -> int:
    """An odd multiple of 16: a column of a tile is then in many sets of a cache."""
    return min(m, _TILE // max(widths) // 32 * 32 + 16)


def _tile(x, factors):
    """All factors' product of a few rows, with the rows innermost on the way."""
    a, d, c, _ = factors[0].shape
    x = x.reshape(-1, a, c, d).transpose(1, 3, 0, 2)
    y = _blocks(factors[0], x, 3)
    for factor in factors[1:]:
        a, d, c, _ = factor.shape
        y = y.transpose(0, 2, 1, 3).reshape(a, c, d, -1)
        y = _blocks(factor, y.transpose(0, 2, 1, 3), 2)
    rows = y.shape[-1]
    return y.transpose(3, 0, 2, 1).reshape(rows, -1)


def _blocks(factor, x, axis):
    """[a, d, b, rows]: each block's product, c being that axis of x [a, d, ., .]."""
    return lax.dot_general(factor, x, (((2,), (axis,)), ((0, 1), (0, 1))))
