"""Attention between the pairs of positions that a mask allows, and no others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsejax.attention import (
    BlockMask,
    BlockStats,
    Expression,
    block_mask,
    block_stats,
    everything,
    keys_below,
)
from sparsejax.layers._attention_spec import SparseAttentionSpec
from sparsejax.layers._kv_cache import KVCache, append
from sparsejax.ops import block_sparse_attention
from sparsejax.ops._attention_batch import axis_names

Selector = Callable[..., tuple[BlockMask, BlockStats]]
AttentionMask = Expression | BlockMask | Selector


def mask_holds_arrays(mask: AttentionMask | None) -> bool:
    """Whether a mask is data, so that a module must keep it as a variable.

    Example:
      >>> from sparsejax import attention, layers
      >>> causal = attention.causal()
      >>> layers.mask_holds_arrays(causal)
      False
      >>> layers.mask_holds_arrays(attention.block_mask(causal, 256, 256))
      True
    """
    return isinstance(mask, Expression | BlockMask) and bool(jax.tree.leaves(mask))


def apply_sparse_attention(
    spec: SparseAttentionSpec,
    params: dict[str, Array],
    mask: AttentionMask | None,
    x: Float[Array, "b t n"],
    x_kv: Float[Array, "b s _n"] | None = None,
    *,
    positions: Int[Array, "..."] | None = None,
    return_stats: bool = False,
    dense: Expression | None = None,
) -> Any:
    """Computes y = concat_h(softmax(mask(q_h k^T / sqrt(d))) v) W_out.

    Of the t s products only those in blocks that the mask lists are computed: 4 d
    operations for each pair and head, and memory for a block of them at a time.

    Args:
      spec: The layer.
      params: As from ``init_sparse_attention``.
      mask: Which queries may look where: an expression of ``sparsejax.attention`` such
        as ``causal() & sliding_window(512)``; a ``BlockMask`` of (t, s); or a selector,
        which is called ``mask(query, key, block_shape=spec.block_shape)`` on
        ``[b, t, h, d]`` and ``[b, s, h_kv, d]`` and returns a ``BlockMask`` and stats:
        ``functools.partial(attention.moba, budget=8)``. Its arrays may be traced. None:
        everything.
      x: Of the queries, and of keys and values where x_kv is None.
      x_kv: Of keys and values.
      positions: Of x for the rotary positions, int ``[t]`` or ``[b, t]``, such as those
        inside packed documents; None: 0, 1, ... Keys of x_kv have 0, 1, ...
      return_stats: Whether density, recall and work of the mask are returned too.
      dense: What the dense attention allows whose mass the recall is a share of, such
        as ``causal()``; None: everything. A selector has its own.

    Returns:
      y ``[b, t, d_model]``; with ``return_stats`` (y, ``attention.BlockStats``), whose
      recall costs as much as dense attention where it is used. A query that may look
      nowhere has y = out_bias.

    Raises:
      ValueError: x or x_kv is not of ``spec.features``, a mask not of their lengths,
        positions not of x's.
      NotImplementedError: ``implementation`` names one that cannot serve.

    Example:
      >>> from sparsejax import attention, layers
      >>> spec = layers.SparseAttentionSpec(
      ...     features=16, num_heads=4, num_kv_heads=2, block_shape=(8, 8))
      >>> params = layers.init_sparse_attention(jax.random.key(0), spec)
      >>> mask = attention.causal() & attention.sliding_window(8)
      >>> x = jax.random.normal(jax.random.key(1), (2, 32, 16))
      >>> layers.apply_sparse_attention(spec, params, mask, x).shape
      (2, 32, 16)

    References:
      Vaswani et al., "Attention Is All You Need", NeurIPS 2017. Grouped queries:
      Ainslie et al., "GQA", EMNLP 2023. Rotary positions: Su et al., "RoFormer", 2021.

    Note:
      Over a mesh with explicit axes each device computes its sequences and heads, where
      x is cut over the batch and the parameters over heads. A selector, and statistics,
      get all queries and keys on every device.
    """
    mask = _checked(mask)
    _check(spec, "x", x)
    if x_kv is not None:
        _check(spec, "x_kv", x_kv)
    places = _positions(positions, x)
    query = _rotate(spec, _project(spec, params, "query", x), places)
    source, places = (x, places) if x_kv is None else (x_kv, _positions(None, x_kv))
    key = _rotate(spec, _project(spec, params, "key", source), places)
    value = _project(spec, params, "value", source)
    found, stats = _find(spec, mask, query, key)
    y = _join(spec, params, _attend(spec, query, key, value, found))
    if not return_stats:
        return y
    if stats is None:
        dense = everything() if dense is None else dense
        query, key = _together(query, key)
        stats = block_stats(
            query, key, found, dense, overflow=found.overflow, scale=spec.scale
        )
    return y, stats


def decode_sparse_attention(
    spec: SparseAttentionSpec,
    params: dict[str, Array],
    mask: AttentionMask | None,
    x: Float[Array, "b t n"],
    cache: KVCache,
) -> tuple[Float[Array, "b t n"], KVCache]:
    """Computes y of the next t tokens, and the cache with their keys and values.

    The same as ``apply_sparse_attention`` on all tokens, of which the last t are looked
    at. Shapes do not change from step to step, so one compilation serves them all.
    Sequences may have different lengths.

    Args:
      spec: The layer.
      params: As from ``init_sparse_attention``.
      mask: An expression between positions in the sequence; keys that are not there yet
        are left out in any case. A selector, which is handed the position of each
        sequence's first query as ``offset``, and all of the cache as keys. Or a
        ``BlockMask`` of this call's t queries and the cache's ``capacity`` keys. None:
        everything that is there.
      x: The next tokens, one or more.
      cache: As from ``init_kv_cache``, or from the call before.

    Returns:
      y ``[b, t, d_model]`` and the next cache. Tokens beyond the cache's capacity are
      not stored, and seen by no query.

    Raises:
      ValueError: x is not of ``spec.features``, the cache not of its sequences or of
        the layer's heads and blocks, a mask not of (t, capacity).
      NotImplementedError: ``implementation`` names one that cannot serve.

    Example:
      >>> from sparsejax import attention, layers
      >>> spec = layers.SparseAttentionSpec(
      ...     features=8, num_heads=2, block_shape=(4, 4), rotary_base=10_000)
      >>> params = layers.init_sparse_attention(jax.random.key(0), spec)
      >>> mask = attention.causal() & attention.sliding_window(3)
      >>> x = jax.random.normal(jax.random.key(1), (1, 6, 8))
      >>> whole = layers.apply_sparse_attention(spec, params, mask, x)
      >>> step = jax.jit(layers.decode_sparse_attention, static_argnums=(0, 2))
      >>> cache = layers.init_kv_cache(spec, 1, 6)
      >>> for i in range(6):
      ...     y, cache = step(spec, params, mask, x[:, i : i + 1], cache)
      >>> bool(jnp.allclose(y, whole[:, -1:], atol=1e-6)), cache.length.tolist()
      (True, [6])
    """
    mask = _checked(mask)
    _check(spec, "x", x)
    _check_cache(spec, x, cache)
    t, start = x.shape[1], cache.length
    places = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    query = _rotate(spec, _project(spec, params, "query", x), places)
    key = _rotate(spec, _project(spec, params, "key", x), places)
    cache = append(cache, key, _project(spec, params, "value", x))

    # One row of a block of queries is as many rows as there are.
    sides = min(spec.block_shape[0], t), spec.block_shape[1]
    if isinstance(mask, Expression):
        there = mask.shift(queries=start) & keys_below(start + t)
        found = block_mask(there, t, cache.capacity, block_shape=sides)
    elif isinstance(mask, BlockMask):
        found = mask
    else:
        found = _choose(mask, query, cache.contiguous().key, start, sides)
    y = _attend(spec, query, cache.key, cache.value, found, cache.page_table)
    return _join(spec, params, y), cache


def _find(spec, mask, query, key):
    """The mask of these queries and keys; a selector's stats."""
    if isinstance(mask, BlockMask):
        return mask, None
    if isinstance(mask, Expression):
        sizes = query.shape[1], key.shape[1]
        how = dict(block_shape=spec.block_shape, capacity=spec.capacity)
        return block_mask(mask, *sizes, **how), None
    return mask(*_together(query, key), block_shape=spec.block_shape)


