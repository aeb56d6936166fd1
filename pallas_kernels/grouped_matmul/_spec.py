"""What the grouped kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions. Rows lie sorted by group: group g has the
``sizes[g]`` rows after those of the groups before it; rows beyond the sum are the tail.

``product(x, w, sizes, *, transpose, config, interpret)`` -> y
    x       [m, k], or with ``transpose=True`` [m, n]; m >= 1
    w       [groups, k, n]              dtype of x
    sizes   int32 [groups]              traced; sum at most m
    y       [m, n], or [m, k]           dtype of x

        y[i] = x[i] @ w[group of i], or x[i] @ w[group of i].T;  0 in the tail

``sampled(x, y, sizes, *, dtype, config, interpret)`` -> w
    x       [m, k]                      y [m, n], dtype of x
    w       [groups, k, n]              of ``dtype``: that of x, or float32

        w[g] = x[rows of g].T @ y[rows of g];  0 for a group without rows

Both accumulate in float32. What the tail's rows hold, NaN included, is never used, and
what one group's rows hold does not reach another's result.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "grouped", "grouped_transposed" or "grouped_sampled"; [k, n] is the shape
    of one group's matrix, in all three.
    """

    op: str
    m: int
    k: int
    n: int
    groups: int
    dtype: str
    out_dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.m} rows in {self.groups} groups, matrices "
            f"{self.k}x{self.n}, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y) that one program instance holds.
    tile_k, tile_n: rows and columns of a matrix that it holds.
    rows: TPU: rows of a tile that go through the inner step at a time.
    vmem: TPU: bytes that the kernel may take of VMEM.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    rows: int = 128
    vmem: int = 0


# --- TPU: Pallas Mosaic -------------------------------------------------------------


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------
