"""Chains by their usual names: block-diagonal, Monarch, butterfly."""

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
    in_size: int, out_size: int, *, blocks: int, rank: int | None = None
) -> Chain:
    """Two factors of ``blocks`` blocks each with a shuffle between.

    With inputs (k, i), k < blocks, and outputs (o, j), j < blocks, the matrix
    ``w[(k, i), (o, j)]`` has, for each k and j, a block ``[i, o]`` of the given rank.

    Args:
      in_size: Inputs.
      out_size: Outputs.
      blocks: Of each factor; sizes that they do not divide are padded.
      rank: Of the blocks between one block of the first factor and one of the second;
        default as MonarchLinear has it, the smaller block over ``blocks``.

    Raises:
      ValueError: blocks is below 1 or above one of the sizes; rank is below 1 or above
        the blocks.

    Example:
      >>> chain = sparsejax.structured.monarch(1024, 1024, blocks=16)
      >>> [p.factor_shape for p in chain.patterns], chain.params / 1024**2
      ([(16, 1, 64, 64), (1, 16, 64, 64)], 0.125)

    References:
      Dao et al., `Monarch: Expressive Structured Matrices for Efficient and Accurate
      Training <https://arxiv.org/abs/2204.00595>`_, 2022.
    """
    _check_blocks(in_size, out_size, blocks)
    inner, outer = -(-in_size // blocks), -(-out_size // blocks)
    rank = -(-min(inner, outer) // blocks) if rank is None else rank
    if not 1 <= rank <= min(inner, outer):
        raise ValueError(
            f"rank: got {rank}, needed 1 to {min(inner, outer)}, the smaller side of a "
            f"block of {inner}x{outer}"
        )
    dims = (blocks, inner), (outer, blocks)
    return tensor_train(*dims, rank, in_size=in_size, out_size=out_size)


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


def _check_blocks(in_size, out_size, blocks):
    for name, size in dict(in_size=in_size, out_size=out_size).items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, needed at least 1")
    if not 1 <= blocks <= min(in_size, out_size):
        raise ValueError(
            f"blocks: got {blocks}, needed 1 to {min(in_size, out_size)}, the smaller "
            "of the sizes"
        )
