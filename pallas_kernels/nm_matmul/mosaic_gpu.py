"""Products with a condensed N:M matrix on Hopper: Pallas Mosaic GPU, TMA and wgmma.

Memory plan. GMEM holds the matrix as values and packed places alone. A unit
(``_spec.unit``) is one word of places and the rows of values it is for; a tile of the
matrix is 64 units by ``tile_p`` columns, one group of m rows of each at a time. TMA
brings operands into ``stages`` sets of buffers in SMEM; one warpgroup per program;
float32 accumulators never leave the registers; a result goes through SMEM once.

Expansion. The warpgroup loads the words and the n kept rows of a group of 64 units into
registers in the layout of wgmma, compares each place with i in [0, m), and stores tiles
[64, tile_p] of the dense matrix to SMEM, which wgmma multiplies; it reads up to four
such buffers while the next one is written. So HBM and L2 read n / m of the weight and
its places.

``product``. A program has one tile [tile_m, tile_p] of y; a step is one group, with the
m columns of x that it meets, one buffer of [tile_m, 64] each. The words of 64 units are
copied once for all their groups, one such copy ahead. Grid: column tiles by row tiles;
neighbours share the weight.

``product`` with ``transpose``. A program has the m rows of w.T's result that one group
of 64 units gives, m accumulators [64, tile_m]; a step is ``tile_p`` columns of w, words
included, and of x. So few programs make up the matrix that p is split, and XLA sums the
parts, float32. Grid: units by groups by parts of p by row tiles.

``sampled``. A program has the n kept rows of one group of 64 units in ``tile_p``
columns; a step is 64 rows of dy and of the columns of x that give four of the m rows of
the dense tile; after all rows each place takes its entry of them. No dense gradient
leaves the registers. Grid: units by groups by column tiles; neighbours share x.

x is laid out beforehand as [rows of a unit, rows, units], so that column i of every
group is one tile, and so does the transposed product come out: a copy of x, which is
small where these kernels pay. What TMA reads outside of an array is zero, and what it
writes there is dropped: that covers the last units and rows.

Dtypes: bfloat16 and float16; of ``sampled`` also float32 out. Chips: compiled with
ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and 0.11.2, no spills; results proven
by simulation. Not yet run on a GPU: speed is unmeasured.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.mosaic_gpu import transforms
from pallas_kernels.grouped_matmul.mosaic_gpu import varying, whole_tiles
from pallas_kernels.nm_matmul._spec import (
    HOPPER_TILES as _TILES,
)
from pallas_kernels.nm_matmul._spec import (
    HOPPER_UNITS as _UNITS,
)
from pallas_kernels.nm_matmul._spec import (
    Config,
    index_bits,
    unit,
)

# wgmma reads its operands from SMEM while the warpgroup goes on: a buffer is handed
# back one step late.
_DELAY = 1


def product(
    x: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    n: int,
    m: int,
    transpose: bool,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Dense times condensed, or times its transpose; the contract is in ``_spec``.

    Args:
        x: ``[rows, k]``, or ``[rows, p]`` with ``transpose``; bfloat16 or float16.
        values: ``[k * n / m, p]``, dtype of x.
        words: uint32, the packed places.
        n: kept of every m.
        m: group size.
        transpose: multiply by the transposed matrix.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        ``[rows, p]``, or ``[rows, k]`` with ``transpose``, dtype of x.
    """
    values = values.reshape(-1, unit(n, m)[0], values.shape[1])
    words = lax.bitcast_convert_type(words, jnp.int32)
    call = _transposed if transpose else _product
    return call(x, values, words, n, m, config, interpret)


