"""Products of rows sorted by group on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan. A kernel is ``programs`` persistent programs, one per multiprocessor, which
take output tiles in turn. Of a program's three warpgroups one copies: per step TMA
brings a piece of each operand into one of ``stages`` sets of buffers in SMEM, swizzled.
The other two compute half of the tile's columns each, accumulators in registers. Copies
run ahead across tiles: while a result is stored, the buffers fill for the next tile. A
result goes through SMEM by pieces of 64 x 64. How many tiles and steps there are is
data; a program that gets no tile leaves.

``product``. A row tile is ``tile_m`` rows of one group, from a multiple of 8 on; XLA
lists the tiles beforehand (group, start, the rows that count), so a program looks
nothing up and the number of groups costs nothing. Programs take them in strips of
``group``, column by column: neighbours share matrix and rows in L2. Where all 64 rows
of a piece are of the group it leaves in one swizzled copy; at a group's ends in copies
of 2**i rows each, so that no row of another group is touched. Rows of other groups, or
beyond the array (zeros then), are multiplied and not stored: a row of the product
depends on that row of x alone, so nothing leaks, NaN neither. The tail is a group of
its own, of no step: the accumulators' zeros are stored.

``sampled``. A tile is [tile_k, tile_n] of one group's result, a step ``tile_m`` of the
group's rows, from a multiple of 8 on. In the first and the last step the warpgroups
set rows of other groups in SMEM to zero, in both operands, for NaN times 0 is NaN. An
empty group has no step.

Dtypes: bfloat16 and float16 in, float32 sums; out the same, of ``sampled`` also
float32. Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and
0.11.2, no spills; results proven by simulation. Not yet run on a GPU: speed is
unmeasured.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul._spec import HOPPER_PIECE as _PIECE
from pallas_kernels.grouped_matmul._spec import Config

# Warpgroups that compute; one more copies.
COMPUTE = 2
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
    x = whole_tiles(x)
    m = x.shape[0]
    groups, k, n = w.shape
    inner, width = (n, k) if transpose else (k, n)
    deep, wide = config.tile_k, config.tile_n
    if transpose:
        deep, wide = wide, deep
    tile_m, share = config.tile_m, wide // COMPUTE
    tiles, count = row_tiles(sizes, m, tile_m)

    def plan(x_gmem, w_gmem, tiles_gmem, count_gmem, y_gmem, whole_smem, part_smem):
        warpgroup = lax.axis_index("warpgroup")
        total, place = places(tiles_gmem, count_gmem, pl.cdiv(width, wide), config)

        def steps(tile):
            return jnp.where(tile.group < groups, jnp.int32(inner // deep), 0)

        def fetch(tile, i):
            along, across = pl.ds(i * deep, deep), pl.ds(tile.column * wide, wide)
            piece = (across, along) if transpose else (along, across)
            return (
                x_gmem.at[pl.ds(tile.start * _ROWS, tile_m), along],
                w_gmem.at[(tile.group, *piece)],
            )

        def multiply(tile, i, accs, x_smem, w_smem):
            del tile, i
            mine = pl.ds(warpgroup * share, share)
            piece = transposed(w_smem.at[mine]) if transpose else w_smem.at[:, mine]
            plgpu.wgmma(accs[0], x_smem, piece)

        def finish(tile, results):
            result = results[0].astype(x.dtype)
            for r in range(0, tile_m, _PIECE):
                for c in range(0, share, _PIECE):
                    at = tile.column * wide + warpgroup * share + c
                    store_rows(
                        result[r : r + _PIECE, c : c + _PIECE],
                        y_gmem.at[:, pl.ds(at, _PIECE)],
                        tile.start * _ROWS + r,
                        tile,
                        whole_smem.at[warpgroup],
                        part_smem.at[warpgroup],
                    )

        return Plan(total, place, steps, fetch, multiply, finish)

    piece = plgpu.SMEM((COMPUTE, _PIECE, _PIECE), x.dtype)
    y = persistent(
        (x, w, tiles, count),
        plan,
        name="grouped_matmul" + ("_transposed" if transpose else ""),
        out_type=jax.ShapeDtypeStruct((m, width), x.dtype),
        buffers=[(tile_m, deep), (wide, deep) if transpose else (deep, wide)],
        accumulators=[(tile_m, share)],
        scratch=[piece, piece],
        config=config,
        interpret=interpret,
    )
    return y if m == rows else y[:rows]


def sampled(
    x: jax.Array,
    y: jax.Array,
    sizes: jax.Array,
    *,
    dtype,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Computes ``x.T @ y`` over each group's rows, as ``_spec`` defines it.

    Args:
        x: [m, k], bfloat16 or float16.
        y: [m, n] of x's dtype.
        sizes: int32 [groups].
        dtype: of the result, x's or float32.
        config: tile sizes; ``tile_m`` is the rows that one step multiplies.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [groups, k, n] of ``dtype``, zeros for empty groups.
    """
    x, y = whole_tiles(x), whole_tiles(y)
    (m, k), n, groups = x.shape, y.shape[1], sizes.shape[0]
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    share, half = tile_n // COMPUTE, tile_k // COMPUTE
    down, across = pl.cdiv(k, tile_k), pl.cdiv(n, tile_n)
    first, last = row_ranges(sizes, m)

    def plan(x_gmem, y_gmem, first_gmem, last_gmem, out_gmem, piece_smem, both):
        warpgroup = lax.axis_index("warpgroup")

        def place(number):
            group = lax.div(number, jnp.int32(down * across))
            rest = number - group * (down * across)
            row, column = _row_and_column(rest, jnp.int32(down), across, config.group)
            first, last = first_gmem[group], last_gmem[group]
            return Tile(
                group, lax.div(first, jnp.int32(_ROWS)), first, last, row, column
            )

        def steps(tile):
            rows = tile.last - tile.start * _ROWS
            some = tile.last > tile.first
            return jnp.where(some, lax.div(rows + (tile_m - 1), jnp.int32(tile_m)), 0)

        def fetch(tile, i):
            rows = pl.ds((tile.start + i * (tile_m // _ROWS)) * _ROWS, tile_m)
            return (
                x_gmem.at[rows, pl.ds(tile.row * tile_k, tile_k)],
                y_gmem.at[rows, pl.ds(tile.column * tile_n, tile_n)],
            )

        def multiply(tile, i, accs, x_smem, y_smem):
            row = tile.start * _ROWS + i * tile_m
            mine = pl.ds(warpgroup * share, share)

            @pl.when((row < tile.first) | (tile.last < row + tile_m))
            def _():
                keep = dict(row=row, first=tile.first, last=tile.last)
                _clear_rows(x_smem.at[:, pl.ds(warpgroup * half, half)], **keep)
                _clear_rows(y_smem.at[:, mine], **keep)
                plgpu.commit_smem()
                # Each multiplies the half of x that the other has cleared, too.
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

            plgpu.wgmma(accs[0], transposed(x_smem), y_smem.at[:, mine])

        def finish(tile, results):
            result = results[0].astype(dtype)
            for r in range(0, tile_k, _PIECE):
                for c in range(0, share, _PIECE):
                    row = tile.row * tile_k + r
                    at = tile.column * tile_n + warpgroup * share + c
                    # What was stored before may still be read.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    piece = piece_smem.at[warpgroup]
                    piece[...] = result[r : r + _PIECE, c : c + _PIECE]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        piece,
                        out_gmem.at[tile.group, pl.ds(row, _PIECE), pl.ds(at, _PIECE)],
                    )

        total = jnp.int32(groups * down * across)
        return Plan(total, place, steps, fetch, multiply, finish)

    return persistent(
        (x, y, first, last),
        plan,
        name="grouped_matmul_sampled",
        out_type=jax.ShapeDtypeStruct((groups, k, n), dtype),
        buffers=[(tile_m, tile_k), (tile_m, tile_n)],
        accumulators=[(tile_k, share)],
        scratch=[
            plgpu.SMEM((COMPUTE, _PIECE, _PIECE), dtype),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ],
        config=config,
        interpret=interpret,
    )


# --- Where rows are -------------------------------------------------------------------


def row_ranges(sizes: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """First row of each group, and last row + 1; int32 [groups] both."""
    sizes = jnp.maximum(sizes, 0)
    last = jnp.minimum(_running_sum(sizes), m)
    return jnp.minimum(last - sizes, last), last


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
    first, last = row_ranges(sizes, m)
    first = jnp.append(first, last[-1])
    last = jnp.append(last, jnp.int32(m))
    aligned = first // _ROWS * _ROWS
    tiles = jnp.where(last > first, -(-(last - aligned) // tile_m), 0)
    after = _running_sum(tiles)
    # A part has at most 7 rows before its start and tile_m - 1 beyond its end.
    most = (m + min(groups + 1, m) * (tile_m + _ROWS - 2)) // tile_m
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(number[:, None] >= after[None, :], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups)
    start = aligned[group] + (number - (after - tiles)[group]) * tile_m
    first = jnp.maximum(first[group], start)
    last = jnp.minimum(last[group], start + tile_m)
    return jnp.stack([group, start // _ROWS, first, last], axis=1), after[-1:]


def _running_sum(values):
    """Inclusive; of so few values a masked sum, which XLA fuses, is cheaper."""
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    up_to = index[:, None] >= index[None, :]
    return jnp.sum(jnp.where(up_to, values, 0), axis=1, dtype=jnp.int32)


def whole_tiles(x):
    """Pads the rows to a multiple of 8: the SMEM tiling is applied to GMEM as well."""
    return x if x.shape[0] % _ROWS == 0 else jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


# --- The persistent kernel ------------------------------------------------------------


class Tile(NamedTuple):
    """A tile of the output; int32 scalars."""

    group: Any
    start: Any  # first row copied, in units of 8
    first: Any  # rows of the group: from here
    last: Any  # up to before here
    row: Any
    column: Any


class Plan(NamedTuple):
    """What a persistent kernel does with its tiles.

    ``place(number)`` is a tile, for numbers below ``total``; it takes ``steps(tile)``
    steps. ``fetch(tile, i)`` gives the GMEM slices of step i, ``multiply(tile, i, accs,
    *buffers)`` issues its products, one per accumulator, and ``finish(tile, results)``
    stores what came out; these two are for one warpgroup.
    """

    total: Any
    place: Callable
    steps: Callable
    fetch: Callable
    multiply: Callable
    finish: Callable


def persistent(
    operands,
    plan,
    *,
    name,
    out_type,
    buffers,
    accumulators,
    scratch,
    config: Config,
    interpret,
):
    """Runs ``plan(*operand refs, output ref, *scratch refs)``, see the module.

    ``buffers`` and ``accumulators`` are shapes: of one step's pieces, in the operands'
    dtype, and of what one warpgroup sums up.
    """
    stages = config.stages

    def body(*refs):
        *refs, full, free = refs
        refs, buffers_smem = refs[: -len(buffers)], refs[-len(buffers) :]
        todo = plan(*refs)

        def walk(visit):
            """Calls ``visit(tile, step)``, which gives the step after, for each tile."""
            program, programs = lax.axis_index("program"), jnp.int32(config.programs)
            mine = lax.div(todo.total - program + (programs - 1), programs)
            one = lambda i, step: visit(todo.place(program + i * programs), step)
            lax.fori_loop(jnp.int32(0), mine, one, jnp.int32(0))

        def copy():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def visit(tile, step):
                def one(i, step):
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(free.at[slot])
                    for piece, buffer in zip(
                        todo.fetch(tile, i), buffers_smem, strict=True
                    ):
                        plgpu.copy_gmem_to_smem(piece, buffer.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(jnp.int32(0), todo.steps(tile), one, step)

            walk(visit)
            # No arrival is left behind.
            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])

        def compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            def visit(tile, step):
                def release(step):
                    plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(stages))])

                def accumulate(*accs):
                    def one(i, step):
                        slot = lax.rem(step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        todo.multiply(
                            tile, i, accs, *(b.at[slot] for b in buffers_smem)
                        )
                        # All but this step's, which go on reading their buffers.
                        plgpu.wgmma_wait(len(accs))
                        pl.when(i > 0)(lambda: release(step - 1))
                        return step + 1

                    end = lax.fori_loop(jnp.int32(0), todo.steps(tile), one, step)
                    plgpu.wgmma_wait(0)
                    pl.when(end > step)(lambda: release(end - 1))
                    return [acc[...] for acc in accs], end

                results, end = pl.run_scoped(
                    accumulate, *(plgpu.ACC(s, jnp.float32) for s in accumulators)
                )
                todo.finish(tile, results)
                return end

            walk(visit)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(lax.axis_index("warpgroup") < COMPUTE, compute, copy)

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
        scratch_types=[
            *scratch,
            *(plgpu.SMEM((stages, *shape), operands[0].dtype) for shape in buffers),
            plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        grid=(config.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name=name,
        # The default differs between versions of jax: say which.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **kwargs,
    )(*operands)
    return _varying(out, operands)


def places(tiles_gmem, count_gmem, columns: int, config: Config):
    """``total`` and ``place`` of row tiles listed by ``row_tiles``."""
    rows = count_gmem[0]

    def place(number):
        row, column = _row_and_column(number, rows, columns, config.group)
        return Tile(*(tiles_gmem[row, field] for field in range(4)), row, column)

    return rows * columns, place


def _row_and_column(number, rows, columns: int, group: int):
    """Place of a tile: strips of ``group`` row tiles, each column by column."""
    strip = lax.div(number, jnp.int32(group * columns))
    rest = number - strip * (group * columns)
    height = jnp.minimum(rows - strip * group, group)
    return strip * group + lax.rem(rest, height), lax.div(rest, height)


def transposed(ref):
    return ref.transpose((1, 0))


def store_rows(piece, y_gmem, row, tile: Tile, whole_smem, part_smem):
    """Stores those of the piece's rows, from ``row`` on, that are of the tile's group."""
    # What was stored before may still be read.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def whole():
        whole_smem[...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole_smem, y_gmem.at[pl.ds(row, _PIECE)])

    def part():
        part_smem[...] = piece
        plgpu.commit_smem()
        at = jnp.maximum(tile.first - row, 0)
        size = jnp.minimum(tile.last - row, _PIECE) - at
        # TMA copies a number of rows fixed beforehand: one copy per power of two.
        height = _PIECE // 2
        while height:

            @pl.when(size & height != 0)
            def _(at=at, height=height):
                plgpu.copy_smem_to_gmem(
                    part_smem.at[pl.ds(at, height)], y_gmem.at[pl.ds(row + at, height)]
                )

            at = at + (size & height)
            height //= 2

    inside = (tile.first <= row) & (row + _PIECE <= tile.last)
    some = (tile.first < row + _PIECE) & (row < tile.last)
    lax.cond(inside, whole, lambda: pl.when(some)(part))


def _clear_rows(ref, *, row, first, last):
    """Sets to zero the rows of a buffer, which starts at ``row``, not in [first, last)."""
    shape = (ref.shape[0], _PIECE)
    index = row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    inside = (first <= index) & (index < last)
    for c in range(0, ref.shape[1], _PIECE):
        part = ref.at[:, c : c + _PIECE]
        part[...] = jnp.where(inside, part[...], jnp.zeros(shape, ref.dtype))


def _varying(out, operands):
    """Gives ``out`` the operands' varying axes, inside shard_map.

    ``plgpu.kernel`` forgets them, and a result that differs between devices would pass
    as replicated.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = frozenset().union(*axes) - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out
