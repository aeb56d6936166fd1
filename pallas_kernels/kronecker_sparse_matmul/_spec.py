"""What the Kronecker-sparse kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions. A factor of pattern (a, b, c, d) is
stored as ``[a, d, c, b]``; x's columns are (i j k) and y's (i o k), row-major, with
i < a, j < c, o < b, k < d.

``product(x, factor, *, config, interpret)`` -> y
    x       [m, a * c * d]              m >= 1
    factor  [a, d, c, b]                dtype of x
    y       [m, a * b * d]              dtype of x

        y[:, (i, o, k)] = sum over j of x[:, (i, j, k)] factor[i, k, j, o]

``sampled(x, y, *, pattern, dtype, config, interpret)`` -> factor
    x       [m, a * c * d]              y [m, a * b * d], dtype of x
    factor  [a, d, c, b]                of ``dtype``: that of x, or float32

        factor[i, k, j, o] = sum over rows of x[:, (i, j, k)] y[:, (i, o, k)]

Both accumulate in float32. The transposed product is ``product`` of the factor with its
last two axes swapped.
"""

import dataclasses

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "kronecker" or "kronecker_sampled"; a, b, c, d are the factor's pattern.
    """

    op: str
    rows: int
    a: int
    b: int
    c: int
    d: int
    dtype: str
    out_dtype: str

    def __str__(self):
        k, n = self.a * self.c * self.d, self.a * self.b * self.d
        return (
            f"{self.op}: {self.rows} rows, {k}x{n} factor of {self.a * self.d} blocks "
            f"of {self.c}x{self.b}, {self.d} of them interleaved, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y) that one program instance holds.
    tile_k, tile_n: rows and columns of a unit's matrix that it holds.
    blocks: TPU: blocks that make up a unit, on its diagonal.
    spread: TPU: a block is the d interleaved ones as one matrix, [c * d, b * d]; else
        each of them is a block, and the columns of x and y are brought together.
    units: TPU: units that one program instance multiplies.
    vmem: TPU: bytes that the kernel may take of VMEM.
    stages: GPU: depth of the copy pipeline, at least 2.
    group: GPU: row tiles that programs take together, for L2.
    programs: GPU: persistent programs, one per multiprocessor.
    splits: GPU: parts of the rows that "kronecker_sampled" sums up by themselves.
    """

    tile_m: int
    tile_k: int
    tile_n: int
    blocks: int = 1
    spread: bool = True
    units: int = 1
    vmem: int = 0
    stages: int = 2
    group: int = 8
    programs: int = 1
    splits: int = 1


# --- TPU: Pallas Mosaic -------------------------------------------------------------