def _choose(selector, query, key, start, sides):
    """What a selector says of each sequence, whose queries begin where it ends."""

    def of_one(query, key, start):
        one = query[None], key.astype(query.dtype)[None]
        return selector(*one, block_shape=sides, offset=start)[0]

    found = jax.vmap(of_one)(*_together(query, key, start))
    return jax.tree.map(lambda leaf: leaf[:, 0], found)


def _attend(spec, query, key, value, mask, page_table=None):
    return block_sparse_attention(
        query,
        key.astype(query.dtype),
        value.astype(query.dtype),
        mask,
        scale=spec.scale,
        logits_soft_cap=spec.logits_soft_cap,
        page_table=page_table,
        implementation=spec.implementation,
    )


def _project(spec, params, name, x):
    """``[b, t, d_model]`` to ``[b, t, heads, d]``."""
    kernel = params[name]
    dtype = spec.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    return _affine(spec, params, name, "btn,nhd->bthd", x.astype(dtype))


def _join(spec, params, y):
    """``[b, t, h, d]`` to ``[b, t, d_model]``."""
    return _affine(spec, params, "out", "bthd,hdn->btn", y)


def _affine(spec, params, name, equation, x):
    """The product over all axes of x but batch and length, and a bias.

    Over a mesh whose types say where arrays lie the result is cut over batch and length
    as x is, and over the others as the kernel is: JAX asks where both are cut over what
    is summed, as heads are before ``out``.
    """
    kernel, where, of_bias = params[name].astype(x.dtype), None, None
    if _types_say_where():
        rows = jax.typeof(x).sharding.spec[:2]
        taken = {axis for entry in rows for axis in axis_names(entry)}
        entries = jax.typeof(kernel).sharding.spec[x.ndim - 2 :]
        free = [taken.isdisjoint(axis_names(entry)) for entry in entries]
        of_bias = [e if f else None for e, f in zip(entries, free, strict=True)]
        where = P(*rows, *of_bias)
    y = jnp.einsum(equation, x, kernel, out_sharding=where)
    if not spec.use_bias:
        return y
    bias = params[f"{name}_bias"].astype(x.dtype)
    if of_bias is not None:
        bias = jax.sharding.reshard(bias, P(*of_bias))
    return y + bias


