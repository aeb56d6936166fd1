"""butterfly_matmul: the product with a chain of Kronecker-sparse factors."""

import itertools
from collections.abc import Sequence

import jax
from jaxtyping import Array, Shaped

from sparsejax._dispatch import Choice
from sparsejax.ops import _kronecker_sparse_matmul as kronecker
from sparsejax.ops._kronecker_sparse_matmul import (
    check_fits,
    check_sizes,
    compute_dtype,
    kronecker_sparse_matmul_reference,
    over_rows,
    static_of,
)
from sparsejax.ops._merged_factors import merge, plan
from sparsejax.ops._monarch_matmul import monarch
from sparsejax.structured import Pattern


def butterfly_matmul(
    x: Shaped[Array, "..."],
    factors: Sequence[Shaped[Array, "..."]],
    *,
    out_size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    """Multiplies by a chain of Kronecker-sparse factors, from first to last.

    ``y = x f_1 f_2 ... f_p``, each as ``kronecker_sparse_matmul`` has it: a butterfly
    (factors ``[n / 2 s, s, 2, 2]`` for s = 1, 2, 4 ...), a Monarch matrix of any order,
    a block tensor train. Factors with small blocks are multiplied together first where
    that is quicker: it is at most ``n`` times the work of one row.

    Args:
      x: Activations ``[..., n]``, n at most what the first factor takes: filled up with
        zeros; float32, bfloat16, float16 (float64 on CPU).
      factors: Each ``[a, d, c, b]``; each takes what the one before gives.
      out_size: Entries of y to keep; default all that the last factor gives.
      dtype: In which to multiply, and that of y; default, the promoted dtype. Sums are
        float32 in any case, and gradients of float32 factors come out unrounded.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[..., out_size]``.

    Raises:
      ValueError: No factor; shapes or dtypes do not fit; the implementation's name is
        unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> level = jnp.array([[1.0, 1.0], [1.0, -1.0]])
      >>> chain = sparsejax.structured.butterfly(4)
      >>> hadamard = [jnp.broadcast_to(level, p.factor_shape) for p in chain.patterns]
      >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> print(sparsejax.ops.butterfly_matmul(x, hadamard))
      [10. -2. -4.  0.]

    References:
      Dao et al., `Learning Fast Algorithms for Linear Transforms Using Butterfly
      Factorizations <https://arxiv.org/abs/1903.05895>`_, 2019.

    Note:
      Reverse mode to any order, in x and all factors. Forward mode raises JAX's error
      for ``custom_vjp``; ``butterfly_matmul_reference`` has it.
    """
    factors = tuple(factors)
    _check_chain(factors)
    out_size = check_sizes(x, factors, out_size)
    named = {f"factors[{t}]": factor for t, factor in enumerate(factors)}
    compute = compute_dtype(dtype, x=x, **named)

    def apply(rows, *factors):
        runs = plan([Pattern.of(factor) for factor in factors], rows.shape[0])
        ends = itertools.accumulate(runs)
        merged = [merge(factors[e - n : e]) for e, n in zip(ends, runs, strict=True)]
        return _multiply(implementation, compute, rows, merged)

    return over_rows(apply, x, factors, out_size)


def butterfly_matmul_reference(
    x: Shaped[Array, "..."],
    factors: Sequence[Shaped[Array, "..."]],
    *,
    out_size: int | None = None,
) -> Shaped[Array, "..."]:
    """The equation of ``butterfly_matmul``, one einsum per factor.

    Differentiable in both modes; takes complex numbers too.
    """
    factors = tuple(factors)
    _check_chain(factors)
    out_size = check_sizes(x, factors, out_size)
    for factor in factors:
        x = kronecker_sparse_matmul_reference(x, factor)
    return x[..., :out_size]


def _multiply(choice, compute, rows, factors):
    """Of rows [m, n], all of y; pairs that are a Monarch matrix by its one product."""
    while factors:
        one, *factors = factors
        if factors and one.shape[1] == factors[0].shape[0] == 1:
            two, *factors = factors
            rows = monarch(choice, compute, rows, one, two)
        else:
            static = static_of(choice, compute, one)
            rows = kronecker.product(static, rows, one, None)
    return rows


def _check_chain(factors):
    if not factors:
        raise ValueError("factors: got none, needed at least one")
    for t, factor in enumerate(factors):
        check_fits(factor, None, f"factors[{t}]")
    sizes = [Pattern.of(factor) for factor in factors]
    for t, (one, two) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        if one.out_size != two.in_size:
            raise ValueError(
                f"factors[{t}]: got shape {two.factor_shape}, which takes "
                f"{two.in_size}, needed one that takes the {one.out_size} that "
                f"factors[{t - 1}] of shape {one.factor_shape} gives"
            )
