"""Products with a constant fan-in matrix by XLA: gathers in loops, fused by hand.

With c a column, i one of its f places, and w zero elsewhere:

    product      y[r, c]       = sum over i of values[c, i] x[r, indices[c, i]]
    transposed   x[r, a]       = sum over (c, i) with indices[c, i] = a of
                                 values[c, i] y[r, c]
    sampled      values[c, i]  = sum over r of x[r, indices[c, i]] y[r, c]

XLA's CPU compiler writes what a gather finds to memory before it sums, unless the sum
is of several arrays at once: then one loop gathers, multiplies and adds, on all cores,
and the several sums hide each other's latency. So a few rows of x are summed as several
chains. More rows are transposed first: a gathered place is then a run of up to 64
numbers, and the loop over it is vector code.

Indices are taken as unsigned, which leaves one comparison of their clamp. Each product
has a dense form: the matrix is written down, by a scatter, and multiplied. Not
differentiable in reverse mode; they sit inside the operator's ``custom_vjp``.
"""

import jax.numpy as jnp
from jax import lax

from sparsejax._dispatch import vary_alike
from sparsejax.layouts._fan_in import expand
from sparsejax.ops._block_sparse_xla import _dot
from sparsejax.ops._checks import accumulator

_CHAINS = 4  # sums in flight at a time
_FEW = 4  # rows of x, up to which a row is a chain
_LANES = 16  # rows are filled up to a multiple: with 8, XLA's inner loop is scalar
_TILE = 64  # rows at a time: x^T of a tile stays in cache
_UNROLL = 8  # places per pass over the sums


def product(x, values, indices):
    """y [m, n] = x w, for x [m, k], values and indices [n, f]."""
    m, n = x.shape[0], values.shape[0]
    if not values.size:
        return _zeros((m, n), x.dtype, x, values)
    wide = x.astype(accumulator(x.dtype))
    form = _product_few if m <= _FEW else _product_tiles
    return form(wide, values, indices.astype(jnp.uint32)).astype(x.dtype)


