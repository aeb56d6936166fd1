"""Product with a Monarch matrix on TPU: Pallas Mosaic, both factors in one kernel.

Memory plan. Both factors stay in VMEM while tiles of rows stream by. Of a tile, chunks
of ``config.rows`` rows go through four phases, each of whole panels of 128 columns: the
products with left, h's shuffle, the products with right, y's shuffle. HBM sees x, y and
the factors.

The shuffle. Block i of left gives columns (rank, t), and block t of right takes rows
(rank, i): panels change places with lanes. Let panel i hold, at lane z, what belongs in
panel ``(z - i) mod n``. Then panel t of the result has at every lane z what panel ``(z
- t) mod n`` has at the same lane: nothing crosses lanes, and n panels are exchanged by
log2(n) selections each (``_exchange``), bit by bit of z. The order of lanes that this
asks for is one rotation of each panel's natural order, and so is the order in which
panels come out. For h both are orders of left's columns and of right's rows, made by
XLA once per call (``_take``). For y the first is an order of right's columns; the
second is a rotation of each panel in the kernel, by units that are idle else. Two
numbers of bfloat16 travel as a word of 32 bits, which holds two rows of one column.

Padding, outside: the rank, up to a power of two (``_spec.panels_mosaic_tpu``); x's
blocks, where they are neither multiples nor divisors of 128 columns. Where y's panels
have no such order (l no divisor of 128, s neither multiple nor divisor), y is written
with t outermost, and XLA transposes it: one more pass in HBM.

Blocks narrower than a panel share it, with zeros where the others are: an infinity or
NaN in one block's columns of x makes NaN of a row's results from those beside it too.

Dtypes: bfloat16 and float32; sums are float32, h is rounded to the dtype of x. Products
of float32 go at the precision of ``jax.default_matmul_precision``, as those of XLA do.
Chips: compiled for v4, v5e, v5p, v6e and tpu7x, jax 0.10.2. Not yet run on a TPU. By
the compiler's schedule for v5e, bfloat16, 4096 x 4096: 0.68 of the matrix peak with 32
blocks, 0.85 with 16 (0.21 with 16 blocks of 64 x 64, whose panels are zeros for the
most part). With 32 blocks a chunk of 256 rows takes 6,000 cycles, and 7,700 to come
from HBM and go there; the order of the weights takes 22,000 once per call, at 4096 rows
a fifth of it.
"""

import functools

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._chips import TPU_LANES
from pallas_kernels.grouped_matmul.mosaic_tpu import at_least, dot, out_shape
from pallas_kernels.monarch_matmul._spec import (
    Config,
    Panels,
    Problem,
    panels_mosaic_tpu,
)

_SUBLANES = 8  # of 32 bits


