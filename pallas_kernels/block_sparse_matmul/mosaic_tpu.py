"""Block-sparse products on TPU: Pallas Mosaic, lists by scalar prefetch.

Memory plan. x stays in HBM; a row tile of it, whole ([tile_m, K]), is brought to VMEM
by one copy and used for every block before the next one arrives (two buffers). The
stored blocks lie in VMEM whole where they fit (``Config.resident``), else each inner
step's blocks are copied one step ahead. y is gathered in VMEM as panels
[tile_m, side_out], one per tile of columns, which copies to HBM put side by side while
the next row tile is computed (two buffers). ``splits`` cuts the columns of y, and in
sdd the slots, where they do not fit at once. The lists (source, target, slot) are in
SMEM: they are data, so new contents do not recompile.

Grid of dsd: (cores, row tiles per core, splits of y's columns). A grid step runs over a
flat list of blocks sorted by target, ``unroll`` of them per inner step, whatever
columns they belong to: the cost is that of the blocks that are there. The float32
accumulator is set to zero where a column starts. Each block writes the column's running
sum to its panel, so that no step needs to know where a column ends. An empty column has
one list entry of its own, which multiplies a tile of zeros by a block of zeros, kept in
VMEM for that; so do the entries that fill up the last inner step. Work goes ``rows``
rows at a time, so that the accumulator stays in registers from block to block.

Grid of sdd: (chunks of slots, row tiles). The float32 accumulators of all blocks of a
chunk stay in VMEM while the rows stream by. x is transposed once per row tile, in VMEM.

Blocks whose sides are no multiples of 128 lanes go by units of lcm(side, 128): dsd lays
the blocks of one unit column out in a dense strip in VMEM and multiplies the units that
hold a block; sdd computes those units whole and cuts the blocks out.

The last row tile begins early enough to be whole: it repeats rows of the one before it
(dsd) or counts them as zero (sdd). Only m that is no multiple of 16, or k or n that is
no multiple of the unit, is padded outside.

Dtypes: bfloat16 and float32, accumulated in float32. Products of float32 go at the
precision of ``jax.default_matmul_precision``, as those of XLA do.
Chips: compiled for v4, v5e, v5p, v6e and tpu7x, jax 0.10.2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._chips import TPU_LANES as _LANES
from pallas_kernels._chips import TPU_SLACK as _SLACK
from pallas_kernels.block_sparse_matmul._spec import Config

# Rows that a tile of a bfloat16 array holds; every tile_m is a multiple of it.
_SUBLANES = 16


def dsd(
    x: jax.Array,
    blocks: jax.Array,
    order: jax.Array | None,
    source: jax.Array,
    ptr: jax.Array,
    *,
    transpose: bool,
    config: Config,
    interpret=False,
) -> jax.Array:
    """Dense times sparse; the contract is in ``_spec``.

    Args:
        x: ``[m, tiles_in * side_in]``.
        blocks: ``[slots, bk, bn]``, dtype of x.
        order: int32 ``[slots]``, slot of each list entry's block; None: in order.
        source: int32 ``[slots]``, tile of x that each entry multiplies.
        ptr: int32 ``[tiles_out + 1]``, entries of each tile of y.
        transpose: multiply each block transposed.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        y, ``[m, tiles_out * side_out]``, dtype of x.
    """
    m, columns_out = x.shape[0], (ptr.shape[0] - 1) * blocks.shape[2 - transpose]
    side_in, side_out = blocks.shape[1 + transpose], blocks.shape[2 - transpose]
    unit_in, unit_out = math.lcm(side_in, _LANES), math.lcm(side_out, _LANES)
    x = _pad(x, _SUBLANES, unit_in)
    call = _dsd_direct if (unit_in, unit_out) == (side_in, side_out) else _dsd_strips
    y = call(x, blocks, order, source, ptr, transpose, config, interpret)
    return y if y.shape == (m, columns_out) else y[:m, :columns_out]


def _dsd_direct(x, blocks, order, source, ptr, transpose, config, interpret):
    """The product where each side of a block is a multiple of 128."""
    slots, bk, bn = blocks.shape
    side_in, side_out = (bn, bk) if transpose else (bk, bn)
    tiles_out = ptr.shape[0] - 1
    splits, columns = _split(tiles_out, config.splits)
    # One entry per block, and one per empty column; padding at the end is never read.
    length = slots + tiles_out
    visits = jnp.maximum(jnp.diff(ptr), 1)
    starts = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(visits, dtype=jnp.int32)]
    )
    entry = jnp.arange(length, dtype=jnp.int32)
    target = jnp.searchsorted(starts, entry, side="right").astype(jnp.int32) - 1
    target = jnp.clip(target, 0, tiles_out - 1)
    rank = entry - starts[target]
    place = jnp.clip(ptr[target] + rank, 0, slots - 1)
    empty = ptr[target] == ptr[target + 1]
    slot = place if order is None else order[place]
    edges = [min(split * columns, tiles_out) for split in range(splits + 1)]
    lists = (
        jnp.where(empty, x.shape[1] // side_in, source[place]),
        target % columns,
        jnp.where(empty, slots, slot),
        (rank == 0).astype(jnp.int32),
        starts[jnp.array(edges)],
    )
    kernel = functools.partial(_dsd_kernel, tiles_out=tiles_out)
    call = _DsdCall(kernel, side_out, tiles_out, transpose, config, interpret)
    # The tile of zeros is one more tile of x.
    return call(lists, x, blocks, zeros=side_in)


def _dsd_strips(x, blocks, order, source, ptr, transpose, config, interpret):
    """The product by dense strips, for blocks with other sides."""
    slots, bk, bn = blocks.shape
    side_in, side_out = (bn, bk) if transpose else (bk, bn)
    unit_k, unit_n = math.lcm(bk, _LANES), math.lcm(bn, _LANES)
    unit_in, unit_out = (unit_n, unit_k) if transpose else (unit_k, unit_n)
    group_in, group_out = unit_in // side_in, unit_out // side_out
    units_in = x.shape[1] // unit_in
    units_out = -(-(ptr.shape[0] - 1) // group_out)
    entry = jnp.arange(slots, dtype=jnp.int32)
    target = jnp.searchsorted(ptr, entry, side="right").astype(jnp.int32) - 1
    unit = jnp.where(entry < ptr[-1], target // group_out, units_out)
    full, counts = _full_units(unit, source // group_in, units_out, units_in)
    edges = jnp.minimum(jnp.arange(units_out + 1) * group_out, ptr.shape[0] - 1)
    lists = (
        source,
        target,
        entry if order is None else order,
        ptr[edges],
        full,
        counts,
    )
    groups = (group_in, group_out)
    kernel = functools.partial(_dsd_strips_kernel, groups=groups, units_out=units_out)
    call = _DsdCall(kernel, unit_out, units_out, transpose, config, interpret)
    return call(lists, x, blocks, strip=pltpu.VMEM((units_in, unit_k, unit_n), x.dtype))


@dataclasses.dataclass(frozen=True)
class _DsdCall:
    """The pallas_call that both forms of dsd share."""

    kernel: Callable
    side: int
    panels: int
    transpose: bool
    config: Config
    interpret: Any

    def __call__(self, lists, x, blocks, *, zeros=0, strip=None):
        config = self.config
        rows, columns_in = x.shape
        slots, bk, bn = blocks.shape
        tile_m = min(config.tile_m, rows)
        splits, columns = _split(self.panels, config.splits)
        tiles = -(-rows // tile_m)
        cores = min(config.cores, tiles)
        # The last block held is zero.
        held = (slots if config.resident else 2 * config.unroll) + 1
        scratch = [
            pltpu.VMEM((2, tile_m, columns_in + zeros), x.dtype),
            pltpu.VMEM((2, columns, tile_m, self.side), x.dtype),
            pltpu.VMEM((tile_m, self.side), jnp.float32),
            pltpu.VMEM((held, bk, bn), x.dtype),
        ]
        scratch += [] if strip is None else [strip]
        limit = sum(_bytes(ref.shape, ref.dtype) for ref in scratch)
        any_spec = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            functools.partial(
                self.kernel,
                transpose=self.transpose,
                widen=bool(self.interpret),
                config=config,
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(lists),
                grid=(cores, -(-tiles // cores), splits),
                in_specs=[any_spec, any_spec],
                out_specs=any_spec,
                scratch_shapes=[pltpu.SemaphoreType.DMA((2,))] * 3 + scratch,
            ),
            out_shape=_out_shape((rows, self.panels * self.side), x.dtype, x),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=limit + _SLACK,
            ),
            interpret=self.interpret,
            name="block_sparse_matmul_dsd" + ("_transposed" if self.transpose else ""),
        )(*lists, x, blocks)


def _dsd_kernel(
    source_ref,
    target_ref,
    slot_ref,
    start_ref,
    bounds_ref,
    x_hbm,
    blocks_hbm,
    y_hbm,
    x_sem,
    y_sem,
    blocks_sem,
    x_ref,
    y_ref,
    acc_ref,
    held_ref,
    *,
    transpose,
    tiles_out,
    widen,
    config,
):
    side_in = held_ref.shape[2 if transpose else 1]
    unroll = config.unroll
    split = pl.program_id(2)
    first, last = bounds_ref[split], bounds_ref[split + 1]
    blocks = _Blocks(blocks_hbm, held_ref, blocks_sem, config)
    x_now, y_now = _open_tile(x_hbm, x_ref, x_sem, y_ref, y_sem, tiles_out, blocks)
    groups = _cdiv(last - first, unroll)

    def slots(group):
        # Entries that fill the last step up multiply zeros by zeros into the last
        # column, so that what x and the blocks hold does not matter.
        for entry in range(unroll):
            entry += first + group * unroll
            real = entry < last
            yield jnp.where(real, slot_ref[jnp.minimum(entry, last - 1)], blocks.slots)

    def step(group, carry):
        work = []
        for u, block in enumerate(blocks.take(slots, group, groups)):
            entry = first + group * unroll + u
            real, entry = entry < last, jnp.minimum(entry, last - 1)
            tile = jnp.where(real, source_ref[entry], x_hbm.shape[1] // side_in)
            start = real & (start_ref[entry] == 1)
            column = pl.multiple_of(tile * side_in, _LANES)
            work.append((column, target_ref[entry], start, block))
        for rows in _row_chunks(acc_ref.shape[0], config.rows):
            acc = acc_ref[rows]
            for column, target, start, block in work:
                product = _dot(
                    x_ref[x_now, rows, pl.ds(column, side_in)],
                    block(),
                    transpose,
                    widen,
                )
                acc = jnp.where(start, 0.0, acc) + product
                y_ref[y_now, target, rows] = acc.astype(y_ref.dtype)
            acc_ref[rows] = acc
        return carry

    blocks.start(slots, 0, groups)
    _each(groups, step)
    _close_tile(y_hbm, y_ref, y_sem, tiles_out)


def _dsd_strips_kernel(
    source_ref,
    target_ref,
    slot_ref,
    bounds_ref,
    full_ref,
    counts_ref,
    x_hbm,
    blocks_hbm,
    y_hbm,
    x_sem,
    y_sem,
    blocks_sem,
    x_ref,
    y_ref,
    acc_ref,
    held_ref,
    strip_ref,
    *,
    transpose,
    groups,
    units_out,
    widen,
    config,
):
    units_in, unit_k, unit_n = strip_ref.shape
    unit_in = unit_n if transpose else unit_k
    group_in, group_out = groups
    unroll, columns = config.unroll, y_ref.shape[1]
    base = pl.program_id(2) * columns
    blocks = _Blocks(blocks_hbm, held_ref, blocks_sem, config)
    x_now, y_now = _open_tile(x_hbm, x_ref, x_sem, y_ref, y_sem, units_out, blocks)

    def column(local, carry):
        unit = base + local
        first, last = bounds_ref[unit], bounds_ref[unit + 1]
        steps = _cdiv(last - first, unroll)

        def entries(group):
            return [
                jnp.minimum(first + group * unroll + u, last - 1) for u in range(unroll)
            ]

        def slots(group):
            return [slot_ref[entry] for entry in entries(group)]

        def zero(index, carry):
            strip_ref[index] = jnp.zeros((unit_k, unit_n), strip_ref.dtype)
            return carry

        def place(group, carry):
            taken = blocks.take(slots, group, steps)
            for entry, block in zip(entries(group), taken, strict=True):
                # A repeated entry writes what is there already.
                index = _div(source_ref[entry], group_in)
                inner = _rem(source_ref[entry], group_in)
                outer = _rem(target_ref[entry], group_out)
                row, col = (outer, inner) if transpose else (inner, outer)
                _place(strip_ref, index, row, col, block())
            return carry

        blocks.start(slots, 0, steps)
        _each(units_in, zero)
        _each(steps, place)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        count = counts_ref[unit]

        def multiply(group, carry):
            work = []
            for u in range(config.unit_unroll):
                entry = group * config.unit_unroll + u
                index = full_ref[unit * units_in + jnp.minimum(entry, count - 1)]
                work.append(
                    (pl.multiple_of(index * unit_in, _LANES), index, entry < count)
                )
            for rows in _row_chunks(acc_ref.shape[0], config.rows):
                acc = acc_ref[rows]
                for start, index, counts in work:
                    product = _dot(
                        x_ref[x_now, rows, pl.ds(start, unit_in)],
                        strip_ref[index],
                        transpose,
                        widen,
                    )
                    acc = acc + jnp.where(counts, product, 0.0)
                acc_ref[rows] = acc
            return carry

        _each(_cdiv(count, config.unit_unroll), multiply)
        y_ref[y_now, local] = acc_ref[...].astype(y_ref.dtype)
        return carry

    here = jnp.minimum(columns, units_out - base)
    _each(here, column)
    _close_tile(y_hbm, y_ref, y_sem, units_out)


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
    interpret=False,
) -> jax.Array:
    """The blocks of x^T dy that a layout keeps; the contract is in ``_spec``.

    Args:
        x: ``[m, tiles_k * bk]``.
        dy: ``[m, tiles_n * bn]``, dtype of x.
        rows: int32 ``[slots]``.
        cols: int32 ``[slots]``; slots sorted by (col, row).
        count: int32 ``[]``, slots in use.
        block_shape: (bk, bn).
        dtype: of the result: that of x, or float32.
        config: tile sizes.
        interpret: True or ``pltpu.InterpretParams()`` to run without a TPU.

    Returns:
        blocks, ``[slots, bk, bn]``; zeros beyond ``count``.
    """
    bk, bn = block_shape
    slots = rows.shape[0]
    unit_k, unit_n = math.lcm(bk, _LANES), math.lcm(bn, _LANES)
    x, dy = _pad(x, _SUBLANES, unit_k), _pad(dy, _SUBLANES, unit_n)
    chunks, size = _split(slots, config.splits)
    size = -(-size // config.unroll) * config.unroll
    chunks = -(-slots // size)
    used = jnp.arange(slots, dtype=jnp.int32) < count
    more = (0, chunks * size - slots)
    rows = jnp.pad(jnp.where(used, rows, 0), more)
    units_k, units_n = x.shape[1] // unit_k, dy.shape[1] // unit_n
    direct = (unit_k, unit_n) == (bk, bn)
    tile_m = min(config.tile_m, x.shape[0])
    scratch = [
        pltpu.VMEM((2, tile_m, x.shape[1]), x.dtype),
        pltpu.VMEM((2, tile_m, dy.shape[1]), x.dtype),
        pltpu.VMEM((units_k, unit_k, tile_m), x.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    total = jnp.reshape(count, (1,)).astype(jnp.int32)
    if direct:
        lists = (rows, jnp.pad(jnp.where(used, cols, 0), more), total)
        kernel = functools.partial(_sdd_kernel, widen=bool(interpret), config=config)
    else:
        group_k, group_n = unit_k // bk, unit_n // bn
        cols = jnp.where(used, cols, units_n * group_n)
        full, counts = _full_units(
            cols // group_n, rows[:slots] // group_k, units_n, units_k
        )
        edges = jnp.arange(units_n + 1, dtype=jnp.int32) * group_n
        bounds = jnp.searchsorted(cols, edges, side="left").astype(jnp.int32)
        lists = (rows, jnp.pad(cols, more), total, bounds, full, counts)
        scratch.append(pltpu.VMEM((units_k, unit_k, unit_n), jnp.float32))
        kernel = functools.partial(
            _sdd_strips_kernel,
            groups=(group_k, group_n),
            widen=bool(interpret),
            config=config,
        )
    # A float32 result is its own accumulator.
    if jnp.dtype(dtype) != jnp.float32:
        scratch.append(pltpu.VMEM((size, bk, bn), jnp.float32))
    limit = sum(_bytes(s.shape, s.dtype) for s in scratch if len(s.shape) > 1)
    limit += min(chunks, 2) * _bytes((size, bk, bn), dtype)
    any_spec = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(chunks, -(-x.shape[0] // tile_m)),
            in_specs=[any_spec, any_spec],
            out_specs=pl.BlockSpec(
                (size, bk, bn),
                lambda chunk, *_: (chunk, jnp.int32(0), jnp.int32(0)),
                pipeline_mode=pl.Buffered(min(chunks, 2)),
            ),
            scratch_shapes=scratch,
        ),
        out_shape=_out_shape((slots, bk, bn), dtype, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=limit + _SLACK,
        ),
        interpret=interpret,
        name="block_sparse_matmul_sdd",
    )(*lists, x, dy)
    return out


def _sdd_kernel(
    rows_ref,
    cols_ref,
    count_ref,
    x_hbm,
    dy_hbm,
    out_ref,
    x_ref,
    dy_ref,
    xt_ref,
    x_sem,
    dy_sem,
    acc_ref=None,
    *,
    widen,
    config,
):
    size, _, bn = out_ref.shape
    acc_ref = out_ref if acc_ref is None else acc_ref
    first, last, fresh = _sdd_range(count_ref, size)
    now = _sdd_open(x_hbm, dy_hbm, x_ref, dy_ref, xt_ref, x_sem, dy_sem)
    groups = _cdiv(last - first, config.unroll)

    def step(group, carry):
        for u in range(config.unroll):
            slot = group * config.unroll + u
            column = pl.multiple_of(cols_ref[first + slot] * bn, _LANES)
            product = _dot(
                xt_ref[rows_ref[first + slot]],
                dy_ref[now, :, pl.ds(column, bn)],
                False,
                widen,
            )
            acc = jnp.where(fresh, 0.0, acc_ref[slot]) + product
            acc = jnp.where(first + slot < last, acc, 0.0)
            acc_ref[slot] = acc
            if acc_ref is not out_ref:
                out_ref[slot] = acc.astype(out_ref.dtype)
        return carry

    _each(groups, step)
    _zero_rest(out_ref, jnp.where(fresh, groups * config.unroll, size))


def _sdd_strips_kernel(
    rows_ref,
    cols_ref,
    count_ref,
    bounds_ref,
    full_ref,
    counts_ref,
    x_hbm,
    dy_hbm,
    out_ref,
    x_ref,
    dy_ref,
    xt_ref,
    x_sem,
    dy_sem,
    strip_ref,
    acc_ref=None,
    *,
    groups,
    widen,
    config,
):
    size, bk, bn = out_ref.shape
    units_k, unit_k, unit_n = strip_ref.shape
    group_k, group_n = groups
    acc_ref = out_ref if acc_ref is None else acc_ref
    first, last, fresh = _sdd_range(count_ref, size)
    now = _sdd_open(x_hbm, dy_hbm, x_ref, dy_ref, xt_ref, x_sem, dy_sem)

    def column(unit, carry):
        begin = jnp.maximum(bounds_ref[unit], first)
        end = jnp.minimum(bounds_ref[unit + 1], last)
        start = pl.multiple_of(unit * unit_n, _LANES)
        count = jnp.where(begin < end, counts_ref[unit], 0)

        def multiply(group, carry):
            for u in range(config.unit_unroll):
                entry = jnp.minimum(group * config.unit_unroll + u, count - 1)
                index = full_ref[unit * units_k + entry]
                strip_ref[index] = _dot(
                    xt_ref[index], dy_ref[now, :, pl.ds(start, unit_n)], False, widen
                )
            return carry

        _each(_cdiv(count, config.unit_unroll), multiply)

        def cut(slot, carry):
            row, col = rows_ref[slot], cols_ref[slot]
            low = pl.multiple_of(_rem(row, group_k) * bk, 8)
            piece = strip_ref[_div(row, group_k), pl.ds(low, bk)]
            if group_n > 1:
                # To the left by the block's place, by way of the right: shifts are
                # not negative.
                shift = _rem(unit_n - _rem(col, group_n) * bn, unit_n)
                piece = pltpu.roll(piece, shift, 1)
            acc = jnp.where(fresh, 0.0, acc_ref[slot - first]) + piece[:, :bn]
            acc_ref[slot - first] = acc
            if acc_ref is not out_ref:
                out_ref[slot - first] = acc.astype(out_ref.dtype)
            return carry

        _each(end, cut, begin)
        return carry

    _each(bounds_ref.shape[0] - 1, column)
    _zero_rest(out_ref, jnp.where(fresh, jnp.maximum(last - first, 0), size))


def _sdd_range(count_ref, size):
    """This chunk's first and last slot, and whether its first row tile is at work."""
    first = pl.program_id(0) * size
    last = jnp.minimum(count_ref[0], first + size)
    return first, jnp.maximum(last, first), pl.program_id(1) == 0


def _zero_rest(out_ref, start):
    def zero(slot, carry):
        out_ref[slot] = jnp.zeros(out_ref.shape[1:], out_ref.dtype)
        return carry

    _each(out_ref.shape[0], zero, start)


def _sdd_open(x_hbm, dy_hbm, x_ref, dy_ref, xt_ref, x_sem, dy_sem):
    """Brings a row tile of x and dy, and lays x out transposed; returns the buffer."""
    step, steps = pl.program_id(1), pl.num_programs(1)
    rows, tile_m = x_hbm.shape[0], x_ref.shape[1]

    def start(index):
        buffer = _rem(index, 2)
        window = _window(index, rows, tile_m)
        pltpu.make_async_copy(
            x_hbm.at[window], x_ref.at[buffer], x_sem.at[buffer]
        ).start()
        pltpu.make_async_copy(
            dy_hbm.at[window], dy_ref.at[buffer], dy_sem.at[buffer]
        ).start()

    pl.when(step == 0)(lambda: start(step))
    pl.when(step + 1 < steps)(lambda: start(step + 1))
    now = _rem(step, 2)
    _wait(x_ref.at[now], x_sem.at[now])
    _wait(dy_ref.at[now], dy_sem.at[now])
    units, unit, _ = xt_ref.shape
    # Rows of the last tile that the one before it has counted already.
    repeated = step * tile_m - jnp.minimum(step * tile_m, rows - tile_m)
    for index in range(units):
        tile = x_ref[now, :, index * unit : (index + 1) * unit].T
        if rows % tile_m:
            row = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
            zero = jnp.zeros((), tile.dtype)
            tile = jnp.where(row >= repeated, tile, zero)
        xt_ref[index] = tile
    return now


def _open_tile(x_hbm, x_ref, x_sem, y_ref, y_sem, tiles_out, blocks):
    """Brings a row tile of x, frees a buffer of y; returns which buffers are in use."""
    core, step, split = (pl.program_id(axis) for axis in range(3))
    steps, splits = pl.num_programs(1), pl.num_programs(2)
    (rows, columns), tile_m = x_hbm.shape, x_ref.shape[1]

    def start(index):
        buffer = _rem(index, 2)
        pltpu.make_async_copy(
            x_hbm.at[_window(core * steps + index, rows, tile_m)],
            x_ref.at[buffer, :, pl.ds(0, columns)],
            x_sem.at[buffer],
        ).start()

    x_now = _rem(step, 2)

    @pl.when((split == 0) & (step == 0))
    def _():
        start(step)
        blocks.open()
        if x_ref.shape[2] > columns:
            zeros = jnp.zeros((2, tile_m, x_ref.shape[2] - columns), x_ref.dtype)
            x_ref[:, :, columns:] = zeros
        blocks.wait()

    pl.when((split == 0) & (step + 1 < steps))(lambda: start(step + 1))
    pl.when(split == 0)(
        lambda: _wait(x_ref.at[x_now, :, pl.ds(0, columns)], x_sem.at[x_now])
    )
    done = step * splits + split
    y_now = _rem(done, 2)
    # The buffer was last filled two grid steps ago.
    pl.when(done >= 2)(
        lambda: _wait_panels(y_ref, y_sem, y_now, _rem(done - 2, splits), tiles_out)
    )
    return x_now, y_now


