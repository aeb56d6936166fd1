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
    stages: GPU: depth of the copy pipeline.
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


# --- GPU: Pallas Mosaic, Hopper -----------------------------------------------------


def check_mosaic_gpu(problem: Problem, chip: str | None) -> None:
    """Raises NotImplementedError where the Hopper kernels do not serve the problem.

    Args:
        problem: the half of the layer asked for.
        chip: "h100", "h200", another chip's name, or None where it is not known yet.
    """
    for name in ("tokens", "choices", "experts"):
        if getattr(problem, name) < 1:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {getattr(problem, name)}, needs at least 1"
            )
    for name in ("d", "f"):
        size = getattr(problem, name)
        if size < grouped.HOPPER_PIECE or size % grouped.HOPPER_PIECE:
            raise NotImplementedError(
                f"mosaic_gpu: {name} is {size}, needs a multiple of "
                f"{grouped.HOPPER_PIECE}"
            )
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
        n *= 2
    return grouped.Problem(
        "grouped",
        problem.choices,
        k,
        n,
        problem.experts,
        problem.dtype,
        problem.dtype,
    )
