"""block_sparse_matmul and sampled_matmul: products with a weight stored as blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.block_sparse_matmul import _spec
from pallas_kernels.block_sparse_matmul._spec import Problem
from sparsejax import _dispatch
from sparsejax._dispatch import Choice, Implementation
from sparsejax.layouts import BlockLayout
from sparsejax.layouts._block import check_blocks, check_single, pad_to
from sparsejax.ops import _block_sparse_xla
from sparsejax.ops._checks import accumulator, check_floating, over_explicit_axes
from sparsejax.ops._products import (
    SAMPLED,
    TRANSPOSED,
    batched_by_loop,
    closed_products,
)


def block_sparse_matmul(
    x: Shaped[Array, "... _k"],
    blocks: Shaped[Array, "*_capacity _bk _bn"],
    layout: BlockLayout,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "*batch n"]:
    """Multiplies by a block-sparse matrix.

    ``y[..., j] = sum_i x[..., i] w[i, j]``, where ``w [k, n]`` holds ``blocks`` at the
    places of ``layout`` and zeros elsewhere. Work and memory are proportional to the
    number of stored blocks; no array of shape ``[k, n]`` exists, forward or backward,
    unless the density is so high that a dense product is faster (``explain`` says).

    Args:
      x: Activations ``[..., k]``; float32, bfloat16, float16 (float64 on CPU).
      blocks: Stored blocks ``[capacity, bk, bn]`` in the layout's order.
      layout: Their places. Traced contents: a new topology of equal capacity does not
        recompile.
      dtype: In which x and blocks are multiplied, and that of y; default, their
        promoted dtype. Sums are float32 in any case, and the gradient of float32
        ``blocks`` comes out of those sums unrounded: keep float32 master blocks and
        pass ``dtype=jnp.bfloat16``.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: Shapes or dtypes do not fit; a concrete layout is not valid; the
        implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> layout = sparsejax.layouts.BlockLayout.from_mask(
      ...     jnp.array([[True, False], [True, True]]), (8, 8))
      >>> blocks = jnp.ones((3, 8, 8))
      >>> y = sparsejax.ops.block_sparse_matmul(jnp.ones((4, 16)), blocks, layout)
      >>> print(y.shape, y[0, 0], y[0, 15])
      (4, 16) 16.0 8.0

    References:
      Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022, for the three
      products that close under differentiation.

    Note:
      Reverse mode to any order, in x and blocks. Forward mode raises JAX's error for
      ``custom_vjp``; ``block_sparse_matmul_reference`` has it.
    """
    check_single(layout)
    check_blocks(blocks, layout)
    if x.ndim < 1 or x.shape[-1] != layout.shape[0]:
        raise ValueError(
            f"x: got shape {x.shape}, needed [..., {layout.shape[0]}]: the layout is "
            f"of a {layout.shape} matrix"
        )
    check_floating(x=x, blocks=blocks)
    static = _static(implementation, dtype, x, blocks)

    def local(x, blocks, layout):
        rows = _as_rows(x, layout.grid[0] * layout.block_shape[0])
        y = _product(static, *_prepare(layout, rows, blocks))
        return y[: rows.shape[0], : layout.shape[1]].reshape(
            *x.shape[:-1], layout.shape[1]
        )

    return over_explicit_axes(local, x, blocks, layout, keep_rows=True)


def sampled_matmul(
    x: Shaped[Array, "... _k"],
    y: Shaped[Array, "... _n"],
    layout: BlockLayout,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Choice = None,
) -> Float[Array, "capacity bk bn"]:
    """Computes the blocks of ``x^T y`` that a layout stores, and no others.

    ``blocks[s] = x[..., rows[s]]^T y[..., cols[s]]``, summed over all leading axes,
    where rows[s] and cols[s] stand for the block's whole range. Work is proportional to
    the number of stored blocks. The weight gradient of ``block_sparse_matmul``.

    Args:
      x: ``[..., k]``, in most uses ``[m, k]``.
      y: ``[..., n]``, leading axes as x.
      layout: Which blocks, of a ``[k, n]`` matrix.
      dtype: In which x and y are multiplied, and that of the result; default, their
        promoted dtype. Sums are float32 in any case.
      implementation: As for ``block_sparse_matmul``.

    Returns:
      Blocks ``[capacity, bk, bn]``; zeros in padding slots.

    Raises:
      ValueError: Shapes or dtypes do not fit; a concrete layout is not valid; the
        implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype or this platform.

    Example:
      >>> layout = sparsejax.layouts.BlockLayout.from_mask(
      ...     jnp.array([[True, False], [True, True]]), (8, 8))
      >>> blocks = sparsejax.ops.sampled_matmul(
      ...     jnp.ones((4, 16)), jnp.ones((4, 16)), layout)
      >>> print(blocks.shape, blocks[0, 0, 0])
      (3, 8, 8) 4.0

    Note:
      Reverse mode to any order.
    """
    check_single(layout)
    if x.ndim < 1 or x.shape[-1] != layout.shape[0]:
        raise ValueError(f"x: got shape {x.shape}, needed [..., {layout.shape[0]}]")
    if y.shape != (*x.shape[:-1], layout.shape[1]):
        raise ValueError(
            f"y: got shape {y.shape}, needed {(*x.shape[:-1], layout.shape[1])}: x's "
            "leading axes and the layout's columns"
        )
    check_floating(x=x, y=y)
    static = _static(implementation, dtype, x, y)

    def local(x, y, layout):
        (kb, nb), (bk, bn) = layout.grid, layout.block_shape
        x, y = _as_rows(x, kb * bk), _as_rows(y, nb * bn)
        static_ = dataclasses.replace(static, out=static.compute)
        x, y, layout_ = _prepare(layout, x, y, pad_blocks=False)
        return _sampled(static_, x, y, layout_)[: layout.capacity]

    return over_explicit_axes(local, x, y, layout, keep_rows=False)


def block_sparse_matmul_reference(
    x: Float[Array, "*batch k"],
    blocks: Float[Array, "capacity bk bn"],
    layout: BlockLayout,
) -> Float[Array, "*batch n"]:
    """The equation of ``block_sparse_matmul`` in a few lines; slow.

    Differentiable in both modes. ``y[..., c] = sum over s with cols[s] = c of
    x[..., rows[s]] blocks[s]``.
    """
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    dtype = jnp.promote_types(x.dtype, blocks.dtype)
    wide = accumulator(dtype)
    tiles = pad_to(x.astype(wide), kb * bk).reshape(*x.shape[:-1], kb, bk)
    terms = jnp.einsum(
        "...sk,skn->...sn",
        tiles.at[..., layout.rows, :].get(mode="fill", fill_value=0),
        blocks.astype(wide),
    )
    y = jnp.zeros((*x.shape[:-1], nb, bn), terms.dtype)
    y = y.at[..., layout.cols, :].add(terms, mode="drop")
    return y.reshape(*x.shape[:-1], nb * bn)[..., : layout.shape[1]].astype(dtype)


def sampled_matmul_reference(
    x: Float[Array, "*batch k"], y: Float[Array, "*batch n"], layout: BlockLayout
) -> Float[Array, "capacity bk bn"]:
    """The equation of ``sampled_matmul`` in a few lines; slow.

    Differentiable in both modes. ``blocks[s] = x[:, rows[s]]^T y[:, cols[s]]``.
    """
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = accumulator(dtype)
    x_tiles = _as_rows(x.astype(wide), kb * bk).reshape(-1, kb, bk)
    y_tiles = _as_rows(y.astype(wide), nb * bn).reshape(-1, nb, bn)
    return jnp.einsum(
        "msk,msn->skn",
        x_tiles.at[:, layout.rows].get(mode="fill", fill_value=0),
        y_tiles.at[:, layout.cols].get(mode="fill", fill_value=0),
    ).astype(dtype)


# --- The three products ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed while tracing: who computes, and in which dtypes."""

    choice: Choice
    compute: jnp.dtype
    out: jnp.dtype | None = None  # of a sampled product


