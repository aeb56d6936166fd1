"""Block-sparse products on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan. Operands and index lists stay in GMEM. A program reads its bounds and its
list entries from there as scalars, inside the pipeline's index maps, so the contents of
a layout are data: new contents do not recompile. Per pipeline step TMA brings
``unroll`` pieces, each [tile_m, tile_k] of x and [tile_k, side_out] of a block, into
one of ``stages`` buffers in SMEM, swizzled as wide as the sides allow (64, 32 or 16
columns of 16 bits). The float32 accumulator never leaves the registers of the one or
two warpgroups that compute; the result goes through SMEM once, in the output's dtype.
What TMA reads outside of an array is zero and what it writes there is dropped: that
covers the last rows of x, the pieces beyond the end of a list and blocks that are
smaller than wgmma's 64 rows.

Grid. One axis, ``tile`` (ctaid.x, so no limit below 2**31), in strips of ``group`` row
tiles: neighbours share the blocks of a column, a strip shares its rows of x in L2.
dsd has a program per (tile of rows, tile of columns); sdd one per (slot, part of the
block of at most tile_m x 256). Programs of padding slots and of empty columns run a
pipeline of no step and store the accumulator's zeros.

``warpgroups=1``: one warpgroup copies and computes; several such programs share a
multiprocessor and cover each other's start and end. ``warpgroups=2``: a third one
copies, two compute tile_m / 2 rows each; one program fills a multiprocessor. With
``cluster`` such programs, of one column and adjacent row tiles, get each block by one
multicast copy.

Dtypes: bfloat16 and float16 in; out the same, for sdd also float32.
Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and 0.11.2, no
spills; results proven by simulation. Not yet run on a GPU: speed is unmeasured.
"""

import functools
import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul._spec import Config
from pallas_kernels.grouped_matmul.mosaic_gpu import (
    row_and_column,
    varying,
    whole_tiles,
)

# wgmma reads its operands from SMEM while the warpgroup goes on: a buffer is handed
# back one step late, after a wait for all products but those of the last step (each
# call of wgmma commits a group of its own).
_DELAY = 1
# Registers that the copying warpgroup keeps; the computing ones share the rest.
_COPY_REGISTERS = 40


