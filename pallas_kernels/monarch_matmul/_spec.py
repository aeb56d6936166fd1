"""What the Monarch kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same function.

``product(x, left, right, *, config, interpret)`` -> y
    x       [m, k * p]                  m >= 1
    left    [k, 1, p, q]                dtype of x
    right   [1, l, r, s]                dtype of x; k * q == r * l
    y       [m, s * l]                  dtype of x

        h[:, (i, u)] = sum over j of x[:, (i, j)] left[i, 0, j, u]
        y[:, (o, t)] = sum over v of h[:, (v, t)] right[0, t, v, o]

where h's columns are (i u) with i < k and u < q, read again as (v t) with v < r and t <
l. Sums are float32, h is rounded to x's dtype, and never in HBM.
"""

import dataclasses
from typing import NamedTuple

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "monarch".
    """

    op: str
    rows: int
    k: int
    p: int
    q: int
    l: int  # noqa: E741
    r: int
    s: int
    dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.rows} rows, {self.k * self.p}x{self.s * self.l} matrix: "
            f"{self.k} blocks of {self.p}x{self.q}, {self.l} of {self.r}x{self.s}, "
            f"{self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y) that one program instance holds.
    rows: TPU: rows of a tile that go through the inner step at a time.
    vmem: TPU: bytes that the kernel may take of VMEM.
    group: GPU: blocks of right whose part of h a program holds.
    tile_r, tile_s: GPU: rows and columns of a block of right that a step multiplies.
    stages, stages_right: GPU: depths of the copy pipelines, at least 2.
    programs: GPU: persistent programs, one per multiprocessor.
    """

    tile_m: int
    rows: int = 128
    vmem: int = 0
    group: int = 2
    tile_r: int = 16
    tile_s: int = 64
    stages: int = 2
    stages_right: int = 2
    programs: int = 1


# --- TPU: Pallas Mosaic -------------------------------------------------------------

# Multiplications with zeros for each one asked for, by the kernel and its padding, up
# to which two kernels with h in HBM between them cost more.
_TPU_WASTE = 16
# Products of one row chunk, which the kernel spells all out.
_TPU_PRODUCTS = 1024


class Panels(NamedTuple):
    """How the TPU kernel lays columns out in panels of 128 lanes.

    rank: columns that a block of left gives each t, with padding: q = rank * l.
    swap: panels of h that change places with as many groups of lanes.
    wide_p: rows of a block of left, with those that meet other blocks' columns.
    copy_x: x's columns are padded in HBM.
    wide_s: columns of a block of right, likewise.
    swap_y: panels of y that change places with as many groups of lanes; 0: y is
        written with t outermost and transposed in HBM.
    """

    rank: int
    swap: int
    wide_p: int
    copy_x: bool
    wide_s: int
    swap_y: int


