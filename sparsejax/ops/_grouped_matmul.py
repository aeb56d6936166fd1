"""grouped_matmul and its transpose: products of rows with the weight of their group."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Shaped

from pallas_kernels.grouped_matmul import _spec
from pallas_kernels.grouped_matmul._spec import Problem
from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.ops import _grouped_matmul_xla
from sparsejax.ops._checks import accumulator, check_floating
from sparsejax.ops._products import PRODUCT, SAMPLED, TRANSPOSED, closed_products


def grouped_matmul(
    x: Shaped[Array, "..."],
    w: Shaped[Array, "..."],
    group_sizes: Shaped[Array, "..."],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "m n"]:
    """Multiplies each row by the weight of its group.

    ``y[i] = x[i] w[g]`` for the rows i of group g: the first ``group_sizes[0]`` rows
    are group 0's, the next ``group_sizes[1]`` group 1's, and so on. Rows beyond their
    sum are 0 in y, and get no gradient. Multiply-adds are those of one product of all
    rows with one weight, whatever the number of groups.

    Args:
      x: Rows sorted by group ``[m, k]``; float32, bfloat16, float16 (float64 on CPU).
      w: Weights ``[g, k, n]``.
      group_sizes: Integers ``[g]``. Traced contents: other sizes do not recompile. Not
        differentiated.
      dtype: In which x and w are multiplied, and that of y; default, their promoted
        dtype. Sums are float32 in any case, and the gradient of float32 ``w`` comes out
        of those sums unrounded: keep float32 master weights and pass
        ``dtype=jnp.bfloat16``.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[m, n]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; concrete group sizes are negative or
        exceed the rows (traced ones are clipped: a negative size is 0, and groups take
        rows in their order while there are any); the implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> x = jnp.ones((4, 2))
      >>> w = jnp.stack([jnp.ones((2, 1)), 10 * jnp.ones((2, 1))])
      >>> print(sparsejax.ops.grouped_matmul(x, w, jnp.array([1, 2])).ravel())
      [ 2. 20. 20.  0.]

    References:
      Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022.

    Note:
      Reverse mode to any order, in x and w. Forward mode raises JAX's error for
      ``custom_vjp``; ``grouped_matmul_reference`` has it.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x, w: got shapes {x.shape} and {w.shape}, needed [m, k] and [g, k, n]"
        )
    m, (groups, _, n) = x.shape[0], w.shape
    sizes = _check_sizes(group_sizes, groups, m)
    static = _static(implementation, dtype, x=x, w=w)
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((m, n), static.compute)
    return _product(static, *_dispatch.vary_alike(x, w, sizes))


def transposed_grouped_matmul(
    x: Shaped[Array, "..."],
    y: Shaped[Array, "..."],
    group_sizes: Shaped[Array, "..."],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "g k n"]:
    """Computes ``x^T y`` of each group's rows.

    ``w[g] = sum over rows i of group g of x[i]^T y[i]``, groups as in
    ``grouped_matmul``, whose weight gradient this is. An empty group gets zeros; rows
    beyond the sum of the sizes are left out.

    Args:
      x: Rows sorted by group ``[m, k]``.
      y: Rows sorted by group ``[m, n]``.
      group_sizes: Integers ``[g]``, as for ``grouped_matmul``.
      dtype: In which x and y are multiplied, and that of the result; default, their
        promoted dtype. Sums are float32 in any case.
      implementation: As for ``grouped_matmul``.

    Returns:
      w ``[g, k, n]``.

    Raises:
      ValueError: As for ``grouped_matmul``.
      NotImplementedError: As for ``grouped_matmul``.

    Example:
      >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
      >>> w = sparsejax.ops.transposed_grouped_matmul(x, y, jnp.array([1, 2]))
      >>> print(w[:, :, 0])
      [[1. 1.]
       [2. 2.]]

    Note:
      Reverse mode to any order.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x, y: got shapes {x.shape} and {y.shape}, needed [m, k] and [m, n]"
        )
    sizes = _check_sizes(group_sizes, None, x.shape[0])
    static = _static(implementation, dtype, x=x, y=y)
    static = dataclasses.replace(static, out=static.compute)
    shape = (sizes.shape[0], x.shape[1], y.shape[1])
    if 0 in (*shape, x.shape[0]):
        return jnp.zeros(shape, static.compute)
    return _sampled(static, *_dispatch.vary_alike(x, y, sizes))


def grouped_matmul_reference(
    x: Float[Array, "m k"], w: Float[Array, "g k n"], group_sizes: Shaped[Array, "g"]
) -> Float[Array, "m n"]:
    """The equation of ``grouped_matmul`` in a few lines; slow.

    Differentiable in both modes. The product with every weight, of which each row takes
    its group's.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    mine = _members(group_sizes, x.shape[0])
    wide = dict(preferred_element_type=accumulator(dtype))
    rows = jnp.where(mine[..., None], x.astype(dtype), 0).astype(dtype)
    return jnp.einsum("gmk,gkn->mn", rows, w.astype(dtype), **wide).astype(dtype)