def _product(x, values, words, n, m, config, interpret):
    rows, (units, side_v, p) = x.shape[0], values.shape
    groups = side_v // n
    x = _by_place(x, units)
    tile_m, tile_p = config.tile_m, config.tile_p
    row_tiles, steps = pl.cdiv(rows, tile_m), pl.cdiv(units, _UNITS)

    def body(x_gmem, values_gmem, words_gmem, y_gmem):
        column, row = _divmod(lax.axis_index("tile"), row_tiles)
        columns = pl.ds(column * tile_p, tile_p)

        def scope(words_smem, w_smem, barriers):
            def fetch(step):
                slot = lax.rem(step, jnp.int32(2))
                plgpu.copy_gmem_to_smem(
                    words_gmem.at[pl.ds(step * _UNITS, _UNITS), columns],
                    words_smem.at[slot],
                    barriers.at[slot],
                )

            def multiply(index, acc, x_smem, values_smem):
                step, group = index
                slot = lax.rem(step, jnp.int32(2))

                @pl.when(group == 0)
                def _():
                    plgpu.barrier_wait(barriers.at[slot])
                    pl.when(step + 1 < steps)(lambda: fetch(step + 1))

                kept = [ref[...] for ref in values_smem]
                _expand(
                    words_smem[slot],
                    lambda: kept,
                    w_smem,
                    group,
                    m,
                    lambda i, w: plgpu.wgmma(acc, x_smem[i], w),
                )

            def accumulate(acc):
                fetch(jnp.int32(0))
                plgpu.emit_pipeline(
                    lambda index, *refs: multiply(index, acc, refs[:m], refs[m:]),
                    grid=(steps, groups),
                    in_specs=[
                        *(
                            _spec(
                                (None, tile_m, _UNITS),
                                lambda step, group, i=i: (group * m + i, row, step),
                                x.dtype,
                            )
                            for i in range(m)
                        ),
                        *(
                            _spec(
                                (_UNITS, None, tile_p),
                                lambda step, group, j=j: (step, group * n + j, column),
                                x.dtype,
                            )
                            for j in range(n)
                        ),
                    ],
                    max_concurrent_steps=config.stages,
                )(*[x_gmem] * m, *[values_gmem] * n)
                return acc[...]

            return pl.run_scoped(accumulate, plgpu.ACC((tile_m, tile_p), jnp.float32))

        result = pl.run_scoped(
            scope,
            _smem((2, _UNITS, tile_p), jnp.int32),
            _smem((min(m, _TILES), _UNITS, tile_p), x.dtype),
            plgpu.Barrier(num_barriers=2),
        )
        _store(
            [(result.astype(x.dtype), y_gmem.at[pl.ds(row * tile_m, tile_m), columns])]
        )

    y = _launch(
        body,
        (x, values, words),
        jax.ShapeDtypeStruct((x.shape[1], p), x.dtype),
        programs=row_tiles * (p // tile_p),
        name="nm_matmul",
        interpret=interpret,
    )
    return y[:rows]


def _transposed(x, values, words, n, m, config, interpret):
    rows, (units, side_v, p) = x.shape[0], values.shape
    groups = side_v // n
    x = whole_tiles(x)
    tile_m, tile_p, splits = config.tile_m, config.tile_p, config.splits
    row_tiles, unit_tiles = pl.cdiv(rows, tile_m), pl.cdiv(units, _UNITS)
    steps = pl.cdiv(p // tile_p, splits)

    def body(x_gmem, values_gmem, words_gmem, y_gmem):
        tile, row = _divmod(lax.axis_index("tile"), row_tiles)
        tile, split = _divmod(tile, splits)
        first, group = _divmod(tile, groups)
        # The last part may go beyond the columns, where all is zero.
        column = lambda step: split * steps + step

        def scope(w_smem):
            def accumulate(*accs):
                def multiply(_, x_smem, words_smem, *values_smem):
                    _expand(
                        words_smem[...],
                        # Again for each tile: the sums take the registers.
                        lambda: [ref[...] for ref in values_smem],
                        w_smem,
                        group,
                        m,
                        lambda i, w: plgpu.wgmma(accs[i], w, _turned(x_smem)),
                    )

                plgpu.emit_pipeline(
                    multiply,
                    grid=(steps,),
                    in_specs=[
                        _spec((tile_m, tile_p), lambda s: (row, column(s)), x.dtype),
                        _spec(
                            (_UNITS, tile_p), lambda s: (first, column(s)), jnp.int32
                        ),
                        *(
                            _spec(
                                (_UNITS, None, tile_p),
                                lambda s, j=j: (first, group * n + j, column(s)),
                                x.dtype,
                            )
                            for j in range(n)
                        ),
                    ],
                    max_concurrent_steps=config.stages,
                )(x_gmem, words_gmem, *[values_gmem] * n)
                return [acc[...] for acc in accs]

            return pl.run_scoped(
                accumulate, *[plgpu.ACC((_UNITS, tile_m), jnp.float32)] * m
            )

        results = pl.run_scoped(scope, _smem((min(m, _TILES), _UNITS, tile_p), x.dtype))
        at = pl.ds(first * _UNITS, _UNITS), pl.ds(row * tile_m, tile_m)
        y_gmem = y_gmem.at[split]
        _store([(r, y_gmem.at[(group * m + i, *at)]) for i, r in enumerate(results)])

    y = _launch(
        body,
        (x, values, words),
        jax.ShapeDtypeStruct(
            (splits, groups * m, units, row_tiles * tile_m), jnp.float32
        ),
        programs=unit_tiles * groups * splits * row_tiles,
        name="nm_matmul_transposed",
        interpret=interpret,
    )
    y = jnp.sum(y, axis=0).astype(x.dtype)
    return y.transpose(2, 1, 0).reshape(y.shape[2], -1)[:rows]


def sampled(
    x: jax.Array,
    dy: jax.Array,
    words: jax.Array,
    *,
    n: int,
    m: int,
    dtype,
    config: Config,
    interpret=None,
) -> jax.Array:
    """The entries of ``x.T @ dy`` at the places; the contract is in ``_spec``.

    Args:
        x: ``[rows, k]``, bfloat16 or float16.
        dy: ``[rows, p]``, dtype of x.
        words: uint32, the packed places.
        n: kept of every m.
        m: group size.
        dtype: of the result, that of x or float32.
        config: tile sizes; ``tile_m`` is the rows that one step multiplies.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        ``[k * n / m, p]`` of ``dtype``.
    """
    (rows, k), p = x.shape, dy.shape[1]
    side_v, _, side_w = unit(n, m)
    units, groups = k // side_w, side_v // n
    x, dy = _by_place(x, units), whole_tiles(dy)
    words = lax.bitcast_convert_type(words, jnp.int32)
    tile_m, tile_p = config.tile_m, config.tile_p
    steps, columns = pl.cdiv(rows, tile_m), p // tile_p

    def body(x_gmem, dy_gmem, words_gmem, values_gmem):
        tile, column = _divmod(lax.axis_index("tile"), columns)
        first, group = _divmod(tile, groups)
        at = pl.ds(first * _UNITS, _UNITS), pl.ds(column * tile_p, tile_p)

        def dense(some):
            """Tiles of the product for ``some`` of the group's rows."""

            def accumulate(*accs):
                def multiply(_, dy_smem, *x_smem):
                    for acc, ref in zip(accs, x_smem, strict=True):
                        plgpu.wgmma(acc, _turned(ref), dy_smem)
                    plgpu.wgmma_wait(_DELAY * len(accs))

                plgpu.emit_pipeline(
                    multiply,
                    grid=(steps,),
                    in_specs=[
                        _spec((tile_m, tile_p), lambda s: (s, column), x.dtype, _DELAY),
                        *(
                            _spec(
                                (None, tile_m, _UNITS),
                                lambda s, i=i: (group * m + i, s, first),
                                x.dtype,
                                _DELAY,
                            )
                            for i in some
                        ),
                    ],
                    max_concurrent_steps=config.stages,
                )(dy_gmem, *[x_gmem] * len(some))
                return [acc[...] for acc in accs]

            return pl.run_scoped(
                accumulate, *[plgpu.ACC((_UNITS, tile_p), jnp.float32)] * len(some)
            )

        def scope(words_smem, barrier, *kept_smem):
            plgpu.copy_gmem_to_smem(words_gmem.at[at], words_smem, barrier)
            kept = []
            for low in range(0, m, _TILES):
                some = range(low, min(low + _TILES, m))
                if low:  # they would take the registers of the sums
                    for ref, entries in zip(kept_smem, kept, strict=True):
                        ref[...] = entries
                    plgpu.commit_smem()
                sums = dense(some)
                if not low:
                    plgpu.barrier_wait(barrier)
                kept = [ref[...] for ref in kept_smem] if low else [sums[0]] * n
                word = words_smem[...]
                for j in range(n):
                    for i, dense_i in zip(some, sums, strict=True):
                        here = _is_at(i, word, group, j, n, m)
                        kept[j] = jnp.where(here, dense_i, kept[j])
            return kept

        kept = pl.run_scoped(
            scope,
            _smem((_UNITS, tile_p), jnp.int32),
            plgpu.Barrier(),
            *[_smem((_UNITS, tile_p), jnp.float32)] * (n if m > _TILES else 0),
        )
        _store(
            [
                (entries.astype(dtype), values_gmem.at[at[0], group * n + j, at[1]])
                for j, entries in enumerate(kept)
            ]
        )

    values = _launch(
        body,
        (x, dy, words),
        jax.ShapeDtypeStruct((units, side_v, p), dtype),
        programs=pl.cdiv(units, _UNITS) * groups * columns,
        name="nm_matmul_sampled",
        interpret=interpret,
    )
    return values.reshape(units * side_v, p)


def _is_at(i, word, group, j, n, m):
    """Where the j-th of a group's n entries is in its row i.

    Compared where it lies in its word: a shifted place would be held in registers for
    all of the i.
    """
    bits = index_bits(m)
    low = bits * (group * n + j)
    here = lax.shift_left(jnp.int32(2**bits - 1), low)
    other = word ^ lax.shift_left(jnp.int32(i), low)
    return (other & here) == 0


def _expand(word, values, w_smem, group, m, multiply):
    """Calls ``multiply(i, tile i of a group)`` for each of the dense tiles.

    ``values()`` gives the group's kept rows, and is called for each tile.
    """
    slots = w_smem.shape[0]
    for i in range(m):
        kept = values()
        entry = jnp.zeros(word.shape, w_smem.dtype)
        for j, value in enumerate(kept):
            at = _is_at(i, word, group, j, len(kept), m)
            entry = jnp.where(at, value, entry)
        w_smem[i % slots] = entry
        if slots <= i + 1 < m:
            # For the next tile's buffer. Each warp waits for its part of a product
            # alone: that all have, the barrier of the commit makes sure.
            plgpu.wgmma_wait(slots - 2)
        plgpu.commit_smem()
        multiply(i, w_smem.at[i % slots])
    plgpu.wgmma_wait(0)
    plgpu.commit_smem()


def _store(pieces):
    """Copies arrays to their places in GMEM, through two buffers; all are alike."""
    array, _ = pieces[0]

    def scope(smem):
        for number, (array, place) in enumerate(pieces):
            if number > 1:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            smem[number % 2] = array
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.at[number % 2], place)
        plgpu.wait_smem_to_gmem(0)

    # A scope of its own, after the pipeline's: the two share the same SMEM.
    pl.run_scoped(scope, _smem((min(2, len(pieces)), *array.shape), array.dtype))


def _launch(body, operands, out_type, *, programs, name, interpret):
    """Runs ``body(*operand refs, output ref)`` in each program."""
    kwargs = {}
    if interpret:
        # Simulates the warpgroup, TMA and barriers on the CPU; not in jax 0.10.
        if interpret is True:
            # pyrefly: ignore[missing-attribute]
            interpret = plgpu.InterpretGPUParams()
        kwargs["interpret"] = interpret
    out = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(programs,),
        grid_names=("tile",),
        kernel_name=name,
        # The default differs between versions of jax: say which.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **kwargs,
    )(*operands)
    return varying(out, operands)


def _by_place(x, units):
    """x as [rows of a unit, rows, units]: its copies are of one row of each unit."""
    rows = x.shape[0]
    # The tiling in SMEM is applied to GMEM as well, so it must divide both axes.
    more = [(0, -rows % 8), (0, -units % _UNITS), (0, 0)]
    return jnp.pad(x.reshape(rows, units, -1), more).transpose(2, 0, 1)


def _divmod(number, by: int):
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _turned(ref):
    return ref.transpose((1, 0))


def _spec(shape, index, dtype, delay_release=0):
    return plgpu.BlockSpec(
        shape,
        index,
        transforms=transforms(shape[-1], dtype),
        delay_release=delay_release,
    )


def _smem(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))
