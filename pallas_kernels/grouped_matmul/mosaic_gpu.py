"""Products of rows sorted by group on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan. A kernel is ``programs`` persistent programs, one per multiprocessor, which
take output tiles in turn. Of a program's three warpgroups one copies: per step TMA
brings a piece of each operand into one of ``stages`` sets of buffers in SMEM, swizzled.
The other two compute half of the tile each, 64 rows where it has 128, accumulators in
registers. Copies run ahead across tiles: while a result is stored, the buffers fill for
the next tile. A result goes through SMEM by pieces of 64 x 64. How many tiles and steps
there are is data; a program that gets no tile leaves.

``product``. A row tile is ``tile_m`` rows of one group, from a multiple of 8 on; XLA
lists the tiles beforehand (group, start, the rows that count), so a program looks
nothing up and the number of groups costs nothing. Programs take them in strips of
``group``, column by column: neighbours share matrix and rows in L2. Where all 64 rows
of a piece are of the group it leaves in one swizzled copy; at a group's ends in copies
of 2**i rows each, so that no row of another group is touched. Rows of other groups, or
beyond the array, are multiplied and not stored: a row of the product depends on that
row of x alone, so nothing leaks, NaN neither. The tail is a group of its own, of no
step: the accumulators' zeros are stored.

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
COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232
# Rows that a swizzled tile in SMEM is high; copies start at a multiple.
ROWS = 8


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
    tile_m = config.tile_m
    tiles, count = row_tiles(sizes, m, tile_m)

    def plan(x_gmem, w_gmem, tiles_gmem, count_gmem, y_gmem, *pieces):
        row, column, shape = share(tile_m, wide)
        total, place = places(
            tiles_gmem, count_gmem, pl.cdiv(width, wide), config.group
        )

        def steps(tile):
            return jnp.where(tile.group < groups, jnp.int32(inner // deep), 0)

        def fetch(tile, i):
            along, across = pl.ds(i * deep, deep), pl.ds(tile.column * wide, wide)
            piece = (across, along) if transpose else (along, across)
            rows = pl.ds(tile.start * ROWS, tile_m)
            return x_gmem.at[rows, along], w_gmem.at[(tile.group, *piece)]

        def multiply(tile, i, accs, x_smem, w_smem):
            del tile, i
            rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            if transpose:
                piece = w_smem.at[columns].transpose((1, 0))
            else:
                piece = w_smem.at[:, columns]
            plgpu.wgmma(accs[0], x_smem.at[rows], piece)

        def finish(tile, results):
            at = tile.start * ROWS + row, tile.column * wide + column
            store_rows(results[0].astype(x.dtype), y_gmem, *at, tile, pieces)

        return Plan(total, place, steps, fetch, multiply, finish)

    y = persistent(
        (x, w, tiles, count),
        plan,
        name="grouped_matmul" + ("_transposed" if transpose else ""),
        out_type=jax.ShapeDtypeStruct((m, width), x.dtype),
        buffers=[(tile_m, deep), (wide, deep) if transpose else (deep, wide)],
        tile=(tile_m, wide),
        scratch=store_rows_scratch(x.dtype),
        stages=config.stages,
        programs=config.programs,
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
    down, across = pl.cdiv(k, tile_k), pl.cdiv(n, tile_n)
    first, last = row_ranges(sizes, m)
    slots = 4 // jnp.dtype(dtype).itemsize

    def plan(x_gmem, y_gmem, first_gmem, last_gmem, out_gmem, pieces, both):
        warpgroup = lax.axis_index("warpgroup")
        row, column, shape = share(tile_k, tile_n)

        def place(number):
            group = lax.div(number, jnp.int32(down * across))
            rest = number - group * (down * across)
            where = row_and_column(rest, jnp.int32(down), across, config.group)
            first, last = first_gmem[group], last_gmem[group]
            return Tile(group, lax.div(first, jnp.int32(ROWS)), first, last, *where)

        def steps(tile):
            rows = tile.last - tile.start * ROWS
            some = tile.last > tile.first
            return jnp.where(some, lax.div(rows + (tile_m - 1), jnp.int32(tile_m)), 0)

        def fetch(tile, i):
            rows = pl.ds((tile.start + i * (tile_m // ROWS)) * ROWS, tile_m)
            return (
                x_gmem.at[rows, pl.ds(tile.row * tile_k, tile_k)],
                y_gmem.at[rows, pl.ds(tile.column * tile_n, tile_n)],
            )

        def multiply(tile, i, accs, x_smem, y_smem):
            at = tile.start * ROWS + i * tile_m

            @pl.when((at < tile.first) | (tile.last < at + tile_m))
            def _():
                for ref in x_smem, y_smem:
                    half = ref.shape[1] // COMPUTE
                    _clear_rows(ref.at[:, pl.ds(warpgroup * half, half)], at, tile)
                plgpu.commit_smem()
                # Each multiplies what the other has cleared, too.
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

            rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            x_piece = x_smem.at[:, rows].transpose((1, 0))
            plgpu.wgmma(accs[0], x_piece, y_smem.at[:, columns])

        def finish(tile, results):
            at = tile.row * tile_k + row, tile.column * tile_n + column
            result, mine = results[0].astype(dtype), pieces.at[warpgroup]
            store(result, out_gmem.at[tile.group], *at, mine)

        total = jnp.int32(groups * down * across)
        return Plan(total, place, steps, fetch, multiply, finish)

    return persistent(
        (x, y, first, last),
        plan,
        name="grouped_matmul_sampled",
        out_type=jax.ShapeDtypeStruct((groups, k, n), dtype),
        buffers=[(tile_m, tile_k), (tile_m, tile_n)],
        tile=(tile_k, tile_n),
        scratch=[
            plgpu.SMEM((COMPUTE, slots, _PIECE, _PIECE), dtype),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ],
        stages=config.stages,
        programs=config.programs,
        interpret=interpret,
    )


# --- Where rows are -------------------------------------------------------------------


def row_ranges(sizes: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """First row of each group, and last row + 1; int32 [groups] both."""
    sizes = jnp.maximum(sizes, 0)
    last = _running_sum(sizes)
    return jnp.minimum(last - sizes, m), jnp.minimum(last, m)


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
    aligned = first // ROWS * ROWS
    tiles = jnp.where(last > first, -(-(last - aligned) // tile_m), 0)
    after = _running_sum(tiles)
    # A part has at most 7 rows before its start and tile_m - 1 beyond its end.
    most = (m + min(groups + 1, m) * (tile_m + ROWS - 2)) // tile_m
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(number[:, None] >= after[None, :], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups)
    start = aligned[group] + (number - (after - tiles)[group]) * tile_m
    first = jnp.maximum(first[group], start)
    last = jnp.minimum(last[group], start + tile_m)
    return jnp.stack([group, start // ROWS, first, last], axis=1), after[-1:]


def _running_sum(values):
    """Inclusive; of so few values a masked sum, which XLA fuses, is cheaper."""
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    up_to = index[:, None] >= index[None, :]
    return jnp.sum(jnp.where(up_to, values, 0), axis=1, dtype=jnp.int32)


def whole_tiles(x):
    """Pads the rows to a multiple of 8: the SMEM tiling is applied to GMEM as well."""
    return x if x.shape[0] % ROWS == 0 else jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


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
    steps. ``fetch(tile, i)`` lists what is copied in step i, one piece per buffer. For
    a warpgroup ``multiply(tile, i, accs, *buffers)`` issues its products, one per
    accumulator, and ``finish(tile, results)`` stores what came out.
    """

    total: Any
    place: Callable
    steps: Callable
    fetch: Callable
    multiply: Callable
    finish: Callable