def _multiply(static, op, a, b, layout):
    a, b = a.astype(static.compute), b.astype(static.compute)
    rows = jnp.minimum(layout.rows, layout.grid[0] - 1)
    cols = jnp.minimum(layout.cols, layout.grid[1] - 1)
    if op == SAMPLED:
        # A kernel writes its operands' dtype or float32; anything else is a cast.
        wide = static.out in (static.compute, jnp.float32)
        out = static.out if wide else static.compute
        blocks = _sdd((static.choice, out), layout, a, b, rows, cols, layout.count)
        return blocks.astype(static.out)
    if op == TRANSPOSED:
        order = layout.transpose_order()
        ptr = layout.transpose().column_pointers()
        how = (static.choice, "dsd_transposed")
        return _dsd(how, layout, a, b, order, cols[order], ptr)
    ptr = layout.column_pointers()
    return _dsd((static.choice, "dsd"), layout, a, b, None, rows, ptr)


_product, _, _sampled = closed_products(_multiply)


@_dispatch.jit
def _dsd(static, layout, x, blocks, order, source, ptr):
    choice, op = static

    def dsd(x, blocks, order, source, ptr):
        problem = _problem(op, layout, x, x.dtype)
        return _dispatch.call(DSD, choice, problem, x, blocks, order, source, ptr)

    return batched_by_loop(dsd, more_rows=True)(x, blocks, order, source, ptr)


@_dispatch.jit
def _sdd(static, layout, x, dy, rows, cols, count):
    choice, out = static

    def sdd(x, dy, rows, cols, count):
        problem = _problem("sdd", layout, x, out)
        return _dispatch.call(SDD, choice, problem, x, dy, rows, cols, count)

    return batched_by_loop(sdd, more_rows=False)(x, dy, rows, cols, count)


