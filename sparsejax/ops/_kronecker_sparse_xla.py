"""Products with Kronecker-sparse factors by XLA: the CPU product, right everywhere.

    product   y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]       factor after factor
    sampled   factor[i, k, j, o] = sum of x[i, j, k] y[i, o, k] over the rows

On a CPU in a loop over tiles of rows that stay in cache, all factors within: a tile is
turned by the first product, so that its rows are entries of x and what is between two
factors moves in runs, and is turned back at the end. Bfloat16 and float16 become
float32 there. Elsewhere, one batched product per factor. Not differentiable in
reverse mode; it sits inside the operators' ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._checks import accumulator

# Rows of a tile: x's, an intermediate's and y's fit a core's 1 MiB of L2 with 64 of
# them at a width of 1024, but each step of the loop costs several microseconds.
_TILE = 256


def product(x, *factors):
    """Multiplies every row by the factors, the first first.

    Args:
      x: [m, a * c * d], as the first factor takes.
      *factors: Each [a, d, c, b], of the dtype of x.

    Returns:
      y [m, a * b * d], as the last factor gives; dtype of x.
    """
    return lax.platform_dependent(
        x, *factors, cpu=_over_tiles, default=_einsum_by_einsum
    )


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


def _over_tiles(x, *factors):
    (m, n), (a, d, _, b) = x.shape, factors[-1].shape
    wide = accumulator(x.dtype)
    factors = [factor.astype(wide) for factor in factors]
    tile = min(m, _TILE)

    def step(i, y):
        # The last tile overlaps the one before it and writes the same values again.
        row = jnp.minimum(i * tile, m - tile)
        x_i = lax.dynamic_slice(x, (row, 0), (tile, n)).astype(wide)
        y_i = _tile(x_i, factors).astype(x.dtype)
        return lax.dynamic_update_slice(y, y_i, (row, 0))

    y = vary_alike(jnp.zeros((m, a * b * d), x.dtype), x)[0]
    return lax.fori_loop(0, -(-m // tile), step, y)


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
