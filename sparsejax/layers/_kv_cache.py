"""Keys and values of the past, contiguous or in pages; state that is handed on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsejax.layers._attention_spec import SparseAttentionSpec

# Not annotated with shapes: a pytree's leaves may be anything while JAX rebuilds it.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys, turned by their rotary positions, and values of what was decoded so far.

    Attributes:
      key: ``[b, s, h_kv, d]``, or in pages ``[pages, bk, h_kv, d]``.
      value: Likewise.
      length: Tokens of each sequence so far, int32 ``[b]``. Above the capacity it
        counts tokens that were not stored.
      page_table: int32 ``[b, s / bk]``: positions j bk to (j + 1) bk of sequence i lie
        in page ``page_table[i, j]``. Sequences may share pages that no one writes to;
        a number past the last page stands for a page that is not there. None: the cache
        is contiguous.
    """

    key: Any
    value: Any
    length: Any
    page_table: Any = None

    @property
    def capacity(self) -> int:
        """Tokens of a sequence for which there is room."""
        if self.page_table is None:
            return self.key.shape[1]
        return self.page_table.shape[1] * self.key.shape[1]

    def contiguous(self) -> "KVCache":
        """The same without pages, a copy."""
        if self.page_table is None:
            return self

        def laid_out(pages):
            found = jnp.take(pages, self.page_table, axis=0, mode="clip")
            return found.reshape(len(found), -1, *pages.shape[2:])

        key, value = laid_out(self.key), laid_out(self.value)
        return KVCache(key, value, self.length)


def init_kv_cache(
    spec: SparseAttentionSpec,
    batch: int,
    capacity: int,
    *,
    page_table: Int[Array, "b n"] | None = None,
    pages: int | None = None,
    dtype: Any = None,
) -> KVCache:
    """Makes an empty cache.

    Args:
      spec: The layer, whose key blocks the pages are.
      batch: b, sequences.
      capacity: Tokens of each; of a paged cache filled up to whole pages.
      page_table: Where each sequence's pages are, int32 ``[b, ceil(capacity / bk)]``.
        None: contiguous.
      pages: How many there are; None: ``page_table.size``.
      dtype: In which keys and values are kept; None: in which the layer computes, or
        keeps its parameters. Another one is cast as a whole at every step.

    Returns:
      A ``KVCache`` of zeros.

    Raises:
      ValueError: The page table has another shape, or ``pages`` comes without one;
        there is room for no token.

    Example:
      >>> from sparsejax import attention, layers
      >>> spec = layers.SparseAttentionSpec(
      ...     features=8, num_heads=2, block_shape=(4, 4))
      >>> pages = jnp.array([[0, 2], [3, 1]], jnp.int32)
      >>> cache = layers.init_kv_cache(spec, 2, 8, page_table=pages)
      >>> cache.key.shape, cache.capacity
      ((4, 4, 2, 4), 8)
    """
    if batch < 0 or capacity < 1:
        raise ValueError(
            f"batch, capacity: got {batch} and {capacity}, needed 0 and 1 at least"
        )
    side = spec.block_shape[1]
    lead = batch, capacity
    if page_table is not None:
        needed = batch, -(-capacity // side)
        if page_table.shape != needed:
            raise ValueError(
                f"page_table: got shape {page_table.shape}, needed {needed}: pages of "
                f"{side} tokens for {capacity} tokens of {batch} sequences"
            )
        lead = page_table.size if pages is None else pages, side
    elif pages is not None:
        raise ValueError(f"pages: got {pages}, needed a page_table beside it")
    dtype = dtype or spec.dtype or spec.param_dtype
    key, value = jnp.zeros((2, *lead, spec.kv_heads, spec.size), dtype)
    return KVCache(key, value, jnp.zeros(batch, jnp.int32), page_table)


def append(cache: KVCache, key: Array, value: Array) -> KVCache:
    """Writes more keys and values ``[b, t, h_kv, d]``, of which some may not fit."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.explicit_axes:
        return _appended(cache, key, value)
    # The cache stays where it lies; how the new ones get there is XLA's.
    stay = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, cache)
    put: Any = jax.sharding.auto_axes(_appended, out_sharding=stay)
    return put(cache, key, value)


def _appended(cache, key, value):
    b, t = key.shape[:2]
    at = cache.length[:, None] + jnp.arange(t, dtype=jnp.int32)
    if cache.page_table is None:
        first, second = jnp.arange(b)[:, None], at
    else:
        side = cache.key.shape[1]
        first = jnp.take_along_axis(
            cache.page_table, at // side, axis=1, mode="fill", fill_value=len(cache.key)
        )
        second = at % side
    put = lambda old, new: old.at[first, second].set(new.astype(old.dtype), mode="drop")
    return dataclasses.replace(
        cache,
        key=put(cache.key, key),
        value=put(cache.value, value),
        length=cache.length + t,
    )