def _close_tile(y_hbm, y_ref, y_sem, tiles_out):
    """Sends this step's panels of y on their way; the last step waits for all."""
    core, step, split = (pl.program_id(axis) for axis in range(3))
    steps, splits = pl.num_programs(1), pl.num_programs(2)
    _, columns, tile_m, side = y_ref.shape
    done = step * splits + split
    now = _rem(done, 2)
    window = _window(core * steps + step, y_hbm.shape[0], tile_m)

    def send(local):
        column = pl.multiple_of((split * columns + local) * side, _LANES)
        pltpu.make_async_copy(
            y_ref.at[now, jnp.int32(local)],
            y_hbm.at[window, pl.ds(column, side)],
            y_sem.at[now],
        ).start()

    for local in range(columns):
        if tiles_out % columns and local >= tiles_out % columns:
            pl.when(split * columns + local < tiles_out)(functools.partial(send, local))
        else:
            send(local)

    @pl.when(done == steps * splits - 1)
    def _():
        pl.when(done >= 1)(
            lambda: _wait_panels(
                y_ref, y_sem, 1 - now, _rem(done - 1, splits), tiles_out
            )
        )
        _wait_panels(y_ref, y_sem, now, split, tiles_out)


def _wait_panels(y_ref, y_sem, buffer, split, tiles_out):
    """Waits for the panels that one grid step sent."""
    columns = y_ref.shape[1]
    if tiles_out % columns == 0:
        _wait(y_ref.at[buffer], y_sem.at[buffer])
        return

    def wait(local, carry):
        _wait(y_ref.at[buffer, local], y_sem.at[buffer])
        return carry

    _each(jnp.minimum(columns, tiles_out - split * columns), wait)


