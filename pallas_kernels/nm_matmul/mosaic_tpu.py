"""Products with a condensed N:M matrix on TPU: Pallas Mosaic, expanded in VMEM.

Memory plan. HBM holds the matrix as values and packed places alone. A grid step brings
a tile of both to VMEM (two buffers each, by Pallas' pipeline), writes the dense tile
they stand for to a scratch [tile_k, tile_p], and multiplies it on the matrix units; the
dense tile never leaves VMEM, so that HBM reads n / m of the weight and its places.

Expansion. A unit is the shortest piece of a column that whole words of places and
whole groups make up (``_spec.unit``). Eight units and 128 columns at a time: one
register of words holds the same rows of eight units, read with a stride, and so does
one of values; a place is compared, where it lies in its word, with each i in [0, m),
and the value selected. Two entries of bfloat16 that share a word of 32 bits, rows 2h
and 2h + 1 of w, are selected at once: the value is shifted to its half by the lowest
bit of its place. Nothing is converted. The registers are stored one below the other,
and the columns of x put in that order beforehand (``Config.permute``); where x is large
they are stored with a stride instead, which takes longer and is hidden by the product.

Grid of ``product``: (row tiles, output tiles, contraction tiles), float32 accumulator
in scratch. Grid of ``sampled``: (tiles of k, tiles of p, row tiles): the dense tile of
x.T @ dy is summed in scratch, and of it the entries at the places are written out, so
that no dense gradient reaches HBM.

Padding, outside: rows to a multiple of the row tile, k to whole tiles of units, p to a
multiple of 128; only where they do not fit. Zeros add nothing.

Dtypes: bfloat16 and float32, accumulated in float32. Products of float32 go at the
precision of ``jax.default_matmul_precision``, as those of XLA do.
Chips: compiled for v4, v5e, v5p, v6e and tpu7x, jax 0.10.2. Not yet run on a TPU. By
the compiler's schedule for v5e a step at 16 rows of bfloat16, a tile of 1024 x 512,
takes 900 cycles at 1:8 and 1,400 at 2:4, where reading the dense tile from HBM takes
1,200 and the condensed one 190 and 680: few rows pay where little is kept.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._chips import TPU_LANES as _LANES
from pallas_kernels.nm_matmul._spec import Config, index_bits, unit

_SUBLANES = 8  # of 32 bits


def product(
    x: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    n: int,
    m: int,
    transpose: bool,
    config: Config,
    interpret=False,
) -> jax.Array:
    """Dense times condensed, or times its transpose; the contract is in ``_spec``.

    Args:
        x: ``[rows, k]``, or ``[rows, p]`` with ``transpose``.
        values: ``[k * n / m, p]``, dtype of x.
        words: uint32, the packed places.
        n: kept of every m.
        m: group size.
        transpose: multiply by the transposed matrix.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[rows, p]``, or ``[rows, k]`` with ``transpose``, dtype of x.
    """
    rows, k, p = x.shape[0], values.shape[0] // n * m, values.shape[1]
    side_v, side_q, side_w = unit(n, m)
    units, tile_p, tile_m = config.units, config.tile_p, config.tile_m
    tile_k = units * side_w
    steps_k, steps_p = pl.cdiv(k, tile_k), pl.cdiv(p, tile_p)
    whole_k, whole_p = steps_k * tile_k, steps_p * tile_p
    x = _pad(x, -(-rows // tile_m) * tile_m, whole_p if transpose else whole_k)
    values = _pad(values, steps_k * units * side_v, whole_p)
    words = _words(words, steps_k * units * side_q, whole_p)
    if transpose:
        tile_in, tile_out, steps_in, steps_out = tile_p, tile_k, steps_p, steps_k
        weight = lambda row, out, step: (out, step)
    else:
        tile_in, tile_out, steps_in, steps_out = tile_k, tile_p, steps_k, steps_p
        weight = lambda row, out, step: (step, out)
    panels = tile_p // _LANES
    kernel = functools.partial(
        _product_kernel,
        panels,
        n=n,
        m=m,
        transpose=transpose,
        permute=config.permute,
        widen=bool(interpret),
    )
    heights = (side_w * x.dtype.itemsize // 4, _SUBLANES)
    if config.permute and not transpose:
        x = _permute(x, *heights[::-1])
    y = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tile_m, steps_out, steps_in),
        in_specs=[
            pl.BlockSpec((tile_m, tile_in), lambda row, out, step: (row, step)),
            *_panels(units * side_v, panels, weight),
            *_panels(units * side_q, panels, weight),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_out), lambda row, out, step: (row, out)),
        scratch_shapes=[
            pltpu.VMEM((tile_m, tile_out), jnp.float32),
            # Both in words of 32 bits: no load with a stride reads narrower ones, and
            # the interpreter stores through no bitcast.
            pltpu.VMEM((units * side_v * x.dtype.itemsize // 4, _LANES), jnp.int32),
            *[
                pltpu.VMEM((tile_k * x.dtype.itemsize // 4, _LANES), jnp.int32)
                for _ in range(panels)
            ],
        ],
        out_shape=_out_shape((x.shape[0], steps_out * tile_out), x.dtype, x),
        compiler_params=_params(config),
        interpret=interpret,
        name="nm_matmul" + ("_transposed" if transpose else ""),
    )(x, *[values] * panels, *[words] * panels)
    if config.permute and transpose:
        y = _permute(y, *heights)
    return _crop(y, rows, k if transpose else p)


def sampled(
    x: jax.Array,
    dy: jax.Array,
    words: jax.Array,
    *,
    n: int,
    m: int,
    dtype,
    config: Config,
    interpret=False,
) -> jax.Array:
    """The entries of ``x.T @ dy`` at the places; the contract is in ``_spec``.

    Args:
        x: ``[rows, k]``.
        dy: ``[rows, p]``, dtype of x.
        words: uint32, the packed places.
        n: kept of every m.
        m: group size.
        dtype: of the result, that of x or float32.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        ``[k * n / m, p]`` of ``dtype``.
    """
    (rows, k), p = x.shape, dy.shape[1]
    side_v, side_q, side_w = unit(n, m)
    units, tile_p, tile_m = config.units, config.tile_p, config.tile_m
    tile_k = units * side_w
    steps_k, steps_p = pl.cdiv(k, tile_k), pl.cdiv(p, tile_p)
    whole = -(-rows // tile_m) * tile_m
    x, dy = _pad(x, whole, steps_k * tile_k), _pad(dy, whole, steps_p * tile_p)
    words = _words(words, steps_k * units * side_q, steps_p * tile_p)
    panels = tile_p // _LANES
    tile = lambda i, j, row: (i, j)
    scratch = lambda rows: [pltpu.VMEM((rows, _LANES), jnp.float32)] * panels
    values = pl.pallas_call(
        functools.partial(_sampled_kernel, panels, n=n, m=m, widen=bool(interpret)),
        grid=(steps_k, steps_p, whole // tile_m),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda i, j, row: (row, i)),
            pl.BlockSpec((tile_m, tile_p), lambda i, j, row: (row, j)),
            *_panels(units * side_q, panels, tile),
        ],
        out_specs=pl.BlockSpec((units * side_v, tile_p), tile),
        scratch_shapes=[*scratch(tile_k), *scratch(units * side_v)],
        out_shape=_out_shape((steps_k * units * side_v, steps_p * tile_p), dtype, x),
        compiler_params=_params(config),
        interpret=interpret,
        name="nm_matmul_sampled",
    )(x, dy, *[words] * panels)
    return _crop(values, k // m * n, p)


def _product_kernel(panels, x_ref, *refs, n, m, transpose, permute, widen):
    values_refs, words_refs = refs[:panels], refs[panels : 2 * panels]
    y_ref, acc_ref, bits_ref, *w_refs = refs[2 * panels :]
    step = pl.program_id(2)
    for values_ref, words_ref, w_ref in zip(
        values_refs, words_refs, w_refs, strict=True
    ):
        bits_ref[...] = pltpu.bitcast(values_ref[...], jnp.int32)
        paired = values_ref.dtype == jnp.bfloat16
        _expand(bits_ref, words_ref, w_ref, n, m, paired, permute)
    # Side by side: registers are 128 columns wide, so nothing moves.
    w = [pltpu.bitcast(w_ref[...], x_ref.dtype) for w_ref in w_refs]
    w = jnp.concatenate(w, axis=1)
    product = _dot(x_ref[...], w, (1, 1 if transpose else 0), widen)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = product

    @pl.when(step > 0)
    def _():
        acc_ref[...] += product

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = acc_ref[...].astype(y_ref.dtype)


def _sampled_kernel(panels, x_ref, dy_ref, *refs, n, m, widen):
    words_refs, values_ref = refs[:panels], refs[panels]
    w_refs, kept_refs = refs[panels + 1 : -panels], refs[-panels:]
    step = pl.program_id(2)
    product = _dot(x_ref[...], dy_ref[...], (0, 0), widen)
    lanes = [slice(c * _LANES, (c + 1) * _LANES) for c in range(panels)]

    @pl.when(step == 0)
    def _():
        for w_ref, columns in zip(w_refs, lanes, strict=True):
            w_ref[...] = product[:, columns]

    @pl.when(step > 0)
    def _():
        for w_ref, columns in zip(w_refs, lanes, strict=True):
            w_ref[...] += product[:, columns]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for w_ref, words_ref, kept_ref, columns in zip(
            w_refs, words_refs, kept_refs, lanes, strict=True
        ):
            _take(w_ref, words_ref, kept_ref, n, m)
            values_ref[:, columns] = kept_ref[...].astype(values_ref.dtype)


def _panels(rows, panels, tile):
    """A tile as panels of 128 columns: no load with a stride reads a wider array."""

    def panel(c):
        def index(i, j, step):
            row, column = tile(i, j, step)
            return row, column * panels + c

        return pl.BlockSpec((rows, _LANES), index)

    return [panel(c) for c in range(panels)]


def _expand(bits_ref, words_ref, w_ref, n, m, paired, permute):
    """Writes 128 columns of the dense tile, in words of 32 bits.

    With ``paired`` rows 2h and 2h + 1 are the lower and the upper half of a word.
    """
    side_v, side_q, side_w = unit(n, m)
    halves = 2 if paired else 1

    def chunk(first):
        words = [words_ref[_rows(first, side_q, row)] for row in range(side_q)]
        values = []
        for row in range(side_v // halves):
            word = bits_ref[_rows(first, side_v // halves, row)]
            values += _halves(word) if paired else [word]
        dense: list = [None] * (side_w // halves)
        for r, value in enumerate(values):
            start = r // n * m
            select = _select_half if paired else _select_word
            for row, part in select(words, r, value, start, m):
                old = dense[row]
                dense[row] = part if old is None else old | part
        for row, word in enumerate(dense):
            if permute:
                window = pl.ds(first * (side_w // halves) + row * _SUBLANES, _SUBLANES)
            else:
                window = _rows(first, side_w // halves, row)
            w_ref[window] = word

    _chunks(words_ref, n, m, chunk)


def _select_word(words, r, value, start, m):
    """(row of w, the value where it belongs there and else 0) for each of its m."""
    word, low, bits = _field(words, r, m)
    # Compared where it lies: no shift.
    place = word & _int32((2**bits - 1) << low)
    zero = jnp.zeros_like(value)
    return [
        (start + i, jnp.where(place == _int32(i << low), value, zero)) for i in range(m)
    ]


def _select_half(words, r, value, start, m):
    """As ``_select_word``, of words that hold two rows of w each."""
    word, low, bits = _field(words, r, m)
    zero = jnp.zeros_like(value)
    if start % 2:
        place = (lax.shift_right_logical(word, low) & (2**bits - 1)) + 1
        shift, half = lax.shift_left(place & 1, 4), place & ~1
        scale = 1
    else:
        # The lowest bit of the place, moved to where it counts 16.
        if low < 4:
            shift = lax.shift_left(word, 4 - low) & 16
        else:
            shift = lax.shift_right_logical(word, low - 4) & 16
        half = word & _int32((2**bits - 2) << low)
        scale = 1 << low
    value = lax.shift_left(value, shift)
    count = (start % 2 + m + 1) // 2
    if count == 2:
        lower = half == 0
        parts = [jnp.where(lower, value, zero), jnp.where(lower, zero, value)]
    else:
        parts = [
            jnp.where(half == _int32(2 * h * scale), value, zero) for h in range(count)
        ]
    return [(start // 2 + h, part) for h, part in enumerate(parts)]


def _field(words, r, m):
    """The word that holds the place of row r, its lowest bit there, and its width."""
    bits = index_bits(m)
    return words[r * bits // 32], r * bits % 32, bits


def _int32(number):
    """The number that has the same lower 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _take(w_ref, words_ref, kept_ref, n, m):
    """Takes the entries at the places out of the dense tile, both in float32."""
    side_v, _, side_w = unit(n, m)

    def chunk(first):
        places = _places(words_ref, first, n, m)
        for r, place in enumerate(places):
            dense = [
                w_ref[_rows(first, side_w, l)]
                for l in range(r // n * m, r // n * m + m)
            ]
            kept = dense[0]
            for i in range(1, m):
                kept = jnp.where(place == i, dense[i], kept)
            kept_ref[_rows(first, side_v, r)] = kept

    _chunks(words_ref, n, m, chunk)


def _chunks(words_ref, n, m, chunk):
    """Calls ``chunk(first unit)`` for every eight units."""
    chunks = words_ref.shape[0] // unit(n, m)[1] // _SUBLANES

    def step(index, carry):
        chunk(index * _SUBLANES)
        return carry

    lax.fori_loop(0, chunks, step, 0)


def _places(words_ref, first, n, m):
    """A register of places, one unit per sublane, for each row of a unit's values."""
    bits = index_bits(m)
    side_v, side_q, _ = unit(n, m)
    words = [words_ref[_rows(first, side_q, row)] for row in range(side_q)]
    per = 32 // bits
    return [
        lax.shift_right_logical(words[r // per], bits * (r % per)) & (2**bits - 1)
        for r in range(side_v)
    ]


def _rows(first, side, row):
    """The same row of eight units that are ``side`` rows high."""
    return pl.ds(first * side + row, _SUBLANES, stride=side)


def _halves(word):
    """The lower and the upper 16 bits, each in the lower half of a word."""
    return [word & 0xFFFF, lax.shift_right_logical(word, 16)]


def _dot(a, b, contracted, widen):
    """Contracts one axis of each tile, in float32.

    Widened first where the kernel is interpreted: XLA has no such product of bfloat16
    for every shape on CPU. It changes nothing, products of bfloat16 are exact there.
    """
    if widen:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _permute(x, outer, inner):
    """Changes the order of columns from (outer, inner) to (inner, outer).

    Of words of 32 bits, again and again along the columns.
    """
    rows, columns = x.shape
    x = x.reshape(rows, -1, outer, inner, 4 // x.dtype.itemsize)
    return x.swapaxes(2, 3).reshape(rows, columns)


def _words(words, rows, columns):
    """As int32, which every chip's vector unit compares and shifts."""
    return _pad(lax.bitcast_convert_type(words, jnp.int32), rows, columns)


def _pad(x, rows, columns):
    """Zeros at the end of both axes up to the sizes; x itself where it fits."""
    more = [(0, rows - x.shape[0]), (0, columns - x.shape[1])]
    return jnp.pad(x, more) if any(high for _, high in more) else x


def _crop(y, rows, columns):
    return y if y.shape == (rows, columns) else y[:rows, :columns]


def _params(config):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=config.vmem,
    )


def _out_shape(shape, dtype, x):
    """The result's type: it varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )
