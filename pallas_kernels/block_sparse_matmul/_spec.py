"""What the block-sparse kernels take, and their tile sizes. Pure Python on shapes.

Every backend file has the same two functions.

``dsd(x, blocks, order, source, ptr, *, transpose, config, interpret)`` -> y
    x       [m, tiles_in * side_in]     any m >= 1; the kernel handles a ragged tail
    blocks  [slots, bk, bn]             slots >= 1
    order   int32 [slots] or None       None: the identity
    source  int32 [slots]
    ptr     int32 [tiles_out + 1]       non-decreasing, ptr[0] = 0, ptr[-1] <= slots
    y       [m, tiles_out * side_out]   dtype of x

        y[:, j] = sum over p in ptr[j] .. ptr[j + 1] - 1
                  of x[:, source[p]] @ b[order[p]]

    where index j of x and y means a whole tile of columns, and b is ``blocks``, or
    with ``transpose=True`` each block transposed (side_in = bn, side_out = bk).
    Accumulates in float32. An empty j gives zeros. Every entry of order and source is
    in range, also those at p >= ptr[-1], which are padding and take no part.

``sdd(x, dy, rows, cols, count, *, block_shape, dtype, config, interpret)`` -> blocks
    x       [m, tiles_k * bk]           dy [m, tiles_n * bn]
    rows    int32 [slots]               cols int32 [slots], sorted by (col, row)
    count   int32 []                    slots at p >= count are padding: zeros come back
    blocks  [slots, bk, bn]             of ``dtype``: that of x, or float32

        blocks[p] = x[:, rows[p]].T @ dy[:, cols[p]]
"""

