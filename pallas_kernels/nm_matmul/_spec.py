"""What the condensed N:M kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions. w ``[k, p]`` is the dense matrix that
``values [k * n / m, p]`` and ``words`` stand for: row ``g * n + j`` of values belongs
in row ``g * m + place`` of w, and row r has its place in word ``r // per`` (per = 32 /
``index_bits(m)``) from bit ``index_bits(m) * (r % per)`` on.

``product(x, values, words, *, n, m, transpose, config, interpret)`` -> y
    x       [rows, k], or with ``transpose=True`` [rows, p]; rows >= 1
    values  [k * n / m, p]              dtype of x
    words   uint32 [ceil(k * n / m / per), p]
    y       x @ w, or x @ w.T           dtype of x

``sampled(x, dy, words, *, n, m, dtype, config, interpret)`` -> values
    x       [rows, k]                   dy [rows, p], dtype of x
    values  [k * n / m, p]              x.T @ dy at the places; of ``dtype``

Both accumulate in float32.
"""

import dataclasses
import math

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "nm", "nm_transposed" or "nm_sampled"; [k, p] is the dense shape of the
    condensed matrix, in all three.
    """

    op: str
    rows: int
    k: int
    p: int
    n: int
    m: int
    dtype: str
    out_dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.rows} rows, {self.k}x{self.p} matrix condensed "
            f"{self.n}:{self.m} ({self.n / self.m:.1%} of the entries), {self.dtype}"
        )


def index_bits(m: int) -> int:
    """Bits that the place of a kept entry takes."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def unit(n: int, m: int) -> tuple[int, int, int]:
    """(rows of values, rows of words, rows of w) of a unit.

    The shortest piece of a column that whole words and whole groups make up, of an even
    number of rows of w.
    """
    per = 32 // index_bits(m)
    values = math.lcm(n, per)
    if values // n * m % 2:
        values *= 2
    return values, values // per, values // n * m


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y, dy) that one program instance works on.
    units: units (see ``unit``) that a tile is high; tile_k is as many times a unit's
        rows of w.
    tile_p: columns of w that a tile is wide.
    vmem: TPU: bytes that the kernel may take of VMEM.
    permute: TPU: x's columns are brought into the order in which tiles are expanded,
        or for the transposed product back from it.
    stages: GPU: depth of the copy pipeline.
    splits: GPU: parts of p that "nm_transposed" sums up by themselves.
    """

    tile_m: int
    units: int
    tile_p: int
    vmem: int = 0
    permute: bool = False
    stages: int = 2
    splits: int = 1


# --- TPU: Pallas Mosaic -------------------------------------------------------------

# Selections that expand one unit; the kernel spells them all out.
_TPU_SELECTIONS = 2048
# Rows of x up to which changing the order of its columns costs little.
_TPU_PERMUTED = 256
# What the compiler keeps in VMEM beside the buffers asked for: spills, constants.
_TPU_SLACK = 4 * 2**20


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    sampled = problem.op == "nm_sampled"
    _chips.check_out_dtype("mosaic_tpu", problem, sampled=sampled)
    _chips.check_positive("mosaic_tpu", problem, "rows", "k", "p")
    selections = problem.n * unit(problem.n, problem.m)[2]
    if selections > _TPU_SELECTIONS:
        raise NotImplementedError(
            f"mosaic_tpu: n:m is {problem.n}:{problem.m}, which takes {selections} "
            f"selections per unit, needs at most {_TPU_SELECTIONS}: smaller groups"
        )
    needed, room = config_mosaic_tpu(problem, chip).vmem, _chips.tpu_vmem(chip)
    if needed > room:
        raise NotImplementedError(
            f"mosaic_tpu: n:m is {problem.n}:{problem.m}, whose smallest tile needs "
            f"{needed} bytes of VMEM, {chip or 'the smallest chip'} has {room}"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the TPU kernels: wide copies, within a share of VMEM.

    By reasoning, not yet by measurement: at few rows the kernel waits for HBM, and
    wants copies of some hundred KiB; at many rows each expanded tile serves up to 512
    rows of x, which hides its making behind the matrix units.
    """
    room = _chips.tpu_vmem(chip)
    side = unit(problem.n, problem.m)[2]
    # Whole registers of units, and whole lanes of x's columns.
    least = max(8, TPU_LANES // math.gcd(side, TPU_LANES))
    rows = -(-problem.rows // 16) * 16
    wide = _chips.up(problem.p)
    most = max(1, -(-problem.k // (least * side)))
    config = Config(16, least, TPU_LANES)
    for tile_m in (512, 256, 128, 64, 32, 16):
        if tile_m >= 2 * rows > 32:
            continue
        for tile_k, tile_p in ((1024, 512), (512, 512), (512, 256), (1, 128)):
            units = least * min(most, max(1, tile_k // (least * side)))
            permute = problem.op != "nm_sampled" and rows <= _TPU_PERMUTED
            config = Config(
                min(tile_m, rows), units, _chips.divisor(wide, tile_p), permute=permute
            )
            config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
            if config.vmem <= room:
                return config
    return config


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel asks for."""
    side_v, side_q, side_w = unit(problem.n, problem.m)
    item = 2 if problem.dtype == "bfloat16" else 4
    out = 2 if problem.out_dtype == "bfloat16" else 4
    tile_m, tile_p, tile_k = config.tile_m, config.tile_p, config.units * side_w
    words = config.units * side_q * tile_p * 4
    kept, dense = config.units * side_v * tile_p, tile_k * tile_p
    if problem.op == "nm_sampled":
        # The product is a value before it is added to the scratch.
        total = 2 * (tile_m * (tile_k + tile_p) * item + words + kept * out)
        return total + tile_m * tile_k * item + 4 * (2 * dense + kept) + _TPU_SLACK
    side_in, side_out = tile_k, tile_p
    if problem.op == "nm_transposed":
        side_in, side_out = tile_p, tile_k
    total = 2 * (tile_m * (side_in + side_out) * item + words + kept * item)
    # w once in scratch and once as a value; the values of a panel as words.
    total += 2 * dense * item + config.units * side_v * TPU_LANES * item
    return total + 4 * 2 * tile_m * side_out + _TPU_SLACK


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Shared memory that the kernel's barriers, and what fills up to its buffers, may take.
_HOPPER_BARRIERS = 2_048
# Units that go through registers at a time: the rows that wgmma's layout needs.
HOPPER_UNITS = 64
# Tiles of the dense matrix in SMEM at a time.
HOPPER_TILES = 4
# Rows of x times rows of a group whose sums, of 64 units, a program of "nm_transposed"
# holds without spills, by ptxas.
_HOPPER_SUMS = 192
# With more rows the dense product is what takes the time.
_HOPPER_ROWS = 256


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    n, m = problem.n, problem.m
    _chips.check_dtype("mosaic_gpu", problem)
    sampled = problem.op == "nm_sampled"
    _chips.check_out_dtype("mosaic_gpu", problem, sampled=sampled)
    if not 1 <= problem.rows <= _HOPPER_ROWS:
        raise NotImplementedError(
            f"mosaic_gpu: rows is {problem.rows}, needs 1 to {_HOPPER_ROWS}: with "
            "more, one dense product by XLA costs less"
        )
    # Larger ones spill registers, or do not fit shared memory.
    if n > 2 or m > 8:
        raise NotImplementedError(
            f"mosaic_gpu: n:m is {n}:{m}, needs n at most 2 and m at most 8"
        )
    side = unit(n, m)[2]
    # TMA copies whole tiles of 8 rows and 64 columns.
    for name, multiple in (("k", 8 * side), ("p", 64)):
        size = getattr(problem, name)
        if size < 1 or size % multiple:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {size}, needs a multiple of {multiple} for "
                f"{n}:{m}"
            )
    _chips.check_chip("mosaic_gpu", chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels.

    By reasoning, not yet by measurement: the smallest tiles that wgmma and the widest
    swizzle take, so that a narrow matrix gives every multiprocessor a tile. Those of
    "nm_transposed" are 64 units high, and there are few: p is split for the rest.
    """
    n, m = problem.n, problem.m
    tile = HOPPER_UNITS * 64 * 2
    words, dense = 2 * tile, min(m, HOPPER_TILES) * tile
    tile_m, splits = 64, 1
    if problem.op == "nm":
        fixed, stage = dense + 2 * words, (n + m) * tile
    elif problem.op == "nm_sampled":
        kept = n * words if m > HOPPER_TILES else 0
        fixed, stage = words + kept, dense + tile
    else:
        tile_m = min(_HOPPER_SUMS // m // 16 * 16, 64, -(-problem.rows // 16) * 16)
        side_v, _, side_w = unit(n, m)
        tiles = -(-problem.rows // tile_m) * -(-problem.k // (HOPPER_UNITS * side_w))
        programs = _chips.hopper_multiprocessors(chip)
        splits = min(programs // (tiles * (side_v // n)), problem.p // 64)
        fixed, stage = dense, words + n * tile + tile_m * 64 * 2
    stages = min(4, (_chips.HOPPER_SMEM - _HOPPER_BARRIERS - fixed) // stage)
    return Config(tile_m, HOPPER_UNITS, 64, stages=stages, splits=max(1, splits))