def _problem(op, layout, x, out):
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    return Problem(
        op=op,
        m=x.shape[0],
        k=kb * bk,
        n=nb * bn,
        block_shape=layout.block_shape,
        slots=layout.capacity,
        dtype=x.dtype.name,
        out_dtype=jnp.dtype(out).name,
    )


def _dense_is_faster(problem):
    return _block_sparse_xla.prefers_dense(
        problem.m,
        problem.k,
        problem.n,
        problem.block_shape,
        problem.slots,
        jnp.dtype(problem.dtype),
    )


def _run_dsd_xla(problem, chip, interpret, x, blocks, order, source, ptr):
    del chip, interpret
    dense = _dense_is_faster(problem)
    dsd = _block_sparse_xla.dsd_dense if dense else _block_sparse_xla.dsd
    transpose = problem.op == "dsd_transposed"
    return dsd(x, blocks, order, source, ptr, transpose=transpose)


def _run_sdd_xla(problem, chip, interpret, x, dy, rows, cols, count):
    del chip, interpret
    dense = _dense_is_faster(problem)
    sdd = _block_sparse_xla.sdd_dense if dense else _block_sparse_xla.sdd
    out = jnp.dtype(problem.out_dtype)
    block_shape = problem.block_shape
    return sdd(x, dy, rows, cols, count, block_shape=block_shape, dtype=out)


def _kernels(name):
    """The kernels' file of an implementation and how it picks tiles, loaded if used."""
    if name == "mosaic_tpu":
        from pallas_kernels.block_sparse_matmul import mosaic_tpu

        return mosaic_tpu, _spec.config_mosaic_tpu
    from pallas_kernels.block_sparse_matmul import mosaic_gpu

    return mosaic_gpu, _spec.config_mosaic_gpu


def _run_dsd_kernel(name, problem, chip, interpret, *arrays):
    kernels, config = _kernels(name)
    return kernels.dsd(
        *arrays,
        transpose=problem.op == "dsd_transposed",
        config=config(problem, chip),
        interpret=interpret,
    )


def _run_sdd_kernel(name, problem, chip, interpret, *arrays):
    kernels, config = _kernels(name)
    return kernels.sdd(
        *arrays,
        block_shape=problem.block_shape,
        dtype=jnp.dtype(problem.out_dtype),
        config=config(problem, chip),
        interpret=interpret,
    )


def _note_xla(problem):
    kb, nb = problem.k // problem.block_shape[0], problem.n // problem.block_shape[1]
    share = f"{problem.slots / max(kb * nb, 1):.1%} of dense's multiply-adds"
    if _dense_is_faster(problem):
        return f"densify and multiply, faster than a loop over {share}"
    return f"loop over the blocks, {share}; faster than dense by the CPU's static rule"


def _anything(problem, chip):
    """XLA takes every problem."""


def _implementations(run_xla, run_kernel):
    tpu = functools.partial(run_kernel, "mosaic_tpu")
    gpu = functools.partial(run_kernel, "mosaic_gpu")
    return {
        "xla": Implementation("xla", None, _anything, run_xla, note=_note_xla),
        "mosaic_tpu": Implementation("mosaic_tpu", "tpu", _spec.check_mosaic_tpu, tpu),
        # Hopper only: not offered to a GPU of which nothing is known.
        "mosaic_gpu": Implementation(
            "mosaic_gpu", "cuda", _spec.check_mosaic_gpu, gpu, needs_chip=True
        ),
    }


DSD = _implementations(_run_dsd_xla, _run_dsd_kernel)
SDD = _implementations(_run_sdd_xla, _run_sdd_kernel)


# --- Operands -------------------------------------------------------------------------


def _static(choice, dtype, a, b):
    compute = jnp.promote_types(a.dtype, b.dtype) if dtype is None else jnp.dtype(dtype)
    check_floating(dtype=jax.ShapeDtypeStruct((), compute))
    return _Static(choice, compute)


def _as_rows(x, width):
    """[..., k] -> [m, width], zeros on the right."""
    return pad_to(x.reshape(-1, x.shape[-1]), width)


def _prepare(layout, a, b, pad_blocks=True):
    """Operands that a kernel takes: one slot and one row at least, varying alike.

    TPU and GPU have no empty arrays; a row of zeros and a slot of padding add nothing.
    """
    if layout.capacity == 0:
        (kb, nb) = layout.grid
        one = lambda size: jnp.full((1,), size, jnp.int32)
        layout = dataclasses.replace(layout, rows=one(kb), cols=one(nb))
        b = jnp.zeros(layout.blocks_shape, b.dtype) if pad_blocks else b
    if a.shape[0] == 0:
        a = jnp.zeros((1, a.shape[1]), a.dtype)
        b = b if pad_blocks else jnp.zeros((1, b.shape[1]), b.dtype)
    a, b, rows, cols = _dispatch.vary_alike(a, b, layout.rows, layout.cols)
    return a, b, dataclasses.replace(layout, rows=rows, cols=cols)
