"""What attention operators are given: checked, and made the operands of loops."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.attention import BlockMask
from sparsejax.ops._attention_operands import How, Operands, Where
from sparsejax.ops._checks import check_floating


def check_heads(query, key, value) -> None:
    """Raises ValueError unless these are heads that fit each other, of one dtype."""
    check_floating(query=query, key=key, value=value)
    for name, a in (("query", query), ("key", key), ("value", value)):
        if a.ndim != 4:
            raise ValueError(
                f"{name}: got shape {a.shape}, needed [batch, length, heads, size]"
            )
        if a.dtype != query.dtype:
            raise ValueError(
                f"{name}: got dtype {a.dtype}, needed {query.dtype}, that of query"
            )
    h, h_kv = query.shape[2], key.shape[2]
    if h_kv < 1 or h % h_kv:
        raise ValueError(
            f"key: got {h_kv} heads, needed a number that divides query's {h}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {value.shape}, needed {key.shape[:3]} before its last "
            "axis, as key has"
        )


def check_block_mask(block_mask) -> None:
    """Raises ValueError unless it is a ``BlockMask``."""
    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            f"block_mask: got {type(block_mask).__name__}, needed a BlockMask; "
            "sparsejax.attention.block_mask makes one of an expression"
        )


def prepared(
    query,
    key,
    value,
    block_mask,
    *,
    scale,
    logits_soft_cap,
    block_bias,
    page_table,
    implementation,
) -> tuple[How, Operands]:
    """Checks what the user gave."""
    check_heads(query, key, value)
    check_block_mask(block_mask)
    (b, t, h, d), h_kv = query.shape, key.shape[2]
    mask_t, s = block_mask.shape
    if page_table is None:
        needed = (b, s, h_kv, d)
        what = f"{needed}, by query {query.shape} and block_mask of {block_mask.shape}"
    else:
        needed = (key.shape[0], block_mask.block_shape[1], h_kv, d)
        what = f"{needed}: with page_table, pages of a key block each"
    if mask_t != t:
        raise ValueError(f"block_mask: got shape {block_mask.shape}, needed ({t}, s)")
    if key.shape != needed:
        raise ValueError(f"key: got shape {key.shape}, needed {what}")
    nq, nk = block_mask.grid
    _check_lists(block_mask, b, h)
    if block_bias is not None:
        check_floating(block_bias=block_bias)
        shape = (b, h, nq, block_mask.capacity)
        ours = block_bias.shape
        fits = len(ours) == 4 and ours[2:] == shape[2:]
        if not fits or ours[0] not in (1, b) or ours[1] not in (1, h):
            raise ValueError(
                f"block_bias: got shape {ours}, needed [{b} or 1, {h} or 1, {nq}, "
                f"{block_mask.capacity}]"
            )
        block_bias = jnp.broadcast_to(block_bias, shape)
    if page_table is not None:
        page_table = _page_table(page_table, (b, nk), key.shape[0])
    if scale is None:
        scale = 1 / math.sqrt(max(d, 1))
    soft_cap = logits_soft_cap
    if soft_cap is not None and not _number("logits_soft_cap", soft_cap) > 0:
        raise ValueError(f"logits_soft_cap: got {soft_cap}, needed a positive number")
    where, predicate = _lowered(block_mask)
    how = How(
        choice=implementation,
        scale=_number("scale", scale),
        soft_cap=None if soft_cap is None else _number("logits_soft_cap", soft_cap),
        predicate=predicate,
        lowers=block_mask.expr is None or block_mask.expr.lowers,
        lengths=(t, s),
        block_shape=block_mask.block_shape,
    )
    return how, Operands(query, key, value, block_bias, where, page_table)


def _number(name, value):
    """A static number: kernels have it in their code."""
    is_array = isinstance(value, jax.core.Tracer)
    if is_array or not isinstance(value, numbers.Real | np.ndarray | jax.Array):
        raise ValueError(
            f"{name}: got {value}, needed a number that is not traced; multiply the "
            "query instead"
        )
    single = not isinstance(value, np.ndarray | jax.Array) or not value.ndim
    number = float(value) if single else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {value}, needed one finite number")
    return number


def _check_lists(block_mask, b, h):
    members, heads = block_mask.kv_cnt.shape[:2]
    if block_mask.kv_cnt.ndim != 3:
        raise ValueError(
            f"block_mask: got counts of shape {block_mask.kv_cnt.shape}, needed [b or "
            "1, heads, nq]: under jax.vmap or jax.lax.scan, one of a stack"
        )
    if members not in (1, b):
        raise ValueError(f"block_mask: got batch {members}, needed {b}, query's, or 1")
    if h % heads:
        raise ValueError(
            f"block_mask: got {heads} heads, needed a number that divides query's {h}"
        )


def _page_table(page_table, shape, pages):
    if not jnp.issubdtype(page_table.dtype, jnp.integer) or page_table.shape != shape:
        raise ValueError(
            f"page_table: got {page_table.dtype} {page_table.shape}, needed integers "
            f"{shape}: a page for each key block of each member"
        )
    # A page that does not exist stands for an unlisted block, which is not read.
    return jnp.clip(page_table, 0, max(pages - 1, 0)).astype(jnp.int32)


def _lowered(block_mask):
    """The mask's arrays, and its predicate."""
    lists = block_mask.kv_idx, block_mask.kv_cnt, block_mask.kv_full
    if block_mask.expr is None:
        return Where(*lists), None
    predicate, *arrays = block_mask.expr.lower(*block_mask.shape)
    return Where(*lists, *arrays), predicate
