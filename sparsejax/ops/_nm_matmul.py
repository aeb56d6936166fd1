"""nm_matmul: the product with a condensed N:M weight."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.nm_matmul import _spec
from pallas_kernels.nm_matmul._spec import Problem
from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.layouts import expand_nm
from sparsejax.layouts._nm import check_condensed
from sparsejax.ops import _nm_matmul_xla
from sparsejax.ops._checks import accumulator, check_floating, over_explicit_axes
from sparsejax.ops._products import SAMPLED, batched_by_loop, closed_products


def nm_matmul(
    x: Shaped[Array, "... _k"],
    values: Shaped[Array, "..."],
    indices: Shaped[Array, "..."],
    *,
    n: int,
    m: int,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "*batch p"]:
    """Multiplies by a condensed N:M matrix.

    ``y[..., c] = sum_r x[..., row(r, c)] values[r, c]``, where ``row(g * n + j, c)`` is
    the row of the j-th kept entry of group g in column c: n entries are kept of every m
    consecutive ones along the contraction axis. Holds and reads n / m of the weight and
    2, 4 or 8 bits per place; the multiply-adds are those of the dense product. It saves
    memory; it saves time where reading the weight is what takes the time: at few rows
    of x, on a chip that has a kernel, and where little is kept (``explain`` says).

    Args:
      x: Activations ``[..., k]``; float32, bfloat16, float16 (float64 on CPU).
      values: Kept entries ``[k * n / m, p]``, as ``layouts.condense_nm`` makes them.
      indices: Their packed places, uint32. Traced contents: new places do not
        recompile. Not differentiated.
      n: How many of each group are KEPT.
      m: Group size.
      dtype: In which x and values are multiplied, and that of y; default, their
        promoted dtype. Sums are float32 in any case, and the gradient of float32
        ``values`` comes out of those sums unrounded: keep float32 master values and
        pass ``dtype=jnp.bfloat16``.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[..., p]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; n > m; concrete indices are not valid;
        the implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> w = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> values, indices = sparsejax.layouts.condense_nm(
      ...     w, jnp.array([[False], [True], [False], [True]]), n=2, m=4)
      >>> print(sparsejax.ops.nm_matmul(jnp.ones((1, 4)), values, indices, n=2, m=4))
      [[6.]]

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021.

    Note:
      Reverse mode to any order, in x and values. Forward mode raises JAX's error for
      ``custom_vjp``; ``nm_matmul_reference`` has it.
    """
    check_condensed(values, indices, n, m)
    k, p = values.shape[0] // n * m, values.shape[1]
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(
            f"x: got shape {x.shape}, needed [..., {k}]: values {values.shape} are the "
            f"{n} of every {m} rows of a {(k, p)} matrix"
        )
    check_floating(x=x, values=values)
    compute = jnp.promote_types(x.dtype, values.dtype) if dtype is None else dtype
    check_floating(dtype=jax.ShapeDtypeStruct((), jnp.dtype(compute)))
    static = _Static(implementation, n, m, jnp.dtype(compute))

    def local(x, values, indices):
        rows = x.reshape(-1, k)
        # TPU and GPU have no empty arrays; a row of zeros adds nothing.
        some = rows if rows.shape[0] else jnp.zeros((1, k), x.dtype)
        y = _product(static, *_dispatch.vary_alike(some, values, indices))
        return y[: rows.shape[0]].reshape(*x.shape[:-1], p)

    return over_explicit_axes(local, x, values, indices, keep_rows=True)


def nm_matmul_reference(
    x: Float[Array, "*batch k"],
    values: Float[Array, "kept p"],
    indices: Shaped[Array, "words p"],
    *,
    n: int,
    m: int,
) -> Float[Array, "*batch p"]:
    """The equation of ``nm_matmul``: the dense product with the expanded weight.

    Differentiable in both modes.
    """
    dtype = jnp.promote_types(x.dtype, values.dtype)
    w = expand_nm(values, indices, n=n, m=m).astype(dtype)
    y = jnp.matmul(x.astype(dtype), w, preferred_element_type=accumulator(dtype))
    return y.astype(dtype)


# --- The three products ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed while tracing: who computes, what is kept, and in which dtypes."""

    choice: Choice
    n: int
    m: int
    compute: jnp.dtype
    out: jnp.dtype | None = None  # of a sampled product