def share(rows: int, columns: int):
    """A warpgroup's share of a tile: first row, first column and shape.

    By rows where that leaves it the 64 that wgmma takes: wide products read less SMEM.
    """
    warpgroup = lax.axis_index("warpgroup")
    if rows == COMPUTE * _PIECE:
        return warpgroup * _PIECE, 0, (_PIECE, columns)
    return 0, warpgroup * (columns // COMPUTE), (rows, columns // COMPUTE)


def persistent(
    operands,
    plan,
    *,
    name,
    out_type,
    buffers,
    tile,
    scratch,
    stages: int,
    programs: int,
    interpret,
    sums=1,
):
    """Runs ``plan(*operand refs, output ref, *scratch refs)``; see the module.

    ``buffers`` are the shapes of one step's pieces, in the operands' dtype; ``tile`` is
    the shape of a tile and ``sums`` how many such are summed up.
    """
    if stages < 2:  # one step's buffers are let go of during the next
        raise ValueError(f"config.stages: got {stages}, needed at least 2")

    def body(*refs):
        *refs, full, free = refs
        refs, buffers_smem = refs[: -len(buffers)], refs[-len(buffers) :]
        todo = plan(*refs)

        def walk(visit):
            """Calls ``visit(tile, step)`` for each tile; it gives the step after."""
            program = lax.axis_index("program")
            mine = lax.div(todo.total - program + (programs - 1), jnp.int32(programs))
            one = lambda i, step: visit(todo.place(program + i * programs), step)
            lax.fori_loop(jnp.int32(0), mine, one, jnp.int32(0))

        def copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def visit(tile, step):
                def one(i, step):
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(free.at[slot])
                    pieces = todo.fetch(tile, i)
                    for piece, buffer in zip(pieces, buffers_smem, strict=True):
                        plgpu.copy_gmem_to_smem(piece, buffer.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(jnp.int32(0), todo.steps(tile), one, step)

            walk(visit)
            # No arrival is left behind.
            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])

        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            *_, shape = share(*tile)
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            def visit(tile, step):
                def release(step):
                    plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(stages))])

                def accumulate(*accs):
                    def one(i, step):
                        slot = lax.rem(step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        here = [buffer.at[slot] for buffer in buffers_smem]
                        todo.multiply(tile, i, accs, *here)
                        # All but this step's, which go on reading their buffers.
                        plgpu.wgmma_wait(len(accs))
                        pl.when(i > 0)(lambda: release(step - 1))
                        return step + 1

                    end = lax.fori_loop(jnp.int32(0), todo.steps(tile), one, step)
                    plgpu.wgmma_wait(0)
                    pl.when(end > step)(lambda: release(end - 1))
                    return [acc[...] for acc in accs], end

                results, end = pl.run_scoped(
                    accumulate, *[plgpu.ACC(shape, jnp.float32)] * sums
                )
                todo.finish(tile, results)
                return end

            walk(visit)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(lax.axis_index("warpgroup") < COMPUTE, compute, copy)

    return launch(
        body,
        operands,
        name=name,
        out_type=out_type,
        scratch=[
            *scratch,
            *(plgpu.SMEM((stages, *shape), operands[0].dtype) for shape in buffers),
            plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ],
        programs=programs,
        interpret=interpret,
    )


def launch(body, operands, *, name, out_type, scratch, programs: int, interpret):
    """Runs ``body(*operand refs, output ref, *scratch refs)`` in each program."""
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
        scratch_types=scratch,
        grid=(programs,),
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
    return varying(out, operands)


def places(tiles_gmem, count_gmem, columns: int, group: int):
    """``total`` and ``place`` of row tiles listed by ``row_tiles``."""
    rows = count_gmem[0]

    def place(number):
        row, column = row_and_column(number, rows, columns, group)
        listed = [tiles_gmem[row, field] for field in range(4)]
        return Tile(*listed, row=row, column=column)

    return rows * columns, place


def row_and_column(number, rows, columns: int, group: int):
    """Place of a tile: strips of ``group`` row tiles, each column by column."""
    strip = lax.div(number, jnp.int32(group * columns))
    rest = number - strip * (group * columns)
    height = jnp.minimum(rows - strip * group, group)
    return strip * group + lax.rem(rest, height), lax.div(rest, height)


def store(result, out_gmem, row, column, pieces):
    """Stores a result at (row, column), piece by piece."""
    slots, count = pieces.shape[0], result.shape[1] // _PIECE
    for number in range(count):
        piece, c = pieces.at[number % slots], number * _PIECE
        # What this slot held may still be read: by the copy of ``slots`` pieces ago, or
        # for the first piece by that of the result before which began a round.
        behind = slots - 1 if number else (count - 1) % slots
        plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
        piece[...] = result[:, c : c + _PIECE]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            piece, out_gmem.at[pl.ds(row, _PIECE), pl.ds(column + c, _PIECE)]
        )


