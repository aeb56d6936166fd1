"""block_sparse_attention: attention over the blocks that a mask lists."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax import _dispatch
from sparsejax._dispatch import Choice
from sparsejax.attention import BlockMask
from sparsejax.ops import _attention_plain
from sparsejax.ops._attention_arguments import prepared
from sparsejax.ops._attention_batch import in_one_batch, over_explicit_axes
from sparsejax.ops._attention_implementations import (
    ATTENTION,
    ATTENTION_GRADIENTS,
    GRADIENTS,
    problem_of,
)
from sparsejax.ops._attention_operands import How, Operands
from sparsejax.ops._checks import accumulator


def block_sparse_attention(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    block_bias: Shaped[Array, "..."] | None = None,
    page_table: Shaped[Array, "..."] | None = None,
    implementation: Choice = None,
) -> Any:
    """Attention of each query to the keys that a block mask allows.

    ``z[i, j] = scale * query[i] . key[j]``, with a cap c made ``c * tanh(z / c)``, plus
    the bias of its block; ``lse[i] = log(sum over allowed j of exp(z[i, j]))``;
    ``out[i] = sum over allowed j of exp(z[i, j] - lse[i]) value[j]``. Multiply-adds are
    those of the listed blocks, forward and backward, and no array of shape ``[t, s]``
    exists. A query that is allowed no key has out 0, lse -inf and no gradient.

    Args:
      query: ``[b, t, h, d]``; float32, bfloat16, float16 (float64 on CPU).
      key: ``[b, s, h_kv, d]``, of the same dtype. h_kv divides h: neighbouring query
        heads share a key head, which is not repeated.
      value: ``[b, s, h_kv, dv]``.
      block_mask: Of shape (t, s), for b or 1 batch members and heads that divide h.
        Traced contents: other blocks do not recompile, the mask may be made in the same
        jit, and time goes by the blocks listed, not by the lists' capacity.
      scale: Of the products, a number; default ``1 / sqrt(d)``.
      return_lse: Whether to return lse too, as ``merge_attention`` takes it.
      logits_soft_cap: c, a number; default, none.
      block_bias: Added to the logits of each listed block, ``[b|1, h|1, nq,
        capacity]``, by place in the mask's lists. With gradient, which is 0 beyond
        their counts: by it a selector of blocks can be trained.
      page_table: int32 ``[b, nk]``, for a cache of pages that are as long as the mask's
        key blocks: key and value are then ``[pages, bk, h_kv, d]``, and key block j of
        member i is page ``page_table[i, j]``. Entries of unlisted blocks are not read.
      implementation: "xla", "mosaic_tpu" or "mosaic_gpu"; None chooses and always
        works. A named implementation never falls back.

    Returns:
      out ``[b, t, h, dv]``, of the query's dtype; with ``return_lse`` also lse ``[b, t,
      h]``, float32.

    Raises:
      ValueError: Shapes or dtypes do not fit; the implementation's name is unknown.
      NotImplementedError: The named implementation does not serve these shapes, this
        dtype, this mask or this platform.

    Example:
      >>> at = sparsejax.attention
      >>> mask = at.block_mask(at.causal(), 4, 4, block_shape=(2, 2))
      >>> query = key = jnp.zeros((1, 4, 1, 8))  # all logits alike
      >>> value = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
      >>> out = sparsejax.ops.block_sparse_attention(query, key, value, mask)
      >>> print(out.ravel())
      [1.  1.5 2.  2.5]

    References:
      Dao, `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_, 2023, for the loops;
      Dong et al., `Flex Attention <https://arxiv.org/abs/2412.05496>`_, 2024, for lists
      of blocks beside a predicate of elements.

    Note:
      Reverse mode to any order, in query, key, value and block_bias, through out and
      lse. Forward mode raises JAX's error for ``custom_vjp``;
      ``block_sparse_attention_reference`` has it. Under jit over a mesh with explicit
      axes each device computes its batch members and heads; with automatic axes XLA
      cuts the loops, and may do so badly: use ``jax.shard_map``. For a sequence over
      devices there is ``context_parallel_attention``.
    """
    how, operands = prepared(
        query,
        key,
        value,
        block_mask,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        block_bias=block_bias,
        page_table=page_table,
        implementation=implementation,
    )
    out, lse = over_explicit_axes(attend, how, operands)
    return (out, lse) if return_lse else out


def block_sparse_attention_reference(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    logits_soft_cap: float | None = None,
    block_bias: Shaped[Array, "..."] | None = None,
    page_table: Shaped[Array, "..."] | None = None,
) -> Any:
    """The equation of ``block_sparse_attention`` in a few lines: dense and slow.

    Differentiable in both modes.
    """
    how, operands = prepared(
        query,
        key,
        value,
        block_mask,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        block_bias=block_bias,
        page_table=page_table,
        implementation=None,
    )
    (t, s), (bq, bk), wide = how.lengths, how.block_shape, accumulator(query.dtype)
    heads = lambda a: jnp.repeat(a, query.shape[2] // a.shape[2], 2)
    key, value = (heads(_attention_plain.gathered(a, page_table)) for a in (key, value))
    precise = dict(preferred_element_type=wide)
    z = how.scale * jnp.einsum("bthd,bshd->bhts", query, key[:, :s], **precise)
    if logits_soft_cap is not None:
        z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
    if block_bias is not None:
        bias = _by_block(operands, how.blocks).astype(wide)
        z = z + jnp.repeat(jnp.repeat(bias, bq, 2), bk, 3)[:, :, :t, :s]
    mask = block_mask.to_mask()
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = jnp.repeat(mask, query.shape[2] // mask.shape[1], 1)
    p, lse = _attention_plain.softmax_of(z, jnp.broadcast_to(mask, z.shape), 3)
    p = p.astype(value.dtype)
    out = jnp.einsum("bhts,bshd->bthd", p, value[:, :s], **precise)
    out, lse = out.astype(query.dtype), lse.swapaxes(1, 2)
    return (out, lse) if return_lse else out


def _by_block(operands, blocks):
    """The bias [b, h, nq, nk] of slots."""
    bias, where = operands.bias, operands.where
    capacity, (_, nk) = bias.shape[3], blocks
    counted = jnp.arange(capacity, dtype=jnp.int32) < where.kv_cnt[..., None]
    idx = jnp.where(counted, where.kv_idx, nk)
    idx = jnp.repeat(idx, bias.shape[1] // idx.shape[1], 1)
    idx = jnp.broadcast_to(idx, bias.shape)
    put = lambda bias, idx: jnp.zeros(nk, bias.dtype).at[idx].set(bias, mode="drop")
    for _ in range(3):
        put = jax.vmap(put)
    return put(bias, idx)


# --- The product and its derivatives --------------------------------------------------


def attend(how: How, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(out, lse) on one device, or of each under shard_map."""
    q, k, v = operands[:3]
    if 0 in (*q.shape[:3], k.shape[0]):
        out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        return out, jnp.full(q.shape[:3], -jnp.inf, accumulator(q.dtype))
    if 0 in (q.shape[3], v.shape[3]):
        # Of no logits but 0, or for lse alone.
        one = lambda a: a if a.shape[3] else jnp.zeros((*a.shape[:3], 1), a.dtype)
        wide = operands._replace(query=one(q), key=one(k), value=one(v))
        out, lse = attend(how, wide)
        return out[..., : v.shape[3]], lse
    leaves, tree = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(tree, _dispatch.vary_alike(*leaves))
    return _attention(how, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, *operands):
    return _call(how, Operands(*operands))


