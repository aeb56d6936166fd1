"""BlockMask: which blocks of the attention matrix are computed, query by query."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._expressions import Expression, elements, from_array, gather
from sparsejax.attention._lowering import (
    Given,
    as_array,
    grid,
    host,
    space,
    status,
)


class TransposedLists(NamedTuple):
    """Lists of a block mask by key block, for gradients of keys and values.

    The entries of key block j are those from ``ptr[j]`` to ``ptr[j + 1]``, their query
    blocks ascending; what lies beyond ``ptr[nk]`` is padding. A key block may have as
    many as there are query blocks: the lists are one flat array, which no capacity
    caps.

    Attributes:
      q_idx: int32 ``[b|1, h|1, nq * capacity]``, query block of each entry.
      q_full: bool, the same shape: all of the block is allowed.
      ptr: int32 ``[b|1, h|1, nk + 1]``.
      slot: int32, shape of ``q_idx``: place of the entry in ``kv_idx``, flattened over
        its last two axes.
    """

    q_idx: Any
    q_full: Any
    ptr: Any
    slot: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys each query attends to: lists of key blocks, and an expression.

    Query i attends to key j if block (i // bq, j // bk) is listed and either all of it
    is allowed (``kv_full``) or ``expr`` allows (i, j). A pytree: contents may be traced
    and change without compiling again. Axes of batch and heads may be 1, for all; there
    may be as many heads as keys have, each for its group of query heads.

    Make one by ``block_mask``, ``from_mask`` or ``from_blocks``.

    Attributes:
      kv_idx: int32 ``[b|1, h|1, nq, capacity]``, key blocks of each query block,
        ascending; beyond the count the last is repeated (0 if there is none).
      kv_cnt: int32 ``[b|1, h|1, nq]``, how many there are.
      kv_full: bool, shape of ``kv_idx``: all elements of the block (of the part of it
        inside ``shape``) are allowed, and ``expr`` need not be asked.
      expr: Asked about the elements of the other blocks; None: all are full.
      shape: (t, s), numbers of queries and keys. The last blocks may reach over.
      block_shape: (bq, bk).
      overflow: int32 ``[b|1, h|1]``, blocks that were wanted beyond the capacity and
        are not listed; None where the lists were given.
    """

    # Not annotated with shapes: a pytree's leaves may be anything while JAX rebuilds
    # it.
    kv_idx: Any
    kv_cnt: Any
    kv_full: Any
    expr: Expression | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    overflow: Any = None

    @classmethod
    def from_mask(
        cls,
        mask: Given,
        block_shape: tuple[int, int] = (128, 128),
        *,
        capacity: int | None = None,
    ) -> "BlockMask":
        """Lists the blocks of a mask given in full.

        Args:
          mask: Boolean ``[t, s]`` or ``[b|1, h|1, t, s]``; may be traced.
          block_shape: (bq, bk).
          capacity: As of ``block_mask``.

        Returns:
          The block mask, which keeps ``mask`` for the blocks that are allowed in part.

        Raises:
          ValueError: ``mask`` or ``block_shape`` is not as above; ``capacity`` is too
            small for a concrete mask.

        Example:
          >>> mask = jnp.arange(4)[:, None] >= jnp.arange(4)
          >>> found = sparsejax.attention.BlockMask.from_mask(mask, (2, 2))
          >>> found.kv_cnt, found.kv_idx[0, 0, 1], found.kv_full[0, 0, 1]
          (Array([[[1, 2]]], dtype=int32), Array([0, 1], dtype=int32),
           Array([ True, False], dtype=bool))
        """
        array = as_array("mask", mask)
        expr = from_array(array)
        t, s = array.shape[-2:]
        return block_mask(expr, t, s, block_shape=block_shape, capacity=capacity)

    @classmethod
    def from_blocks(
        cls,
        block_map: Given,
        *,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        expr: Expression | None = None,
        capacity: int | None = None,
    ) -> "BlockMask":
        """Lists the blocks where ``block_map`` is True and ``expr`` allows something.

        Args:
          block_map: Boolean ``[nq, nk]`` or ``[b|1, h|1, nq, nk]``; may be traced.
          shape: (t, s).
          block_shape: (bq, bk); nq = ceil(t / bq) and nk = ceil(s / bk).
          expr: What is allowed inside the blocks, such as ``causal()``; default, all.
          capacity: As of ``block_mask``.

        Returns:
          The block mask.

        Raises:
          ValueError: The shapes do not fit; ``capacity`` is too small for concrete
            contents.
        """
        shape, block_shape = _pair("shape", shape), _pair("block_shape", block_shape)
        size = grid(*shape, block_shape)
        blocks = as_array("block_map", block_map)
        if blocks.ndim not in (2, 4) or blocks.dtype != np.bool_:
            raise ValueError(
                f"block_map: got dtype {blocks.dtype} and shape {blocks.shape}, "
                "needed bool [nq, nk] or [b|1, h|1, nq, nk]"
            )
        if blocks.shape[-2:] != size:
            raise ValueError(
                f"block_map: got {blocks.shape[-2:]} blocks, needed {size}: so many "
                f"of {block_shape} cover {shape}"
            )
        some = host(blocks if blocks.ndim == 4 else blocks[None, None])
        every = some
        if expr is not None:
            inside, wholly = status(*gather(expr, *shape), block_shape)
            some, every = some & inside, some & wholly
        return _listed(some, every, expr, shape, block_shape, capacity, size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(nq, nk): numbers of query blocks and key blocks."""
        return grid(*self.shape, self.block_shape)

    @property
    def capacity(self) -> int:
        """Places in each list: the most key blocks that a query block can have."""
        return self.kv_idx.shape[-1]

    @property
    def count(self) -> Int[Array, "*stack"]:
        """Number of listed blocks over batch and heads as stored, int32."""
        return jnp.sum(self.kv_cnt, axis=(-3, -2, -1), dtype=jnp.int32)

    @property
    def density(self) -> Float[Array, "*stack"]:
        """Listed blocks over all blocks, float32."""
        share = self.kv_cnt.astype(jnp.float32) / self.grid[1]
        return jnp.mean(share, axis=(-3, -2, -1))

    def to_blocks(self) -> Bool[Array, "b h nq nk"]:
        """Boolean ``[b|1, h|1, nq, nk]``, True where a block is listed."""
        return jnp.asarray(self._spread(self._valid()))

    def full_blocks(self) -> Bool[Array, "b h nq nk"]:
        """Boolean ``[b|1, h|1, nq, nk]``, True where a listed block is full."""
        full = True if self.expr is None else host(self.kv_full)
        return jnp.asarray(self._spread(self._valid() & full))

    def to_mask(self) -> Bool[Array, "..."]:
        """The mask in full; for tests and pictures, it is quadratic.

        Returns:
          Boolean ``[b|1, h|1, t, s]``, True where attention is allowed; ``[t, s]``
          where batch and heads are 1.
        """
        (t, s), (bq, bk) = self.shape, self.block_shape

        def stretched(blocks):
            return blocks.repeat(bq, axis=-2).repeat(bk, axis=-1)[..., :t, :s]

        valid = self._valid()
        mask = stretched(self._spread(valid))
        if self.expr is not None:
            full = stretched(self._spread(valid & host(self.kv_full)))
            mask = mask & (full | elements(*gather(self.expr, t, s)))
        return jnp.asarray(mask[0, 0] if mask.shape[:2] == (1, 1) else mask)

    def transposed(self) -> TransposedLists:
        """The lists by key block. One sort of nq * capacity numbers; may be traced."""
        valid, nk = self._valid(), np.int32(self.grid[1])
        idx, full = host(self.kv_idx), host(self.kv_full)
        xp = space(valid, idx, full)
        # Padding sorts behind every key block.
        key = xp.where(valid, idx, nk).reshape(*idx.shape[:2], -1)
        # Stable, so the query blocks of a key block stay in order.
        slot = xp.argsort(key, axis=-1, stable=True).astype(np.int32)
        full = xp.take_along_axis(full.reshape(key.shape), slot, axis=-1)
        ends = self._spread(valid).sum(-2, dtype=np.int32).cumsum(-1, dtype=np.int32)
        ptr = xp.pad(ends, [(0, 0), (0, 0), (1, 0)])
        lists = slot // np.int32(self.capacity), full, ptr, slot
        return TransposedLists(*(jnp.asarray(x) for x in lists))

    def _valid(self) -> Any:
        return np.arange(self.capacity, dtype=np.int32) < host(self.kv_cnt)[..., None]

    def _spread(self, flags: Any) -> Any:
        """Flags of the places in the lists, as ``[b|1, h|1, nq, nk]``."""
        nk, idx = self.grid[1], host(self.kv_idx)
        xp = space(flags, idx)
        # One column more, for what is not to be seen.
        where = xp.where(flags, idx, np.int32(nk))
        blocks = xp.zeros((*flags.shape[:-1], nk + 1), bool)
        if xp is np:
            np.put_along_axis(blocks, where, True, -1)
        else:
            blocks = jnp.put_along_axis(blocks, where, True, -1, inplace=False)
        return blocks[..., :nk]


def block_mask(
    expr: Expression,
    t: int,
    s: int,
    *,
    block_shape: tuple[int, int] = (128, 128),
    capacity: int | None = None,
) -> BlockMask:
    """Finds the blocks in which a mask expression allows something.

    By interval arithmetic over the least and greatest position, segment id, ... of each
    block, O(nq nk), never through a ``[t, s]`` array (unless the expression holds one,
    by ``from_array``). A block may be listed in which nothing is allowed after all,
    where the intervals do not tell; never is one left out.

    Concrete contents are computed on the host and nothing is compiled; traced ones
    inside the jit at hand.

    Args:
      expr: The mask.
      t: Number of queries.
      s: Number of keys.
      block_shape: (bq, bk). Need not divide t and s.
      capacity: Places in the list of each query block; default, the most that can be
        needed as far as static numbers such as a window's width tell, so that it does
        not depend on contents. A traced mask that needs more loses the last blocks of
        the list, and ``overflow`` counts them.

    Returns:
      The block mask.

    Raises:
      ValueError: A size is below 1; arrays in ``expr`` do not fit t and s; ``capacity``
        is too small for concrete contents.

    Example:
      >>> at = sparsejax.attention
      >>> mask = at.block_mask(at.causal() & at.sliding_window(512), 4096, 4096)
      >>> mask.capacity, mask.count
      (5, Array(150, dtype=int32))
    """
    block_shape = _pair("block_shape", block_shape)
    if not isinstance(expr, Expression):
        raise ValueError(
            f"expr: got {type(expr).__name__}, needed a mask expression; "
            "BlockMask.from_mask takes an array"
        )
    condition, found = gather(expr, t, s)
    some, every = status(condition, found, block_shape)
    sure, _ = status(condition, found, block_shape, static=True)
    most = max(int(sure.sum(-1).max()), 1)
    return _listed(some, every, expr, (t, s), block_shape, capacity, most)


def _listed(some, every, expr, shape, block_shape, capacity, most) -> BlockMask:
    """Lists from (some, every) of all blocks; ``most``, the default capacity."""
    xp = space(some, every)
    count = some.sum(-1, dtype=np.int32)
    if capacity is None:
        capacity = most
    elif not isinstance(capacity, int | np.integer) or capacity < 1:
        raise ValueError(f"capacity: got {capacity}, needed at least 1, an int")
    elif xp is np and count.max() > capacity:
        raise ValueError(
            f"capacity: got {capacity}, needed at least {count.max()}, the most key "
            "blocks that a query block has"
        )
    capacity = min(capacity, some.shape[-1])
    # Stable: listed blocks first, ascending. Without any, the first is block 0.
    order = xp.argsort(~some, axis=-1, stable=True)[..., :capacity].astype(np.int32)
    listed = xp.minimum(count, np.int32(capacity))
    last = xp.take_along_axis(order, xp.maximum(listed - 1, 0)[..., None], axis=-1)
    valid = np.arange(capacity, dtype=np.int32) < listed[..., None]
    idx = xp.where(valid, order, last)
    full = xp.take_along_axis(xp.broadcast_to(every, some.shape), idx, axis=-1) & valid
    return BlockMask(
        jnp.asarray(idx),
        jnp.asarray(listed),
        jnp.asarray(full),
        expr,
        shape,
        block_shape,
        jnp.asarray((count - listed).sum(-1, dtype=np.int32)),
    )


def _pair(name: str, given: Any) -> tuple[int, int]:
    """Checks a pair of positive sizes."""
    pair = tuple(given) if np.iterable(given) else ()
    whole = all(isinstance(size, int | np.integer) for size in pair)
    if len(pair) != 2 or not whole or min(pair) < 1:
        raise ValueError(f"{name}: got {given}, needed two positive ints")
    return int(pair[0]), int(pair[1])