def _together(*arrays):
    """Whole on each device of a mesh whose types say where arrays lie."""
    if not _types_say_where():
        return arrays
    return tuple(jax.sharding.reshard(a, P()) for a in arrays)


def _types_say_where():
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(mesh.explicit_axes)


def _rotate(spec, x, positions):
    """Turns features k and k + d / 2 by position * base^(-2 k / d), in float32."""
    if spec.rotary_base is None:
        return x
    half = x.shape[-1] // 2
    frequency = spec.rotary_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [b|1, t, 1, d / 2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)


def _positions(given, x):
    b, t = x.shape[:2]
    if given is None:
        return jnp.arange(t, dtype=jnp.int32)[None]
    if given.shape not in ((t,), (b, t)):
        raise ValueError(
            f"positions: got shape {given.shape}, needed {(t,)} or {(b, t)}, as x has"
        )
    return given.reshape(-1, t)


def _checked(mask):
    if mask is None:
        return everything()
    if not isinstance(mask, Expression | BlockMask) and not callable(mask):
        raise ValueError(
            f"mask: got {type(mask).__name__}, needed an expression, a BlockMask or a "
            "selector of sparsejax.attention"
        )
    return mask


def _check(spec, name, x):
    if x.ndim != 3 or x.shape[-1] != spec.features:
        raise ValueError(
            f"{name}: got shape {x.shape}, needed [b, t, {spec.features}], features"
        )


def _check_cache(spec, x, cache):
    batch, heads = len(cache.length), cache.key.shape[2:]
    if batch != len(x) or heads != (spec.kv_heads, spec.size):
        raise ValueError(
            f"cache: got one of {batch} sequences and heads {heads}, needed {len(x)} "
            f"sequences and heads {(spec.kv_heads, spec.size)}"
        )
    if cache.page_table is not None and cache.key.shape[1] != spec.block_shape[1]:
        raise ValueError(
            f"cache: got pages of {cache.key.shape[1]} tokens, needed "
            f"{spec.block_shape[1]}, the keys of a block"
        )