def product(
    x: jax.Array,
    left: jax.Array,
    right: jax.Array,
    *,
    config: Config,
    interpret=False,
) -> jax.Array:
    """Rows times a Monarch matrix; the contract is in ``_spec``.

    Args:
        x: ``[m, k * p]``.
        left: ``[k, 1, p, q]``, dtype of x.
        right: ``[1, l, r, s]``, dtype of x.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[m, s * l]``, dtype of x.
    """
    rows = x.shape[0]
    (k, _, p, q), (_, l, r, s) = left.shape, right.shape  # noqa: E741
    problem = Problem("monarch", rows, k, p, q, l, r, s, str(x.dtype))
    panels = panels_mosaic_tpu(problem)
    if panels.copy_x:
        more = ((0, 0), (0, 0), (0, panels.wide_p - p))
        x = jnp.pad(x.reshape(rows, k, p), more).reshape(rows, -1)
    x = at_least(_SUBLANES, x, 0)
    left, right = _left(left, l, panels), _right(right, k, panels)
    width = l * (s if panels.swap_y else panels.wide_s)
    inner = left.shape[0] * left.shape[2] // TPU_LANES
    held = lambda array: pl.BlockSpec(
        array.shape, lambda m: (_zero(),) * 3, pipeline_mode=pl.Buffered(1)
    )
    panel = lambda count: pltpu.VMEM((count, config.rows, TPU_LANES), x.dtype)
    y = pl.pallas_call(
        functools.partial(
            _kernel, sizes=(k, l, x.shape[1] // k), panels=panels, widen=bool(interpret)
        ),
        grid=(pl.cdiv(x.shape[0], config.tile_m),),
        in_specs=[
            pl.BlockSpec((config.tile_m, x.shape[1]), lambda m: (m, _zero())),
            held(left),
            held(right),
        ],
        out_specs=pl.BlockSpec((config.tile_m, width), lambda m: (m, _zero())),
        scratch_shapes=[panel(inner)]
        + [panel(width // TPU_LANES)] * (panels.swap_y > 0),
        out_shape=out_shape((x.shape[0], width), x.dtype, x, left, right),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=config.vmem
        ),
        interpret=interpret,
        name="monarch_matmul",
    )(x, left, right)[:rows]
    if panels.swap_y:
        return y
    y = y.reshape(rows, l, panels.wide_s)[:, :, :s]
    return jnp.swapaxes(y, 1, 2).reshape(rows, s * l)


def _kernel(
    x_ref, left_ref, right_ref, y_ref, h_ref, o_ref=None, *, sizes, panels, widen
):
    k, l, p = sizes  # noqa: E741
    swap, (_, chunk, _) = panels.swap, h_ref.shape
    of_left, of_right = (h_ref.shape[0] // blocks for blocks in (k, l))
    wide_s = right_ref.shape[2]

    def slot(t, part):
        """Where part of the rows that block t of right takes lies, once exchanged."""
        pieces = max(1, panels.rank // TPU_LANES)
        outer, piece = divmod(part, pieces)
        inner, place = divmod(t, swap)
        return (outer * swap + place) * of_left + inner * pieces + piece

    def step(index, _):
        rows = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
        for i in range(k):
            first = i * p // TPU_LANES * TPU_LANES
            h = dot(
                x_ref[rows, first : first + panels.wide_p], left_ref[i], (1, 0), widen
            )
            for part in range(of_left):
                lanes = slice(part * TPU_LANES, (part + 1) * TPU_LANES)
                h_ref[i * of_left + part] = h[:, lanes].astype(h_ref.dtype)

        for t in range(0, l if swap > 1 else 0, swap):
            for part in range(of_right):
                group = [slot(t + place, part) for place in range(swap)]
                _exchange_in_place(h_ref, group)

        def block(t):
            h = [h_ref[slot(t, part)] for part in range(of_right)]
            return dot(jnp.concatenate(h, axis=1), right_ref[t], (1, 0), widen)

        if o_ref is None:
            for t in range(l):
                y = block(t)
                y_ref[rows, t * wide_s : (t + 1) * wide_s] = y.astype(y_ref.dtype)
            return

        # Panels of y: of one t, or of several beside each other.
        of_t, swap_y = wide_s // TPU_LANES, panels.swap_y
        for first in range(swap_y):
            y = functools.reduce(jnp.add, map(block, range(first, l, swap_y)))
            for part in range(of_t):
                lanes = slice(part * TPU_LANES, (part + 1) * TPU_LANES)
                o_ref[first * of_t + part] = y[:, lanes].astype(o_ref.dtype)
        for part in range(of_t):
            group = [place * of_t + part for place in range(swap_y)]
            _exchange_out(o_ref, group, y_ref, part * swap_y, index * chunk)

    chunks = jnp.int32(x_ref.shape[0] // chunk)
    lax.fori_loop(jnp.int32(0), chunks, step, None)


def _zero():
    """An index, also where Python's integers are 64 bits."""
    return jnp.int32(0)


def _exchange_in_place(ref, group):
    """Exchanges panels ``group`` of ``ref``; leaves each rotated by its number."""
    for low, rows in _word_rows(ref):
        words = [_to_words(ref[panel, low : low + rows]) for panel in group]
        for panel, word in zip(group, _exchange(words), strict=True):
            ref[panel, low : low + rows] = _from_words(word, ref.dtype)


def _exchange_out(ref, group, out_ref, column, first):
    """Exchanges panels ``group`` of ``ref`` to ``out_ref``, in natural order.

    They go to panels of columns from ``column``, and to rows from ``first`` on.
    """
    for low, rows in _word_rows(ref):
        words = [_to_words(ref[panel, low : low + rows]) for panel in group]
        window = pl.ds(pl.multiple_of(first + low, rows), rows)
        for place, word in enumerate(_exchange(words)):
            if place:
                word = pltpu.roll(word, jnp.int32(TPU_LANES - place), 1)
            lanes = pl.ds((column + place) * TPU_LANES, TPU_LANES)
            out_ref[window, lanes] = _from_words(word, ref.dtype)


def _word_rows(ref):
    """(first row, rows) of one register of words after the other."""
    rows = _SUBLANES * 4 // ref.dtype.itemsize
    return [(low, rows) for low in range(0, ref.shape[1], rows)]


def _exchange(words):
    """Panel t of the result has at lane z what panel ``(z - t) mod n`` has there."""
    n = len(words)
    lane = lax.broadcasted_iota(jnp.int32, words[0].shape, 1)
    bit = 1
    while bit < n:
        chosen = lane & bit != 0
        words = [
            jnp.where(chosen, words[(i + bit) % n], word)
            for i, word in enumerate(words)
        ]
        bit *= 2
    return [words[-t % n] for t in range(n)]


def _to_words(tile):
    return pltpu.bitcast(tile, jnp.int32) if tile.dtype.itemsize == 2 else tile


def _from_words(words, dtype):
    return pltpu.bitcast(words, dtype) if words.dtype != dtype else words


def _left(left, l, panels: Panels):  # noqa: E741
    """left's blocks ``[k, wide_p, parts * 128]``: columns in the order of the lanes."""
    k, _, p, q = left.shape
    block, t, rank = _lanes(k, l, panels)
    column = np.where(rank < q // l, rank * l + t, -1)
    left = _take(left[:, 0], column.reshape(k, -1))
    if panels.copy_x or p % TPU_LANES == 0:
        return _pad(left, 1, panels.wide_p)
    # Zeros where other blocks have their columns of x.
    share = TPU_LANES // p
    own = block[:, :1] % share == np.arange(share)
    left = jnp.where(own[:, :, None, None], left[:, None], jnp.zeros((), left.dtype))
    return left.reshape(k, TPU_LANES, -1)


def _right(right, k, panels: Panels):
    """right's blocks ``[l, parts * 128, wide_s]``: rows and columns likewise."""
    _, l, r, s = right.shape  # noqa: E741
    block, i, rank = _lanes(l, k, panels)
    row = np.where(rank < r // k, i * (r // k) + rank, -1)
    right = jnp.swapaxes(_take(jnp.swapaxes(right[0], 1, 2), row.reshape(l, -1)), 1, 2)
    if not panels.swap_y:
        return _pad(right, 2, panels.wide_s)
    # A panel's lanes in natural order: (rest, t's place among those that share the
    # panel, v), of columns (panel, v, rest).
    n, rest, share = panels.swap_y, TPU_LANES // l, max(1, TPU_LANES // s)
    panel, lane = divmod(np.arange(panels.wide_s), TPU_LANES)
    lane = (lane - block[:, :1] % n) % TPU_LANES
    column = panel * TPU_LANES + lane % n * rest + lane // n // share
    own = lane // n % share == block[:, :1] // n
    return _take(right, np.where(own, column, -1))


def _lanes(blocks, others, panels: Panels):
    """(block, other block, rank) of each lane of h, ``[blocks, parts * 128]``.

    Natural order is (outer, piece of the ranks) for panels and (rank, inner) for lanes,
    with other block = (outer, inner).
    """
    n = panels.swap
    pieces = max(1, panels.rank // TPU_LANES)
    block, outer, piece, lane = np.indices((blocks, others // n, pieces, TPU_LANES))
    rank, inner = divmod((lane - block % n) % TPU_LANES, n)
    return [
        a.reshape(blocks, -1)
        for a in (block, outer * n + inner, piece * TPU_LANES + rank)
    ]


def _take(w, column):
    """``w[i][:, column[i]]``, zeros where that is negative.

    By a product with ones and zeros, exact: the chips have no fast gather of columns.
    """
    own = lax.broadcasted_iota(jnp.int32, (1, w.shape[2], 1), 1)
    chosen = (own == column.astype(np.int32)[:, None]).astype(w.dtype)
    return jnp.einsum("iuv,ivz->iuz", w, chosen, precision=lax.Precision.HIGHEST)


def _pad(array, axis, size):
    more = [(0, 0)] * array.ndim
    more[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, more)
