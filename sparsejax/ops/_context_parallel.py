"""context_parallel_attention: sequences over the devices of a mesh axis."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice
from sparsejax.attention import BlockMask
from sparsejax.ops._attention_arguments import check_block_mask, prepared
from sparsejax.ops._attention_operands import Operands
from sparsejax.ops._block_sparse_attention import attend, call_gradients
from sparsejax.ops._checks import accumulator
from sparsejax.ops._exchange import AxisName
from sparsejax.ops._merge_attention import merge_attention


def context_parallel_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    block_mask: BlockMask,
    *,
    axis_name: AxisName,
    exchange: str = "ring",
    scale: float | None = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    block_bias: Shaped[Array, "..."] | None = None,
    implementation: Choice = None,
) -> Any:
    """``block_sparse_attention`` inside ``jax.shard_map``, sequences over a mesh axis.

    Each of the p devices of the axis holds a part of the queries and as large a part of
    the keys, in order. The result is that of ``block_sparse_attention`` on the whole
    sequences. ``exchange`` says how queries meet keys:

    ``"ring"``
        Keys and values go from device to device, p - 1 times; each computes with those
        at hand what its queries' lists have of them, and merges. Their gradients travel
        along. No device ever holds more than its part and one that passes by.
    ``"gather"``
        All keys and values to all devices at once; gradients are reduce-scattered. A
        device holds the whole of them, which for few key heads is little.

    Args:
      query: This device's queries ``[b, t / p, h, d]``.
      key: Its keys ``[b, s / p, h_kv, d]``.
      value: Its values ``[b, s / p, h_kv, dv]``.
      block_mask: Of the whole sequences, (t, s), the same on all devices; its blocks
        divide their parts.
      axis_name: The mesh axis over which the sequences lie, or a tuple of axes.
      exchange: One of the two.
      scale: As for ``block_sparse_attention``, like all that follow.
      return_lse: See scale.
      logits_soft_cap: See scale.
      block_bias: Of the whole mask.
      implementation: See scale.

    Returns:
      out ``[b, t / p, h, dv]``; with ``return_lse`` also lse ``[b, t / p, h]``.

    Raises:
      ValueError: Shapes do not fit; blocks do not divide the parts; the axis is not one
        of an enclosing ``shard_map``; there is no such exchange.
      NotImplementedError: A named implementation does not serve.

    Example:
      >>> at, P = sparsejax.attention, jax.sharding.PartitionSpec
      >>> mesh = jax.make_mesh(
      ...     (2,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> mask = at.block_mask(at.causal(), 4, 4, block_shape=(2, 2))
      >>> def attention(query, key, value):
      ...     return sparsejax.ops.context_parallel_attention(
      ...         query, key, value, mask, axis_name="seq")
      >>> attention = jax.shard_map(
      ...     attention, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
      >>> query = key = jnp.zeros((1, 4, 1, 8))  # all logits alike
      >>> value = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
      >>> print(jax.jit(attention)(query, key, value).ravel())
      [1.  1.5 2.  2.5]

    References:
      Liu et al., `Ring Attention with Blockwise Transformers
      <https://arxiv.org/abs/2310.01889>`_, 2023.

    Note:
      Reverse mode to any order; second derivatives of the ring gather. Under a causal
      mask the last devices have the most to do: nothing is balanced here.
    """
    if exchange not in ("ring", "gather"):
        raise ValueError(f"exchange: got {exchange!r}, needed 'ring' or 'gather'")
    try:
        size = lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name: got {axis_name!r}, needed an axis of the jax.shard_map around"
        ) from error
    check_block_mask(block_mask)
    for name, a, side in (("query", query, 0), ("key", key, 1)):
        block, whole = block_mask.block_shape[side], block_mask.shape[side]
        if a.ndim != 4 or a.shape[1] * size != whole or a.shape[1] % block:
            raise ValueError(
                f"{name}: got shape {a.shape} on each of {size} devices, needed [b, n, "
                f"heads, size] with {size} * n == {whole}, block_mask's, and n a "
                f"multiple of its blocks of {block}"
            )
    # Checked as if the sequences were whole.
    whole = lambda a: jax.ShapeDtypeStruct(
        (a.shape[0], a.shape[1] * size, *a.shape[2:]), a.dtype
    )
    how, operands = prepared(
        whole(query),
        whole(key),
        whole(value) if value.ndim == 4 else value,
        block_mask,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        block_bias=block_bias,
        page_table=None,
        implementation=implementation,
    )
    operands = operands._replace(query=query, key=key, value=value)
    leaves, tree = jax.tree.flatten(operands)
    mine = lax.axis_index(axis_name)
    *leaves, _ = _dispatch.vary_alike(*leaves, mine)
    operands = jax.tree.unflatten(tree, leaves)
    how, operands = _cut_queries(how, operands, mine, size)
    run = _ring if exchange == "ring" else _gathered
    out, lse = run(how, axis_name, *operands)
    return (out, lse) if return_lse else out


# --- Pieces of a mask -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """A predicate of a piece: where it begins stands in the last two scalars."""

    predicate: Callable[..., Any]

    def __call__(self, i, j, rows, cols, scalars, dense):
        *scalars, queries, keys = scalars
        return self.predicate(i + queries, j + keys, rows, cols, tuple(scalars), dense)


def _cut_queries(how, operands, part, parts):
    """One device's queries: the lists name key blocks of the whole sequence still."""
    (t, s), where = how.lengths, operands.where
    begin = part * (t // parts)

    def cut(a):
        size = a.shape[2] // parts
        return lax.dynamic_slice_in_dim(a, part * size, size, 2)

    number = lambda a: jnp.zeros((1, 1), jnp.int32) + a.astype(jnp.int32)
    where = where._replace(
        kv_idx=cut(where.kv_idx),
        kv_cnt=cut(where.kv_cnt),
        kv_full=cut(where.kv_full),
        rows=tuple(map(cut, where.rows)),
        dense=tuple(map(cut, where.dense)),
    )
    if how.predicate is not None:
        scalars = *where.scalars, number(begin), number(0 * begin)
        where = where._replace(scalars=scalars)
        how = dataclasses.replace(how, predicate=_Shifted(how.predicate))
    bias = None if operands.bias is None else cut(operands.bias)
    how = dataclasses.replace(how, lengths=(t // parts, s))
    return how, operands._replace(bias=bias, where=where)


def _cut_keys(how, where, part, parts):
    """What of the lists lies in one part of the keys, and the same for the bias."""
    (t, s), nk = how.lengths, how.blocks[1] // parts
    first, size = part * nk, s // parts
    idx, count, full = where.kv_idx, where.kv_cnt, where.kv_full
    capacity = idx.shape[3]
    slot = jnp.arange(capacity, dtype=jnp.int32)
    # Lists ascend: what lies in the part stands together.
    inside = (idx >= first) & (idx < first + nk) & (slot < count[..., None])
    start = jnp.argmax(inside, 3).astype(jnp.int32)
    kept = start[..., None] + slot[: min(capacity, nk)]
    kept = jnp.minimum(kept, capacity - 1)
    take = lambda a: jnp.take_along_axis(a, kept, 3)
    cut = lambda a, axis: lax.dynamic_slice_in_dim(a, part * size, size, axis)
    where = where._replace(
        kv_idx=jnp.clip(take(idx) - first, 0, nk - 1),
        kv_cnt=inside.sum(3, dtype=jnp.int32),
        kv_full=take(full),
        cols=tuple(cut(a, 2) for a in where.cols),
        dense=tuple(cut(a, 3) for a in where.dense),
    )
    if how.predicate is not None:
        *scalars, keys = where.scalars
        where = where._replace(scalars=(*scalars, keys + part * size))

    def cut_bias(bias):
        if bias is None:
            return None
        kept_ = jnp.repeat(kept, bias.shape[1] // kept.shape[1], 1)
        shape = (*bias.shape[:3], kept.shape[3])
        # Slots beyond the count add 0 to what others get of its gradient.
        return jnp.take_along_axis(bias, jnp.broadcast_to(kept_, shape), 3)

    return dataclasses.replace(how, lengths=(t, size)), where, cut_bias


# --- Gathered -------------------------------------------------------------------------


def _gathered(how, axis_name, q, k, v, bias, where, page_table):
    k, v = (lax.all_gather(a, axis_name, axis=1, tiled=True) for a in (k, v))
    return attend(how, Operands(q, k, v, bias, where, page_table))


# --- In a ring ------------------------------------------------------------------------


def _passed_on(axis_name, arrays):
    """What the device before had."""
    size = lax.axis_size(axis_name)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: lax.ppermute(a, axis_name, ring), arrays)


def _piece(how, axis_name, operands, step):
    """The attention to the keys at hand after ``step`` steps."""
    size = lax.axis_size(axis_name)
    part = (lax.axis_index(axis_name) - step) % size
    how, where, cut_bias = _cut_keys(how, operands.where, part, size)
    return how, operands._replace(where=where), cut_bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(how, axis_name, *operands):
    operands, size = Operands(*operands), lax.axis_size(axis_name)
    wide = accumulator(operands.query.dtype)

    def partial(step, k, v):
        piece, at_hand, cut_bias = _piece(how, axis_name, operands, step)
        bias, piece = cut_bias(operands.bias), dataclasses.replace(piece, exact=True)
        out, lse = attend(piece, at_hand._replace(key=k, value=v, bias=bias))
        return out.astype(wide), lse

    def body(step, carry):
        k, v, out, lse = carry
        k, v = _passed_on(axis_name, (k, v))
        part, its = partial(step, k, v)
        return k, v, *merge_attention([out, part], [lse, its])

    k, v = operands.key, operands.value
    carry = k, v, *partial(0, k, v)
    *_, out, lse = lax.fori_loop(jnp.int32(1), jnp.int32(size), body, carry)
    return out.astype(wide if how.exact else operands.query.dtype), lse


def _ring_fwd(how, axis_name, *operands):
    biased = Operands(*operands).bias is not None
    exact, lse = _ring(dataclasses.replace(how, exact=biased), axis_name, *operands)
    out = exact.astype(operands[0].dtype)
    return (out, lse), (operands, exact, lse)


def _ring_bwd(how, axis_name, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents
    dout = dout.astype(operands[0].dtype)
    gradients = _ring_gradients(how, axis_name, *operands, out, lse, dout, dlse)
    return *gradients, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_gradients(how, axis_name, *arrays):
    """Of q, k, v and bias."""
    *operands, out, lse, dout, dlse = arrays
    operands, wide = Operands(*operands), accumulator(out.dtype)
    delta = (dout.astype(wide) * out.astype(wide)).sum(-1) - dlse
    zeros = lambda a: None if a is None else jnp.zeros(a.shape, wide)

    def body(step, carry):
        (k, v, dk, dv), dq, dbias = carry
        piece, at_hand, cut_bias = _piece(how, axis_name, operands, step)
        bias, uncut = jax.vjp(cut_bias, operands.bias)
        at_hand = at_hand._replace(key=k, value=v, bias=bias)
        parts = call_gradients(piece, at_hand, lse, dout, delta)
        add = lambda a, part: a + part.astype(wide)
        dq, dk, dv = map(add, (dq, dk, dv), parts[:3])
        if bias is not None:
            dbias = add(dbias, uncut(parts[3])[0])
        return _passed_on(axis_name, (k, v, dk, dv)), dq, dbias

    q, k, v, bias = operands[:4]
    size = jnp.int32(lax.axis_size(axis_name))
    carry = (k, v, zeros(k), zeros(v)), zeros(q), zeros(bias)
    leaves, tree = jax.tree.flatten(carry)
    carry = jax.tree.unflatten(tree, _dispatch.vary_alike(*leaves))
    (_, _, dk, dv), dq, dbias = lax.fori_loop(jnp.int32(0), size, body, carry)
    like = lambda da, a: None if a is None else da.astype(a.dtype)
    return tuple(map(like, (dq, dk, dv, dbias), operands[:4]))


def _ring_gradients_fwd(how, axis_name, *arrays):
    return _ring_gradients(how, axis_name, *arrays), arrays


def _ring_gradients_bwd(how, axis_name, residuals, cotangents):
    """Of out and lse too as functions of the operands, which have all the gradient."""
    *arrays, where, page_table, _, _, dout, dlse = residuals

    def gradients(q, k, v, bias, dout, dlse):
        def whole(q, k, v, bias):
            return _gathered(how, axis_name, q, k, v, bias, where, page_table)

        return jax.vjp(whole, q, k, v, bias)[1]((dout, dlse))

    *ds, ddout, ddlse = jax.vjp(gradients, *arrays, dout, dlse)[1](cotangents)
    return *ds, None, None, None, None, ddout, ddlse


_ring.defvjp(_ring_fwd, _ring_bwd)
_ring_gradients.defvjp(_ring_gradients_fwd, _ring_gradients_bwd)
