"""Both factors of a Monarch matrix on Hopper: one Pallas Mosaic GPU kernel, wgmma.

Memory plan. A program holds, of 64 rows, the columns of h that ``group`` blocks of
right take: group * r numbers a row, in SMEM, never in HBM. Every block of left gives
some of them, width = q / l columns for each block of right. So a program goes through
all of x's columns and those of left's that are for its group, then through its blocks
of right. Programs are persistent, one per multiprocessor; of their three warpgroups one
copies by TMA, into ``stages`` buffers for x and left and ``stages_right`` for right,
each filled while the other is at work; two compute, each its half of the group's blocks
from x to y, so h needs no barrier.

What is read again: x once per group, from L2, where the l / group programs of the same
rows run at the same time; both factors once per 64 rows.

Where h's columns lie. wgmma wants 16 neighbours along the contraction in SMEM, a block
of left gives ``width`` of them. The sums of ``fold`` = 16 / width blocks of left are in
registers at once, columns of as many blocks of right in each; XLA has rotated left's
columns, by one place more for each block, so that what one block of right takes of all
of them is in different columns, and a select by column puts it together: no number
leaves its thread. Right's rows are rotated to match. XLA reorders both factors, which
are small, and transposes y, which is written with right's blocks outermost, as every
one of them is of one program: one more pass over y in HBM.

Dtypes: bfloat16 and float16 in and out, float32 sums, h rounded to x's dtype. Chips:
compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and 0.11.2, no spills;
results proven by simulation. Not yet run on a GPU: speed is unmeasured.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.mosaic_gpu import (
    COMPUTE,
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    launch,
    store,
    whole_tiles,
)
from pallas_kernels.monarch_matmul._spec import HOPPER_DEPTH as _DEPTH
from pallas_kernels.monarch_matmul._spec import HOPPER_PIECE as _PIECE
from pallas_kernels.monarch_matmul._spec import Config, fold_mosaic_gpu


def product(
    x: jax.Array,
    left: jax.Array,
    right: jax.Array,
    *,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Multiplies rows by both factors, as ``_spec`` defines it.

    Args:
        x: [m, k * p], bfloat16 or float16.
        left: [k, 1, p, q] of x's dtype.
        right: [1, l, r, s] of x's dtype.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [m, s * l] of x's dtype.
    """
    rows, dtype = x.shape[0], x.dtype
    x = whole_tiles(x)
    m = x.shape[0]
    (k, _, p, q), (_, l, r, s) = left.shape, right.shape
    width = q // l
    fold = fold_mosaic_gpu(width)
    left = left.reshape(k, p, width, l // fold, fold).transpose(0, 3, 4, 2, 1)
    left = _rotated(left).reshape(k, l * width, p)
    right = _rotated(right.reshape(l, k // fold, fold, width, s)).reshape(l, r, s)

    group, stages, stages_right = config.group, config.stages, config.stages_right
    for name in ("stages", "stages_right"):  # let go of during the next step
        if (got := getattr(config, name)) < 2:
            raise ValueError(f"config.{name}: got {got}, needed at least 2")
    mine = group // COMPUTE  # blocks of right that a warpgroup computes
    wide, deep, across = mine * width, config.tile_r, config.tile_s
    parts, sides = p // _PIECE, s // across
    groups, programs = l // group, config.programs
    total = pl.cdiv(m, _PIECE) * groups

    def body(x_gmem, left_gmem, right_gmem, y_gmem, *scratch):
        h_smem, pieces, x_smem, left_smem, right_smem, *barriers = scratch
        full, free, full_right, free_right = barriers
        warpgroup = lax.axis_index("warpgroup")

        def walk(visit):
            """Calls ``visit(row tile, group, steps)``, which gives the steps after."""
            program = lax.axis_index("program")
            count = lax.div(total - program + (programs - 1), jnp.int32(programs))

            def one(i, steps):
                tile = program + i * programs
                row = lax.div(tile, jnp.int32(groups))
                return visit(row, tile - row * groups, steps)

            lax.fori_loop(0, count, one, (jnp.int32(0), jnp.int32(0)))

        def copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def visit(row, place, steps):
                def one_left(i, step):
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(free.at[slot])
                    block = lax.div(i, jnp.int32(parts))
                    along = pl.ds(i * _PIECE, _PIECE)
                    in_block = pl.ds((i - block * parts) * _PIECE, _PIECE)
                    from_x = x_gmem.at[pl.ds(row * _PIECE, _PIECE), along]
                    plgpu.copy_gmem_to_smem(from_x, x_smem.at[slot], full.at[slot])
                    for each in range(COMPUTE):
                        columns = pl.ds((place * COMPUTE + each) * wide, wide)
                        plgpu.copy_gmem_to_smem(
                            left_gmem.at[block, columns, in_block],
                            left_smem.at[slot, each],
                            full.at[slot],
                        )
                    return step + 1

                def one_right(i, step):
                    slot = lax.rem(step, jnp.int32(stages_right))
                    plgpu.barrier_wait(free_right.at[slot])
                    number = lax.div(i, jnp.int32(r // deep))
                    down = pl.ds((i - number * (r // deep)) * deep, deep)
                    block = lax.div(number, jnp.int32(sides))
                    side = pl.ds((number - block * sides) * across, across)
                    for each in range(COMPUTE):
                        at = (place * COMPUTE + each) * mine + block
                        plgpu.copy_gmem_to_smem(
                            right_gmem.at[at, down, side],
                            right_smem.at[slot, each],
                            full_right.at[slot],
                        )
                    return step + 1

                step, step_right = steps
                step = lax.fori_loop(0, k * parts, one_left, step)
                count = mine * sides * (r // deep)
                return step, lax.fori_loop(0, count, one_right, step_right)

            walk(visit)
            # No arrival is left behind.
            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])
            for slot in range(stages_right):
                plgpu.barrier_wait(free_right.at[slot])

        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])
            for slot in range(stages_right):
                plgpu.barrier_arrive(free_right.at[slot])

            def release(step):
                plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(stages))])

            def release_right(step):
                slot = lax.rem(step, jnp.int32(stages_right))
                plgpu.barrier_arrive(free_right.at[slot])

            def from_left(number, start):
                """Columns of h by ``fold`` blocks of left, for each block of right."""

                def accumulate(*accs):
                    def one(_, step, acc, first):
                        slot = lax.rem(step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        piece = left_smem.at[slot, warpgroup].transpose((1, 0))
                        plgpu.wgmma(acc, x_smem.at[slot], piece)
                        # All but this step's, which go on reading their buffers.
                        plgpu.wgmma_wait(1)
                        pl.when(step > first)(lambda: release(step - 1))
                        return step + 1

                    step = start
                    for acc in accs:
                        each = functools.partial(one, acc=acc, first=step)
                        step = lax.fori_loop(0, parts, each, step)
                        # With several sums under way ptxas serializes all products.
                        plgpu.wgmma_wait(0)
                        release(step - 1)
                    return [acc[...] for acc in accs], step

                sums, step = pl.run_scoped(
                    accumulate, *[plgpu.ACC((_PIECE, wide), jnp.float32)] * fold
                )
                sums = [each.astype(dtype) for each in sums]
                columns = fold * width
                for j in range(mine):
                    at = j // fold * columns
                    some = [each[:, at : at + columns] for each in sums]
                    h = _select(some, width, j)
                    for c in range(columns // _DEPTH):
                        place = number * (columns // _DEPTH) + c
                        part = h[:, c * _DEPTH : (c + 1) * _DEPTH]
                        h_smem[warpgroup, j, place] = part
                return step

            def to_right(i, start, row, place):
                """One block of right, or a part of its columns."""
                block = lax.div(i, jnp.int32(sides))

                def accumulate(acc):
                    def one(i, step):
                        slot = lax.rem(step, jnp.int32(stages_right))
                        plgpu.barrier_wait(full_right.at[slot])
                        for c in range(deep // _DEPTH):
                            place = i * (deep // _DEPTH) + c
                            plgpu.wgmma(
                                acc,
                                h_smem.at[warpgroup, block, place],
                                right_smem.at[
                                    slot, warpgroup, pl.ds(c * _DEPTH, _DEPTH)
                                ],
                            )
                        plgpu.wgmma_wait(deep // _DEPTH)
                        pl.when(i > 0)(lambda: release_right(step - 1))
                        return step + 1

                    step = lax.fori_loop(0, r // deep, one, start)
                    plgpu.wgmma_wait(0)
                    release_right(step - 1)
                    return acc[...], step

                acc = plgpu.ACC((_PIECE, across), jnp.float32)
                result, step = pl.run_scoped(accumulate, acc)
                y = y_gmem.at[:, (place * COMPUTE + warpgroup) * mine + block]
                at = row * _PIECE, (i - block * sides) * across
                store(result.astype(dtype), y, *at, pieces.at[warpgroup])
                return step

            def visit(row, place, steps):
                step, step_right = steps
                step = lax.fori_loop(0, k // fold, from_left, step)
                plgpu.commit_smem()
                one = functools.partial(to_right, row=row, place=place)
                return step, lax.fori_loop(0, mine * sides, one, step_right)

            walk(visit)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup < COMPUTE, compute, copy)

    def smem(columns, *shape):
        """Swizzled in tiles of 8 rows and ``columns`` columns."""
        swizzle = columns * jnp.dtype(dtype).itemsize
        transforms = (
            plgpu.TilingTransform((8, columns)),
            plgpu.SwizzleTransform(swizzle),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    y = launch(
        body,
        (x, left, right),
        name="monarch_matmul",
        out_type=jax.ShapeDtypeStruct((m, l, s), dtype),
        scratch=[
            # Both operands of a wgmma need the same swizzle.
            smem(_DEPTH, COMPUTE, mine, r // _DEPTH, _PIECE, _DEPTH),
            smem(_PIECE, COMPUTE, 1, _PIECE, _PIECE),
            smem(_PIECE, stages, _PIECE, _PIECE),
            smem(_PIECE, stages, COMPUTE, wide, _PIECE),
            smem(_DEPTH, stages_right, COMPUTE, deep, across),
            plgpu.Barrier(num_arrivals=1 + COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages_right),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages_right),
        ],
        programs=programs,
        interpret=interpret,
    )
    y = y if m == rows else y[:rows]
    return y.swapaxes(1, 2).reshape(rows, s * l)


def _select(sums, width: int, j: int):
    """What block j of right takes of each block of left: see the module.

    Place b of the result is place b of the sums of block (b - j) mod fold.
    """
    fold, shape = len(sums), sums[0].shape
    if fold == 1:
        return sums[0]
    layout = plgpu.Layout.WGMMA
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    h = sums[0]
    for i, each in enumerate(sums[1:], 1):
        first = (i + j) % fold * width
        h = jnp.where((first <= column) & (column < first + width), each, h)
    return h


def _rotated(w):
    """Moves place b of axis 2 to (b + n) mod its size, n the index along axis 0."""
    count, fold = w.shape[0], w.shape[2]
    if fold == 1:
        return w
    source = (jnp.arange(fold)[None, :] - jnp.arange(count)[:, None]) % fold
    return jnp.take_along_axis(w, source[:, None, :, None, None], axis=2)