def store_rows_scratch(dtype):
    """What ``store_rows`` needs: for each warpgroup pieces, swizzled or else not."""
    pieces = plgpu.SMEM((2, _PIECE, _PIECE), dtype)
    return [plgpu.RefUnion(pieces, pieces)] * COMPUTE


def store_rows(result, y_gmem, row, column, tile: Tile, pieces):
    """Stores those of the result's rows, from ``row`` on, that the tile is for."""
    skipped = jnp.maximum(tile.first - row, 0)
    size = jnp.minimum(tile.last - row, _PIECE) - skipped
    # The same memory may be read as the other kind of piece.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for warpgroup, (whole_smem, part_smem) in enumerate(pieces):
        mine = lax.axis_index("warpgroup") == warpgroup

        @pl.when(mine & (size == _PIECE))
        def _(whole_smem=whole_smem):
            store(result, y_gmem, row, column, whole_smem)

        @pl.when(mine & (0 < size) & (size < _PIECE))
        def _(part_smem=part_smem):
            for number, c in enumerate(range(0, result.shape[1], _PIECE)):
                piece, columns = part_smem.at[number % 2], pl.ds(column + c, _PIECE)
                if number > 1:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                piece[...] = result[:, c : c + _PIECE]
                plgpu.commit_smem()
                _store_few(piece, y_gmem.at[:, columns], row, skipped, size)


def _store_few(piece, y_gmem, row, skipped, size):
    """Stores ``size`` rows after the ``skipped`` first ones, of a piece at ``row``.

    TMA copies a number of rows fixed beforehand: one copy per power of two.
    """
    height = _PIECE // 2
    while height:

        @pl.when(size & height != 0)
        def _(skipped=skipped, height=height):
            plgpu.copy_smem_to_gmem(
                piece.at[pl.ds(skipped, height)],
                y_gmem.at[pl.ds(row + skipped, height)],
            )

        skipped = skipped + (size & height)
        height //= 2


def _clear_rows(ref, row, tile: Tile):
    """Sets to zero the rows of a buffer, of rows from ``row`` on, of other groups."""
    shape = (ref.shape[0], _PIECE)
    layout = plgpu.Layout.WGMMA
    index = row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    inside = (tile.first <= index) & (index < tile.last)
    for c in range(0, ref.shape[1], shape[1]):
        part = ref.at[:, c : c + shape[1]]
        part[...] = jnp.where(inside, part[...], jnp.zeros(shape, ref.dtype))


def varying(out, operands):
    """Gives ``out`` the operands' varying axes, inside shard_map.

    ``plgpu.kernel`` forgets them, and a result that differs between devices would pass
    as replicated.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in operands]
    missing = frozenset().union(*axes) - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out
