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

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


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
    stages: GPU: depth of the copy pipeline, at least 2.
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

# A longer contraction goes by parts: the compiler unrolls it, and spills.
TPU_WHOLE = 8192


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    sampled = problem.op == "grouped_sampled"
    _chips.check_out_dtype("mosaic_tpu", problem, sampled=sampled)
    _chips.check_positive("mosaic_tpu", problem, "m", "k", "n", "groups")
    tile_m = config_mosaic_tpu(problem, chip).tile_m
    lists = 4 * (2 * (-(-problem.m // tile_m) + problem.groups) + problem.groups + 2)
    if lists > _chips.TPU_SMEM:
        raise NotImplementedError(
            f"mosaic_tpu: m={problem.m}, groups={problem.groups} have lists that take "
            f"{lists} bytes of SMEM, needs at most {_chips.TPU_SMEM}: fewer "
            "groups or rows"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the TPU kernels from mean rows per group and the chip.

    A row tile is read once for all its groups, and only the windows of ``rows`` that
    hold a group's rows are multiplied: its height costs VMEM alone. Wide tiles read x
    less often; a contraction that is held whole needs no accumulator. By the
    compiler's schedule, not yet by measurement.
    """
    room = _chips.tpu_vmem(chip)
    config = None
    for tile_m, tile_k, tile_n in _tiles_mosaic_tpu(problem, _chips.tpu_cores(chip)):
        rows = rows_tpu(problem, tile_m, chip in _chips.TPU_WIDE)
        config = Config(tile_m, tile_k, tile_n, rows)
        config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
        if config.vmem <= room:
            break
    assert config is not None
    return config


def _tiles_mosaic_tpu(problem: Problem, cores: int):
    """(tile_m, tile_k, tile_n), the best first; the last ones fit every chip."""
    k, n = problem.k, problem.n
    rows = -(-problem.m // 16) * 16
    if problem.op == "grouped_sampled":
        for tile_m, side in ((1024, 1024), (512, 1024), (512, 512), (128, 256)):
            yield min(tile_m, rows), part_tpu(k, side, cores), part_tpu(n, side)
        return
    inner, outer = (n, k) if problem.op == "grouped_transposed" else (k, n)
    most = min(inner, TPU_WHOLE)
    whole = [(most, *pair) for pair in ((512, 1024), (512, 512), (256, 512))]
    parts = [
        (2048, 512, 1024), (2048, 512, 512), (1024, 512, 512), (512, 256, 512),
        (512, 256, 256), (256, 128, 128),
    ]  # fmt: skip
    for side, tile_m, wide in (*whole, (most, 128, 512), *parts):
        tile_in, tile_out = part_tpu(inner, side), part_tpu(outer, wide, cores)
        sides = (tile_in, tile_out)
        if problem.op == "grouped_transposed":
            sides = (tile_out, tile_in)
        yield min(tile_m, rows), *sides


def part_tpu(size: int, most: int, cores: int = 1, unit: int = TPU_LANES) -> int:
    """A tile of up to ``most``, in whole units: all alike, as many as cores share."""
    units = -(-size // unit)
    tiles = -(-size // most)
    if units >= cores:
        tiles = -(-tiles // cores) * cores
    return -(-units // tiles) * unit


def rows_tpu(problem: Problem, tile_m: int, wide: bool) -> int:
    """Rows of a window: the fewest cycles for a group of mean size.

    A window costs what filling the matrix units with weights costs, counted in rows,
    and its rows; a group has half a window more than its rows need.
    """
    mean = problem.m / problem.groups + 8
    if problem.op == "grouped_sampled":
        least, fixed = (256, 20) if wide else (128, 20)
    else:
        least, fixed = (16, 240) if wide else (40, 6)
    sizes = [r for r in (16, 32, 64, 128, 256, 512) if r < tile_m] + [min(tile_m, 512)]
    return min(
        sizes,
        key=lambda r: max(1, mean / r + 0.5) * (max(r, least) + fixed),
    )


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel asks for."""
    item = 2 if problem.dtype == "bfloat16" else 4
    out = 2 if problem.out_dtype == "bfloat16" else 4
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    rows, matrix = config.rows, tile_k * tile_n
    both = tile_k + tile_n
    if problem.op == "grouped_sampled":
        # A window masked, its x transposed; a sum of float32, and what is added to it.
        total = item * (2 * tile_m * both + rows * (both + tile_k)) + 2 * matrix * out
        return total + 4 * matrix * (2 if out == 2 else 1) + _chips.TPU_SLACK
    inner, side_in, side_out = problem.k, tile_k, tile_n
    if problem.op == "grouped_transposed":
        inner, side_in, side_out = problem.n, tile_n, tile_k
    total = 2 * item * (tile_m * both + matrix) + 2 * 4 * rows * side_out
    if inner > side_in:
        # Sums, and those of a window as they were.
        total += 4 * (tile_m + rows) * side_out
    if inner % side_in:
        # The operands with what lies outside their arrays cut off.
        total += item * (matrix + rows * side_in)
    return total + _chips.TPU_SLACK


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Columns and rows that leave a program at once, and columns of a swizzled tile.
HOPPER_PIECE = 64


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    _chips.check_dtype("mosaic_gpu", problem)
    sampled = problem.op == "grouped_sampled"
    _chips.check_out_dtype("mosaic_gpu", problem, sampled=sampled)
    _chips.check_positive("mosaic_gpu", problem, "m", "groups")
    _chips.check_multiple("mosaic_gpu", problem, HOPPER_PIECE, "k", "n")
    _chips.check_chip("mosaic_gpu", chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels from mean rows per group and the chip.

    By reasoning, not yet by measurement. A group's last tile is half empty on average:
    tiles are 64 rows high where 128 would waste more than they save. Wide tiles reread
    x and the matrix less often, which is what L2 limits.
    """
    programs = _chips.hopper_multiprocessors(chip)
    width = problem.k if problem.op == "grouped_transposed" else problem.n
    wide = 256 if width > 128 else 128
    # What a result leaves through: two pieces of 16 bits for each of two warpgroups.
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
    stages = min(6, (_chips.HOPPER_SMEM - _chips.HOPPER_BARRIERS - out) // stage)
    return Config(tile_m, tile_k, tile_n, stages=stages, programs=programs)