def transposed_grouped_matmul_reference(
    x: Float[Array, "m k"], y: Float[Array, "m n"], group_sizes: Shaped[Array, "g"]
) -> Float[Array, "g k n"]:
    """The equation of ``transposed_grouped_matmul`` in a few lines; slow.

    Differentiable in both modes.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    mine = _members(group_sizes, x.shape[0])[..., None]
    wide = dict(preferred_element_type=accumulator(dtype))
    rows = lambda a: jnp.where(mine, a.astype(dtype), 0).astype(dtype)
    return jnp.einsum("gmk,gmn->gkn", rows(x), rows(y), **wide).astype(dtype)


def _members(sizes, m):
    """Which rows are of group g, bool [g, m]."""
    row, ends = jnp.arange(m, dtype=sizes.dtype), jnp.cumsum(sizes, dtype=sizes.dtype)
    return (row < ends[:, None]) & (row >= (ends - sizes)[:, None])


# --- Operands -------------------------------------------------------------------------


def _check_sizes(sizes, groups, m):
    """The group sizes as int32, none negative, in all at most m."""
    wanted = "[g]" if groups is None else f"[{groups}], one per weight"
    if sizes.ndim != 1 or groups not in (None, sizes.shape[0]):
        raise ValueError(f"group_sizes: got shape {sizes.shape}, needed {wanted}")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes: got dtype {sizes.dtype}, needed integers")
    if not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes, np.int64)
        if (known < 0).any():
            raise ValueError(f"group_sizes: got {known.min()}, needed at least 0")
        if known.sum() > m:
            raise ValueError(
                f"group_sizes: got a sum of {known.sum()}, needed at most {m}, the "
                "number of rows"
            )
        return sizes.astype(jnp.int32)
    ends = jnp.cumsum(jnp.clip(sizes, 0, m).astype(jnp.int32), dtype=jnp.int32)
    return jnp.diff(jnp.minimum(ends, m), prepend=jnp.zeros(1, jnp.int32))


def _static(choice, dtype, **arrays):
    check_floating(**arrays)
    if dtype is None:  # strict promotion refuses bfloat16 beside float32
        dtype = jnp.promote_types(*(a.dtype for a in arrays.values()))
    compute = jnp.dtype(dtype)
    check_floating(dtype=jax.ShapeDtypeStruct((), compute))
    return Static(choice, compute)


# --- The three products ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Static:
    """What is fixed while tracing: who computes, and in which dtypes."""

    choice: Choice
    compute: jnp.dtype
    out: jnp.dtype | None = None  # of a sampled product


def products(run: Callable[..., jax.Array]) -> tuple[Callable[..., jax.Array], ...]:
    """The product, its transposed and its sampled one, closed under differentiation.

    Args:
      run: ``run(static, op, out, a, b, sizes)`` computes one of them, of operands that
        have the dtype they are multiplied in, into the dtype ``out``.
    """

    def multiply(static, op, a, b, sizes):
        a, b = a.astype(static.compute), b.astype(static.compute)
        if op != SAMPLED:
            return run(static, op, static.compute, a, b, sizes)
        # A kernel writes its operands' dtype or float32; anything else is a cast.
        wide = static.out in (static.compute, jnp.float32)
        out = static.out if wide else static.compute
        return run(static, op, out, a, b, sizes).astype(static.out)

    return closed_products(multiply)


def _choose(static, op, out, a, b, sizes):
    return _call((static.choice, op, out), a, b, sizes)


@_dispatch.jit
def _call(how, a, b, sizes):
    """Product of a with weights b, or of rows a with rows b."""
    choice, op, out = how

    def call(a, b, sizes):
        problem = problem_of(op, out, a, b, sizes)
        return _dispatch.call(GROUPED_MATMUL, choice, problem, a, b, sizes)

    return _batched_by_groups(call, sampled=op == SAMPLED)(a, b, sizes)


_product, _, _sampled = products(_choose)


def _batched_by_groups(fn, *, sampled):
    """``fn(a, b, sizes)`` whose batch is computed at once, as more rows or groups.

    Rows are brought into the order of the groups of all members, tails last. Weights
    that all members share keep their number: a group then has the rows of all members.
    """
    batching = custom_vmap(fn)

    @batching.def_vmap
    def _(size, batched, a, b, sizes):
        shared = not (batched[1] or sampled)
        every = lambda array, is_batched: (
            array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
        )
        a, sizes = every(a, batched[0]), every(sizes, batched[2])
        (_, m, _), groups = a.shape, sizes.shape[1]
        row = jnp.arange(m, dtype=jnp.int32)
        find = jax.vmap(lambda ends: jnp.searchsorted(ends, row, side="right"))
        group = find(jnp.cumsum(sizes, 1, dtype=jnp.int32)).astype(jnp.int32)
        if shared:
            sizes = sizes.sum(0, dtype=jnp.int32)
        else:
            b = every(b, batched[1])
            member = jnp.arange(size, dtype=jnp.int32)[:, None]
            group = jnp.where(group < groups, group + member * groups, size * groups)
            sizes = sizes.ravel()
        order = jnp.argsort(group.ravel(), stable=True)
        sort = lambda rows: rows.reshape(-1, rows.shape[-1])[order]
        if sampled:
            w = batching(sort(a), sort(b), sizes)
            return w.reshape(size, groups, *w.shape[1:]), True
        y = batching(sort(a), b if shared else b.reshape(-1, *b.shape[2:]), sizes)
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        return y.reshape(size, m, -1), True

    return batching


_OPS = {
    PRODUCT: "grouped",
    TRANSPOSED: "grouped_transposed",
    SAMPLED: "grouped_sampled",
}


def problem_of(op, out, a, b, sizes):
    """What the implementations are told of a product."""
    k, n = (a.shape[1], b.shape[1]) if op == SAMPLED else b.shape[1:]
    return Problem(
        op=_OPS[op],
        m=a.shape[0],
        k=k,
        n=n,
        groups=sizes.shape[0],
        dtype=a.dtype.name,
        out_dtype=jnp.dtype(out).name,
    )


def _run_xla(problem, chip, interpret, a, b, sizes):
    del chip, interpret
    if problem.op == "grouped_sampled":
        out = jnp.dtype(problem.out_dtype)
        return _grouped_matmul_xla.sampled(a, b, sizes, dtype=out)
    transpose = problem.op == "grouped_transposed"
    return _grouped_matmul_xla.product(a, b, sizes, transpose=transpose)


def _kernels(name):
    """The kernels' file of an implementation and how it picks tiles, loaded if used."""
    if name == "mosaic_tpu":
        from pallas_kernels.grouped_matmul import mosaic_tpu

        return mosaic_tpu, _spec.config_mosaic_tpu
    from pallas_kernels.grouped_matmul import mosaic_gpu

    return mosaic_gpu, _spec.config_mosaic_gpu


def _run_kernel(name, problem, chip, interpret, a, b, sizes):
    kernels, config = _kernels(name)
    how = dict(config=config(problem, chip), interpret=interpret)
    if problem.op == "grouped_sampled":
        out = jnp.dtype(problem.out_dtype)
        return kernels.sampled(a, b, sizes, dtype=out, **how)
    transpose = problem.op == "grouped_transposed"
    return kernels.product(a, b, sizes, transpose=transpose, **how)


def _note(problem):
    return "the multiply-adds of one weight for all rows, whatever the groups"


def _anything(problem, chip):
    """XLA takes every problem."""


GROUPED_MATMUL = {
    "xla": Implementation("xla", None, _anything, _run_xla, note=_note),
    "mosaic_tpu": Implementation(
        "mosaic_tpu",
        "tpu",
        _spec.check_mosaic_tpu,
        functools.partial(_run_kernel, "mosaic_tpu"),
        note=_note,
    ),
    # Hopper only: not offered to a GPU of which nothing is known.
    "mosaic_gpu": Implementation(
        "mosaic_gpu",
        "cuda",
        _spec.check_mosaic_gpu,
        functools.partial(_run_kernel, "mosaic_gpu"),
        needs_chip=True,
        note=_note,
    ),
}