def transforms(columns: int, dtype) -> tuple:
    """The layout in SMEM of a tile: the widest swizzle that divides its columns."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(columns * itemsize, 128)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)


def _transposed(ref):
    return ref.transpose((1, 0))


def _call(operands, body, *, name, out_type, programs, config, interpret):
    kwargs = {}
    if interpret:
        # Simulates the warpgroups, TMA and barriers on the CPU; not in jax 0.10.
        if interpret is True:
            # pyrefly: ignore[missing-attribute]
            interpret = plgpu.InterpretGPUParams()
        kwargs["interpret"] = interpret
    if config.warpgroups > 1:
        kwargs.update(num_threads=config.warpgroups + 1, thread_name="warpgroup")
    if config.cluster > 1:
        kwargs.update(cluster=(config.cluster,), cluster_names=("member",))
    kernel = plgpu.kernel(
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
    )
    return varying(kernel(*operands), operands)


def _multiply(
    operands,
    in_specs,
    multiply,
    store,
    *,
    steps,
    products,
    acc_shape,
    out_dtype,
    config: Config,
):
    """Runs the pipeline into an accumulator and stores it.

    ``multiply(acc, rows, *buffers)`` issues the ``products`` of one step for a
    warpgroup's slice ``rows`` of the tile; ``store(buffer, first_row, first_column)``
    copies a buffer to its place in the output. ``acc_shape`` is the whole tile's.
    """
    tile_rows, columns = acc_shape
    warpgroups = config.warpgroups
    rows = tile_rows // warpgroups

    if warpgroups == 1:

        def accumulate(acc):
            def step(_, *buffers):
                multiply(acc, slice(None), *buffers)
                plgpu.wgmma_wait(_DELAY * products)

            plgpu.emit_pipeline(
                step,
                grid=(steps,),
                in_specs=in_specs,
                max_concurrent_steps=config.stages,
            )(*operands)
            return acc[...]

        result = pl.run_scoped(accumulate, plgpu.ACC((rows, columns), jnp.float32))

        def epilogue(out_smem):
            out_smem[...] = result.astype(out_dtype)
            plgpu.commit_smem()
            store(out_smem, 0, 0)
            plgpu.wait_smem_to_gmem(0)

        # A scope of its own, after the pipeline's: the two share the same SMEM.
        pl.run_scoped(
            epilogue,
            plgpu.SMEM(
                (rows, columns), out_dtype, transforms=transforms(columns, out_dtype)
            ),
        )
        return

    warpgroup = lax.axis_index("warpgroup")
    # Columns that leave at once: one swizzled tile, so that SMEM is left for stages.
    wide = math.gcd(columns, 128 // jnp.dtype(out_dtype).itemsize)

    def scope(out_smem):
        def compute(pipeline):
            def with_accumulator(acc):
                pipeline(acc)
                result = acc[...].astype(out_dtype)
                for c in range(columns // wide):
                    if c:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[warpgroup] = result[:, c * wide : (c + 1) * wide]
                    plgpu.commit_smem()
                    store(out_smem.at[warpgroup], warpgroup * rows, c * wide)
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(with_accumulator, plgpu.ACC((rows, columns), jnp.float32))

        def step(_, *buffers_and_acc):
            *buffers, acc = buffers_and_acc
            multiply(acc, pl.ds(warpgroup * rows, rows), *buffers)
            plgpu.wgmma_wait(_DELAY * products)
            return acc

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            in_specs=in_specs,
            max_concurrent_steps=config.stages,
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            memory_registers=_COPY_REGISTERS,
            compute_context=compute,
        )(*operands)

    pl.run_scoped(
        scope,
        plgpu.SMEM(
            (warpgroups, rows, wide),
            out_dtype,
            transforms=transforms(wide, out_dtype),
        ),
        collective_axes="warpgroup",
    )


def dsd(
    x: jax.Array,
    blocks: jax.Array,
    order: jax.Array | None,
    source: jax.Array,
    ptr: jax.Array,
    *,
    transpose: bool,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Multiplies dense rows by a block-sparse matrix, as ``_spec`` defines it.

    Args:
        x: [m, tiles_in * side_in], bfloat16 or float16.
        blocks: [slots, bk, bn] of x's dtype.
        order: int32 [slots], or None for the identity.
        source: int32 [slots].
        ptr: int32 [tiles_out + 1].
        transpose: multiply by each block transposed.
        config: tile sizes; ``tile_k`` divides side_in.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [m, tiles_out * side_out] of x's dtype.
    """
    rows = x.shape[0]
    x = whole_tiles(x)
    m = x.shape[0]
    slots, bk, bn = blocks.shape
    side_in, side_out = (bn, bk) if transpose else (bk, bn)
    tiles_in, tiles_out = x.shape[1] // side_in, ptr.shape[0] - 1
    # The programs of a cluster take row tiles one below the other of the same column.
    cluster = config.cluster
    clusters = pl.cdiv(m, config.tile_m * cluster)
    tile_k, unroll = config.tile_k, config.unroll
    parts = side_in // tile_k
    # Both operands of a wgmma need the same swizzle, which divides the contiguous side
    # of each: tile_k of x, and of a block side_out or, transposed, tile_k.
    swizzled = transforms(tile_k if transpose else math.gcd(tile_k, side_out), x.dtype)

    def body(x_gmem, blocks_gmem, *refs):
        order_gmem = None if order is None else refs[0]
        source_gmem, ptr_gmem, y_gmem = refs[-3:]
        row, column = row_and_column(
            lax.axis_index("tile"), clusters, tiles_out, max(config.group // cluster, 1)
        )
        if cluster > 1:
            row = row * cluster + lax.axis_index("member")
        first, last = ptr_gmem[column], ptr_gmem[column + 1]
        pieces = (last - first) * parts

        def place(step, u):
            """Which entry and which part of it piece u of a step is, and if it is."""
            piece = step * unroll + u
            entry = first + lax.div(piece, jnp.int32(parts))
            part = lax.rem(piece, jnp.int32(parts))
            if unroll == 1:
                return entry, part, None
            # A step past the end reads beyond its array, which TMA answers by zeros.
            return jnp.minimum(entry, slots - 1), part, piece < pieces

        def x_index(step, *, u):
            entry, part, inside = place(step, u)
            tile = source_gmem[entry]
            if inside is not None:
                tile = jnp.where(inside, tile, tiles_in)
            return row, tile * parts + part

        def block_index(step, *, u):
            entry, part, inside = place(step, u)
            slot = entry if order_gmem is None else order_gmem[entry]
            if inside is not None:
                slot = jnp.where(inside, slot, slots)
            return (slot, 0, part) if transpose else (slot, part, 0)

        spec = functools.partial(
            plgpu.BlockSpec, transforms=swizzled, delay_release=_DELAY
        )
        block_spec = spec
        if cluster > 1:
            block_spec = functools.partial(spec, collective_axes=("member",))
        x_shape = (config.tile_m, tile_k)
        block_shape = (
            (None, side_out, tile_k) if transpose else (None, tile_k, side_out)
        )

        def multiply(acc, rows, *buffers):
            for u in range(unroll):
                block = buffers[unroll + u]
                plgpu.wgmma(
                    acc,
                    buffers[u].at[rows],
                    _transposed(block) if transpose else block,
                )

        def store(buffer, first_row, first_column):
            at = pl.ds(row * config.tile_m + first_row, buffer.shape[0])
            to = pl.ds(column * side_out + first_column, buffer.shape[1])
            plgpu.copy_smem_to_gmem(buffer, y_gmem.at[at, to])

        _multiply(
            [x_gmem] * unroll + [blocks_gmem] * unroll,
            [
                *(
                    spec(x_shape, functools.partial(x_index, u=u))
                    for u in range(unroll)
                ),
                *(
                    block_spec(block_shape, functools.partial(block_index, u=u))
                    for u in range(unroll)
                ),
            ],
            multiply,
            store,
            steps=lax.div(pieces + (unroll - 1), jnp.int32(unroll)),
            products=unroll,
            acc_shape=(config.tile_m, side_out),
            out_dtype=x.dtype,
            config=config,
        )

    lists = [source, ptr] if order is None else [order, source, ptr]
    y = _call(
        (x, blocks, *lists),
        body,
        name="block_sparse_matmul_dsd" + ("_transposed" if transpose else ""),
        out_type=jax.ShapeDtypeStruct((m, tiles_out * side_out), x.dtype),
        programs=clusters * tiles_out,
        config=config,
        interpret=interpret,
    )
    return y if m == rows else y[:rows]


def sdd(
    x: jax.Array,
    dy: jax.Array,
    rows: jax.Array,
    cols: jax.Array,
    count: jax.Array,
    *,
    block_shape: tuple[int, int],
    dtype,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Computes the stored blocks of ``x.T @ dy``, as ``_spec`` defines it.

    Args:
        x: [m, tiles_k * bk], bfloat16 or float16.
        dy: [m, tiles_n * bn] of x's dtype.
        rows: int32 [slots], block row of each slot.
        cols: int32 [slots], block column of each slot.
        count: int32 [], slots in use.
        block_shape: (bk, bn).
        dtype: of the result, x's or float32.
        config: tile sizes; here ``tile_m`` is the rows of a block that one program
            computes and ``tile_k`` the rows of x that one step multiplies.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [slots, bk, bn] of ``dtype``, zeros at slots beyond the count.
    """
    x, dy = whole_tiles(x), whole_tiles(dy)
    m = x.shape[0]
    slots = rows.shape[0]
    bk, bn = block_shape
    tile_k, tile_rows = config.tile_k, config.tile_m
    parts = pl.cdiv(bk, tile_rows)
    # The same swizzle for both; its width divides every column that a copy starts at.
    swizzled = transforms(math.gcd(bk, bn, tile_rows), x.dtype)

    def body(x_gmem, dy_gmem, rows_gmem, cols_gmem, count_gmem, out_gmem):
        tile = lax.axis_index("tile")
        slot, part = lax.div(tile, jnp.int32(parts)), lax.rem(tile, jnp.int32(parts))
        row, column = rows_gmem[slot], cols_gmem[slot]
        steps = jnp.where(slot < count_gmem[0], jnp.int32(pl.cdiv(m, tile_k)), 0)
        spec = functools.partial(
            plgpu.BlockSpec, transforms=swizzled, delay_release=_DELAY
        )

        def multiply(acc, acc_rows, x_smem, dy_smem):
            plgpu.wgmma(acc, _transposed(x_smem.at[:, acc_rows]), dy_smem)

        def store(buffer, first_row, first_column):
            plgpu.copy_smem_to_gmem(
                buffer,
                out_gmem.at[
                    slot,
                    pl.ds(part * tile_rows + first_row, buffer.shape[0]),
                    pl.ds(first_column, buffer.shape[1]),
                ],
            )

        _multiply(
            [
                # Where tile_rows is more than is left of the block, this reads columns
                # of its neighbour, and the store drops the rows they end up in.
                x_gmem.at[:, pl.ds(row * bk + part * tile_rows, tile_rows)],
                dy_gmem,
            ],
            [
                spec((tile_k, tile_rows), lambda step: (step, 0)),
                spec((tile_k, bn), lambda step: (step, column)),
            ],
            multiply,
            store,
            steps=steps,
            products=1,
            acc_shape=(tile_rows, bn),
            out_dtype=dtype,
            config=config,
        )

    return _call(
        (x, dy, rows, cols, count.reshape(1)),
        body,
        name="block_sparse_matmul_sdd",
        out_type=jax.ShapeDtypeStruct((slots, bk, bn), dtype),
        programs=slots * parts,
        config=config,
        interpret=interpret,
    )
