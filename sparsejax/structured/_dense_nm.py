"""Dense x N:M: a small dense basis, of which each output combines a few vectors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from sparsejax.masks import nm_mask
from sparsejax.straight_through import sr_ste
from sparsejax.structured._init import unit_columns
from sparsejax.structured._real import check_real, check_sizes, check_x, einsum


@dataclasses.dataclass(frozen=True)
class DenseNM:
    """A dense matrix times one that keeps n of every m entries of a column.

    ``w = down nm(up)``: the columns of ``down`` are a basis of ``rank`` vectors, of
    which each output takes ``rank n / m``. ``nm`` keeps the largest n of every m; its
    gradient is straight through, so that which are kept is learned. For a rank above
    the smaller size w may have full rank, where ``LowRank`` of equal size cannot.

    Attributes:
      in_size: Inputs.
      out_size: Outputs.
      rank: Vectors of the basis, a multiple of m.
      n: How many of each group are KEPT.
      m: Group size.

    Raises:
      ValueError: A size is below 1; not 1 <= n <= m; m does not divide rank.

    Example:
      >>> family = sparsejax.structured.DenseNM(512, 256, rank=64, n=2, m=8)
      >>> family.params, family.flops(rows=1)
      (36864, 73728)

    References:
      Chand et al., `DSFormer: Effective Compression of Text-Transformers by
      Dense-Sparse Weight Factorization <https://arxiv.org/abs/2312.13211>`_, 2023.

    Note:
      ``layouts.condense_nm(up, masks.nm_mask(abs(up), n, m, axis=0), n=n, m=m)`` has
      the operands of ``ops.nm_matmul``, which skips what is not kept.
    """

    in_size: int
    out_size: int
    rank: int
    n: int
    m: int

    def __post_init__(self):
        check_sizes(self, "in_size", "out_size", "rank")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n: got {self.n}:{self.m}, needed 1 <= n <= m")
        if self.rank % self.m:
            raise ValueError(f"rank: got {self.rank}, needed a multiple of m={self.m}")

    @property
    def shape(self) -> tuple[int, int]:
        """(in_size, out_size)."""
        return self.in_size, self.out_size

    @property
    def params(self) -> int:
        """Entries of the basis, and kept ones of the other; not their places."""
        return self.rank * self.in_size + self.rank * self.n // self.m * self.out_size

    def flops(self, rows: int) -> int:
        """Of the product with so many rows, N:M entries by a kernel that skips them."""
        return 2 * rows * self.params

    def init(
        self, key: Array, dtype: Any = jnp.float32, *, scale: ArrayLike = 1.0
    ) -> dict[str, Float[Array, "..."]]:
        """{"down" [in_size, rank], "up" [rank, out_size]}, to a dense layer's variance.

        The entries of ``up`` that are not kept are there, smaller than those that are:
        any may take their place.
        """
        check_real(self, dtype=dtype)
        down_key, up_key = jax.random.split(key)
        dtype = jnp.dtype(dtype)
        down = unit_columns(down_key, (self.in_size, self.rank), dtype)
        up = jax.random.normal(up_key, (self.rank, self.out_size))
        kept = jnp.where(nm_mask(jnp.abs(up), self.n, self.m, axis=0), up, 0)
        up = scale * up / jnp.linalg.norm(kept, axis=0)
        return {"down": down, "up": up.astype(dtype)}

    def to_dense(self, params: dict[str, Float[Array, "..."]]) -> Float[Array, "k n"]:
        """The matrix ``[in_size, out_size]``."""
        return einsum("kr,rn->kn", params["down"], self._sparse(params["up"]))

    def apply(
        self, params: dict[str, Float[Array, "..."]], x: Shaped[Array, "*batch k"]
    ) -> Float[Array, "*batch n"]:
        """``x @ to_dense(params)``, x ``[..., in_size]``; both products dense."""
        check_x(self, x)
        hidden = einsum("...k,kr->...r", x, params["down"])
        return einsum("...r,rn->...n", hidden, self._sparse(params["up"]))

    def _sparse(self, up):
        return sr_ste(up, n=self.n, m=self.m, axis=0, decay=None)
