"""Attention over listed blocks of plain operations, differentiable to any order.

One query block after the other, with all slots of its list gathered; padding is
computed and left out. What the operator's second derivatives are derivatives of.
"""

import jax
import jax.numpy as jnp

from sparsejax.ops._attention_operands import How, Operands
from sparsejax.ops._checks import accumulator


def attention(how: How, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """(out [b, t, h, dv], lse [b, t, h])."""
    q, k, v, bias, where, page_table = operands
    (b, t, h, _), (_, nk) = q.shape, how.blocks
    (bq, bk), (_, s) = how.block_shape, how.lengths
    nq, wide = how.blocks[0], accumulator(q.dtype)

    of_heads = lambda a: jnp.broadcast_to(
        jnp.repeat(a, h // a.shape[1], 1), (b, h, *a.shape[2:])
    )
    blocks = lambda a: _tiles(a, nk, bk, page_table).astype(wide)
    k, v = (of_heads(blocks(a).transpose(0, 3, 1, 2, 4)) for a in (k, v))
    q = _pad(q.astype(wide), 1, nq * bq).transpose(0, 2, 1, 3)  # [b, h, t, d]
    tile = lambda a, size: of_heads(_pad(a, 2, size))
    rows = [tile(a, nq * bq) for a in where.rows]
    cols = [tile(a, nk * bk).reshape(b, h, nk, bk) for a in where.cols]
    scalars = [of_heads(a)[:, :, None, None, None] for a in where.scalars]
    dense = [_pad(tile(a, nq * bq), 3, nk * bk) for a in where.dense]
    dense = [a.reshape(b, h, nq * bq, nk, bk) for a in dense]
    lists = [of_heads(a) for a in where[:3]]
    take = jax.vmap(jax.vmap(lambda blocks, of: blocks[of]))

    @jax.checkpoint
    def block(i):
        cut = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, i * bq, bq, axis)
        at = lambda a: jax.lax.dynamic_index_in_dim(a, i, 2, keepdims=False)
        idx, count, full = map(at, lists)
        z = how.scale * jnp.einsum("bhqd,bhckd->bhqck", cut(q, 2), take(k, idx))
        if how.soft_cap is not None:
            z = how.soft_cap * jnp.tanh(z / how.soft_cap)
        if bias is not None:
            z = z + at(bias).astype(wide)[:, :, None, :, None]
        keys = (idx[..., None] * bk + jnp.arange(bk, dtype=idx.dtype))[:, :, None]
        slots = jnp.arange(idx.shape[2], dtype=count.dtype)
        allowed = (slots < count[..., None])[:, :, None, :, None] & (keys < s)
        if how.predicate is not None:
            queries = i * bq + jnp.arange(bq, dtype=idx.dtype)
            asked = how.predicate(
                queries[:, None, None],
                keys,
                tuple(cut(a, 2)[..., None, None] for a in rows),
                tuple(take(a, idx)[:, :, None] for a in cols),
                tuple(scalars),
                tuple(
                    take(cut(a, 2).swapaxes(2, 3), idx).swapaxes(2, 3) for a in dense
                ),
            )
            allowed = allowed & (full[:, :, None, :, None] | asked)
        out, lse = softmax_of(z, jnp.broadcast_to(allowed, z.shape), (3, 4))
        return jnp.einsum("bhqck,bhckd->bhqd", out, take(v, idx)), lse

    out, lse = jax.lax.map(block, jnp.arange(nq, dtype=jnp.int32))
    whole = lambda a: jnp.moveaxis(a, 0, 2).reshape(b, h, nq * bq, *a.shape[4:])
    out, lse = whole(out).swapaxes(1, 2), whole(lse).swapaxes(1, 2)
    return out[:, :t].astype(operands.query.dtype), lse[:, :t]


def softmax_of(z, allowed, axes):
    """Softmax over the allowed, and log of its sum; 0 and -inf where there is none."""
    top = jnp.max(z, axes, keepdims=True, where=allowed, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    p = jnp.where(allowed, jnp.exp(jnp.where(allowed, z - top, 0)), 0)
    total = p.sum(axes, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
    return p / total, lse.squeeze(axes)


def gathered(a, page_table):
    """The keys or values [b, s, h_kv, d] that lie in pages."""
    if page_table is None:
        return a
    b, nk = page_table.shape
    return a[page_table].reshape(b, nk * a.shape[1], *a.shape[2:])


def _tiles(a, nk, bk, page_table):
    """[b, nk, bk, h_kv, d] of keys or values."""
    a = _pad(gathered(a, page_table), 1, nk * bk)
    return a.reshape(a.shape[0], nk, bk, *a.shape[2:])


def _pad(a, axis, size):
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths)
