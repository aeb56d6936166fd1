"""Block-sparse products as plain GEMMs in loops: the CPU product, right everywhere.

With index j of x and y meaning a whole tile of columns (``pallas_kernels``'
``block_sparse_matmul/_spec.py`` has the full contract):

    dsd    y[:, j]   = sum over p in ptr[j] .. ptr[j + 1] - 1 of x[:, source[p]] @ b[p]
    sdd    blocks[p] = x[:, rows[p]].T @ dy[:, cols[p]]

For a few thousand rows of x at a time: one loop over the columns that hold a block, in
it one over the column's slots; each step cuts a strip of x out and multiplies it by its
block; the finished column is written into y in place. Trip counts and indices are
traced: new contents never recompile. Not differentiable in reverse mode; it sits inside
the operator's ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.ops._checks import accumulator

# Entries of a strip of x or y that one step works on: 2 MiB of float32. Longer ones
# are copied through memory: with blocks of 128, 4096 rows at a time are 1.4 times as
# fast as 32768 in dsd, twice as fast in sdd.
_STRIP = 2**19


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
    m, n = x.shape[0], (ptr.shape[0] - 1) * side_out
    x_bits, b_bits = _bits(x), _bits(blocks)
    trips, columns = _occupied(ptr)
    tile = min(m, _STRIP // max(side_in, side_out))

    def rows(step, y):
        # The last tile overlaps the one before it and writes the same values again.
        row = jnp.minimum(step * tile, m - tile)

        def product(p):
            x_i = _cut(x_bits, (row, source[p] * side_in), (tile, side_in), x.dtype)
            p = p if order is None else order[p]
            b = _cut(b_bits, (p, 0, 0), (1, *blocks.shape[1:]), blocks.dtype)[0]
            return _dot(x_i, b, (1, 1 if transpose else 0))

        def column(step, y):
            j = columns[step]
            first, end = ptr[j], ptr[j + 1]
            y_j = lax.fori_loop(
                first + 1, end, lambda p, y_j: y_j + product(p), product(first)
            )
            return _put(y, y_j.astype(x.dtype), (row, j * side_out))

        return lax.fori_loop(0, trips, column, y)

    y = _bits(vary_alike(jnp.zeros((m, n), x.dtype), x)[0])
    return _values(lax.fori_loop(0, -(-m // tile), rows, y), x.dtype)


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
    bk, bn = block_shape
    # A product that contracts the rows of both operands runs at half the speed of a
    # plain one, so the smaller operand is transposed beforehand: x, or else both
    # operands change places and the blocks are transposed at the end.
    if x.shape[1] > dy.shape[1]:
        blocks = sdd(dy, x, cols, rows, count, block_shape=(bn, bk), dtype=dtype)
        return blocks.swapaxes(1, 2)
    m, k = x.shape
    x_bits, dy_bits = _bits(x), _bits(dy)

    def add_rows(row, size, blocks):
        x_t = _bits(_cut(x_bits, (row, 0), (size, k), x.dtype).T)

        def add(p, blocks):
            x_i = _cut(x_t, (rows[p] * bk, 0), (bk, size), x.dtype)
            dy_j = _cut(dy_bits, (row, cols[p] * bn), (size, bn), dy.dtype)
            block = _cut(blocks, (p, 0, 0), (1, bk, bn), blocks.dtype)
            return _put(blocks, block + _dot(x_i, dy_j, (1, 0)), (p, 0, 0))

        return lax.fori_loop(0, count, add, blocks)

    tile = min(m, _STRIP // max(bk, bn))
    blocks = jnp.zeros((rows.shape[0], bk, bn), accumulator(x.dtype))
    blocks = lax.fori_loop(
        0,
        m // tile,
        lambda step, blocks: add_rows(step * tile, tile, blocks),
        vary_alike(blocks, x)[0],
    )
    if m % tile:
        blocks = add_rows(m - m % tile, m % tile, blocks)
    return blocks.astype(dtype)


def prefers_dense(m, k, n, block_shape, slots, dtype):
    """Whether writing the whole matrix and one dense product beat the loops on a CPU.

    A static rule, fitted to value and both gradients of 144 problems: a multiply-add in
    the loops costs as many of the dense product as ``loops`` says (strips are copied,
    and small products run slowly), and writing the matrix costs about 100 rows of x.

    Args:
      m: Rows of x.
      k: Rows of the sparse matrix.
      n: Columns of the sparse matrix.
      block_shape: (bk, bn).
      slots: Blocks stored, spare slots counted: their number is not static.
      dtype: Of the operands; the rule is the same for all.

    Returns:
      True where ``dsd_dense`` and ``sdd_dense`` are the faster ones.
    """
    del dtype
    bk, bn = block_shape
    side = 2 * bk * bn / (bk + bn)
    loops = 1.1 + 55 / side + 250 / side**2
    return slots * bk * bn * loops > k * n * (1 + 100 / m)


def dsd_dense(x, blocks, order, source, ptr, *, transpose):
    """``dsd`` by one dense product: holds the whole matrix."""
    slots, bk, bn = blocks.shape
    side_in, side_out = (bn, bk) if transpose else (bk, bn)
    tiles_in, tiles_out = x.shape[1] // side_in, ptr.shape[0] - 1
    p = jnp.arange(slots, dtype=ptr.dtype)
    column = jnp.searchsorted(ptr, p, side="right") - 1  # tiles_out at padding
    b = blocks if order is None else blocks[order]
    b = b.swapaxes(1, 2) if transpose else b
    w = jnp.zeros((tiles_in, tiles_out, side_in, side_out), blocks.dtype)
    w = w.at[source, column].set(b, mode="drop").swapaxes(1, 2)
    w = w.reshape(tiles_in * side_in, tiles_out * side_out)
    return _dot(x, w, (1, 0)).astype(x.dtype)


def sdd_dense(x, dy, rows, cols, count, *, block_shape, dtype):
    """``sdd`` by one dense product, of which the stored blocks are gathered."""
    bk, bn = block_shape
    dw = _dot(x, dy, (0, 0)).reshape(-1, bk, dy.shape[1] // bn, bn)
    stored = jnp.arange(rows.shape[0]) < count
    return jnp.where(stored[:, None, None], dw[rows, :, cols], 0).astype(dtype)


def _dot(a, b, contracted):
    """Contracts one dimension of each matrix; float32 sums (float64 of float64)."""
    of_a, of_b = contracted
    dimensions = (((of_a,), (of_b,)), ((), ()))
    product = lax.dot_general(
        a, b, dimensions, preferred_element_type=accumulator(a.dtype)
    )
    # XLA's CPU compiler (jax 0.10, 0.11) takes a bfloat16 product with float32 sums,
    # and refuses to run it once it has pulled a transpose of the result into it.
    return lax.optimization_barrier(product) if a.dtype == jnp.bfloat16 else product


def _cut(bits, start, shape, dtype):
    """A slice of what ``_bits`` made."""
    return _values(lax.dynamic_slice(bits, _int32(start), shape), dtype)


def _put(bits, part, start):
    """Overwrites a slice of what ``_bits`` made, in place."""
    return lax.dynamic_update_slice(bits, _bits(part), _int32(start))


def _int32(start):
    """Of one type, also where 64-bit types are on."""
    return [lax.convert_element_type(i, jnp.int32) for i in start]


def _bits(x):
    """Bfloat16 as integers: to slice it, XLA's CPU compiler would widen all of it."""
    if x.dtype != jnp.bfloat16:
        return x
    # The barrier keeps a transpose of x out of the products, as in ``_dot``.
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint16)


def _values(bits, dtype):
    """The inverse of ``_bits``."""
    return lax.bitcast_convert_type(bits, dtype) if dtype == jnp.bfloat16 else bits


def _occupied(ptr):
    """The number of columns that hold a block, and all columns, those first."""
    empty = ptr[1:] == ptr[:-1]
    return jnp.sum(~empty, dtype=jnp.int32), jnp.argsort(empty, stable=True)