import dataclasses
import math

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES


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

    def __str__(self):
        bk, bn = self.block_shape
        places = (self.k // bk) * (self.n // bn)
        return (
            f"{self.op}: {self.m} rows, {self.k}x{self.n} matrix, {self.slots} slots "
            f"of {bk}x{bn} blocks ({self.slots / places:.1%} of the places), "
            f"{self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: rows of x (and y, dy) that one program instance works on.
    unroll: blocks that one inner step multiplies.
    stages: depth of the copy pipeline.
    rows: TPU: rows of a tile that go through the inner step at a time.
    splits: TPU: parts of y's columns (dsd) or of the slots (sdd) held one at a time.
    resident: TPU: all blocks lie in VMEM.
    cores: TPU: cores of the chip that share the row tiles of dsd.
    unit_unroll: TPU: as ``unroll``, for units made of blocks smaller than 128.
    tile_k: GPU: the contraction that one piece of a step covers.
    warpgroups: GPU: warpgroups that compute; with two, a third one copies.
    group: GPU: row tiles that programs take together, for L2.
    cluster: GPU, dsd with two warpgroups: row tiles that get each block by one copy.
    """

    tile_m: int
    unroll: int = 1
    stages: int = 2
    tile_k: int = 64
    warpgroups: int = 1
    group: int = 8
    cluster: int = 1
    rows: int = 128
    splits: int = 1
    resident: bool = True
    cores: int = 1
    unit_unroll: int = 4


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------

# Entries of the accumulator that a warpgroup holds without spills, by ptxas.
_HOPPER_ACCUMULATOR = 192 * 128


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    for name, side in zip(("bk", "bn"), problem.block_shape, strict=True):
        if side % 16 or not 16 <= side <= 256:
            raise NotImplementedError(
                f"mosaic_gpu: block_shape has {name}={side}, needs a multiple of 16 "
                "from 16 to 256"
            )
    _chips.check_dtype("mosaic_gpu", problem)
    _chips.check_out_dtype("mosaic_gpu", problem, sampled=problem.op == "sdd")
    _chips.check_positive("mosaic_gpu", problem, "m")
    _chips.check_chip("mosaic_gpu", chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels; h100 and h200 differ in memory only.

    By reasoning on traffic, registers and shared memory, not yet by measurement. What
    limits these kernels is L2: a piece of x is used for one block's columns only, so
    the tile is as tall as registers allow, for blocks to be read less often.
    """
    bk, bn = problem.block_shape
    if problem.op == "sdd":
        return _sdd_config_mosaic_gpu(problem.m, bk, bn, problem.out_dtype)
    m = problem.m
    side_in, side_out = (bk, bn) if problem.op == "dsd" else (bn, bk)
    tiles_out = (problem.n if problem.op == "dsd" else problem.k) // side_out
    # The pieces of a block: as wide as the swizzle likes it, at most about 64.
    pieces = [d for d in range(16, side_in + 1, 16) if side_in % d == 0]
    narrow = [d for d in pieces if d <= 64]
    if max(narrow) < 32:
        narrow = [d for d in pieces if d <= 128]
    tile_k = max(narrow, key=lambda d: (math.gcd(d, 64), d))
    unroll = max(1, 64 // tile_k)
    piece = 2 * unroll * tile_k

    tallest = min(256, _HOPPER_ACCUMULATOR // side_out // 64 * 64)
    # Long lists pay a warpgroup of its own for the copies. Short ones are better off
    # with several programs per multiprocessor, which hide each other's ends.
    if problem.slots * side_in / max(tiles_out, 1) >= 1024 and m >= 512:
        for tile_m in (2 * min(128, tallest), 128):
            out = tile_m * math.gcd(side_out, 64) * 2
            stages = _stages_mosaic_gpu(piece * (tile_m + side_out), out, 2)
            if stages >= 3:
                break
        return Config(tile_m, unroll, stages, tile_k=tile_k, warpgroups=2)

    programs = _chips.hopper_multiprocessors(chip)

    def suits(tile_m):
        fits = _stages_mosaic_gpu(piece * (tile_m + side_out), 0, 1) >= 2
        return fits and -(-m // tile_m) * tiles_out >= 2 * programs

    tile_m = next(filter(suits, range(tallest, 64, -64)), 64)
    stages = max(2, _stages_mosaic_gpu(piece * (tile_m + side_out), 0, 1))
    return Config(tile_m, unroll, stages, tile_k=tile_k)


def _sdd_config_mosaic_gpu(m: int, bk: int, bn: int, out_dtype: str) -> Config:
    tile_k = 64
    warpgroups = 2 if bk > 64 and m >= 1024 else 1
    if warpgroups == 2:
        tile_m = 256 if bk > 128 and 128 * bn <= _HOPPER_ACCUMULATOR else 128
    else:
        # Of the heights that registers allow the one with least beyond the block.
        heights = [h for h in (192, 128, 64) if h * bn <= _HOPPER_ACCUMULATOR]
        tile_m = min(heights, key=lambda h: (-(-bk // h) * h, -h))
    out = tile_m * math.gcd(bn * (4 if out_dtype == "float32" else 2), 128)
    stages = max(2, _stages_mosaic_gpu(2 * tile_k * (tile_m + bn), out, warpgroups))
    return Config(tile_m, stages=stages, tile_k=tile_k, warpgroups=warpgroups)


def _stages_mosaic_gpu(stage: int, out: int, warpgroups: int) -> int:
    """Stages that fit: the whole memory for two warpgroups, half of it for one."""
    room = _chips.HOPPER_SMEM - _chips.HOPPER_BARRIERS
    # A single warpgroup's output takes the place of the stages.
    return min(6, (room - out if warpgroups == 2 else room // 2) // stage)


# --- TPU: Pallas Mosaic -------------------------------------------------------------


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the product asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_chip("mosaic_tpu", chip)
    _chips.check_dtype("mosaic_tpu", problem)
    _chips.check_out_dtype("mosaic_tpu", problem, sampled=problem.op == "sdd")
    multiple = 16 if problem.dtype == "bfloat16" else 8
    for name, side in zip(("bk", "bn"), problem.block_shape, strict=True):
        if side % multiple or not multiple <= side <= 256:
            raise NotImplementedError(
                f"mosaic_tpu: block_shape has {name}={side}, needs a multiple of "
                f"{multiple} from {multiple} to 256 for {problem.dtype}"
            )
    _chips.check_positive("mosaic_tpu", problem, "m", "slots")
    lists = _smem_mosaic_tpu(problem)
    if lists > _chips.TPU_SMEM:
        raise NotImplementedError(
            f"mosaic_tpu: slots is {problem.slots}, whose lists take {lists} bytes of "
            f"SMEM, needs at most {_chips.TPU_SMEM}: fewer or larger blocks"
        )
    config = config_mosaic_tpu(problem, chip)
    needed, room = vmem_mosaic_tpu(problem, config), _chips.tpu_vmem(chip)
    if needed > room:
        raise NotImplementedError(
            f"mosaic_tpu: k={problem.k}, n={problem.n} need {needed} bytes of VMEM "
            f"with a tile of {config.tile_m} rows, {chip or 'the smallest chip'} has "
            f"{room}"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the TPU kernels: the largest ones that fit the chip's VMEM."""
    room = _chips.tpu_vmem(chip)
    cores = _chips.tpu_cores(chip)
    rows = -(-problem.m // 16) * 16
    parts = problem.slots if problem.op == "sdd" else _panels_mosaic_tpu(problem)
    splits = [1 << power for power in range((parts - 1).bit_length() + 1)]
    # The first copy in and the last one out are not hidden by any work: tiles stay
    # small enough for that to be a small share.
    wide = chip in _chips.TPU_WIDE
    tiles = 4 if problem.op == "sdd" or wide else 8 * cores
    config = Config(tile_m=16)
    # Wide tiles, even if y or the blocks come in parts; then narrower ones.
    for tile_m in (1024, 512, 256, 128, 64, 32, 16):
        if (tile_m > 512 and tile_m * tiles > rows) or tile_m >= 2 * rows > 32:
            continue
        for resident in (True, False):
            for split in splits:
                config = Config(
                    tile_m=tile_m,
                    unroll=_unroll_mosaic_tpu(problem, tile_m, split, wide),
                    rows=512 if wide else 128,
                    splits=split,
                    resident=resident,
                    cores=cores,
                )
                if vmem_mosaic_tpu(problem, config) <= room:
                    return config
    return config


def _unroll_mosaic_tpu(problem: Problem, tile_m: int, splits: int, wide: bool) -> int:
    """Blocks per inner step: many to amortize it, but a last step that is not empty."""
    bk, bn = problem.block_shape
    area = TPU_LANES**2 * (2 if wide else 1)
    most = max(2, min(16, 16 * area // (bk * bn)))
    if bk % TPU_LANES or bn % TPU_LANES:
        return 8
    entries = problem.slots
    if problem.op != "sdd":
        # An empty column has an entry too; so many are empty at random places.
        panels = _panels_mosaic_tpu(problem)
        entries += round(panels * math.exp(-entries / panels))
    # Cycles of a block, and those of a step in which the matrix units fill and drain.
    block, step = tile_m * bk * bn / (4 * TPU_LANES**2), 190
    return min(
        range(most, max(1, most // 2) - 1, -1),
        key=lambda unroll: (
            -(-max(entries // splits, 1) // unroll) * (unroll * block + step)
        ),
    )


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel's buffers take."""
    bk, bn = problem.block_shape
    unit_k, unit_n = (math.lcm(side, TPU_LANES) for side in (bk, bn))
    k, n = -(-problem.k // unit_k) * unit_k, -(-problem.n // unit_n) * unit_n
    tile_m = min(config.tile_m, -(-problem.m // 16) * 16)
    item = 2 if problem.dtype == "bfloat16" else 4
    wide = _chips.up(bn)
    direct = (unit_k, unit_n) == (bk, bn)
    if problem.op == "sdd":
        size = -(-problem.slots // config.splits)
        size = -(-size // config.unroll) * config.unroll
        out = 4 if problem.out_dtype == "float32" else 2
        total = tile_m * (3 * k + 2 * n) * item
        total += size * bk * wide * (out * (1 + (config.splits > 1)) + 4 * (out < 4))
        return total + (0 if direct else k * unit_n * 4)
    side, inner = (unit_n, k) if problem.op == "dsd" else (unit_k, n)
    columns = -(-_panels_mosaic_tpu(problem) // config.splits)
    zeros = bk if problem.op == "dsd" else bn
    total = tile_m * (2 * (inner + direct * zeros + columns * side) * item + 4 * side)
    total += ((problem.slots if config.resident else 2 * config.unroll) + 1) * (
        bk * wide * item
    )
    return total + (0 if direct else inner * side * item)


def _panels_mosaic_tpu(problem: Problem) -> int:
    """Panels of y that the columns are held as."""
    bk, bn = problem.block_shape
    side, width = (bn, problem.n) if problem.op == "dsd" else (bk, problem.k)
    return -(-width // math.lcm(side, TPU_LANES))


def _smem_mosaic_tpu(problem: Problem) -> int:
    """Bytes of SMEM that the lists of one call take."""
    bk, bn = problem.block_shape
    unit_k, unit_n = (math.lcm(side, TPU_LANES) for side in (bk, bn))
    units = 0
    if (unit_k, unit_n) != (bk, bn):
        units = (-(-problem.k // unit_k) + 2) * (-(-problem.n // unit_n) + 2)
    if problem.op == "sdd":
        return 4 * (2 * problem.slots + units)
    return 4 * (4 * (problem.slots + _panels_mosaic_tpu(problem)) + units)
