"""fan_in_matmul: the product with a constant fan-in weight."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.layouts._fan_in import check_condensed_fan_in
from sparsejax.ops import _fan_in_matmul_xla as xla
from sparsejax.ops._checks import accumulator, check_floating, over_explicit_axes
from sparsejax.ops._products import (
    SAMPLED,
    TRANSPOSED,
    batched_by_loop,
    closed_products,
)


def fan_in_matmul(
    x: Shaped[Array, "... _k"],
    values: Shaped[Array, "..."],
    indices: Shaped[Array, "..."],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "*batch n"]:
    """Multiplies by a weight every column of which keeps the same number of entries.

    ``y[..., j] = sum_i values[j, i] x[..., indices[j, i]]``. Multiply-adds and memory
    are proportional to ``n * fan_in``. It is made for few rows of x on a CPU, where
    reading the weight is what takes the time; where a dense product is faster, by a
    static rule on the shapes, the weight is written out and multiplied
    (``sparsejax.explain`` says). There is no kernel for an accelerator: a matrix unit
    cannot gather, and pays only for whole blocks, which ``block_sparse_matmul`` has,
    or groups, which ``nm_matmul`` has. It runs there, as everywhere, by XLA.

    Args:
      x: Activations ``[..., k]``; float32, bfloat16, float16 (float64 on CPU).
      values: Kept entries ``[n, fan_in]``, as ``layouts.condense_fan_in`` makes them.
      indices: Integers ``[n, fan_in]``, their rows of the weight, in [0, k), distinct
        in a column. Traced contents: new places do not recompile. Not differentiated.
      dtype: In which x and values are multiplied, and that of y; default, their
        promoted dtype. Sums are float32 in any case, and the gradient of float32
        ``values`` comes out of those sums unrounded: keep float32 master values and
        pass ``dtype=jnp.bfloat16``.
      implementation: "xla" or None, which are the same.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; the fan-in is larger than k; concrete
        indices are not valid (``layouts.check_fan_in``); the implementation's name is
        unknown.

    Example:
      >>> x = jnp.array([[1.0, 2.0, 3.0]])
      >>> values, indices = jnp.array([[1.0, 10.0]]), jnp.array([[0, 2]])
      >>> print(sparsejax.ops.fan_in_matmul(x, values, indices))
      [[31.]]

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2023.

    Note:
      Reverse mode to any order, in x and values. Forward mode raises JAX's error for
      ``custom_vjp``; ``fan_in_matmul_reference`` has it.
    """
    if x.ndim < 1:
        raise ValueError(f"x: got shape {x.shape}, needed [..., k]")
    k = x.shape[-1]
    check_condensed_fan_in(values, indices, k)
    check_floating(x=x, values=values)
    compute = jnp.promote_types(x.dtype, values.dtype) if dtype is None else dtype
    check_floating(dtype=jax.ShapeDtypeStruct((), jnp.dtype(compute)))
    static = _Static(implementation, k, jnp.dtype(compute))

    def local(x, values, indices):
        rows = x.reshape(-1, k)
        # TPU and GPU have no empty arrays; a row of zeros adds nothing.
        some = rows if rows.shape[0] else jnp.zeros((1, k), x.dtype)
        y = _product(static, *_dispatch.vary_alike(some, values, indices))
        return y[: rows.shape[0]].reshape(*x.shape[:-1], values.shape[0])

    indices = indices.astype(jnp.int32)
    return over_explicit_axes(local, x, values, indices, keep_rows=True)


def fan_in_matmul_reference(
    x: Float[Array, "*batch k"],
    values: Float[Array, "n fan_in"],
    indices: Shaped[Array, "n fan_in"],
) -> Float[Array, "*batch n"]:
    """The equation of ``fan_in_matmul`` in a few lines; slow.

    Differentiable in both modes.
    """
    dtype = jnp.promote_types(x.dtype, values.dtype)
    wide = accumulator(dtype)
    gathered = jnp.take(x.astype(wide), indices, axis=-1, mode="clip")
    return jnp.sum(gathered * values.astype(wide), axis=-1).astype(dtype)


# --- The three products ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed while tracing: who computes, rows of the weight, and dtypes."""

    choice: Choice
    k: int
    compute: jnp.dtype
    out: jnp.dtype | None = None  # of a sampled product


def _multiply(static, op, a, b, indices):
    return _call((static, op), a, b, indices)


_product, _, _ = closed_products(_multiply)


# --- Calls of XLA's forms -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts by which a form is chosen; [k, n] is the dense weight."""

    op: str
    rows: int
    k: int
    n: int
    fan_in: int
    dtype: str
    out_dtype: str

    def __str__(self):
        return (
            f"fan_in_{self.op}: {self.rows} rows, {self.k}x{self.n} matrix of fan-in "
            f"{self.fan_in} ({self.fan_in / max(self.k, 1):.1%} of the entries), "
            f"{self.dtype}"
        )


@_dispatch.jit
def _call(how, a, b, indices):
    """Product of rows a with values b, or of x with dy; ``how``: (static, op)."""
    static, op = how

    def call(a, b, indices):
        out = static.out if op == SAMPLED else static.compute
        names = (static.compute.name, out.name)
        n, fan_in = indices.shape
        problem = Problem(op, a.shape[0], static.k, n, fan_in, *names)
        a, b = a.astype(static.compute), b.astype(static.compute)
        return _dispatch.call(FAN_IN_MATMUL, static.choice, problem, a, b, indices)

    return batched_by_loop(call, more_rows=op != SAMPLED)(a, b, indices)


def _sizes(problem):
    return problem.op, problem.rows, problem.k, problem.n, problem.fan_in


def _writes_dense(problem):
    loops, dense_form, _ = xla.costs(*_sizes(problem))
    return dense_form < loops


def _run_xla(problem, chip, interpret, a, b, indices):
    del chip, interpret
    dense = _writes_dense(problem)
    if problem.op == SAMPLED:
        sampled = xla.sampled_dense if dense else xla.sampled
        return sampled(a, b, indices, dtype=jnp.dtype(problem.out_dtype))
    if problem.op == TRANSPOSED:
        transposed = xla.transposed_dense if dense else xla.transposed
        return transposed(a, b, indices, problem.k)
    return (xla.product_dense if dense else xla.product)(a, b, indices)


def _note_xla(problem):
    share = f"{problem.fan_in / max(problem.k, 1):.1%} of dense's multiply-adds"
    dense = _writes_dense(problem)
    what = "writes the weight out and multiplies" if dense else "gathers"
    words = {True: "slower than", False: "faster than", None: "about as fast as"}
    verdict = words[xla.dense_is_faster(*_sizes(problem))]
    return f"{what}, {share}; {verdict} a dense weight by the CPU's static rule"


FAN_IN_MATMUL = {
    "xla": Implementation(
        "xla", None, lambda problem, chip: None, _run_xla, note=_note_xla
    ),
}
