"""Summaries of a cache's pages, kept as it grows: extremes and means of their keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from sparsejax.attention._budget import check_count
from sparsejax.attention._heads import pool_blocks


class PageSummary(NamedTuple):
    """What selectors need of the keys of each page, in the order of the sequence.

    A page that holds nothing has extremes of +inf and -inf, and no selector that takes
    a summary chooses it.

    Attributes:
      low: float32 ``[b, h_kv, pages, d]``, the smallest entries.
      high: float32, the same shape, the largest.
      total: float32, the same shape, the sums.
      count: int32 ``[b, pages]``, how many keys there are.
    """

    low: Float[Array, "..."]
    high: Float[Array, "..."]
    total: Float[Array, "..."]
    count: Int[Array, "..."]

    @property
    def mean(self) -> Float[Array, "b g n d"]:
        """Means of the keys, 0 of an empty page."""
        count = jnp.maximum(self.count, 1).astype(jnp.float32)
        return self.total / count[:, None, :, None]


def summarize_pages(
    key: Shaped[Array, "..."], size: int, *, length: ArrayLike | None = None
) -> PageSummary:
    """Summarizes the keys that there are; of none, the start of `update_pages`.

    Args:
      key: ``[b, s, h_kv, d]``, a cache in the order of the sequence; computed in
        float32.
      size: Keys per page; the last may be short.
      length: How many keys there are, int or int32 ``[]`` or ``[b]``, which may be
        traced; None: s. What lies beyond is not looked at.

    Returns:
      A ``PageSummary`` of ``ceil(s / size)`` pages.

    Raises:
      ValueError: ``key`` has not four axes, or ``size`` is below 1.

    Example:
      >>> cache = jnp.arange(6.0).reshape(1, 6, 1, 1)
      >>> pages = sparsejax.attention.summarize_pages(cache, 2, length=3)
      >>> pages.low.ravel(), pages.high.ravel(), pages.count
      (Array([ 0.,  2., inf], dtype=float32), Array([  1.,   2., -inf], dtype=float32),
       Array([[2, 1, 0]], dtype=int32))

    References:
      Tang et al., `Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference
      <https://arxiv.org/abs/2406.10774>`_, 2024.
    """
    check_count("size", size)
    _check_keys(key)
    b, s = key.shape[:2]
    length = jnp.asarray(s if length is None else length, jnp.int32).reshape(-1, 1)
    n, there = -(-s // size), jnp.arange(s, dtype=jnp.int32) < length
    only = lambda rest: jnp.where(there[..., None, None], key.astype(jnp.float32), rest)
    first = jnp.arange(n, dtype=jnp.int32) * size
    count = jnp.clip(length - first, 0, jnp.minimum(s - first, size))
    return PageSummary(
        pool_blocks(only(jnp.inf), size, "min"),
        pool_blocks(only(-jnp.inf), size, "max"),
        pool_blocks(only(0.0), size, "sum"),
        jnp.broadcast_to(count, (b, n)),
    )


def update_pages(
    pages: PageSummary, key: Shaped[Array, "..."], start: ArrayLike, *, size: int
) -> PageSummary:
    """The summary after more keys: as if all had been summarized at once.

    Costs t d per head, however long the sequence is. Pure, as the cache is: where a
    step is taken back, so is its summary.

    Args:
      pages: From `summarize_pages`, or from the call before.
      key: The next keys, ``[b, t, h_kv, d]``.
      start: Position of the first of them, int or int32 ``[]`` or ``[b]``, which may be
        traced: how many keys there were.
      size: Keys per page.

    Returns:
      The next summary. Keys beyond the last page are not looked at.

    Raises:
      ValueError: ``key`` does not fit the summary, or ``size`` is below 1.

    Example:
      >>> at = sparsejax.attention
      >>> keys = jnp.array([3.0, 1.0, 2.0, 5.0]).reshape(1, 4, 1, 1)
      >>> pages = at.summarize_pages(keys, 2, length=0)
      >>> step = jax.jit(lambda pages, key, n: at.update_pages(pages, key, n, size=2))
      >>> for n in range(3):
      ...     pages = step(pages, keys[:, n : n + 1], n)
      >>> pages.high.ravel(), pages.count
      (Array([3., 2.], dtype=float32), Array([[2, 1]], dtype=int32))
    """
    check_count("size", size)
    _check_keys(key)
    b, t, g, d = key.shape
    if pages.low.shape[:2] != (b, g) or pages.low.shape[3] != d:
        raise ValueError(
            f"key: got shape {key.shape} beside pages {pages.low.shape}, needed the "
            "same batch, heads and head_dim"
        )
    place = jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.arange(
        t, dtype=jnp.int32
    )
    index = jnp.broadcast_to(place // size, (b, t))
    rows, key = jnp.arange(b)[:, None], key.astype(jnp.float32)
    return PageSummary(
        pages.low.at[rows, :, index].min(key, mode="drop"),
        pages.high.at[rows, :, index].max(key, mode="drop"),
        pages.total.at[rows, :, index].add(key, mode="drop"),
        pages.count.at[rows, index].add(1, mode="drop"),
    )


def check_pages(
    pages: PageSummary, key: Shaped[Array, "b s g d"], block_k: int
) -> None:
    """Raises ValueError unless the summary is one of these keys' pages."""
    b, s, g, d = key.shape
    needed = (b, g, -(-s // block_k), d)
    if pages.low.shape != needed:
        raise ValueError(
            f"pages: got shape {pages.low.shape}, needed {needed}: pages of {block_k} "
            f"keys for {s}"
        )


def _check_keys(key):
    if key.ndim != 4:
        raise ValueError(f"key: got shape {key.shape}, needed [b, s, h_kv, d]")
