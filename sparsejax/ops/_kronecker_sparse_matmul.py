"""kronecker_sparse_matmul: the product with one Kronecker-sparse factor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.kronecker_sparse_matmul import _spec
from pallas_kernels.kronecker_sparse_matmul._spec import Problem
from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.ops import _kronecker_sparse_xla
from sparsejax.ops._checks import accumulator, check_floating, over_explicit_axes
from sparsejax.ops._merged_factors import note
from sparsejax.ops._products import (
    SAMPLED,
    TRANSPOSED,
    batched_by_loop,
    closed_products,
)
from sparsejax.structured import Pattern


def kronecker_sparse_matmul(
    x: Shaped[Array, "..."],
    factor: Shaped[Array, "..."],
    pattern: Pattern | None = None,
    *,
    out_size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    """Multiplies by a Kronecker-sparse factor.

    ``y[..., (i o k)] = sum_j x[..., (i j k)] factor[i, k, j, o]`` for i < a, j < c,
    o < b and k < d: the product with a matrix of support ``I_a (x) 1_{c x b} (x) I_d``.
    A Monarch factor, a level of a butterfly and a block-diagonal are cases of it. Work
    and memory are those of the stored entries, ``1 / (a d)`` of the dense matrix's; no
    array of its shape exists, forward or backward, unless a dense product is faster
    (``explain`` says).

    Args:
      x: Activations ``[..., n]``, n at most ``a * c * d``: filled up with zeros;
        float32, bfloat16, float16 (float64 on CPU).
      factor: ``[a, d, c, b]``.
      pattern: What factor's shape must say, checked; default, whatever it says.
      out_size: Entries of y to keep; default all.
      dtype: In which x and factor are multiplied, and that of y; default, their
        promoted dtype. Sums are float32 in any case, and the gradient of a float32
        ``factor`` comes out of those sums unrounded: keep float32 master factors and
        pass ``dtype=jnp.bfloat16``.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[..., out_size]``.

    Raises:
      ValueError: Shapes, the pattern or dtypes do not fit; the implementation's name is
        unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> halves = jnp.array([[[[1.0], [1.0]]], [[[1.0], [-1.0]]]])  # [2, 1, 2, 1]
      >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> print(sparsejax.ops.kronecker_sparse_matmul(x, halves))
      [ 3. -1.]

    References:
      Gonon et al., `Make Inference Faster: Efficient GPU Memory Management for
      Butterfly Sparse Matrix Multiplication <https://arxiv.org/abs/2405.15013>`_, 2024.

    Note:
      Reverse mode to any order, in x and factor. Forward mode raises JAX's error for
      ``custom_vjp``; ``kronecker_sparse_matmul_reference`` has it.
    """
    check_fits(factor, pattern)
    out_size = check_sizes(x, (factor,), out_size)
    compute = compute_dtype(dtype, x=x, factor=factor)
    static = static_of(implementation, compute, factor)
    apply = lambda x, factor: product(static, x, factor, None)
    return over_rows(apply, x, (factor,), out_size)


def kronecker_sparse_matmul_reference(
    x: Shaped[Array, "..."],
    factor: Shaped[Array, "..."],
    pattern: Pattern | None = None,
    *,
    out_size: int | None = None,
) -> Shaped[Array, "..."]:
    """The equation of ``kronecker_sparse_matmul``, as an einsum.

    Differentiable in both modes; takes complex numbers too.
    """
    check_fits(factor, pattern)
    out_size = check_sizes(x, (factor,), out_size)
    dtype = jnp.promote_types(x.dtype, factor.dtype)
    wide = accumulator(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
    a, d, c, b = factor.shape
    x = _pad(x, a * c * d).astype(wide).reshape(*x.shape[:-1], a, c, d)
    y = jnp.einsum("...ijk,ikjo->...iok", x, factor.astype(wide))
    return y.reshape(*x.shape[:-3], -1)[..., :out_size].astype(dtype)


# --- Operands: shared with the products of several factors ----------------------------


def check_fits(factor, pattern, name="factor"):
    """Raises ValueError unless factor has four axes, none empty, and fits pattern."""
    if factor.ndim != 4 or 0 in factor.shape:
        raise ValueError(
            f"{name}: got shape {factor.shape}, needed [a, d, c, b], each at least 1"
        )
    if pattern is not None and pattern.factor_shape != factor.shape:
        raise ValueError(
            f"pattern: got {pattern}, whose factor is {pattern.factor_shape}, needed "
            f"that of a factor of shape {factor.shape}"
        )


def check_sizes(x, factors, out_size):
    """Raises ValueError unless x and out_size fit a chain; returns out_size."""
    fed, given = Pattern.of(factors[0]).in_size, Pattern.of(factors[-1]).out_size
    if x.ndim < 1 or not 1 <= x.shape[-1] <= fed:
        raise ValueError(
            f"x: got shape {x.shape}, needed [..., n], n from 1 to {fed}: the first "
            f"factor has shape {factors[0].shape}"
        )
    out_size = given if out_size is None else out_size
    if not 1 <= out_size <= given:
        raise ValueError(f"out_size: got {out_size}, needed 1 to {given}")
    return out_size


def compute_dtype(dtype, **arrays):
    """In which to multiply; raises ValueError where a dtype is not supported."""
    check_floating(**arrays)
    if dtype is None:  # strict promotion refuses bfloat16 beside float32
        dtype = jnp.result_type(*(a.dtype for a in arrays.values()))
    check_floating(dtype=jax.ShapeDtypeStruct((), jnp.dtype(dtype)))
    return jnp.dtype(dtype)


def over_rows(apply, x, factors, out_size):
    """``apply(rows [m, n], *factors)`` of x's rows, filled up; the result cut off."""

    def local(x, *factors):
        rows = _pad(x.reshape(-1, x.shape[-1]), Pattern.of(factors[0]).in_size)
        # TPU and GPU have no empty arrays; a row of zeros adds nothing.
        some = rows if rows.shape[0] else jnp.zeros((1, rows.shape[1]), x.dtype)
        y = apply(*_dispatch.vary_alike(some, *factors))
        return y[: rows.shape[0], :out_size].reshape(*x.shape[:-1], out_size)

    return over_explicit_axes(local, x, *factors, keep_rows=True)