def _attention_fwd(how, *operands):
    biased = Operands(*operands).bias is not None
    exact, lse = _attention(dataclasses.replace(how, exact=biased), *operands)
    out = exact.astype(operands[0].dtype)
    return (out, lse), (operands, exact, lse)


def _attention_bwd(how, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents
    dout = dout.astype(operands[0].dtype)
    gradients = _gradients(how, *operands, out, lse, dout, dlse)
    return *gradients, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(how, q, k, v, bias, where, page_table, out, lse, dout, dlse):
    """Of q, k, v and bias."""
    wide = accumulator(q.dtype)
    delta = (dout.astype(wide) * out.astype(wide)).sum(-1) - dlse
    operands = Operands(q, k, v, bias, where, page_table)
    return call_gradients(how, operands, lse, dout, delta)


def _gradients_fwd(how, *operands):
    return _gradients(how, *operands), operands


def _gradients_bwd(how, residuals, cotangents):
    """Of out and lse too as functions of the operands, which have all the gradient."""
    *arrays, where, page_table, _, _, dout, dlse = residuals

    def gradients(q, k, v, bias, dout, dlse):
        def plain(q, k, v, bias):
            operands = Operands(q, k, v, bias, where, page_table)
            return _attention_plain.attention(how, operands)

        return jax.vjp(plain, q, k, v, bias)[1]((dout, dlse))

    *ds, ddout, ddlse = jax.vjp(gradients, *arrays, dout, dlse)[1](cotangents)
    return *ds, None, None, None, None, ddout, ddlse


_attention.defvjp(_attention_fwd, _attention_bwd)
_gradients.defvjp(_gradients_fwd, _gradients_bwd)


@_dispatch.jit
def _call(how, operands):
    def call(operands):
        problem = problem_of(how, operands, ("forward",))
        return _dispatch.call(ATTENTION, how.choice, problem, operands)

    return in_one_batch(call)(operands)


@_dispatch.jit
def call_gradients(how, operands, lse, dout, delta):
    """Of query, key, value and bias; delta: the sum of dout out, less dlse."""

    def call(operands, lse, dout, delta):
        problem = problem_of(how, operands, GRADIENTS)
        # Whatever the gradient of an lse of -inf is: NaN, in a loss of log 0.
        delta = jnp.where(lse == -jnp.inf, 0, delta)
        arrays = operands, lse, dout, delta
        return _dispatch.call(ATTENTION_GRADIENTS, how.choice, problem, *arrays)

    return in_one_batch(call)(operands, lse, dout, delta)
