"""What the mixture-of-experts kernels take, and their tiles. Pure Python on shapes.

Every backend file has the same two functions. Choices (a token sent to an expert) lie
sorted by expert: expert e has the ``sizes[e]`` choices after those of the experts
before it; choices beyond the sum are the tail.

``hidden(x, w_in, w_gate, tokens, sizes, *, activation, config, interpret)`` -> h
    x       [t, d]
    w_in    [experts, d, f]             w_gate the same or None; dtype of x
    tokens  int32 [c]                   the token of each choice, also in the tail
    sizes   int32 [experts]             traced; sum at most c
    h       [c, f]                      dtype of x

        h[i] = activation(x[tokens[i]] @ w_in[e]), or
        h[i] = activation(x[tokens[i]] @ w_gate[e]) * (x[tokens[i]] @ w_in[e])

``down(h, w_out, choices, weights, sizes, *, config, interpret)`` -> z
    h       [c, f]                      w_out [experts, f, d], dtype of h
    choices int32 [c]                   a permutation of 0 .. c - 1
    weights f32 [c]                     gate of each choice, in the sorted order
    z       [c, d]                      dtype of h

        z[choices[i]] = weights[i] * (h[i] @ w_out[e])

Products and activation in float32. Rows of the tail come out 0 in both.
"""

import dataclasses

