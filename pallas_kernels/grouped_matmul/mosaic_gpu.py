"""Products of rows sorted by group on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan of ``product``. A row tile is ``tile_m`` rows of one group, from a multiple
of 8 on; XLA lists the tiles beforehand (group, start, the rows that count), so a
program looks nothing up. One warpgroup copies: per step TMA brings a piece of x
[tile_m, 64] and one of the group's matrix into one of ``stages`` buffers in SMEM,
swizzled. Two warpgroups compute half of the tile's columns each, accumulators in
registers. Copies run ahead across tiles: while a result is stored, the buffers fill for
the next tile. A result goes through SMEM by pieces of 64 x 64: where all 64 rows are of
the group, in one swizzled copy; at a group's ends by copies of 2**i rows each, so that
no row of another group is touched. The tail is a group of its own, of no step: the
accumulators' zeros are stored.

Rows of other groups, or beyond the array (zeros then), are multiplied and not stored. A
row of a product depends on that row of x alone: nothing leaks, NaN neither.

Grid. ``programs`` persistent ones, one per multiprocessor, take the tiles in turn, in
strips of ``group`` row tiles, column by column: neighbours share matrix and rows in L2.
How many tiles there are is data; a program that gets none leaves.

Dtypes: bfloat16 and float16 in, float32 sums; out the same.
Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and 0.11.2, no
spills; results proven by simulation. Not yet run on a GPU: speed is unmeasured.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul._spec import HOPPER_PIECE as _PIECE
from pallas_kernels.grouped_matmul._spec import Config

# Warpgroups that compute; one more copies.
_COMPUTE = 2
# Registers per thread: 64 K of them are shared by 128 threads of each warpgroup.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 40, 232
# Rows that a swizzled tile in SMEM is high; copies start at a multiple.
_ROWS = 8


def product(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    transpose: bool,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Multiplies each row by its group's matrix, as ``_spec`` defines it.

    Args:
        x: [m, k], or with ``transpose`` [m, n]; bfloat16 or float16.
        w: [groups, k, n] of x's dtype.
        sizes: int32 [groups].
        transpose: multiply by each matrix transposed.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [m, n], or [m, k], of x's dtype; zeros in the tail.
    """
    rows = x.shape[0]
    x = _whole_tiles(x)
    m = x.shape[0]
    groups, k, n = w.shape
    inner, width = (n, k) if transpose else (k, n)
    deep, wide = config.tile_k, config.tile_n
    if transpose:
        deep, wide = wide, deep
    tile_m, stages = config.tile_m, config.stages
    steps, columns, share = inner // deep, pl.cdiv(width, wide), wide // _COMPUTE
    tiles, count = row_tiles(sizes, m, tile_m)

    def body(x_gmem, w_gmem, tiles_gmem, count_gmem, y_gmem, *scratch):
        x_smem, w_smem, whole_smem, part_smem, full, free = scratch
        warpgroup = lax.axis_index("warpgroup")

        def walk(visit):
            """Calls ``visit(tile, column, step)`` for this program's tiles in turn."""
            row_tiles = count_gmem[0]
            program, programs = lax.axis_index("program"), jnp.int32(config.programs)

            def one(i, step):
                row, column = _row_and_column(
                    program + i * programs, row_tiles, columns, config.group
                )
                tile = [tiles_gmem[row, field] for field in range(4)]
                return visit(tile, column, step)

            mine = lax.div(row_tiles * columns - program + programs - 1, programs)
            lax.fori_loop(jnp.int32(0), mine, one, jnp.int32(0))

        def steps_of(group):
            return jnp.where(group < groups, jnp.int32(steps), 0)

        def copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def visit(tile, column, step):
                group, start, _, _ = tile

                def one(i, step):
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(free.at[slot])
                    across, along = pl.ds(column * wide, wide), pl.ds(i * deep, deep)
                    plgpu.copy_gmem_to_smem(
                        x_gmem.at[pl.ds(start * _ROWS, tile_m), along],
                        x_smem.at[slot],
                        full.at[slot],
                    )
                    place = (across, along) if transpose else (along, across)
                    plgpu.copy_gmem_to_smem(
                        w_gmem.at[(group, *place)], w_smem.at[slot], full.at[slot]
                    )
                    return step + 1

                return lax.fori_loop(jnp.int32(0), steps_of(group), one, step)

            walk(visit)
            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])

        def compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            def visit(tile, column, step):
                group, start, first, last = tile
                mine = pl.ds(warpgroup * share, share)

                def accumulate(acc):
                    def one(i, step):
                        slot = lax.rem(step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        if transpose:
                            piece = w_smem.at[slot, mine].transpose((1, 0))
                        else:
                            piece = w_smem.at[slot, :, mine]
                        plgpu.wgmma(acc, x_smem.at[slot], piece)
                        # All but this step's, which reads its buffer meanwhile.
                        plgpu.wgmma_wait(1)
                        before = lax.rem(step + (stages - 1), jnp.int32(stages))

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[before])

                        return step + 1

                    end = lax.fori_loop(jnp.int32(0), steps_of(group), one, step)
                    plgpu.wgmma_wait(0)

                    @pl.when(group < groups)
                    def _():
                        final = lax.rem(end + (stages - 1), jnp.int32(stages))
                        plgpu.barrier_arrive(free.at[final])

                    return acc[...], end

                result, end = pl.run_scoped(
                    accumulate, plgpu.ACC((tile_m, share), jnp.float32)
                )
                result = result.astype(x.dtype)
                for r in range(0, tile_m, _PIECE):
                    for c in range(0, share, _PIECE):
                        row = start * _ROWS + r
                        at = column * wide + warpgroup * share + c
                        _store(
                            result[r : r + _PIECE, c : c + _PIECE],
                            y_gmem.at[:, pl.ds(at, _PIECE)],
                            row,
                            first,
                            last,
                            whole_smem.at[warpgroup],
                            part_smem.at[warpgroup],
                        )
                return end

            walk(visit)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup < _COMPUTE, compute, copy)

    piece = plgpu.SMEM((_COMPUTE, _PIECE, _PIECE), x.dtype)
    w_shape = (wide, deep) if transpose else (deep, wide)
    y = _call(
        (x, w, tiles, count),
        body,
        name="grouped_matmul" + ("_transposed" if transpose else ""),
        out_type=jax.ShapeDtypeStruct((m, width), x.dtype),
        scratch_types=[
            plgpu.SMEM((stages, tile_m, deep), x.dtype),
            plgpu.SMEM((stages, *w_shape), x.dtype),
            piece,
            piece,
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=stages),
        ],
        config=config,
        interpret=interpret,
    )
    return y if m == rows else y[:rows]


