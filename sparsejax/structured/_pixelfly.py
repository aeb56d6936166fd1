"""Pixelfly: a flat block butterfly, the sum of a butterfly's levels, plus low rank."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from sparsejax.structured._low_rank import LowRank
from sparsejax.structured._real import check_real, check_sizes, check_x, einsum


def flat_butterfly(
    in_size: int, out_size: int, *, block_shape: tuple[int, int], size: int
) -> Bool[np.ndarray, "kb nb"]:
    """Which blocks a flat block butterfly keeps: those of I + B_2 + B_4 + ... + B_size.

    Of a square grid block (p, q) is kept if ``p == q`` or ``p xor q`` is one of the
    strides 1, 2, 4 ... size / 2. Of any other the longer side is stretched over the
    shorter one: with 8 block rows and 15 block columns, column q counts as ``q * 8 //
    15``. Any number of blocks is right: each is there, every row and column keeps its
    diagonal, and where both numbers are powers of two all rows keep equally many, and
    all columns.

    Args:
      in_size: Rows of the matrix; blocks may reach over its edge.
      out_size: Columns.
      block_shape: (bk, bn).
      size: Power of two: 1 keeps the diagonal, 2 its neighbours in pairs as well.

    Returns:
      Boolean ``[ceil(in_size / bk), ceil(out_size / bn)]``, as
      ``layouts.BlockLayout.from_mask`` takes it.

    Raises:
      ValueError: A size is below 1; size is no power of two, or is above the one that
        holds the shorter side's blocks.

    Example:
      >>> mask = sparsejax.structured.flat_butterfly(6, 6, block_shape=(1, 1), size=4)
      >>> print(mask.astype(int))
      [[1 1 1 0 0 0]
       [1 1 0 1 0 0]
       [1 0 1 1 0 0]
       [0 1 1 1 0 0]
       [0 0 0 0 1 1]
       [0 0 0 0 1 1]]

    References:
      Dao et al., `Pixelated Butterfly: Simple and Efficient Sparse training for Neural
      Network Models <https://arxiv.org/abs/2112.00029>`_, 2021.
    """
    sizes = dict(in_size=in_size, out_size=out_size, size=size)
    sizes |= {"block_shape": min(block_shape)}
    for name, got in sizes.items():
        if got < 1:
            raise ValueError(f"{name}: got {got}, needed at least 1")
    grid = -(-in_size // block_shape[0]), -(-out_size // block_shape[1])
    most = 1 << (min(grid) - 1).bit_length()
    if size & (size - 1) or size > most:
        raise ValueError(
            f"size: got {size}, needed a power of two, at most {most}: the grid has "
            f"{grid} blocks"
        )
    p, q = (np.arange(n) * min(grid) // n for n in grid)
    distance = p[:, None] ^ q
    # Powers of two, and 0, share no bit with what is one less.
    return (distance & (distance - 1) == 0) & (distance < size)


@dataclasses.dataclass(frozen=True)
class Pixelfly:
    """A flat block butterfly plus a matrix of low rank: ``w = B + down up``.

    Attributes:
      in_size: Inputs.
      out_size: Outputs.
      block_shape: (bk, bn); blocks may reach over the edges.
      size: Of the butterfly, as for ``flat_butterfly``.
      rank: Of the other part.

    Raises:
      ValueError: As ``flat_butterfly`` and ``LowRank`` do.

    Example:
      >>> family = sparsejax.structured.Pixelfly(512, 512, (32, 32), size=4, rank=16)
      >>> int(family.block_mask.sum()), family.params / 512**2
      (48, 0.25)

    References:
      Dao et al., `Pixelated Butterfly: Simple and Efficient Sparse training for Neural
      Network Models <https://arxiv.org/abs/2112.00029>`_, 2021.
    """

    in_size: int
    out_size: int
    block_shape: tuple[int, int]
    size: int
    rank: int

    def __post_init__(self):
        check_sizes(self, "in_size", "out_size")
        _ = self.block_mask, self.low_rank  # their checks

    @property
    def shape(self) -> tuple[int, int]:
        """(in_size, out_size)."""
        return self.in_size, self.out_size

    @property
    def block_mask(self) -> Bool[np.ndarray, "kb nb"]:
        """``flat_butterfly`` of these sizes."""
        shape = self.block_shape
        return flat_butterfly(*self.shape, block_shape=shape, size=self.size)

    @property
    def low_rank(self) -> LowRank:
        """The family of the other part."""
        return LowRank(*self.shape, self.rank)

    @property
    def params(self) -> int:
        """Entries inside the edges."""
        rows, columns = (
            np.minimum(b, n - np.arange(0, n, b))
            for n, b in zip(self.shape, self.block_shape, strict=True)
        )
        return int(rows @ self.block_mask @ columns) + self.low_rank.params

    def flops(self, rows: int) -> int:
        """Of ``apply`` to so many rows."""
        stored = int(self.block_mask.sum()) * self.block_shape[0] * self.block_shape[1]
        return 2 * rows * stored + self.low_rank.flops(rows)

    def init(
        self, key: Array, dtype: Any = jnp.float32, *, scale: ArrayLike = 1.0
    ) -> dict[str, Float[Array, "..."]]:
        """{"blocks" [count, bk, bn], "down", "up"}, to a dense layer's variance.

        Half of it comes from either part. Blocks are in the order of ``BlockLayout``,
        by (block column, block row); what they hold over the edge is zero.
        """
        check_real(self, dtype=dtype)
        blocks_key, low_rank_key = jax.random.split(key)
        rows, columns = self._places()
        bk, bn = self.block_shape
        blocks = jax.random.normal(blocks_key, (len(rows), bk, bn))
        in_rows = rows[:, None] * bk + np.arange(bk) < self.in_size
        in_columns = columns[:, None] * bn + np.arange(bn) < self.out_size
        inside = in_rows[:, :, None] & in_columns[:, None, :]
        blocks = jnp.where(inside, blocks, 0)
        squares = jnp.zeros((self.block_mask.shape[1], bn)).at[columns]
        norm = jnp.sqrt(squares.add(jnp.sum(blocks**2, axis=1)))[columns][:, None]
        scale = scale * 0.5**0.5
        blocks = blocks * (scale / jnp.where(norm > 0, norm, 1))
        low_rank = self.low_rank.init(low_rank_key, dtype, scale=scale)
        return {"blocks": blocks.astype(dtype), **low_rank}

    def to_dense(self, params: dict[str, Float[Array, "..."]]) -> Float[Array, "k n"]:
        """The matrix ``[in_size, out_size]``."""
        (kb, nb), (bk, bn) = self.block_mask.shape, self.block_shape
        blocks = params["blocks"]
        grid = jnp.zeros((kb, nb, bk, bn), blocks.dtype).at[self._places()].set(blocks)
        w = grid.swapaxes(1, 2).reshape(kb * bk, nb * bn)
        return w[: self.in_size, : self.out_size] + self.low_rank.to_dense(params)

    def apply(
        self, params: dict[str, Float[Array, "..."]], x: Shaped[Array, "*batch k"]
    ) -> Float[Array, "*batch n"]:
        """``x @ to_dense(params)``, x ``[..., in_size]``, by the kept blocks."""
        check_x(self, x)
        (kb, nb), (bk, bn) = self.block_mask.shape, self.block_shape
        rows, columns = self._places()
        low_rank = self.low_rank.apply(params, x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, kb * bk - self.in_size)])
        x = x.reshape(*x.shape[:-1], kb, bk)[..., rows, :]
        products = einsum("...tk,tkn->...tn", x, params["blocks"])
        y = jnp.zeros((*x.shape[:-2], nb, bn), products.dtype)
        y = y.at[..., columns, :].add(products).reshape(*x.shape[:-2], nb * bn)
        return y[..., : self.out_size] + low_rank

    def _places(self):
        """Block rows and columns of the kept blocks, by (column, row)."""
        columns, rows = np.nonzero(self.block_mask.T)
        return rows, columns