from pallas_kernels import _chips
from pallas_kernels._chips import TPU_LANES
from pallas_kernels.grouped_matmul import _spec as grouped


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a backend accepts a product and picks its tiles.

    ``op`` is "moe_hidden", "moe_hidden_gated" or "moe_down"; d is the width of a
    token, f that of the hidden layer, in all three.
    """

    op: str
    tokens: int
    choices: int
    d: int
    f: int
    experts: int
    dtype: str

    def __str__(self):
        return (
            f"{self.op}: {self.choices} choices of {self.tokens} tokens, "
            f"{self.experts} experts {self.d}x{self.f}, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel call.

    tile_m: choices that one program instance holds.
    tile_k, tile_n: rows and columns of a matrix that it holds.
    rows: TPU: choices of a tile that go through the inner step at a time.
    vmem: TPU: bytes that the kernel may take of VMEM.
    stages: GPU: depth of the copy pipeline, at least 2.
    group: GPU: tiles of choices that programs take together, for L2.
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

# Columns of which two 16-bit numbers, a half apart, make a word: rows move as words.
_TPU_PAIRED = 256


def check_mosaic_tpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the TPU kernels do not serve the problem.

    Args:
        problem: the half of the layer asked for.
        chip: "v4", "v5e", "v5p", "v6e", "tpu7x", another chip's name, or None where it
            is not known yet.
    """
    _chips.check_positive(
        "mosaic_tpu", problem, "tokens", "choices", "d", "f", "experts"
    )
    grouped.check_mosaic_tpu(_as_product(problem), chip)
    config = config_mosaic_tpu(problem, chip)
    room = _chips.tpu_vmem(chip)
    if config.vmem > room:
        raise NotImplementedError(
            f"mosaic_tpu: d={problem.d}, f={problem.f} need {config.vmem} bytes of "
            f"VMEM at the smallest tiles, {chip} has {room}"
        )
    tiles = -(-problem.choices // config.tile_m)
    # Choices, visits of pairs (expert, tile), first rows; two experts are the tail's.
    lists = tiles * config.tile_m + 2 * (tiles + problem.experts + 2) + problem.experts
    if 4 * (lists + 4) > _chips.TPU_SMEM:
        raise NotImplementedError(
            f"mosaic_tpu: {problem.choices} choices, {problem.experts} experts have "
            f"lists that take {4 * (lists + 4)} bytes of SMEM, needs at most "
            f"{_chips.TPU_SMEM}: fewer choices at once"
        )


def config_mosaic_tpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the TPU kernels from mean rows per expert and the chip.

    Matrices are read once: a tile of columns stays while the choices of its expert
    pass. Tiles as wide as VMEM allows, since rows are gathered once for each. By the
    compiler's schedule, not yet by measurement.
    """
    room = _chips.tpu_vmem(chip)
    cores = _chips.tpu_cores(chip)
    unit = _TPU_PAIRED if problem.dtype == "bfloat16" else TPU_LANES
    most_rows = -(-problem.choices // 16) * 16
    inner, outer = problem.d, problem.f
    if problem.op == "moe_down":
        inner, outer = outer, inner
    product = _as_product(problem)
    config = None
    for most, tile_m, wide in _tiles_mosaic_tpu(inner):
        tile_m = min(tile_m, most_rows)
        tile_k = grouped.part_tpu(inner, most, unit=unit)
        tile_n = grouped.part_tpu(outer, wide, cores, unit=unit)
        rows = grouped.rows_tpu(product, tile_m, chip in _chips.TPU_WIDE)
        config = Config(tile_m, tile_k, tile_n, rows)
        config = dataclasses.replace(config, vmem=vmem_mosaic_tpu(problem, config))
        if config.vmem <= room:
            break
    assert config is not None
    return config


def _tiles_mosaic_tpu(inner: int):
    """(most of the contraction, tile_m, wide), the best first."""
    for most in (grouped.TPU_WHOLE, 4096, 2048, 1024):
        for tile_m, wide in ((512, 1024), (512, 512), (256, 512)):
            yield min(most, inner), tile_m, wide
    for tile_m in (128, 64, 32, 16):
        yield min(512, inner), tile_m, 256


def vmem_mosaic_tpu(problem: Problem, config: Config) -> int:
    """Bytes of VMEM that a kernel asks for."""
    item = 2 if problem.dtype == "bfloat16" else 4
    tile_m, tile_k, tile_n = config.tile_m, config.tile_k, config.tile_n
    rows = config.rows
    inner = problem.f if problem.op == "moe_down" else problem.d
    weights = 2 if problem.op == "moe_hidden_gated" else 1
    # Weights and a tile of the result twice, float32 of a window.
    total = 2 * item * (weights * tile_k * tile_n + tile_m * tile_n)
    total += 4 * rows * tile_n * (weights + 3)
    if problem.op == "moe_down":
        # Rows and, in a column of their own lanes, gates.
        total += 2 * tile_m * (item * tile_k + 4 * TPU_LANES)
    else:
        # Rows as they come, twice, and as the product takes them.
        width = -(-inner // tile_k) * tile_k
        total += tile_m * width * item * (3 if item == 2 else 2)
    if inner > tile_k:
        total += 4 * weights * tile_m * tile_n
    if inner % tile_k:
        # The operands with what lies outside their arrays cut off.
        total += item * (weights * tile_k * tile_n + rows * tile_k)
    return total + _chips.TPU_SLACK


def _as_product(problem: Problem) -> grouped.Problem:
    """The grouped product that the kernel computes, of one of its matrices."""
    k, n = problem.d, problem.f
    if problem.op == "moe_down":
        k, n = n, k
    return grouped.Problem(
        "grouped",
        problem.choices,
        k,
        n,
        problem.experts,
        problem.dtype,
        problem.dtype,
    )


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the half of the layer asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    _chips.check_positive("mosaic_gpu", problem, "tokens", "choices", "experts")
    _chips.check_multiple("mosaic_gpu", problem, grouped.HOPPER_PIECE, "d", "f")
    grouped.check_mosaic_gpu(_grouped(problem), chip)


def config_mosaic_gpu(problem: Problem, chip: str | None) -> Config:
    """Picks the tiles of the Hopper kernels: those of the product they consist of."""
    tiles = grouped.config_mosaic_gpu(_grouped(problem), chip)
    # Two matrices share what one has there.
    wide = 128 if problem.op == "moe_hidden_gated" else tiles.tile_n
    return Config(
        tiles.tile_m,
        tiles.tile_k,
        wide,
        stages=tiles.stages,
        group=tiles.group,
        programs=tiles.programs,
    )


def _grouped(problem: Problem) -> grouped.Problem:
    """The grouped product that the kernel computes."""
    k, n = problem.d, problem.f
    if problem.op == "moe_down":
        k, n = n, k
    elif problem.op == "moe_hidden_gated":
        # Two matrices side by side; of each at least the 128 columns of a tile.
        n = 2 * max(n, 128)
    return grouped.Problem(
        "grouped",
        problem.choices,
        k,
        n,
        problem.experts,
        problem.dtype,
        problem.dtype,
    )
