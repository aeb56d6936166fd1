"""monarch_matmul: the product with two factors and the shuffle between them."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Shaped

from pallas_kernels.monarch_matmul import _spec
from pallas_kernels.monarch_matmul._spec import Problem
from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.ops import _kronecker_sparse_matmul as kronecker
from sparsejax.ops import _kronecker_sparse_xla
from sparsejax.ops._kronecker_sparse_matmul import (
    check_fits,
    check_sizes,
    compute_dtype,
    kronecker_sparse_matmul_reference,
    over_rows,
    static_of,
)
from sparsejax.ops._merged_factors import note
from sparsejax.ops._products import batched_by_loop
from sparsejax.structured import Pattern


def monarch_matmul(
    x: Shaped[Array, "..."],
    left: Shaped[Array, "..."],
    right: Shaped[Array, "..."],
    *,
    out_size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Shaped[Array, "..."]:
    """Multiplies by a Monarch matrix: two block-diagonals, shuffled.

    ``h[..., (k q)] = sum_p x[..., (k p)] left[k, 0, p, q]``, whose entries, read as
    ``(r l)``, give ``y[..., (s l)] = sum_r h[..., (r l)] right[0, l, r, s]``. Of a
    square matrix with k = l blocks the work is ``2 / k`` of the dense product's.

    Args:
      x: Activations ``[..., n]``, n at most ``k * p``: filled up with zeros; float32,
        bfloat16, float16 (float64 on CPU).
      left: The first factor ``[k, 1, p, q]``.
      right: The second ``[1, l, r, s]``, with ``r * l == k * q``.
      out_size: Entries of y to keep; default all ``s * l``.
      dtype: In which to multiply, and that of y; default, the promoted dtype. Sums are
        float32 in any case, and gradients of float32 factors come out unrounded.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. The kernels are one for both factors or, where that does not serve, one
        for each. A named implementation never falls back: the gradients, made by
        products with one factor, are also refused where its kernels do not serve those
        ("mosaic_gpu" needs p, q, r and s to be multiples of 64); to differentiate there
        leave the choice to None.

    Returns:
      y ``[..., out_size]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; the implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> left = jnp.ones((2, 1, 2, 2))  # sums of halves, each twice
      >>> right = jnp.array([[[[1.0], [1.0]], [[1.0], [-1.0]]]])  # [1, 2, 2, 1]
      >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> print(sparsejax.ops.monarch_matmul(x, left, right))
      [10. -4.]

    References:
      Dao et al., `Monarch: Expressive Structured Matrices for Efficient and Accurate
      Training <https://arxiv.org/abs/2204.00595>`_, 2022.

    Note:
      Reverse mode to any order, in x and both factors; the backward pass computes h
      again. Forward mode raises JAX's error for ``custom_vjp``;
      ``monarch_matmul_reference`` has it.
    """
    _check_factors(left, right)
    out_size = check_sizes(x, (left, right), out_size)
    compute = compute_dtype(dtype, x=x, left=left, right=right)
    apply = functools.partial(monarch, implementation, compute)
    return over_rows(apply, x, (left, right), out_size)


def monarch_matmul_reference(
    x: Shaped[Array, "..."],
    left: Shaped[Array, "..."],
    right: Shaped[Array, "..."],
    *,
    out_size: int | None = None,
) -> Shaped[Array, "..."]:
    """The equation of ``monarch_matmul``, as two einsums.

    Differentiable in both modes; takes complex numbers too.
    """
    _check_factors(left, right)
    h = kronecker_sparse_matmul_reference(x, left)
    return kronecker_sparse_matmul_reference(h, right, out_size=out_size)


def _check_factors(left, right):
    check_fits(left, None, "left")
    check_fits(right, None, "right")
    if left.shape[1] != 1:
        raise ValueError(f"left: got shape {left.shape}, needed [k, 1, p, q]")
    (k, _, _, q), (one, l, r, _) = left.shape, right.shape
    if one != 1 or r * l != k * q:
        raise ValueError(
            f"right: got shape {right.shape}, needed [1, l, r, s] with r * l == {k * q}"
            f", which left of shape {left.shape} gives"
        )


# --- The product and its derivative ---------------------------------------------------


def monarch(choice, compute, x, left, right):
    """Of rows [m, k * p], all of y."""
    statics = tuple(static_of(choice, compute, factor) for factor in (left, right))
    return _product(statics, x, left, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(statics, x, left, right):
    choice, compute = statics[0].choice, statics[0].compute
    return _call(choice, *(a.astype(compute) for a in (x, left, right)))


def _product_fwd(statics, *operands):
    return _product(statics, *operands), operands


def _product_bwd(statics, operands, dy):
    """By the products of one factor, so that it can be differentiated in turn.

    h is computed again: a sixth of the work of all three passes, where keeping it would
    double what a layer holds for its backward pass.
    """
    (first, second), (x, left, right) = statics, operands
    h, vjp = jax.vjp(lambda x, left: kronecker.product(first, x, left, None), x, left)
    second = dataclasses.replace(second, out=right.dtype)
    dright = kronecker.sampled(second, h, dy, None)
    return *vjp(kronecker.transposed(second, dy, right, None)), dright


_product.defvjp(_product_fwd, _product_bwd)


@_dispatch.jit
def _call(choice, x, left, right):
    def call(x, left, right):
        problem = _problem(x, left, right)
        return _dispatch.call(MONARCH, choice, problem, x, left, right)

    return batched_by_loop(call, more_rows=True)(x, left, right)


def _problem(x, left, right):
    (k, _, p, q), (_, l, r, s) = left.shape, right.shape
    return Problem("monarch", x.shape[0], k, p, q, l, r, s, x.dtype.name)


def _run_xla(problem, chip, interpret, x, left, right):
    del problem, chip, interpret
    return _kronecker_sparse_xla.product(x, left, right)


def _note_xla(problem):
    return note(_patterns(problem), problem.rows)


def _fused(name):
    """What the kernel of both factors needs, and how it picks tiles."""
    if name == "mosaic_tpu":
        return _spec.check_mosaic_tpu, _spec.config_mosaic_tpu
    return _spec.check_mosaic_gpu, _spec.config_mosaic_gpu


def _refusal(name, problem, chip):
    """Why one kernel does not serve both factors; None: it does."""
    try:
        _fused(name)[0](problem, chip)
    except NotImplementedError as error:
        return str(error)
    return None


def _check_kernels(name, problem, chip):
    """Served by one kernel for both factors or by one for each."""
    why = _refusal(name, problem, chip)
    if why is None:
        return
    for factor in _factors(problem):
        try:
            kronecker.KRONECKER[name].check(factor, chip)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{why}; nor a factor at a time: {error}"
            ) from None


def _run_kernels(name, problem, chip, interpret, x, left, right):
    if _refusal(name, problem, chip) is not None:
        run = kronecker.KRONECKER[name].run
        one, two = _factors(problem)
        return run(two, chip, interpret, run(one, chip, interpret, x, left), right)
    if name == "mosaic_tpu":
        from pallas_kernels.monarch_matmul import mosaic_tpu as kernels
    else:
        from pallas_kernels.monarch_matmul import mosaic_gpu as kernels
    config = _fused(name)[1](problem, chip)
    return kernels.product(x, left, right, config=config, interpret=interpret)


def _note_kernels(name, problem):
    if why := _refusal(name, problem, _dispatch.current_chip()):
        return f"a kernel for each factor, what is between them through memory ({why})"
    return "both factors in one kernel"


def _factors(problem):
    """The products with one factor each."""
    dtypes = dict(dtype=problem.dtype, out_dtype=problem.dtype)
    return [
        kronecker.Problem("kronecker", problem.rows, **vars(pattern), **dtypes)
        for pattern in _patterns(problem)
    ]


def _patterns(problem):
    one = Pattern(problem.k, problem.q, problem.p, 1)
    return one, Pattern(1, problem.s, problem.r, problem.l)


def _anything(problem, chip):
    """XLA takes every problem."""


MONARCH = {
    "xla": Implementation("xla", None, _anything, _run_xla, note=_note_xla),
    "mosaic_tpu": Implementation(
        "mosaic_tpu",
        "tpu",
        functools.partial(_check_kernels, "mosaic_tpu"),
        functools.partial(_run_kernels, "mosaic_tpu"),
        note=functools.partial(_note_kernels, "mosaic_tpu"),
    ),
    # Hopper only: not offered to a GPU of which nothing is known.
    "mosaic_gpu": Implementation(
        "mosaic_gpu",
        "cuda",
        functools.partial(_check_kernels, "mosaic_gpu"),
        functools.partial(_run_kernels, "mosaic_gpu"),
        needs_chip=True,
        note=functools.partial(_note_kernels, "mosaic_gpu"),
    ),
}