# Multiplications that take as long as copying one entry in HBM.
_TPU_COPY = 500


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    sampled = problem.op == "kronecker_sampled"
    _chips.check_out_dtype("mosaic_tpu", problem, sampled=sampled)
    _chips.check_positive("mosaic_tpu", problem, "rows", "a", "b", "c", "d")


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the units and tiles of the TPU kernels.

    By reasoning, not yet by measurement. A unit is as wide as the matrix units at
    least: smaller blocks share one, on its diagonal, where the zeros cost nothing.
    """
    room = _chips.tpu_vmem(chip)
    spread, blocks = _unit_mosaic_tpu(problem)
    config = Config(0, 0, 0, blocks, spread)
    count, wide_k, wide_n = units_mosaic_tpu(problem, config)
    rows = -(-problem.rows // 16) * 16
    for tile_m, side in ((512, 2048), (512, 1024), (512, 512), (256, 256), (128, 128)):
        tile_k, tile_n = _chips.divisor(wide_k, side), _chips.divisor(wide_n, side)
        units = 1
        if (tile_k, tile_n) == (wide_k, wide_n):
            # Several small units amortize the step.
            most = max(1, min(side // max(wide_k, wide_n), 8))
            units = next((u for u in range(most, 0, -1) if count % u == 0), 1)
        config = dataclasses.replace(
            config, tile_m=min(tile_m, rows), tile_k=tile_k, tile_n=tile_n, units=units
        )
        config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
        if config.vmem <= room:
            break
    return config


def units_mosaic_tpu(problem: Problem, config: Config) -> tuple[int, int, int]:
    """(units, rows, columns of a unit's matrix)."""
    p = problem
    count, c, b = (
        (p.a, p.c * p.d, p.b * p.d) if config.spread else (p.a * p.d, p.c, p.b)
    )
    return (
        -(-count // config.blocks),
        _chips.up(config.blocks * c),
        _chips.up(config.blocks * b),
    )


def _unit_mosaic_tpu(problem: Problem) -> tuple[bool, int]:
    """(spread, blocks) that cost least, in multiplications."""
    p = problem

    def cost(choice):
        spread, blocks = choice
        config = Config(0, 0, 0, blocks, spread)
        units, wide_k, wide_n = units_mosaic_tpu(problem, config)
        work, copied = units * wide_k * wide_n, 0
        # Columns that XLA must move, or fill up.
        for wide, true in ((wide_k, p.a * p.c * p.d), (wide_n, p.a * p.b * p.d)):
            if units * wide != true or not (spread or p.d == 1):
                copied += units * wide
        return work * (p.rows + _TPU_COPY) + copied * p.rows * _TPU_COPY, blocks

    choices = [(True, g) for g in range(1, min(p.a, TPU_LANES) + 1)]
    if p.d > 1:
        choices += [(False, g) for g in range(1, min(p.a * p.d, TPU_LANES) + 1)]
    return min(choices, key=cost)


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel asks for."""
    item = 2 if problem.dtype == "bfloat16" else 4
    out = 2 if problem.out_dtype == "bfloat16" else 4
    u, m, k, n = config.units, config.tile_m, config.tile_k, config.tile_n
    if problem.op == "kronecker_sampled":
        # x, y and their transposed values; the sum, once more as a value.
        total = 3 * u * m * (k + n) * item + u * k * n * (2 * out + 4) + 4 * k * n
    else:
        total = 2 * u * (m * (k + n) + k * n) * item + 4 * m * n * (1 + u)
    return total + _chips.TPU_SLACK


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Rows and columns that leave a program at once, and columns of a swizzled tile.
_HOPPER_PIECE = 64
# Rows that a part of "kronecker_sampled" has at least.
_HOPPER_SPLIT = 512


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    _chips.check_dtype("mosaic_gpu", problem)
    sampled = problem.op == "kronecker_sampled"
    _chips.check_out_dtype("mosaic_gpu", problem, sampled=sampled)
    _chips.check_positive("mosaic_gpu", problem, "rows", "a", "d")
    _chips.check_multiple("mosaic_gpu", problem, _HOPPER_PIECE, "c", "b")
    _chips.check_chip("mosaic_gpu", chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels from the block's sides and the chip.

    By reasoning, not yet by measurement. A tile is as wide as a block where that is at
    most 256 columns, so that x is read once; rows are split where the blocks alone
    would leave multiprocessors without work.
    """
    programs = _chips.hopper_multiprocessors(chip)
    piece = _HOPPER_PIECE
    sampled = problem.op == "kronecker_sampled"
    # Rows of the tile that two warpgroups share; where there are 64, by its columns.
    high = 2 * piece if (problem.c if sampled else problem.rows) > piece else piece
    unit = piece if high > piece else 2 * piece
    columns = -(-problem.b // (4 * piece))
    wide = -(-problem.b // (columns * unit)) * unit
    deep, splits = piece, 1
    if sampled:
        tiles = problem.a * problem.d * -(-problem.c // high) * columns
        splits = min(programs // tiles, problem.rows // _HOPPER_SPLIT)
    tile_m, tile_k = (deep, high) if sampled else (high, deep)
    # What a result leaves through: two pieces of 16 bits for each of two warpgroups.
    room = _chips.HOPPER_SMEM - _chips.HOPPER_BARRIERS - 2 * piece**2 * 4
    stages = min(6, room // (2 * deep * (high + wide)))
    return Config(
        tile_m,
        tile_k,
        wide,
        stages=stages,
        programs=programs,
        splits=max(1, splits),
    )
