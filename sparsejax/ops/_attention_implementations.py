"""Who computes attention over listed blocks, and its gradients: XLA, or a kernel."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import _spec
from sparsejax._dispatch import Implementation
from sparsejax.attention import BlockMask
from sparsejax.ops import _attention_xla
from sparsejax.ops._attention_operands import How, Operands

GRADIENTS = "backward_q", "backward_kv"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: what is fixed, and the same for each kernel that it takes."""

    how: How
    kernels: tuple[_spec.Problem, ...]

    def __str__(self):
        return str(self.kernels[0])


def problem_of(how: How, operands: Operands, ops: tuple[str, ...]) -> Problem:
    """What the implementations are told of a call that takes the kernels ``ops``."""
    q, k, v, bias, where, page_table = operands
    mask_b, mask_h, _, capacity = where.kv_idx.shape
    return Problem(
        how,
        tuple(
            _spec.Problem(
                op=op,
                b=q.shape[0],
                h=q.shape[2],
                h_kv=k.shape[2],
                t=how.lengths[0],
                s=how.lengths[1],
                d=q.shape[3],
                dv=v.shape[3],
                block_q=how.block_shape[0],
                block_k=how.block_shape[1],
                capacity=capacity,
                mask_b=mask_b,
                mask_h=mask_h,
                dtype=q.dtype.name,
                rows=len(where.rows),
                cols=len(where.cols),
                scalars=len(where.scalars),
                dense=len(where.dense),
                soft_cap=how.soft_cap is not None,
                bias=bias is not None,
                paged=page_table is not None,
                exact=how.exact and bias is not None and q.dtype.itemsize == 2,
            )
            for op in ops
        ),
    )


# --- XLA ------------------------------------------------------------------------------


def _forward_xla(problem, chip, interpret, operands):
    del chip, interpret
    return _attention_xla.forward(problem.how, operands)


def _gradients_xla(problem, chip, interpret, *arrays):
    del chip, interpret
    return _attention_xla.gradients(problem.how, *arrays)


def _anything(problem, chip):
    """XLA takes every problem."""


def _note(problem):
    """Bounds what is listed: how much of it counts is not known while tracing."""
    nq, nk = problem.how.blocks
    capacity = problem.kernels[0].capacity
    return (
        f"loops over the listed blocks, at most {capacity} of {nk} for each of {nq} "
        f"query blocks, {capacity / nk:.1%} of dense's multiply-adds"
    )


# --- Kernels --------------------------------------------------------------------------


def _check_kernel(name, problem, chip):
    """Raises NotImplementedError where a kernel that it takes does not serve."""
    if not problem.how.lowers:
        raise NotImplementedError(
            f"{name}: block_mask has a from_function, which no kernel can call, needs "
            "an expression without"
        )
    for each in problem.kernels:
        getattr(_spec, f"check_{name}")(each, chip)


def _kernels(name: str) -> Any:
    """The kernels' file of an implementation, loaded if used."""
    if name == "mosaic_tpu":
        from pallas_kernels.block_sparse_attention import mosaic_tpu

        return mosaic_tpu
    from pallas_kernels.block_sparse_attention import mosaic_gpu

    return mosaic_gpu


def _forward_kernel(name, problem, chip, interpret, operands):
    q, k, v, *_, page_table = operands
    heads_first, (queries, keys) = _layout(problem.how, page_table)
    out, lse = _kernels(name).forward(
        heads_first(q, queries),
        heads_first(k, keys),
        heads_first(v, keys),
        *_lists(problem.how, operands.where),
        page_table=page_table,
        **_keywords(name, problem, 0, chip, interpret, operands),
    )
    t = problem.how.lengths[0]
    return out.swapaxes(1, 2)[:, :t], lse.swapaxes(1, 2)[:, :t]


def _gradients_kernel(name, problem, chip, interpret, operands, lse, dout, delta):
    kernels, how = _kernels(name), problem.how
    q, k, v, bias, where, page_table = operands
    heads_first, (queries, keys) = _layout(how, page_table)
    arrays = (
        heads_first(q, queries),
        heads_first(k, keys),
        heads_first(v, keys),
        heads_first(dout, queries),
        heads_first(lse, queries),
        heads_first(delta, queries),
    )
    lists, elements = _lists(how, where)
    keywords = lambda i: _keywords(name, problem, i, chip, interpret, operands)
    dq, dbias = kernels.backward_q(*arrays, lists, elements, **keywords(0)), None
    if bias is not None:
        dq, dbias = dq[0], dq[1].astype(bias.dtype)
    idx, count, full = where[:3]
    mask = BlockMask(idx, count, full, None, how.lengths, how.block_shape)
    transposed = mask.transposed()
    transposed = transposed._replace(q_full=transposed.q_full.astype(jnp.int32))
    dk, dv = kernels.backward_kv(*arrays, transposed, elements, **keywords(1))
    (t, s) = how.lengths
    cut = lambda a, like, size: a.swapaxes(1, 2)[:, :size].astype(like.dtype)
    return cut(dq, q, t), cut(dk, k, s), cut(dv, v, s), dbias


def _layout(how, page_table):
    """A function to [b, heads, length, ...], and the lengths of whole blocks."""

    def heads_first(a, length):
        a = a.swapaxes(1, 2)
        widths = [(0, 0)] * a.ndim
        widths[2] = (0, length - a.shape[2])
        return jnp.pad(a, widths)

    (nq, nk), (bq, bk) = how.blocks, how.block_shape
    return heads_first, (nq * bq, bk if page_table is not None else nk * bk)


def _lists(how, where):
    """What the kernels take of it, of whole blocks."""
    (nq, nk), (bq, bk), (t, s) = how.blocks, how.block_shape, how.lengths
    rows, cols = (0, nq * bq - t), (0, nk * bk - s)
    pad = lambda arrays, *widths: tuple(
        jnp.pad(a, [(0, 0), (0, 0), *widths]) for a in arrays
    )
    elements = _spec.Elements(
        how.predicate,
        pad(where.rows, rows),
        pad(where.cols, cols),
        where.scalars,
        pad(where.dense, rows, cols),
    )
    return (where.kv_idx, where.kv_cnt, where.kv_full.astype(jnp.int32)), elements


def _keywords(name, problem, i, chip, interpret, operands):
    bias = operands.bias
    return dict(
        scale=problem.how.scale,
        soft_cap=problem.how.soft_cap,
        block_bias=None if bias is None else bias.astype(jnp.float32),
        config=getattr(_spec, f"config_{name}")(problem.kernels[i], chip),
        interpret=interpret,
    )


def _implementations(xla, kernel):
    each = lambda fn, name: functools.partial(fn, name)
    return {
        "xla": Implementation("xla", None, _anything, xla, note=_note),
        "mosaic_tpu": Implementation(
            "mosaic_tpu",
            "tpu",
            each(_check_kernel, "mosaic_tpu"),
            each(kernel, "mosaic_tpu"),
            note=_note,
        ),
        # Hopper only: not offered to a GPU of which nothing is known.
        "mosaic_gpu": Implementation(
            "mosaic_gpu",
            "cuda",
            each(_check_kernel, "mosaic_gpu"),
            each(kernel, "mosaic_gpu"),
            needs_chip=True,
            note=_note,
        ),
    }


ATTENTION = _implementations(_forward_xla, _forward_kernel)
ATTENTION_GRADIENTS = _implementations(_gradients_xla, _gradients_kernel)
