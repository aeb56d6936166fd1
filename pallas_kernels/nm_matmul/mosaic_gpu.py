"""The product with a condensed N:M matrix on Hopper: Pallas Mosaic GPU, TMA and wgmma.

Memory plan. GMEM holds the matrix as values and packed places alone. A unit
(``_spec.unit``) is one word of places and the rows of values it is for. Per pipeline
step TMA brings the n kept rows of one group of 64 units and ``tile_p`` columns, and the
m columns of x that they meet, one buffer of [tile_m, 64] each, into one of ``stages``
buffers in SMEM. The words of 64 units are copied once for all their groups, one such
copy ahead. The warpgroup loads words and values into registers in the layout of wgmma,
compares each place with i in [0, m), and stores tiles [64, tile_p] of the dense matrix
to SMEM, four at a time, which wgmma multiplies. So HBM and L2 read n / m of the weight
and its places; the float32 accumulator never leaves the registers; the result goes
through SMEM once. What TMA reads outside of an array is zero: that covers the last
units.

x is laid out beforehand as [rows of a unit, rows, units], so that column i of every
group is one tile: a copy of x, which is small where this kernel pays.

Grid. One axis, ``tile``, column tiles by row tiles: neighbours share the weight.

Serves the forward product alone; its derivatives are XLA's. Dtypes: bfloat16 and
float16. Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2, no
spills; results proven by simulation. Not yet run on a GPU: speed is unmeasured.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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


def product(
    x: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    n: int,
    m: int,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Dense times condensed; the contract is in ``_spec``.

    Args:
        x: ``[rows, k]``, bfloat16 or float16.
        values: ``[k * n / m, p]``, dtype of x.
        words: uint32, the packed places.
        n: kept of every m.
        m: group size.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        ``[rows, p]``, dtype of x.
    """
    (rows, k), p = x.shape, values.shape[1]
    side_v, _, side_w = unit(n, m)
    units, groups, bits = k // side_w, side_v // n, index_bits(m)
    tile_m, tile_p = config.tile_m, config.tile_p
    # The tiling in SMEM is applied to GMEM as well, so it must divide both axes.
    more = [(0, -rows % 8), (0, -units % _UNITS), (0, 0)]
    x = jnp.pad(x.reshape(rows, units, side_w), more).transpose(2, 0, 1)
    values = values.reshape(units, side_v, p)
    words = lax.bitcast_convert_type(words, jnp.int32)
    row_tiles, steps = pl.cdiv(rows, tile_m), pl.cdiv(units, _UNITS)
    swizzled = _transforms(x.dtype)

    def body(x_gmem, values_gmem, words_gmem, y_gmem):
        tile = lax.axis_index("tile")
        row = lax.rem(tile, jnp.int32(row_tiles))
        column = lax.div(tile, jnp.int32(row_tiles))
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

                word = words_smem[slot]
                kept = [ref[...] for ref in values_smem]
                places = []
                for j in range(n):
                    shift = jnp.broadcast_to(bits * (group * n + j), word.shape)
                    place = lax.shift_right_logical(word, shift)
                    places.append(place & (2**bits - 1))
                for low in range(0, m, _TILES):
                    some = range(low, min(low + _TILES, m))
                    for i in some:
                        entry = jnp.zeros(word.shape, x.dtype)
                        for place, value in zip(places, kept, strict=True):
                            entry = jnp.where(place == i, value, entry)
                        w_smem[i - low] = entry
                    plgpu.commit_smem()
                    for i in some:
                        plgpu.wgmma(acc, x_smem[i], w_smem.at[i - low])
                    plgpu.wgmma_wait(0)

            def accumulate(acc):
                fetch(jnp.int32(0))
                plgpu.emit_pipeline(
                    lambda index, *refs: multiply(index, acc, refs[:m], refs[m:]),
                    grid=(steps, groups),
                    in_specs=[
                        *(
                            plgpu.BlockSpec(
                                (None, tile_m, _UNITS),
                                lambda step, group, i=i: (group * m + i, row, step),
                                transforms=swizzled,
                            )
                            for i in range(m)
                        ),
                        *(
                            plgpu.BlockSpec(
                                (_UNITS, None, tile_p),
                                lambda step, group, j=j: (step, group * n + j, column),
                                transforms=swizzled,
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
            plgpu.SMEM(
                (2, _UNITS, tile_p), jnp.int32, transforms=_transforms(jnp.int32)
            ),
            plgpu.SMEM((min(m, _TILES), _UNITS, tile_p), x.dtype, transforms=swizzled),
            plgpu.Barrier(num_barriers=2),
        )

        def epilogue(y_smem):
            y_smem[...] = result.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                y_smem, y_gmem.at[pl.ds(row * tile_m, tile_m), columns]
            )
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            epilogue, plgpu.SMEM((tile_m, tile_p), x.dtype, transforms=swizzled)
        )

    kwargs = {}
    if interpret:
        # Simulates the warpgroup, TMA and barriers on the CPU; not in jax 0.10.
        if interpret is True:
            # pyrefly: ignore[missing-attribute]
            interpret = plgpu.InterpretGPUParams()
        kwargs["interpret"] = interpret
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[1], p), x.dtype),
        grid=(row_tiles * (p // tile_p),),
        grid_names=("tile",),
        kernel_name="nm_matmul",
        # The default differs between versions of jax: say which.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **kwargs,
    )(x, values, words)
    return _varying(y, (x, values, words))[:rows]


def _transforms(dtype) -> tuple:
    """The layout in SMEM of a tile: rows of 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(128)


def _varying(out, operands):
    """Gives ``out`` the operands' varying axes, inside shard_map.

    ``plgpu.kernel`` forgets them, and a result that differs between devices would pass
    as replicated.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = frozenset().union(*axes) - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out
