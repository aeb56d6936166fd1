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
    stages: GPU: depth of the copy pipeline.
    group: GPU: row tiles that programs take together, for L2.
    programs: GPU: persistent programs, one per multiprocessor.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    rows: int = 128
    vmem: int = 0
    stages: int = 2
    group: int = 8
    programs: int = 1


# --- TPU: Pallas Mosaic -------------------------------------------------------------


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Shared memory that one program can ask for, and what its barriers may take of it.
_HOPPER_SMEM = 232_448
_HOPPER_BARRIERS = 1_024
# Multiprocessors; where the chip is not known yet, those of the chips served.
_HOPPER_MULTIPROCESSORS = {"h100": 132, "h200": 132, None: 132}
# Columns and rows that leave a program at once, and columns of a swizzled tile.
HOPPER_PIECE = 64


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    if problem.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"mosaic_gpu: dtype is {problem.dtype}, needs bfloat16 or float16"
        )
    served = (problem.dtype,)
    if problem.op == "grouped_sampled":
        served = (problem.dtype, "float32")
    if problem.out_dtype not in served:
        raise NotImplementedError(
            f"mosaic_gpu: out_dtype is {problem.out_dtype} for {problem.op}, needs "
            f"{' or '.join(served)}"
        )
    for name in ("m", "groups"):
        if getattr(problem, name) < 1:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {getattr(problem, name)}, needs at least 1"
            )
    for name in ("k", "n"):
        size = getattr(problem, name)
        if size < HOPPER_PIECE or size % HOPPER_PIECE:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {size}, needs a multiple of {HOPPER_PIECE}"
            )
    if chip not in _HOPPER_MULTIPROCESSORS:
        raise NotImplementedError(
            f"mosaic_gpu: chip is {chip}, needs a Hopper GPU (h100, h200)"
        )


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels from mean rows per group and the chip.

    By reasoning, not yet by measurement. A group's last tile is half empty on average:
    tiles are 64 rows high where 128 would waste more than they save. Wide tiles reread
    x and the matrix less often, which is what L2 limits.
    """
    programs = _HOPPER_MULTIPROCESSORS.get(chip, _HOPPER_MULTIPROCESSORS[None])
    width = problem.k if problem.op == "grouped_transposed" else problem.n
    wide = 256 if width > 128 else 128
    # What a result leaves through: 64 x 64 for each of two warpgroups; for a product
    # twice, swizzled for whole pieces and not for parts.
    out = 2 * HOPPER_PIECE**2 * 4
    if problem.op == "grouped_sampled":
        tile_m = HOPPER_PIECE
        tile_k, tile_n = 2 * HOPPER_PIECE, wide
        stage = 2 * tile_m * (tile_k + tile_n)
    else:
        tile_m = 128 if problem.m > 96 * problem.groups else 64
        tile_k, tile_n = HOPPER_PIECE, wide
        if problem.op == "grouped_transposed":
            tile_k, tile_n = tile_n, tile_k
        stage = 2 * HOPPER_PIECE * (tile_m + wide)
    stages = min(6, (_HOPPER_SMEM - _HOPPER_BARRIERS - out) // stage)
    return Config(tile_m, tile_k, tile_n, stages=stages, programs=programs)