def _multiply(static, op, a, b, indices):
    a, b = a.astype(static.compute), b.astype(static.compute)
    if op != SAMPLED:
        return _call((static, op, static.compute), a, b, indices)
    # A kernel writes its operands' dtype or float32; anything else is a cast.
    out = static.out if static.out in (static.compute, jnp.float32) else static.compute
    return _call((static, op, out), a, b, indices).astype(static.out)


_product, _, _ = closed_products(_multiply)


@_dispatch.jit
def _call(how, x, other, indices):
    """Product of x with values, or of x with dy; ``how``: (static, op, out dtype)."""
    static, op, out = how

    def call(x, other, indices):
        problem = _problem(static, op, out, x, other)
        return _dispatch.call(NM_MATMUL, static.choice, problem, x, other, indices)

    return batched_by_loop(call, more_rows=op != SAMPLED)(x, other, indices)


_OPS = {"product": "nm", "transposed": "nm_transposed", "sampled": "nm_sampled"}


def _problem(static, op, out, x, other):
    k = x.shape[1] if op == SAMPLED else other.shape[0] // static.n * static.m
    return Problem(
        op=_OPS[op],
        rows=x.shape[0],
        k=k,
        p=other.shape[1],
        n=static.n,
        m=static.m,
        dtype=x.dtype.name,
        out_dtype=jnp.dtype(out).name,
    )


def _run_xla(problem, chip, interpret, x, other, words):
    del chip, interpret
    group = dict(n=problem.n, m=problem.m)
    if problem.op == "nm_sampled":
        out = jnp.dtype(problem.out_dtype)
        return _nm_matmul_xla.sampled(x, other, words, **group, dtype=out)
    transpose = problem.op == "nm_transposed"
    return _nm_matmul_xla.product(x, other, words, **group, transpose=transpose)


def _note_xla(problem):
    if problem.op == "nm_sampled":
        return "the dense product, of which the kept entries are taken"
    how = "expand"
    if problem.op == "nm":
        how = _nm_matmul_xla.form(problem.rows, problem.k, problem.n, problem.m)
    if how == "select":
        return "on a CPU the entries of x are selected, about as fast as dense"
    if how == "planes":
        return "on a CPU expanded piece by piece; dense would be faster"
    return "expand and multiply; dense would be faster, by that pass over the weight"


def _anything(problem, chip):
    """XLA takes every problem."""


def _run_tpu(problem, chip, interpret, x, other, words):
    from pallas_kernels.nm_matmul import mosaic_tpu

    config = _spec.config_mosaic_tpu(problem, chip)
    return _run_kernels(mosaic_tpu, config, problem, interpret, x, other, words)


def _run_gpu(problem, chip, interpret, x, other, words):
    from pallas_kernels.nm_matmul import mosaic_gpu

    config = _spec.config_mosaic_gpu(problem, chip)
    return _run_kernels(mosaic_gpu, config, problem, interpret, x, other, words)


def _run_kernels(kernels, config, problem, interpret, x, other, words):
    how = dict(n=problem.n, m=problem.m, config=config, interpret=interpret)
    if problem.op == "nm_sampled":
        out = jnp.dtype(problem.out_dtype)
        return kernels.sampled(x, other, words, dtype=out, **how)
    transpose = problem.op == "nm_transposed"
    return kernels.product(x, other, words, transpose=transpose, **how)


_SAMPLED_ON_CHIP = "the dense product on chip, of which the kept entries are written"


def _note_tpu(problem):
    if problem.op == "nm_sampled":
        return _SAMPLED_ON_CHIP
    if problem.rows <= 256 and 4 * problem.n <= problem.m:
        return "expanded on chip; by the compiler's schedule faster than dense"
    return "expanded on chip; holds no dense weight, dense would be as fast or faster"


def _note_gpu(problem):
    how = "expanded on chip; holds no dense weight"
    how = _SAMPLED_ON_CHIP if problem.op == "nm_sampled" else how
    return f"{how}; not yet measured against dense"


NM_MATMUL = {
    "xla": Implementation("xla", None, _anything, _run_xla, note=_note_xla),
    "mosaic_tpu": Implementation(
        "mosaic_tpu", "tpu", _spec.check_mosaic_tpu, _run_tpu, note=_note_tpu
    ),
    # Hopper only: not offered to a GPU of which nothing is known.
    "mosaic_gpu": Implementation(
        "mosaic_gpu",
        "cuda",
        _spec.check_mosaic_gpu,
        _run_gpu,
        needs_chip=True,
        note=_note_gpu,
    ),
}
