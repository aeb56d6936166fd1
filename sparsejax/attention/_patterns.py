"""More mask expressions: strides, blocks, prefixes, BigBird's random blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.attention import _predicates as pred
from sparsejax.attention._expressions import (
    STATIC,
    Expression,
    Window,
    checked_number,
    expression,
)
from sparsejax.attention._lowering import Number, along, host, pick, space, value


@expression
class _Below(Expression):
    """Queries, or keys, of a position below a number."""

    axis: str = dataclasses.field(metadata=STATIC)
    count: Number

    def _lower(self, at):
        shift = at.queries if self.axis == "i" else at.keys
        bound = at.number(value(self.count) - shift, shift, self.count)
        return pred.Less(self.axis, bound)


@expression
class _Multiples(Expression):
    """i - j = k * stride, for any k or those of abs(k) < window."""

    stride: Number
    window: Number | None

    def _lower(self, at):
        stride = along(self.stride)
        row = at.row(at.i % stride, self.stride)
        col = at.col(at.j % stride, self.stride)
        condition = pred.Equal(row, col)
        if self.window is not None:
            reach = value(self.stride) * value(self.window)
            offset = at.keys - at.queries
            parameters = at.keys, at.queries, self.stride, self.window
            low = pred.Less(at.number(offset - reach, *parameters), "i-j")
            high = pred.Less("i-j", at.number(offset + reach, *parameters))
            condition = pred.Both(condition, pred.Both(low, high))
        window = () if self.window is None else (self.window,)
        return at.given(condition, self._bounds(at), self.stride, *window)

    def _bounds(self, at):
        """Which multiples lie among the differences of a block, which are contiguous.

        The remainders' own intervals would not do: a block holds all of them as soon as
        it is as wide as the stride.
        """
        stride, offset = _over_blocks(self.stride), _over_blocks(at.keys - at.queries)
        window = None if self.window is None else _over_blocks(self.window)

        def bounds(blocks):
            low = blocks.i[0] - blocks.j[1] - offset
            high = blocks.i[1] - blocks.j[0] - offset
            least, most = -(-low // stride), high // stride
            some = least <= most
            # All of several differences are multiples of 1 alone.
            every = ((low == high) | (stride == 1)) & some
            if window is None:
                return some, every
            return (
                some & (least < window) & (most > -window),
                every & (least > -window) & (most < window),
            )

        return bounds


@expression
class _SameBlock(Expression):
    size: Number

    def _lower(self, at):
        size = along(self.size)
        row = at.row(at.i // size, self.size)
        return pred.Equal(row, at.col(at.j // size, self.size))


@expression
class _RandomBlocks(Expression):
    key: Any  # typed keys [1, 1], or [1, h]
    count: int = dataclasses.field(metadata=STATIC)
    block_shape: tuple[int, int] = dataclasses.field(metadata=STATIC)

    def _lower(self, at):
        bq, bk = self.block_shape
        end = at.s + (at.keys if isinstance(at.keys, int) else 0)
        first, nq = value(at.queries) // bq, (at.t - 1) // bq + 2
        nk = max(-(-end // bk), 1)
        count = min(self.count, nk)
        chosen = host(
            _drawn(self.key, along(first), nq, nk, count)
        )  # [b|1, h|1, nq, count]
        above = at.i // bq - along(first)
        col = at.col(at.j // bk, self.key)
        condition = pred.Not(pred.Always())
        for n in range(count):
            row = at.row(pick(chosen[..., n], above, 2), self.key)
            hit = pred.Equal(row, col)
            condition = pred.Either(condition, hit) if n else hit
        return at.given(condition, self._bounds(at, chosen, first, nk), self.key)

    def _bounds(self, at, chosen, first, nk):
        """Counts the chosen blocks among those that a block of the mask meets."""
        bq, bk = self.block_shape
        xp = space(chosen)
        met = chosen[..., None, :] == np.arange(nk, dtype=np.int32)[:, None]
        summed = met.any(-1).astype(np.int32).cumsum(-1).cumsum(-2, dtype=np.int32)
        summed = xp.pad(summed, [(0, 0), (0, 0), (1, 0), (1, 0)])
        queries, keys = along(at.queries), along(at.keys)

        def bounds(blocks):
            top, bottom = (
                (e.reshape(1, 1, -1) + queries) // bq - along(first) for e in blocks.i
            )
            # A shift may lead past either end, where no block is chosen.
            left, right = (
                ((e.reshape(1, 1, -1) + keys) // bk).clip(-1, nk) for e in blocks.j
            )
            outside = (left < 0) | (right >= nk)
            left, right = left.clip(0, nk), (right + 1).clip(0, nk)
            lower, upper = pick(summed, bottom + 1, 2), pick(summed, top, 2)
            found = pick(lower, right, 3) - pick(lower, left, 3)
            found = found - pick(upper, right, 3) + pick(upper, left, 3)
            there = (bottom - top + 1)[..., None] * (right - left)[:, :, None]
            return found > 0, (found == there) & ~outside[:, :, None]

        return bounds


def strided(s: Any) -> Expression:
    """Keys whole strides away: (i - j) % s == 0.

    Args:
      s: Stride, at least 1. An int, or int32 ``[b]`` or ``[b|1, h|1]``, which may be
        traced.

    Returns:
      The expression.

    Raises:
      ValueError: ``s`` is below 1.

    Example:
      >>> sparsejax.attention.strided(2).to_mask(2, 4).astype(int)
      Array([[1, 0, 1, 0],
             [0, 1, 0, 1]], dtype=int32)

    References:
      Child et al., `Generating Long Sequences with Sparse Transformers
      <https://arxiv.org/abs/1904.10509>`_, 2019.
    """
    return _Multiples(checked_number("s", s, 1), None)


def dilated(window: Any, dilation: Any) -> Expression:
    """A sliding window with gaps: i - j = k * dilation with abs(k) < window.

    Args:
      window: How many keys to either side, the query's own among them; at least 1. An
        int, or int32 ``[b]`` or ``[b|1, h|1]``, which may be traced.
      dilation: Distance of neighbouring keys, at least 1; likewise.

    Returns:
      The expression.

    Raises:
      ValueError: ``window`` or ``dilation`` is below 1.

    Example:
      >>> sparsejax.attention.dilated(2, 3).to_mask(1, 8).astype(int)
      Array([[1, 0, 0, 1, 0, 0, 0, 0]], dtype=int32)

    References:
      Beltagy et al., `Longformer: The Long-Document Transformer
      <https://arxiv.org/abs/2004.05150>`_, 2020.
    """
    return _Multiples(
        checked_number("dilation", dilation, 1), checked_number("window", window, 1)
    )


def keys_below(n: Any) -> Expression:
    """Keys of a position below n: j < n, as of rows padded to one length.

    Args:
      n: An int, or int32 ``[b]`` or ``[b|1, h|1]``, which may be traced.

    Returns:
      The expression.
    """
    return _Below("j", checked_number("n", n))


def global_tokens(n: Any) -> Expression:
    """The first n tokens attend to all and are attended by all: i < n or j < n.

    Args:
      n: At least 0. An int, or int32 ``[b]`` or ``[b|1, h|1]``, which may be traced.

    Returns:
      The expression. ``& causal()`` leaves keys below n, attention sinks.

    Raises:
      ValueError: n is below 0.
    """
    n = checked_number("n", n, least=0)
    return _Below("i", n) | _Below("j", n)


def prefix(n: Any) -> Expression:
    """A prefix that all attend to, then causal: j < n or i >= j.

    Args:
      n: Length of the prefix. An int, or int32 ``[b]``, which may be traced.

    Returns:
      The expression.

    Example:
      >>> sparsejax.attention.prefix(2).to_mask(4, 4).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 0],
             [1, 1, 1, 1]], dtype=int32)
    """
    return keys_below(n) | Window(None, 1)


def block_diagonal(size: Any) -> Expression:
    """Chunks that attend within themselves: i // size == j // size.

    Args:
      size: Length of a chunk, at least 1. An int, or int32 ``[b]`` or ``[b|1, h|1]``,
        which may be traced.

    Returns:
      The expression.

    Raises:
      ValueError: ``size`` is below 1.
    """
    return _SameBlock(checked_number("size", size, 1))


def random_blocks(
    key: Array, count: int, *, block_shape: tuple[int, int]
) -> Expression:
    """BigBird's random blocks: each block of queries attends to some blocks of keys.

    Every block of queries draws ``count`` different blocks of keys among all, uniformly
    and by its number alone: a ``shift`` of the queries sees the same draws.

    Args:
      key: PRNG key; a different one per head by ``per_head``. May be traced.
      count: How many, at least 1; all, where there are fewer.
      block_shape: (bq, bk) of the blocks that are drawn. Best that of the block mask.

    Returns:
      The expression.

    Raises:
      ValueError: ``count`` is below 1, ``block_shape`` no pair of positive ints.

    Example:
      >>> at = sparsejax.attention
      >>> drawn = at.random_blocks(jax.random.key(0), 2, block_shape=(4, 4))
      >>> mask = at.block_mask(drawn, 32, 32, block_shape=(4, 4))
      >>> mask.kv_cnt
      Array([[[2, 2, 2, 2, 2, 2, 2, 2]]], dtype=int32)

    References:
      Zaheer et al., `Big Bird: Transformers for Longer Sequences
      <https://arxiv.org/abs/2007.14062>`_, 2020.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, needed at least 1")
    pair = tuple(int(size) for size in block_shape)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"block_shape: got {block_shape}, needed two positive ints")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        raise ValueError(f"key: got shape {key.shape}, needed one key")
    return _RandomBlocks(key[None, None], int(count), pair)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _drawn(keys: Any, first: Any, nq: int, nk: int, count: int) -> Any:
    """``count`` of nk blocks for nq blocks of queries, int32 [b|1, h|1, nq, count]."""

    def one(key, block):
        bits = jax.random.bits(jax.random.fold_in(key, block), (nk,))
        return jax.lax.top_k(bits, count)[1]

    blocks = first + np.arange(nq, dtype=np.int32)[None, None]
    shape = np.broadcast_shapes((*keys.shape, 1), blocks.shape)
    keys = jnp.broadcast_to(keys[..., None], shape).reshape(-1)
    blocks = jnp.broadcast_to(blocks, shape).reshape(-1)
    return jax.vmap(one)(keys, blocks).reshape(*shape, count)


def _over_blocks(number: Number) -> Any:
    """``value`` with axes for the blocks of queries and keys."""
    found = value(number)
    return found if isinstance(found, int) else found[..., None, None]
