"""What the block-sparse kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions.

``dsd(x, blocks, order, source, ptr, *, transpose, config, interpret)`` -> y
    x       [m, tiles_in * side_in]     any m >= 1; the kernel handles a ragged tail
    blocks  [slots, bk, bn]             slots >= 1
    order   int32 [slots] or None       None: the identity
    source  int32 [slots]
    ptr     int32 [tiles_out + 1]       non-decreasing, ptr[0] = 0, ptr[-1] <= slots
    y       [m, tiles_out * side_out]   dtype of x

        y[:, j] = sum over p in ptr[j] .. ptr[j + 1] - 1 of x[:, source[p]] @ b[order[p]]

    where index j of x and y means a whole tile of columns, and b is ``blocks``, or with
    ``transpose=True`` each block transposed (side_in = bn, side_out = bk). Accumulates in
    float32. An empty j gives zeros. Every entry of order and source is in range, also
    those at p >= ptr[-1], which are padding and take no part.

``sdd(x, dy, rows, cols, count, *, block_shape, dtype, config, interpret)`` -> blocks
    x       [m, tiles_k * bk]           dy [m, tiles_n * bn]
    rows    int32 [slots]               cols int32 [slots], sorted by (col, row)
    count   int32 []                    slots at p >= count are padding: zeros come back
    blocks  [slots, bk, bn]             of ``dtype``: that of x, or float32

        blocks[p] = x[:, rows[p]].T @ dy[:, cols[p]]
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "dsd", "dsd_transposed" or "sdd"; k, n are those of the sparse matrix
    (multiples of its block), also for the transposed product.
    """

    op: str
    m: int
    k: int
    n: int
    block_shape: tuple[int, int]
    slots: int
    dtype: str
    out_dtype: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y, dy) that one program instance works on.
    unroll: blocks that one inner step multiplies.
    stages: depth of the copy pipeline.
    """

    tile_m: int
    unroll: int = 1
    stages: int = 2
