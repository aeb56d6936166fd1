"""Sums of Kronecker products, hypercomplex multiplications (PHM) among them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from sparsejax.structured._init import unit_columns
from sparsejax.structured._real import check_real, check_sizes, check_x, einsum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kronecker:
    """Sums of Kronecker products, ``w = sum_t left_t (x) right_t``.

    ``y[..., (o l)] = sum_{t, j, k} x[..., (j k)] left[t, j, o] right[t, k, l]``, in the
    order that costs less, without the matrix. With a rank each right factor is itself a
    product ``down_t up_t``.

    Attributes:
      left: (p, q), rows and columns of each left factor.
      right: (r, s), rows and columns of each right one.
      terms: How many are added.
      rank: Of the right factors; default, full.
      in_size: True inputs, at most p * r; default all of them.
      out_size: True outputs, at most q * s; default all of them.

    Raises:
      ValueError: A size is below 1, or does not fit the factors'; rank is not from 1 to
        the smaller size of the right factors.

    Example:
      >>> family = sparsejax.structured.Kronecker(left=(2, 2), right=(1, 2))
      >>> left = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
      >>> print(family.to_dense({"left": left, "right": jnp.array([[[1.0, 10.0]]])}))
      [[ 1. 10.  2. 20.]
       [ 3. 30.  4. 40.]]
    """

    left: tuple[int, int]
    right: tuple[int, int]
    terms: int = 1
    rank: int | None = None
    in_size: int = 0
    out_size: int = 0

    def __post_init__(self):
        for name in "left", "right":
            if len(dims := getattr(self, name)) != 2 or min(dims) < 1:
                raise ValueError(f"{name}: got {dims}, needed two sizes of at least 1")
        check_sizes(self, "terms")
        for name, outer, inner in zip(
            ("in_size", "out_size"), self.left, self.right, strict=True
        ):
            size = getattr(self, name) or outer * inner
            if not 1 <= size <= outer * inner:
                raise ValueError(
                    f"{name}: got {size}, needed 1 to {outer * inner}, {outer} times "
                    f"{inner}"
                )
            object.__setattr__(self, name, size)
        if self.rank is not None and not 1 <= self.rank <= min(self.right):
            raise ValueError(
                f"rank: got {self.rank}, needed 1 to {min(self.right)}, the smaller "
                f"side of right {self.right}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(in_size, out_size)."""
        return self.in_size, self.out_size

    @property
    def params(self) -> int:
        """Entries of all factors, but for those that only padding meets."""
        (p, q), right = zip(*self._true, strict=True)
        r, s = right
        return self.terms * (
            p * q + (r * s if self.rank is None else self.rank * (r + s))
        )

    @property
    def _true(self):
        """((p, r), (q, s)) without rows and columns that only padding meets."""
        inner = zip(self.shape, self.right, strict=True)
        return tuple((-(-size // part), min(size, part)) for size, part in inner)

    def flops(self, rows: int) -> int:
        """Of ``apply`` to so many rows."""
        (p, q), (r, s) = self.left, self.right
        a_row = min(r * (p * q) + q * (r * s), p * (r * s) + s * (p * q))
        once = 0 if self.rank is None else self.rank * r * s
        return 2 * self.terms * (rows * a_row + once)

    def init(
        self, key: Array, dtype: Any = jnp.float32, *, scale: ArrayLike = 1.0
    ) -> dict[str, Float[Array, "..."]]:
        """{"left" [terms, p, q], "right" [terms, r, s]}, to a dense layer's variance.

        With a rank "down" [terms, r, rank] and "up" [terms, rank, s] stand for "right".
        """
        check_real(self, dtype=dtype)
        dtype = jnp.dtype(dtype)
        left_key, down_key, up_key = jax.random.split(key, 3)
        (p, q), (r, s), t = self.left, self.right, self.terms
        true_p, true_r = (
            (np.arange(n) < m)[:, None]
            for n, m in zip((p, r), self._true[0], strict=True)
        )
        # Of unit columns a term has a variance of 1 / (true p * true r).
        scale = scale * math.sqrt(math.prod(self._true[0]) / (self.in_size * t))
        left = unit_columns(left_key, (t, p, q), dtype, true_p, scale)
        down = unit_columns(down_key, (t, r, self.rank or s), dtype, true_r)
        if self.rank is None:
            return {"left": left, "right": down}
        up = unit_columns(up_key, (t, self.rank, s), dtype)
        return {"left": left, "down": down, "up": up}

    def to_dense(self, params: dict[str, Float[Array, "..."]]) -> Float[Array, "k n"]:
        """The matrix ``[in_size, out_size]``."""
        (p, q), (r, s) = self.left, self.right
        w = einsum("tjo,tkl->jkol", params["left"], self._right(params))
        return w.reshape(p * r, q * s)[: self.in_size, : self.out_size]

    def apply(
        self, params: dict[str, Float[Array, "..."]], x: Shaped[Array, "*batch k"]
    ) -> Float[Array, "*batch n"]:
        """``x @ to_dense(params)``, x ``[..., in_size]``, without the matrix."""
        check_x(self, x)
        (p, q), (r, s) = self.left, self.right
        left, right = params["left"], self._right(params)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, p * r - self.in_size)])
        x = x.reshape(*x.shape[:-1], p, r)
        if r * (p * q) + q * (r * s) <= p * (r * s) + s * (p * q):
            h = einsum("...jk,tjo->...tok", x, left)
            y = einsum("...tok,tkl->...ol", h, right)
        else:
            h = einsum("...jk,tkl->...tjl", x, right)
            y = einsum("...tjl,tjo->...ol", h, left)
        return y.reshape(*y.shape[:-2], q * s)[..., : self.out_size]

    def _right(self, params):
        if self.rank is None:
            return params["right"]
        return einsum("tkr,trl->tkl", params["down"], params["up"])


def phm(in_size: int, out_size: int, *, n: int, rank: int | None = None) -> Kronecker:
    """Parameterised hypercomplex multiplication: n terms with left factors n x n.

    Has about 1 / n of the dense entries; with a rank, as Compacter has it,
    ``rank (in_size + out_size) + n^3``. Compacter also shares the left factors among
    layers: give each layer the same array.

    Args:
      in_size: Inputs.
      out_size: Outputs.
      n: Terms, and sides of the left factors; sizes that it does not divide are padded.
      rank: Of the right factors; default, full.

    Raises:
      ValueError: A size is below 1; rank is not from 1 to the smaller part.

    Example:
      >>> family = sparsejax.structured.phm(768, 512, n=4, rank=1)
      >>> family.left, family.right, family.params  # 64 + 4 * (192 + 128)
      ((4, 4), (192, 128), 1344)

    References:
      Zhang et al., `Beyond Fully-Connected Layers with Quaternions: Parameterization of
      Hypercomplex Multiplications with 1/n Parameters
      <https://arxiv.org/abs/2102.08597>`_, 2021.
      Mahabadi et al., `Compacter: Efficient Low-Rank Hypercomplex Adapter Layers
      <https://arxiv.org/abs/2106.04647>`_, 2021.
    """
    for name, size in dict(in_size=in_size, out_size=out_size, n=n).items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, needed at least 1")
    parts = -(-in_size // n), -(-out_size // n)
    return Kronecker(
        left=(n, n),
        right=parts,
        terms=n,
        rank=rank,
        in_size=in_size,
        out_size=out_size,
    )