def row_tiles(sizes: jax.Array, m: int, tile_m: int) -> tuple[jax.Array, jax.Array]:
    """Lists the row tiles, each of one group or of the tail.

    A group's tiles start at the multiple of 8 at or before its first row. The tail
    counts as one group more.

    Args:
        sizes: int32 [groups].
        m: rows in all.
        tile_m: rows of a tile, a multiple of 8.

    Returns:
        int32 [most, 4], of which the first ``count`` are tiles: group, start / 8, first
        row of the group in it, last such row + 1; and count, int32 [1].
    """
    groups = sizes.shape[0]
    index = jnp.arange(groups + 1, dtype=jnp.int32)
    up_to = index[:, None] >= index[None, :]

    def running(values):
        # For so few entries a sum under a mask, which XLA fuses, costs less than a scan.
        return jnp.sum(jnp.where(up_to, values, 0), axis=1, dtype=jnp.int32)

    sizes = jnp.append(jnp.maximum(sizes, 0), jnp.int32(m))
    ends = jnp.minimum(running(sizes), m)
    starts = ends - jnp.minimum(sizes, ends)
    starts = jnp.where(index == groups, jnp.roll(ends, 1), starts)
    aligned = lax.div(starts, jnp.int32(_ROWS)) * _ROWS
    tiles = lax.div(ends - aligned + (tile_m - 1), jnp.int32(tile_m))
    tiles = jnp.where(ends > starts, tiles, 0)
    after = running(tiles)
    # Each part has at most 7 rows before its start and tile_m - 1 beyond its end.
    most = (m + min(groups + 1, m) * (tile_m + _ROWS - 2)) // tile_m
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= after[None, :], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups)
    start = aligned[group] + (tile - (after - tiles)[group]) * tile_m
    first = jnp.maximum(starts[group], start)
    last = jnp.minimum(ends[group], start + tile_m)
    start = lax.div(start, jnp.int32(_ROWS))
    return jnp.stack([group, start, first, last], axis=1), after[-1:]


def _store(piece, y_gmem, row, first, last, whole_smem, part_smem):
    """Stores those of 64 rows from ``row`` on that lie in [first, last)."""
    # What was stored before may still be read.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def whole():
        whole_smem[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole_smem, y_gmem.at[pl.ds(row, _PIECE)])

    def part():
        part_smem[...] = piece
        plgpu.commit_smem()
        skipped = jnp.maximum(first - row, 0)
        size = jnp.minimum(last - row, _PIECE) - skipped
        # TMA copies a number of rows fixed beforehand: one copy per power of two.
        height = _PIECE // 2
        while height:

            @pl.when(size & height != 0)
            def _(skipped=skipped, height=height):
                plgpu.copy_smem_to_gmem(
                    part_smem.at[pl.ds(skipped, height)],
                    y_gmem.at[pl.ds(row + skipped, height)],
                )

            skipped = skipped + (size & height)
            height //= 2

    inside = (first <= row) & (row + _PIECE <= last)
    some = (first < row + _PIECE) & (row < last)
    lax.cond(inside, whole, lambda: pl.when(some)(part))


def _row_and_column(tile, rows, columns: int, group: int):
    """Place of a tile: strips of ``group`` row tiles, each column by column."""
    strip = lax.div(tile, jnp.int32(group * columns))
    rest = tile - strip * (group * columns)
    height = jnp.minimum(rows - strip * group, group)
    return strip * group + lax.rem(rest, height), lax.div(rest, height)


def _whole_tiles(x):
    """Pads the rows to a multiple of 8: the SMEM tiling is applied to GMEM as well."""
    return x if x.shape[0] % _ROWS == 0 else jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


def _call(operands, body, *, name, out_type, scratch_types, config, interpret):
    kwargs = {}
    if interpret:
        # Simulates the warpgroups, TMA and barriers on the CPU; not in jax 0.10.
        if interpret is True:
            # pyrefly: ignore[missing-attribute]
            interpret = plgpu.InterpretGPUParams()
        kwargs["interpret"] = interpret
    out = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(config.programs,),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name=name,
        # The default differs between versions of jax: say which.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **kwargs,
    )(*operands)
    return _varying(out, operands)


def _varying(out, operands):
    """Gives ``out`` the operands' varying axes, inside shard_map.

    ``plgpu.kernel`` forgets them, and a result that differs between devices would pass
    as replicated.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = frozenset().union(*axes) - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out