def _pad(x, width):
    """Zeros on the right of x's last axis, up to the width."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


# --- The three products ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Static:
    """What is fixed while tracing: who computes, of which pattern, in which dtypes."""

    choice: Choice
    pattern: Pattern
    compute: jnp.dtype
    out: jnp.dtype | None = None  # of a sampled product


def static_of(choice, compute, factor):
    """That of a product with ``factor``."""
    return Static(choice, Pattern.of(factor), compute)


def _multiply(static, op, a, b, where):
    del where
    a, b = a.astype(static.compute), b.astype(static.compute)
    if op == SAMPLED:
        # A kernel writes its operands' dtype or float32; anything else is a cast.
        wide = static.out in (static.compute, jnp.float32)
        out = static.out if wide else static.compute
        return _call((static, op, out), a, b).astype(static.out)
    factor = b.swapaxes(2, 3) if op == TRANSPOSED else b
    return _call((static, op, static.compute), a, factor)


product, transposed, sampled = closed_products(_multiply)


@_dispatch.jit
def _call(how, x, other):
    """Product of x with a factor, or of x with y; ``how``: (static, op, out dtype)."""
    static, op, out = how

    def call(x, other):
        pattern = static.pattern if op == SAMPLED else Pattern.of(other)
        problem = _problem(op, out, x, pattern)
        return _dispatch.call(KRONECKER, static.choice, problem, x, other)

    return batched_by_loop(call, more_rows=op != SAMPLED)(x, other)


def _problem(op, out, x, pattern):
    return Problem(
        op="kronecker_sampled" if op == SAMPLED else "kronecker",
        rows=x.shape[0],
        **dataclasses.asdict(pattern),
        dtype=x.dtype.name,
        out_dtype=jnp.dtype(out).name,
    )


def _run_xla(problem, chip, interpret, x, other):
    del chip, interpret
    if problem.op == "kronecker":
        return _kronecker_sparse_xla.product(x, other)
    pattern = problem.a, problem.b, problem.c, problem.d
    out = jnp.dtype(problem.out_dtype)
    return _kronecker_sparse_xla.sampled(x, other, pattern=pattern, dtype=out)


def _note_xla(problem):
    pattern = Pattern(problem.a, problem.b, problem.c, problem.d)
    return note([pattern], problem.rows)


def _kernels(name):
    """The kernels' file of an implementation and how it picks tiles, loaded if used."""
    if name == "mosaic_tpu":
        from pallas_kernels.kronecker_sparse_matmul import mosaic_tpu

        return mosaic_tpu, _spec.config_mosaic_tpu
    from pallas_kernels.kronecker_sparse_matmul import mosaic_gpu

    return mosaic_gpu, _spec.config_mosaic_gpu


def _run_kernel(name, problem, chip, interpret, x, other):
    kernels, config = _kernels(name)
    how = dict(config=config(problem, chip), interpret=interpret)
    if problem.op == "kronecker":
        return kernels.product(x, other, **how)
    pattern = problem.a, problem.b, problem.c, problem.d
    out = jnp.dtype(problem.out_dtype)
    return kernels.sampled(x, other, pattern=pattern, dtype=out, **how)


def _anything(problem, chip):
    """XLA takes every problem."""


KRONECKER = {
    "xla": Implementation("xla", None, _anything, _run_xla, note=_note_xla),
    "mosaic_tpu": Implementation(
        "mosaic_tpu",
        "tpu",
        _spec.check_mosaic_tpu,
        functools.partial(_run_kernel, "mosaic_tpu"),
    ),
    # Hopper only: not offered to a GPU of which nothing is known.
    "mosaic_gpu": Implementation(
        "mosaic_gpu",
        "cuda",
        _spec.check_mosaic_gpu,
        functools.partial(_run_kernel, "mosaic_gpu"),
        needs_chip=True,
    ),
}
