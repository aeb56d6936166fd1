"""Block-sparse products as plain GEMMs in loops: the CPU product, right everywhere.

With index j of x and y meaning a whole tile of columns (``pallas_kernels``'
``block_sparse_matmul/_spec.py`` has the full contract):

    dsd    y[:, j]   = sum over p in ptr[j] .. ptr[j + 1] - 1 of x[:, source[p]] @ b[p]
    sdd    blocks[p] = x[:, rows[p]].T @ dy[:, cols[p]]

x is cut once into tiles [tiles, m, side], so that each product reads contiguous memory.
Trip counts and indices are traced: new contents never recompile. Not differentiable in
reverse mode; it sits inside the operator's ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax


def dsd(x, blocks, order, source, ptr, *, transpose):
    """Computes y[:, j] = sum over p of x[:, source[p]] @ b[order[p]].

    Args:
      x: [m, tiles_in * side_in].
      blocks: [slots, bk, bn].
      order: int32 [slots], or None for the identity.
      source: int32 [slots].
      ptr: int32 [tiles_out + 1]; slots from ptr[-1] on are padding.
      transpose: whether b is each block transposed.

    Returns:
      y [m, tiles_out * side_out], of the dtype of x.
    """
    side_in, side_out = blocks.shape[:0:-1] if transpose else blocks.shape[1:]
    accumulator = _accumulator(x.dtype)
    tiles = _tiles(x, side_in)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def column(bounds):
        def add(p, y_j):
            b = blocks[p if order is None else order[p]]
            x_i = tiles[source[p]]
            return y_j + lax.dot_general(
                x_i, b, contract, preferred_element_type=accumulator
            )

        y_j = jnp.zeros((x.shape[0], side_out), accumulator)
        return lax.fori_loop(bounds[0], bounds[1], add, y_j).astype(x.dtype)

    return _untile(lax.map(column, (ptr[:-1], ptr[1:])))


def sdd(x, dy, rows, cols, count, *, block_shape, dtype):
    """Computes blocks[p] = x[:, rows[p]].T @ dy[:, cols[p]]; zeros from count on.

    Args:
      x: [m, tiles_k * bk].
      dy: [m, tiles_n * bn].
      rows: int32 [slots].
      cols: int32 [slots].
      count: int32 []; slots from count on are padding.
      block_shape: (bk, bn).
      dtype: that of the result.

    Returns:
      blocks [slots, bk, bn].
    """
    accumulator = _accumulator(x.dtype)
    x_tiles, dy_tiles = _tiles(x, block_shape[0]), _tiles(dy, block_shape[1])

    def write(p, blocks):
        block = lax.dot_general(
            x_tiles[rows[p]],
            dy_tiles[cols[p]],
            (((0,), (0,)), ((), ())),
            preferred_element_type=accumulator,
        )
        return blocks.at[p].set(block.astype(dtype))

    blocks = jnp.zeros((rows.shape[0], *block_shape), dtype)
    return lax.fori_loop(0, count, write, blocks)


def _accumulator(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _tiles(x, side):
    """[m, tiles * side] -> [tiles, m, side]."""
    return x.reshape(x.shape[0], -1, side).transpose(1, 0, 2)


def _untile(tiles):
    """[tiles, m, side] -> [m, tiles * side]."""
    return tiles.transpose(1, 0, 2).reshape(tiles.shape[1], -1)
