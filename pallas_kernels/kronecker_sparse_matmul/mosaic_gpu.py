"""Kronecker-sparse products on Hopper: Pallas Mosaic GPU, TMA copies and wgmma.

Memory plan. Of grouped_matmul: persistent programs, one per multiprocessor, take output
tiles in turn; of a program's three warpgroups one copies by TMA into ``stages`` sets of
swizzled buffers in SMEM, ahead across tiles, two compute half of a tile each, float32
accumulators in registers. Here which tiles there are is static: the a * d blocks one
after the other, each in strips of ``group`` row tiles, column by column, so neighbours
share a block's columns of x and its matrix in L2.

Order of columns. The kernels see x as [m, blocks, c] and y as [m, blocks, b], and TMA
takes a box of one block: what lies outside of it is read as zero and not written, so no
block sees another's columns. With d == 1 that is how x lies in memory. With d > 1 the
columns of d blocks are interleaved; TMA copies no less than 16 bytes in a row, and
wgmma wants eight neighbours along the contraction in each of its 16-byte rows. So XLA
reorders x before, and y after: one more pass over each, in HBM.

``product``. A tile is [tile_m, tile_n] of one block's columns, a step tile_k of c.

``sampled``. A tile is [tile_k, tile_n] of one block, a step ``tile_m`` rows. Blocks are
few and rows many, so the rows are in ``splits`` parts, whose float32 sums XLA adds up.

Dtypes: bfloat16 and float16 in, float32 sums; out the same, of ``sampled`` also
float32. Chips: compiled with ptxas for H100 and H200 (sm_90a) under jax 0.10.2 and
0.11.2, no spills; results proven by simulation. Not yet run on a GPU: speed is
unmeasured.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul._spec import HOPPER_PIECE as _PIECE
from pallas_kernels.grouped_matmul.mosaic_gpu import (
    COMPUTE,
    Plan,
    persistent,
    row_and_column,
    share,
    store,
    whole_tiles,
)
from pallas_kernels.kronecker_sparse_matmul._spec import Config


def product(
    x: jax.Array, factor: jax.Array, *, config: Config, interpret=None
) -> jax.Array:
    """Multiplies rows by a Kronecker-sparse factor, as ``_spec`` defines it.

    Args:
        x: [m, a * c * d], bfloat16 or float16.
        factor: [a, d, c, b] of x's dtype.
        config: tile sizes.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [m, a * b * d] of x's dtype.
    """
    a, d, c, b = factor.shape
    rows = x.shape[0]
    x = _by_block(whole_tiles(x), a, c, d)
    m, blocks, _ = x.shape
    tile_m, deep, wide = config.tile_m, config.tile_k, config.tile_n

    def plan(x_gmem, w_gmem, y_gmem, pieces):
        row, column, shape = share(tile_m, wide)
        total, place = _places(
            blocks, pl.cdiv(m, tile_m), pl.cdiv(b, wide), config.group
        )

        def steps(tile):
            del tile
            return jnp.int32(c // deep)

        def fetch(tile, i):
            rows, along = pl.ds(tile.row * tile_m, tile_m), pl.ds(i * deep, deep)
            across = pl.ds(tile.column * wide, wide)
            return x_gmem.at[rows, tile.block, along], w_gmem.at[
                tile.block, along, across
            ]

        def multiply(tile, i, accs, x_smem, w_smem):
            del tile, i
            rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            plgpu.wgmma(accs[0], x_smem.at[rows], w_smem.at[:, columns])

        def finish(tile, results):
            at = tile.row * tile_m + row, tile.column * wide + column
            mine = pieces.at[lax.axis_index("warpgroup")]
            store(results[0].astype(x.dtype), y_gmem.at[:, tile.block], *at, mine)

        return Plan(total, place, steps, fetch, multiply, finish)

    y = persistent(
        (x, factor.reshape(blocks, c, b)),
        plan,
        name="kronecker_sparse_matmul",
        out_type=jax.ShapeDtypeStruct((m, blocks, b), x.dtype),
        buffers=[(tile_m, deep), (deep, wide)],
        tile=(tile_m, wide),
        scratch=[plgpu.SMEM((COMPUTE, 2, _PIECE, _PIECE), x.dtype)],
        stages=config.stages,
        programs=config.programs,
        interpret=interpret,
    )
    y = y if m == rows else y[:rows]
    return y.reshape(rows, a, d, b).swapaxes(2, 3).reshape(rows, a * b * d)


def sampled(
    x: jax.Array,
    y: jax.Array,
    *,
    pattern: tuple[int, int, int, int],
    dtype,
    config: Config,
    interpret=None,
) -> jax.Array:
    """Computes each block of ``x.T @ y``, as ``_spec`` defines it.

    Args:
        x: [m, a * c * d], bfloat16 or float16.
        y: [m, a * b * d] of x's dtype.
        pattern: (a, b, c, d).
        dtype: of the result, x's or float32.
        config: tile sizes; ``tile_m`` is the rows that one step multiplies.
        interpret: True or ``plgpu.InterpretGPUParams`` to simulate, from jax 0.11 on.

    Returns:
        [a, d, c, b] of ``dtype``.
    """
    a, b, c, d = pattern
    x, y = whole_tiles(x), whole_tiles(y)
    x, y = _by_block(x, a, c, d), _by_block(y, a, b, d)
    m, blocks, _ = x.shape
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    splits = config.splits
    some = pl.cdiv(pl.cdiv(m, tile_m), splits)  # steps of each part but the last
    part_dtype = dtype if splits == 1 else jnp.float32
    slots = 4 // jnp.dtype(part_dtype).itemsize

    def plan(x_gmem, y_gmem, out_gmem, pieces):
        row, column, shape = share(tile_k, tile_n)
        total, place = _places(
            blocks * splits, pl.cdiv(c, tile_k), pl.cdiv(b, tile_n), config.group
        )

        def split(tile):
            """Block and first step of a tile: a block's parts follow each other."""
            block = lax.div(tile.block, jnp.int32(splits))
            return block, (tile.block - block * splits) * some

        def steps(tile):
            _, first = split(tile)
            return jnp.clip(pl.cdiv(m, tile_m) - first, 0, some)

        def fetch(tile, i):
            block, first = split(tile)
            rows = pl.ds((first + i) * tile_m, tile_m)
            return (
                x_gmem.at[rows, block, pl.ds(tile.row * tile_k, tile_k)],
                y_gmem.at[rows, block, pl.ds(tile.column * tile_n, tile_n)],
            )

        def multiply(tile, i, accs, x_smem, y_smem):
            del tile, i
            rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            x_piece = x_smem.at[:, rows].transpose((1, 0))
            plgpu.wgmma(accs[0], x_piece, y_smem.at[:, columns])

        def finish(tile, results):
            at = tile.row * tile_k + row, tile.column * tile_n + column
            mine = pieces.at[lax.axis_index("warpgroup")]
            store(results[0].astype(part_dtype), out_gmem.at[tile.block], *at, mine)

        return Plan(total, place, steps, fetch, multiply, finish)

    parts = persistent(
        (x, y),
        plan,
        name="kronecker_sparse_matmul_sampled",
        out_type=jax.ShapeDtypeStruct((blocks * splits, c, b), part_dtype),
        buffers=[(tile_m, tile_k), (tile_m, tile_n)],
        tile=(tile_k, tile_n),
        scratch=[plgpu.SMEM((COMPUTE, slots, _PIECE, _PIECE), part_dtype)],
        stages=config.stages,
        programs=config.programs,
        interpret=interpret,
    )
    if splits > 1:
        parts = parts.reshape(blocks, splits, c, b).sum(axis=1).astype(dtype)
    return parts.reshape(a, d, c, b)


class _Tile(NamedTuple):
    """A tile of the output; int32 scalars."""

    block: Any
    row: Any
    column: Any


def _places(blocks: int, down: int, across: int, group: int):
    """``total`` and ``place`` of ``down`` times ``across`` tiles of each block."""

    def place(number):
        block = lax.div(number, jnp.int32(down * across))
        rest = number - block * (down * across)
        return _Tile(block, *row_and_column(rest, jnp.int32(down), across, group))

    return jnp.int32(blocks * down * across), place


def _by_block(x, a: int, side: int, d: int):
    """[m, a * side * d] as [m, a * d, side]."""
    m = x.shape[0]
    return x.reshape(m, a, side, d).swapaxes(2, 3).reshape(m, a * d, side)
