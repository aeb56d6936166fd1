"""Kronecker-sparse factors and chains of them: Monarch, butterfly, tensor trains.

A factor of pattern (a, b, c, d) maps a * c * d inputs to a * b * d outputs,

    y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]      i < a, j < c, o < b, k < d,

which is a product with a matrix whose support is I_a (x) 1_{c x b} (x) I_d. A factor is
stored as ``[a, d, c, b]``: one dense c x b block for each (i, k), so its shape says its
pattern. A chain applies its factors from first to last.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Where a Kronecker-sparse factor is non-zero: ``I_a (x) 1_{c x b} (x) I_d``.

    Of the matrix ``[in_size, out_size]`` that multiplies rows from the right. A
    block-diagonal of a blocks is (a, b, c, 1), a radix-2 butterfly level of stride s on
    n entries (n / (2 s), 2, 2, s).

    Attributes:
      a: Copies side by side, the outermost axis.
      b: Outputs of a block.
      c: Inputs of a block.
      d: Blocks that are interleaved, the innermost axis.

    Raises:
      ValueError: One of them is below 1.

    Example:
      >>> pattern = sparsejax.structured.Pattern(a=2, b=3, c=4, d=5)
      >>> pattern.in_size, pattern.out_size, pattern.factor_shape
      (40, 30, (2, 5, 4, 3))

    References:
      Gonon et al., `Make Inference Faster: Efficient GPU Memory Management for
      Butterfly Sparse Matrix Multiplication <https://arxiv.org/abs/2405.15013>`_, 2024.
    """

    a: int
    b: int
    c: int
    d: int

    def __post_init__(self):
        for name in "abcd":
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: got {value}, needed at least 1")

    @property
    def in_size(self) -> int:
        """a * c * d."""
        return self.a * self.c * self.d

    @property
    def out_size(self) -> int:
        """a * b * d."""
        return self.a * self.b * self.d

    @property
    def factor_shape(self) -> tuple[int, int, int, int]:
        """(a, d, c, b), as factors are stored."""
        return self.a, self.d, self.c, self.b

    @classmethod
    def of(cls, factor: Shaped[Array, "..."]) -> "Pattern":
        """The pattern that a factor's shape says.

        Raises:
          ValueError: It has not four axes.
        """
        if len(factor.shape) != 4:
            raise ValueError(f"factor: got shape {factor.shape}, needed [a, d, c, b]")
        a, d, c, b = factor.shape
        return cls(a=a, b=b, c=c, d=d)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Factors applied one after the other, from ``in_size`` to ``out_size`` entries.

    Inputs are padded with zeros to what the first factor takes, outputs are cut off
    from what the last one gives.

    Attributes:
      patterns: Of each factor, the first to be applied first.
      in_size: True inputs.
      out_size: True outputs.

    Raises:
      ValueError: No pattern; one does not take what the one before gives; sizes of
        0, or beyond the factors'.
    """

    patterns: tuple[Pattern, ...]
    in_size: int
    out_size: int

    def __post_init__(self):
        if not self.patterns:
            raise ValueError("patterns: got none, needed at least one")
        for one, two in zip(self.patterns, self.patterns[1:], strict=False):
            if one.out_size != two.in_size:
                raise ValueError(
                    f"patterns: got {two}, which takes {two.in_size}, after {one}, "
                    f"needed one that takes its {one.out_size}"
                )
        ends = self.patterns[0].in_size, self.patterns[-1].out_size
        for name, padded in zip(("in_size", "out_size"), ends, strict=True):
            if not 1 <= (got := getattr(self, name)) <= padded:
                raise ValueError(f"{name}: got {got}, needed 1 to {padded}")

    @classmethod
    def of(
        cls,
        factors: Sequence[Shaped[Array, "..."]],
        in_size: int | None = None,
        out_size: int | None = None,
    ) -> "Chain":
        """The chain that the factors' shapes say; sizes default to all of theirs."""
        patterns = tuple(Pattern.of(factor) for factor in factors)
        first, last = patterns[:1], patterns[-1:]  # empty lists are refused below
        if in_size is None:
            in_size = sum(p.in_size for p in first)
        if out_size is None:
            out_size = sum(p.out_size for p in last)
        return cls(patterns, in_size, out_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(in_size, out_size)."""
        return self.in_size, self.out_size

    @property
    def stored(self) -> int:
        """Entries of all factors, those that meet padding among them."""
        return sum(math.prod(p.factor_shape) for p in self.patterns)

    @property
    def params(self) -> int:
        """Entries that take part: fed by a true input, read by a true output."""
        live = [np.arange(self.patterns[0].in_size) < self.in_size]
        for p in self.patterns:
            fed = live[-1].reshape(p.a, p.c, p.d).any(1, keepdims=True)
            live.append(np.broadcast_to(fed, (p.a, p.b, p.d)).ravel())
        used = np.arange(self.patterns[-1].out_size) < self.out_size
        count = 0
        for p, fed in zip(self.patterns[::-1], live[-2::-1], strict=True):
            used = used.reshape(p.a, p.b, p.d)
            inputs = fed.reshape(p.a, p.c, p.d).sum(1)
            count += int((inputs * used.sum(1)).sum())
            used = np.broadcast_to(used.any(1, keepdims=True), (p.a, p.c, p.d)).ravel()
        return count

    def flops(self, rows: int) -> int:
        """Of the product with ``rows`` rows: two for each entry and row."""
        return 2 * rows * self.stored


def tensor_train(
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    ranks: int | Sequence[int] = 1,
    *,
    in_size: int | None = None,
    out_size: int | None = None,
) -> Chain:
    """Block tensor train: factor t takes the last input dimension that is left.

    With inputs (m_1 ... m_p) and outputs (n_1 ... n_p) the state before factor t is
    (m_1 ... m_{p-t+1}, rank, n_{p-t+2} ... n_p): the factor sums over (m_{p-t+1}, rank)
    and gives (rank, n_{p-t+1}). Two dimensions are a Monarch matrix, all twos and rank
    1 a butterfly.

    Args:
      in_dims: m_1 ... m_p.
      out_dims: n_1 ... n_p.
      ranks: Between factors, from the first to be applied on: p - 1 of them, or one.
      in_size: True inputs, if fewer than their product.
      out_size: True outputs, if fewer than their product.

    Raises:
      ValueError: The numbers of dimensions differ; a rank or dimension is below 1.

    Example:
      >>> sparsejax.structured.tensor_train((4, 8), (16, 2), 3).patterns
      (Pattern(a=4, b=6, c=8, d=1), Pattern(a=1, b=16, c=12, d=2))

    References:
      Qiu et al., `Compute Better Spent: Replacing Dense Layers with Structured Matrices
      <https://arxiv.org/abs/2406.06248>`_, 2024.
    """
    p = len(in_dims)
    if p < 1 or len(out_dims) != p:
        raise ValueError(f"out_dims: got {tuple(out_dims)}, needed {p}, as in_dims has")
    ranks = (ranks,) * (p - 1) if isinstance(ranks, int) else tuple(ranks)
    if len(ranks) != p - 1:
        raise ValueError(f"ranks: got {ranks}, needed {p - 1} of them")
    for name, sizes in dict(in_dims=in_dims, out_dims=out_dims, ranks=ranks).items():
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name}: got {tuple(sizes)}, needed 1 or more each")
    before, after = (1, *ranks), (*ranks, 1)
    patterns = tuple(
        Pattern(
            a=math.prod(in_dims[: p - t - 1]),
            b=after[t] * out_dims[p - t - 1],
            c=in_dims[p - t - 1] * before[t],
            d=math.prod(out_dims[p - t :]),
        )
        for t in range(p)
    )
    in_size = math.prod(in_dims) if in_size is None else in_size
    out_size = math.prod(out_dims) if out_size is None else out_size
    return Chain(patterns, in_size, out_size)


def to_dense(
    factors: Sequence[Shaped[Array, "..."]],
    in_size: int | None = None,
    out_size: int | None = None,
) -> Shaped[Array, "k n"]:
    """The matrix ``[in_size, out_size]`` that a chain of factors multiplies by.

    Costs a product of the chain with the identity.

    Args:
      factors: Each ``[a, d, c, b]``, the first to be applied first.
      in_size: Rows to keep; default all.
      out_size: Columns to keep; default all.

    Raises:
      ValueError: The factors do not follow each other.

    Example:
      >>> level = jnp.array([[[[1.0, 1.0], [1.0, -1.0]]]])
      >>> print(sparsejax.structured.to_dense([level]))
      [[ 1.  1.]
       [ 1. -1.]]
    """
    chain = Chain.of(factors, in_size, out_size)
    dtype = jnp.result_type(*factors)
    y = jnp.eye(chain.in_size, chain.patterns[0].in_size, dtype=dtype)
    exact = jax.lax.Precision.HIGHEST
    for factor, p in zip(factors, chain.patterns, strict=True):
        y = y.reshape(-1, p.a, p.c, p.d)
        y = jnp.einsum("xijk,ikjo->xiok", y, factor.astype(dtype), precision=exact)
        y = y.reshape(chain.in_size, p.out_size)
    return y[:, : chain.out_size]
