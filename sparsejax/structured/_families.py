"""Chains by their usual names: block-diagonal, Monarch, butterfly."""

import functools
import itertools
import math

from sparsejax.structured._pattern import Chain, Pattern, tensor_train


def block_diagonal(in_size: int, out_size: int, *, blocks: int) -> Chain:
    """One factor of dense blocks along the diagonal, (blocks, b, c, 1).

    Args:
      in_size: Inputs.
      out_size: Outputs.
      blocks: How many; sizes that they do not divide are padded.

    Raises:
      ValueError: blocks is below 1, or above one of the sizes.
    """
    _check_blocks(in_size, out_size, blocks)
    pattern = Pattern(blocks, -(-out_size // blocks), -(-in_size // blocks), 1)
    return Chain((pattern,), in_size, out_size)


def monarch(
    in_size: int,
    out_size: int,
    *,
    blocks: int | None = None,
    rank: int | None = None,
    order: int = 2,
) -> Chain:
    """Two factors of ``blocks`` blocks each with a shuffle between; or ``order``.

    With inputs (k, i), k < blocks, and outputs (o, j), j < blocks, the matrix
    ``w[(k, i), (o, j)]`` has, for each k and j, a block ``[i, o]`` of the given rank.

    Of order p, i and o are themselves p - 1 dimensions, about even: a tensor
    train from (k, i_2 ... i_p) to (o_1 ... o_{p-1}, j). Of rank 1, without padding and
    with ``blocks`` about n^(1/p) each factor has n^(1 + 1/p) entries.

    Args:
      in_size: Inputs.
      out_size: Outputs.
      blocks: Of each factor; sizes that they do not divide are padded. Beyond order 2,
        the first input and the last output dimension. Default, about the p-th root of
        the smaller size.
      rank: Between factors; of order 2, of the blocks between one block of the first
        factor and one of the second. Default of order 2 as MonarchLinear has it, the
        smaller block over ``blocks``; else 1.
      order: Number of factors p, at least 2.

    Raises:
      ValueError: blocks is below 1 or above one of the sizes; rank is below 1 or above
        the blocks; order is below 2.

    Example:
      >>> chain = sparsejax.structured.monarch(1024, 1024, blocks=16)
      >>> [p.factor_shape for p in chain.patterns], chain.params / 1024**2
      ([(16, 1, 64, 64), (1, 16, 64, 64)], 0.125)
      >>> chain = sparsejax.structured.monarch(4096, 4096, order=3)
      >>> [p.factor_shape for p in chain.patterns]
      [(256, 1, 16, 16), (16, 16, 16, 16), (1, 256, 16, 16)]

    References:
      Dao et al., `Monarch: Expressive Structured Matrices for Efficient and Accurate
      Training <https://arxiv.org/abs/2204.00595>`_, 2022.
      Fu et al., `Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture
      <https://arxiv.org/abs/2310.12109>`_, 2023.
    """
    if order < 2:
        raise ValueError(f"order: got {order}, needed at least 2")
    _check_blocks(in_size, out_size, 1 if blocks is None else blocks)
    if blocks is None:
        blocks = _balanced(min(in_size, out_size), order)[0]
    inner = _balanced(-(-in_size // blocks), order - 1)
    outer = _balanced(-(-out_size // blocks), order - 1)
    in_dims, out_dims = (blocks, *inner), (*outer, blocks)
    # The matrix between dimensions t and on of the input, and up to t of the output.
    most = min(
        min(math.prod(in_dims[t:]), math.prod(out_dims[:t])) for t in range(1, order)
    )
    if rank is None:
        rank = -(-most // blocks) if order == 2 else 1
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank: got {rank}, needed 1 to {most}, the smaller side of a block"
        )
    return tensor_train(in_dims, out_dims, rank, in_size=in_size, out_size=out_size)


def butterfly(size: int, out_size: int | None = None) -> Chain:
    """Radix-2 butterfly: log2(n) factors of 2 x 2 blocks.

    Args:
      size: Inputs; padded to n, the next power of two (of the larger of both sizes).
      out_size: Outputs; default as many.

    Raises:
      ValueError: A size is below 1.

    Example:
      >>> chain = sparsejax.structured.butterfly(8)
      >>> [(p.a, p.b, p.c, p.d) for p in chain.patterns]
      [(4, 2, 2, 1), (2, 2, 2, 2), (1, 2, 2, 4)]

    References:
      Dao et al., `Learning Fast Algorithms for Linear Transforms Using Butterfly
      Factorizations <https://arxiv.org/abs/1903.05895>`_, 2019.
    """
    out_size = size if out_size is None else out_size
    for name, got in dict(size=size, out_size=out_size).items():
        if got < 1:
            raise ValueError(f"{name}: got {got}, needed at least 1")
    levels = max(1, math.ceil(math.log2(max(size, out_size))))
    dims = (2,) * levels
    return tensor_train(dims, dims, in_size=size, out_size=out_size)


@functools.cache
def _balanced(size, count):
    """So many dimensions that hold size, none above twice another: of least product."""
    even = math.ceil(size ** (1 / count))
    sides = range(max(1, even // 2), 2 * even + 1)
    firsts = itertools.combinations_with_replacement(sides, count - 1)
    splits = [sorted((*dims, -(-size // math.prod(dims)))) for dims in firsts]
    splits = [dims for dims in splits if dims[-1] <= 2 * dims[0]]
    return tuple(min(splits, key=lambda dims: (math.prod(dims), sum(dims))))


def _check_blocks(in_size, out_size, blocks):
    for name, size in dict(in_size=in_size, out_size=out_size).items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, needed at least 1")
    if not 1 <= blocks <= min(in_size, out_size):
        raise ValueError(
            f"blocks: got {blocks}, needed 1 to {min(in_size, out_size)}, the smaller "
            "of the sizes"
        )