def _wait(ref, sem):
    """Waits until as many bytes as ``ref`` has have arrived on ``sem``."""
    pltpu.make_async_copy(ref, ref, sem).wait()


def _window(index, rows, tile_m):
    """Rows of a tile; the last one begins early enough to be whole."""
    return pl.ds(
        pl.multiple_of(jnp.minimum(index * tile_m, rows - tile_m), _SUBLANES), tile_m
    )


class _Blocks:
    """Where an inner step's blocks come from.

    All lie in VMEM, or each step's are copied one step ahead. The last block held is
    zero, and is what slot number ``slots`` stands for.
    """

    def __init__(self, blocks_hbm, held_ref, sem, config):
        self.hbm, self.held, self.sem = blocks_hbm, held_ref, sem
        self.slots, self.zero = blocks_hbm.shape[0], held_ref.shape[0] - 1
        self.resident, self.unroll = config.resident, config.unroll

    def _all(self):
        held = self.held.at[pl.ds(0, self.slots)]
        return pltpu.make_async_copy(self.hbm, held, self.sem.at[jnp.int32(0)])

    def open(self):
        """Once per core: fills what stays."""
        self.held[self.zero] = jnp.zeros(self.held.shape[1:], self.held.dtype)
        if self.resident:
            self._all().start()

    def wait(self):
        """Once per core: what stays is there."""
        if self.resident:
            self._all().wait()

    def start(self, slots, group, groups):
        """Starts the copies of a step's blocks, if there is such a step."""
        if self.resident:
            return
        buffer = _rem(group, 2)

        @pl.when(group < groups)
        def _():
            for u, slot in enumerate(slots(group)):
                place = self.held.at[buffer * self.unroll + u]
                copies = [
                    pltpu.make_async_copy(source, place, self.sem.at[buffer])
                    for source in (
                        self.hbm.at[jnp.minimum(slot, self.slots - 1)],
                        self.held.at[jnp.int32(self.zero)],
                    )
                ]
                pl.when(slot < self.slots)(copies[0].start)
                pl.when(slot >= self.slots)(copies[1].start)

    def take(self, slots, group, groups):
        """The blocks of a step, each to be read by a call."""
        if self.resident:
            places = [
                jnp.where(slot < self.slots, slot, self.zero) for slot in slots(group)
            ]
        else:
            buffer = _rem(group, 2)
            self.start(slots, group + 1, groups)
            low = buffer * self.unroll
            _wait(self.held.at[pl.ds(low, self.unroll)], self.sem.at[buffer])
            places = [low + u for u in range(self.unroll)]
        return [functools.partial(self.held.__getitem__, place) for place in places]


