"""Low rank: a product of two dense matrices with few entries between them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from sparsejax.structured._init import init_chain
from sparsejax.structured._pattern import Chain, Pattern
from sparsejax.structured._real import check_real, check_sizes, check_x, einsum


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Matrices of rank at most ``rank``: ``w = down up``.

    ``y = (x down) up``, by ``2 rank (in_size + out_size)`` FLOPs a row.

    Attributes:
      in_size: Inputs.
      out_size: Outputs.
      rank: Entries between them.

    Raises:
      ValueError: A size is below 1; rank is not from 1 to the smaller of them.

    Example:
      >>> family = sparsejax.structured.LowRank(512, 256, rank=16)
      >>> params = family.init(jax.random.key(0))
      >>> {name: p.shape for name, p in params.items()}, family.params
      ({'down': (512, 16), 'up': (16, 256)}, 12288)
    """

    in_size: int
    out_size: int
    rank: int

    def __post_init__(self):
        check_sizes(self, "in_size", "out_size")
        if not 1 <= self.rank <= min(self.shape):
            raise ValueError(
                f"rank: got {self.rank}, needed 1 to {min(self.shape)}, the smaller of "
                "the sizes"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(in_size, out_size)."""
        return self.in_size, self.out_size

    @property
    def params(self) -> int:
        """rank * (in_size + out_size)."""
        return self.rank * sum(self.shape)

    def flops(self, rows: int) -> int:
        """Of ``apply`` to so many rows."""
        return 2 * rows * self.params

    def init(
        self, key: Array, dtype: Any = jnp.float32, *, scale: ArrayLike = 1.0
    ) -> dict[str, Float[Array, "..."]]:
        """{"down" [in_size, rank], "up" [rank, out_size]}, scaled as ``init_chain``."""
        check_real(self, dtype=dtype)
        sizes = (self.in_size, self.rank), (self.rank, self.out_size)
        patterns = tuple(Pattern(a=1, b=b, c=c, d=1) for c, b in sizes)
        down, up = init_chain(key, Chain(patterns, *self.shape), dtype, scale=scale)
        return {"down": down[0, 0], "up": up[0, 0]}

    def to_dense(self, params: dict[str, Float[Array, "..."]]) -> Float[Array, "k n"]:
        """The matrix ``[in_size, out_size]``."""
        return einsum("kr,rn->kn", params["down"], params["up"])

    def apply(
        self, params: dict[str, Float[Array, "..."]], x: Shaped[Array, "*batch k"]
    ) -> Float[Array, "*batch n"]:
        """``x @ to_dense(params)``, x ``[..., in_size]``, by way of rank entries."""
        check_x(self, x)
        hidden = einsum("...k,kr->...r", x, params["down"])
        return einsum("...r,rn->...n", hidden, params["up"])