def _product_few(x, values, indices):
    m, n = x.shape[0], values.shape[0]
    pieces = min(n, max(1, _CHAINS // m))
    size = -(-n // pieces)
    # Equal pieces that overlap where n does not divide: [start, start + size).
    starts = [piece * n // pieces for piece in range(pieces)] + [n]
    chains = tuple(
        _take(x[row], indices[start : start + size])
        * values[start : start + size].astype(x.dtype)
        for row in range(m)
        for start in starts[:-1]
    )
    add = lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True))
    sums = lax.reduce(chains, (jnp.zeros((), x.dtype),) * len(chains), add, (1,))
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    whole = [part[:length] for part, length in zip(sums, lengths * m, strict=True)]
    return jnp.concatenate(whole).reshape(m, n)


def _product_tiles(x, values, indices):
    (m, k), (n, f) = x.shape, values.shape
    tiles, tile = _tiling(m)
    x = jnp.pad(x, [(0, tiles * tile - m), (0, 0)])

    def one(x_t):  # [k, tile] -> y^T [n, tile]
        def terms(start, size):
            v = lax.dynamic_slice(values, _int32(0, start), (n, size)).astype(x.dtype)
            i = lax.dynamic_slice(indices, _int32(0, start), (n, size))
            return sum(v[:, p, None] * _take(x_t, i[:, p]) for p in range(size))

        return _sum(terms, f)

    y = lax.map(one, x.reshape(tiles, tile, k).swapaxes(1, 2))
    return y.swapaxes(1, 2).reshape(tiles * tile, n)[:m]


def transposed(y, values, indices, k):
    """x [m, k] = y w^T, for y [m, n]."""
    (m, n), wide = y.shape, accumulator(y.dtype)
    x_t = _zeros((k, m), wide, y, values, indices)
    if not values.size:
        return x_t.T.astype(y.dtype)
    if m == 1:
        terms = values.astype(wide) * y.astype(wide).T
        x = x_t[:, 0].at[indices].add(terms, mode="promise_in_bounds")
        return x[None].astype(y.dtype)
    y_t = y.T.astype(wide)

    def add_column(c, x_t):
        terms = values[c].astype(wide)[:, None] * y_t[c]
        # A duplicate index is refused where it is seen, and summed where it is not.
        return x_t.at[indices[c]].add(terms, mode="promise_in_bounds")

    return lax.fori_loop(0, n, add_column, x_t).T.astype(y.dtype)


def sampled(x, y, indices, *, dtype):
    """values [n, f] = x^T y at the places, for x [m, k] and y [m, n]."""
    wide = accumulator(x.dtype)
    x, y, indices = x.astype(wide), y.astype(wide), indices.astype(jnp.uint32)

    def terms(start, size):
        rows = lambda a: lax.dynamic_slice(a, _int32(start, 0), (size, a.shape[1]))
        x_, y_ = rows(x), rows(y)
        return sum(y_[r][:, None] * _take(x_[r], indices) for r in range(size))

    return _sum(terms, x.shape[0]).astype(dtype)


# --- Dense forms ----------------------------------------------------------------------


def product_dense(x, values, indices):
    """``product`` by one dense product: holds the whole matrix."""
    return _dot(x, expand(values, indices, x.shape[1]), (1, 0)).astype(x.dtype)


def transposed_dense(y, values, indices, k):
    """``transposed`` by one dense product: holds the whole matrix."""
    return _dot(y, expand(values, indices, k), (1, 1)).astype(y.dtype)


def sampled_dense(x, y, indices, *, dtype):
    """``sampled`` by one dense product, of which the places are gathered."""
    dw_t = _dot(y, x, (0, 0))
    values = jnp.take_along_axis(dw_t, indices, axis=1, mode="clip")
    return values.astype(dtype)


def costs(op, m, k, n, f):
    """What the forms of a product cost on a CPU, by a static rule.

    Fitted to 138 problems on two cores of a Zen 5, in nanoseconds there: of numbers
    stored (n f: gathered or scattered one by one) and of the whole matrix's (k n: read
    or written once, and multiplied per row).

    Args:
      op: "product", "transposed" or "sampled".
      m: Rows of x.
      k: Rows of the matrix.
      n: Columns of the matrix.
      f: Fan-in.

    Returns:
      (loops, the dense form here, the dense product of a weight that is dense already).
    """
    loops = {
        "product": 0.3 * m if m <= _FEW else 0.9 + 0.014 * m,
        "transposed": 0.9 + 0.085 * m,
        "sampled": 0.3 + 0.095 * m,
    }[op]
    dense = k * n * (0.1 + 0.0046 * m)
    # Beyond the cache, writing the matrix down costs more than multiplying by it.
    written = k * n * (0.1 if k * n < 2**23 else 1.2)
    moved = n * f * (0.35 if op == "sampled" else 1.3)
    return loops * n * f, written + moved + dense, dense


def dense_is_faster(op, m, k, n, f):
    """Whether the product of a dense weight is; None: within a quarter of its time.

    Of the forms that ``costs`` chooses from, by its figures but for a product's loops:
    with caches and cores that gather slower, they lose more than the dense product. So
    they are held against it as on two cores of a Xeon, in nanoseconds there, fitted to
    benchmarks/results/fan_in_matmul.cpu.json.

    Args:
      op: As for ``costs``, and so are the others.
      m: The same.
      k: The same.
      n: The same.
      f: The same.

    Returns:
      True, False or None.
    """
    loops, written, dense = costs(op, m, k, n, f)
    ours = min(loops, written)
    if op == "product" and loops <= written:
        ours = n * f * (0.55 + 0.18 * m)
        if m > _FEW:
            tiles, tile = _tiling(m)
            ours = n * f * tiles * (2.2 + 0.022 * tile)
        # The dense product comes to its full speed with some 12 rows.
        dense = k * n * min(0.155 + 0.0185 * m, 0.31 + 0.0068 * m)
    if 0.8 * dense <= ours <= 1.25 * dense:
        return None
    return dense < ours


def _sum(terms, count):
    """The sum over [0, count) of which ``terms(start, size)`` gives a part."""
    first = count % _UNROLL or min(count, _UNROLL)
    total = terms(0, first)
    if first == count:
        return total
    return lax.fori_loop(
        0,
        (count - first) // _UNROLL,
        lambda step, total: total + terms(first + step * _UNROLL, _UNROLL),
        total,
    )


def _tiling(m):
    """(number of tiles, rows in each): ``_TILE`` rows at most, whole vectors."""
    tiles = -(-m // _TILE)
    rows = -(-m // tiles)
    return tiles, -(-rows // _LANES) * _LANES


def _take(a, i):
    """a[i] along the first axis; i unsigned and in range."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(i.ndim, i.ndim + a.ndim - 1)),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(a, i[..., None], numbers, (1, *a.shape[1:]), mode=mode)


def _zeros(shape, dtype, *like):
    return vary_alike(jnp.zeros(shape, dtype), *like)[0]


def _int32(*start):
    """Of one type, also where 64-bit types are on."""
    return [lax.convert_element_type(i, jnp.int32) for i in start]