def _dot(a, b, transpose, widen):
    """The product of two tiles, or of a with b transposed, in float32.

    Widened first where the kernel is interpreted: XLA has no such product of bfloat16
    for every shape on CPU. It changes nothing, products of bfloat16 are exact there.
    """
    if widen:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _each(stop, body, start=0):
    """Calls ``body(index, None)`` for index from start to stop."""
    lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, None)


# Of int32 indices, also where Python's integers are 64 bits.


def _div(index, size):
    return lax.div(index, jnp.int32(size))


def _cdiv(index, size):
    return _div(index + (size - 1), size)


def _rem(index, size):
    return lax.rem(index, jnp.int32(size))


def _place(strip_ref, index, row, col, block):
    """Writes a block at place (row, col) of a unit, in blocks; the rest stays."""
    bk, bn = block.shape
    unit_n = strip_ref.shape[2]
    window = (index, pl.ds(pl.multiple_of(row * bk, 8), bk))
    if bn == unit_n:
        strip_ref[window] = block
        return
    # No store begins inside a register of 128 lanes: repeat the block over all of them
    # and take the lanes that are its own. In float32, for which every chip can select.
    wide = jnp.concatenate([block.astype(jnp.float32)] * (unit_n // bn), axis=1)
    lane = lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    own = (lane >= col * bn) & (lane < (col + 1) * bn)
    old = strip_ref[window].astype(jnp.float32)
    strip_ref[window] = jnp.where(own, wide, old).astype(strip_ref.dtype)


def _full_units(outer, inner, units_out, units_in):
    """For each outer unit the inner ones that hold a block, and how many they are."""
    holds = jnp.zeros((units_out, units_in), bool)
    holds = holds.at[outer, inner].set(True, mode="drop")
    full = jnp.argsort(~holds, axis=1, stable=True).astype(jnp.int32)
    return full.reshape(-1), jnp.sum(holds, axis=1, dtype=jnp.int32)


def _split(total, parts):
    """(parts, size) with parts * size >= total and no part empty."""
    size = -(-total // parts)
    return -(-total // size), size


def _row_chunks(tile_m, rows):
    return [pl.ds(low, min(rows, tile_m - low)) for low in range(0, tile_m, rows)]


def _pad(x, row_multiple, column_multiple):
    """Zeros at the end of both axes up to the multiples; x itself where it fits."""
    more = [
        (0, -size % by)
        for size, by in zip(x.shape, (row_multiple, column_multiple), strict=True)
    ]
    return jnp.pad(x, more) if any(high for _, high in more) else x


def _out_shape(shape, dtype, x):
    """The result's type: it varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


def _bytes(shape, dtype):
    """Bytes of an array in VMEM, its last two axes padded to whole registers."""
    *lead, rows, columns = shape
    itemsize = jnp.dtype(dtype).itemsize
    rows = -(-rows * itemsize // 32) * 32 // itemsize
    columns = -(-columns // _LANES) * _LANES
    return math.prod(lead) * rows * columns * itemsize