def panels_mosaic_tpu(problem: Problem) -> Panels:
    """The layout of least padding. Needs q to be a multiple of l."""
    k, p, l, s = problem.k, problem.p, problem.l, problem.s  # noqa: E741
    least = problem.q // l
    rank = _chips.up(least)
    swap = 1
    for groups in (128, 64, 32, 16, 8, 4, 2):
        if TPU_LANES // groups >= least and not (l % groups or k % groups):
            rank, swap = TPU_LANES // groups, groups
            break
    # Columns of several blocks of x in one panel: no copy, the others' rows are zero.
    copy_x = p % TPU_LANES > 0 and (TPU_LANES % p > 0 or k * p % TPU_LANES > 0)
    share = TPU_LANES // s if TPU_LANES % s == 0 else 1
    swap_y = 0
    if TPU_LANES % l == 0 and l % share == 0 and s * share % TPU_LANES == 0:
        swap_y = l // share
    return Panels(rank, swap, _chips.up(p), copy_x, _chips.up(s), swap_y)


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernel does not serve the problem.

    Args:
        problem: the product asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    _chips.check_positive("mosaic_tpu", problem, "rows", "k", "p", "q", "l", "r", "s")
    if problem.q % problem.l:
        raise NotImplementedError(
            f"mosaic_tpu: q is {problem.q}, needs a multiple of l={problem.l}"
        )
    panels = panels_mosaic_tpu(problem)
    left, right = _entries_mosaic_tpu(problem)
    true = problem.k * problem.p * problem.q + problem.l * problem.r * problem.s
    if left + right > _TPU_WASTE * true:
        raise NotImplementedError(
            f"mosaic_tpu: q is {problem.q} for k={problem.k}, l={problem.l}, which the "
            f"kernel pads to {panels.rank * problem.l} and blocks to {panels.wide_p} "
            f"rows, needs at most {_TPU_WASTE} times the multiplications"
        )
    products = (left + right) // TPU_LANES**2
    if products > _TPU_PRODUCTS:
        raise NotImplementedError(
            f"mosaic_tpu: the factors have {products} panels of 128 x 128, needs at "
            f"most {_TPU_PRODUCTS}"
        )
    needed, room = config_mosaic_tpu(problem, chip).vmem, _chips.tpu_vmem(chip)
    if needed > room:
        raise NotImplementedError(
            f"mosaic_tpu: both factors and 16 rows need {needed} bytes of VMEM, "
            f"{chip or 'the smallest chip'} has {room}"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tallest tile that fits beside both factors, which stay in VMEM."""
    room = _chips.tpu_vmem(chip)
    rows = -(-problem.rows // 16) * 16
    config = Config(tile_m=16)
    for tile_m in (512, 256, 128, 64, 32, 16):
        if tile_m >= 2 * rows and tile_m > 16:
            continue
        config = Config(tile_m, rows=min(tile_m, 256))
        config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
        if config.vmem <= room:
            break
    return config


def _entries_mosaic_tpu(problem: Problem) -> tuple[int, int]:
    """Entries of left and of right as the kernel holds them."""
    panels = panels_mosaic_tpu(problem)
    inner = problem.k * problem.l * panels.rank
    return panels.wide_p * inner, inner * panels.wide_s


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that the kernel asks for."""
    item = 2 if problem.dtype == "bfloat16" else 4
    panels = panels_mosaic_tpu(problem)
    columns = problem.k * (panels.wide_p if panels.copy_x else problem.p)
    columns += problem.l * (problem.s if panels.swap_y else panels.wide_s)
    # h and y of the rows at work.
    inner = problem.k * problem.l * panels.rank + problem.l * panels.wide_s
    total = sum(_entries_mosaic_tpu(problem))
    total += 2 * config.tile_m * columns + config.rows * inner
    return total * item + _chips.TPU_SLACK


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Rows of a program, columns of a swizzled tile and what leaves a program at once.
HOPPER_PIECE = 64
# What one wgmma contracts: neighbours in SMEM.
HOPPER_DEPTH = 16
# Warpgroups that compute, and float32 columns of sums that one can hold of 64 rows.
_HOPPER_COMPUTE = 2
_HOPPER_SUMS = 256


def fold_mosaic_gpu(width: int) -> int:
    """Blocks of left that together give what one wgmma contracts."""
    return max(1, HOPPER_DEPTH // width)


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernel does not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    _chips.check_dtype("mosaic_gpu", problem)
    _chips.check_positive("mosaic_gpu", problem, "rows", "k", "p", "q", "l", "r", "s")
    _chips.check_multiple("mosaic_gpu", problem, HOPPER_PIECE, "p", "s")
    if problem.q % problem.l:
        raise NotImplementedError(
            f"mosaic_gpu: q is {problem.q}, needs a multiple of l={problem.l}"
        )
    width = problem.q // problem.l
    if HOPPER_DEPTH % width and width % HOPPER_DEPTH:
        raise NotImplementedError(
            f"mosaic_gpu: q / l is {width}, needs a divisor or a multiple of "
            f"{HOPPER_DEPTH}"
        )
    fold = fold_mosaic_gpu(width)
    for name, unit in (("k", fold), ("l", _HOPPER_COMPUTE * fold)):
        size = getattr(problem, name)
        if size % unit:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {size}, needs a multiple of {unit} for q / l = "
                f"{width}"
            )
    if width > _HOPPER_SUMS:
        raise NotImplementedError(
            f"mosaic_gpu: q / l is {width}, needs at most {_HOPPER_SUMS}"
        )
    needed = smem_mosaic_gpu(problem, _with_group(problem, _HOPPER_COMPUTE * fold))
    if needed > _chips.HOPPER_SMEM:
        raise NotImplementedError(
            f"mosaic_gpu: k is {problem.k}, r is {problem.r}: 64 rows of h for "
            f"{_HOPPER_COMPUTE * fold} blocks of right, and buffers, take {needed} "
            f"bytes of SMEM, needs at most {_chips.HOPPER_SMEM}"
        )
    _chips.check_chip("mosaic_gpu", chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the largest group whose part of h fits, then as many stages as do.

    By reasoning, not yet by measurement: x is read l / group times.
    """
    width, count = problem.q // problem.l, problem.l
    unit = _HOPPER_COMPUTE * fold_mosaic_gpu(width)
    groups = [g for g in range(count, 0, -unit) if count % g == 0]
    config = next(
        c for c in (_with_group(problem, g) for g in groups) if _fits(problem, c)
    )
    smem = smem_mosaic_gpu(problem, config)
    stage = smem_mosaic_gpu(problem, dataclasses.replace(config, stages=3)) - smem
    return dataclasses.replace(
        config,
        stages=min(6, 2 + (_chips.HOPPER_SMEM - smem) // stage),
        programs=_chips.hopper_multiprocessors(chip),
    )


def _with_group(problem: Problem, group: int) -> Config:
    """A config of the fewest stages."""
    tile_s = next(s for s in (256, 192, 128, 64) if problem.s % s == 0)
    tile_r = 2 * HOPPER_DEPTH if tile_s <= 128 else HOPPER_DEPTH
    tile_r = tile_r if problem.r % tile_r == 0 else HOPPER_DEPTH
    return Config(HOPPER_PIECE, group=group, tile_r=tile_r, tile_s=tile_s)


def _fits(problem: Problem, config: Config) -> bool:
    """Whether SMEM holds h, and registers the sums of ``fold`` blocks of left."""
    width = problem.q // problem.l
    sums = fold_mosaic_gpu(width) * width * config.group // _HOPPER_COMPUTE
    return (
        sums <= _HOPPER_SUMS and smem_mosaic_gpu(problem, config) <= _chips.HOPPER_SMEM
    )


def smem_mosaic_gpu(problem: Problem, config: Config) -> int:
    """Bytes of SMEM that the kernel asks for."""
    width = problem.q // problem.l
    h = HOPPER_PIECE * problem.r * config.group
    left = HOPPER_PIECE * (HOPPER_PIECE + config.group * width)
    right = _HOPPER_COMPUTE * config.tile_r * config.tile_s
    y = _HOPPER_COMPUTE * HOPPER_PIECE**2
    total = h + config.stages * left + config.stages_right * right + y
    return 2 * total + _chips.HOPPER_BARRIERS
