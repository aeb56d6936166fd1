"""How the TPU kernels lay arrays out, and find a block of them in HBM."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention._spec import TPU_LANES, TPU_ROWS


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How queries lie in tiles: ``group`` heads that share lists, block by block.

    A block of few rows is ``folded``: the group's rows become one head's, with padding.
    """

    b: int
    h: int
    t: int
    blocks: int
    block: int
    group: int

    @property
    def heads(self):
        """Of the kernel's grid."""
        return self.h // self.group

    @property
    def folded(self):
        shares = self.group > 1 and self.block % TPU_LANES > 0
        return shares or self.block % TPU_ROWS > 0

    @property
    def shape(self):
        """(heads, rows) of a tile."""
        if not self.folded:
            return self.group, self.block
        return 1, pl.cdiv(self.group * self.block, TPU_ROWS) * TPU_ROWS

    def tile(self, x):
        """[b, h, t, d] as [b, heads, group, rows of all blocks, d]."""
        d = x.shape[3]
        if not self.folded:
            return x.reshape(self.b, self.heads, self.group, self.t, d)
        x = x.reshape(self.b, self.heads, self.group, self.blocks, self.block, d)
        x = jnp.swapaxes(x, 2, 3).reshape(self.b, self.heads, self.blocks, -1, d)
        return pad(x, 3, self.shape[1]).reshape(self.b, self.heads, 1, -1, d)

    def untile(self, x):
        """The other way."""
        d = x.shape[4]
        if self.folded:
            x = x.reshape(self.b, self.heads, self.blocks, -1, d)
            x = x[:, :, :, : self.group * self.block]
            x = x.reshape(self.b, self.heads, self.blocks, self.group, self.block, d)
            x = jnp.swapaxes(x, 2, 3)
        return x.reshape(self.b, self.h, self.t, d)

    def line(self, x):
        """[b or 1, heads, t], a number for each row, as [.., heads, blocks, 1, rows].

        Its heads are those of queries, or divide those of the grid.
        """
        b, heads, _ = x.shape
        x = pad(x, 2, self.t)
        if heads == self.h:
            x = x.reshape(b, self.heads, self.group, self.blocks, self.block)
        else:
            x = x.reshape(b, heads, 1, self.blocks, self.block)
            x = jnp.broadcast_to(x, (b, heads, self.group, *x.shape[3:]))
        x = jnp.swapaxes(x, 2, 3)
        x = x.reshape(b, -1, self.blocks, 1, self.group * self.block)
        return pad(x, 4, math.prod(self.shape))

    def unline(self, x):
        """[b, heads, blocks, 1, rows] as [b, h, t]."""
        x = x[..., : self.group * self.block]
        x = x.reshape(self.b, self.heads, self.blocks, self.group, self.block)
        return jnp.swapaxes(x, 2, 3).reshape(self.b, self.h, self.t)

    def positions(self, elements):
        """Each row's own position, and the rows that the predicate asks for."""
        if elements.predicate is None:
            return []
        own = jnp.arange(self.t, dtype=jnp.int32)[None, None]
        return [self.line(a) for a in (own, *elements.rows)]


def tiles_of(q, k, lists, elements, block_bias, config, group):
    """The tiles of q; one head each where heads of a group are told apart."""
    b, h, t, _ = q.shape
    operands = (*elements.rows, *elements.cols, *elements.scalars, *elements.dense)
    told = [a.shape[1] for a in operands] + [k.shape[1], lists.shape[1]]
    if block_bias is not None:
        told.append(block_bias.shape[1])
    if any((h // group) % heads for heads in told):
        group = 1
    return Tiles(b, h, t, t // config.block_q, config.block_q, group)


class Stream(NamedTuple):
    """An array that the kernel copies blocks of from HBM.

    pick: (batch, head of the grid, the program's block, the listed one) -> a place.
    paged: the listed block is looked up in the table of pages.
    """

    array: jax.Array
    block: tuple[int, ...]
    pick: Callable[..., tuple[Any, ...]]
    paged: bool = False

    @classmethod
    def keys(cls, array, tiles, block_k, paged):
        """Blocks of k or v, or their pages."""
        heads = array.shape[1]

        def pick(batch, head, own, index):
            head = lax.div(head, jnp.int32(tiles.heads // heads))
            if paged:
                return index, head
            window = pl.ds(pl.multiple_of(index * block_k, block_k), block_k)
            return batch, head, window

        return cls(array, (block_k, array.shape[3]), pick, paged)

    @classmethod
    def tiles(cls, array, tiles):
        """Tiles of q or dout."""
        array, (group, rows) = tiles.tile(array), tiles.shape

        def pick(batch, head, own, index):
            window = pl.ds(pl.multiple_of(index * rows, TPU_ROWS), rows)
            return batch, head, slice(None), window

        return cls(array, (group, rows, array.shape[4]), pick)

    @classmethod
    def lines(cls, array, tiles):
        """Of [b or 1, heads, blocks, 1, numbers]."""
        place = placer(array, tiles)
        pick = lambda batch, head, own, index: (*place(batch, head), index)
        return cls(array, array.shape[3:], pick)

    @classmethod
    def dense(cls, array, tiles, block_k, nk, transpose):
        """Blocks of [b or 1, heads, t, s], one byte for each element."""
        b, heads = array.shape[:2]
        array = pad(pad(array.astype(jnp.int8), 2, tiles.t), 3, nk * block_k)
        array = array.reshape(b, heads, tiles.blocks, tiles.block, nk, block_k)
        array = jnp.swapaxes(array, 3, 4)
        if tiles.folded:
            array = jnp.concatenate([array] * tiles.group, axis=4)
            array = pad(array, 4, tiles.shape[1])
        if transpose:
            array = jnp.swapaxes(array, 4, 5)
        place = placer(array, tiles)

        def pick(batch, head, own, index):
            query, key = (index, own) if transpose else (own, index)
            return *place(batch, head), query, key

        return cls(array, array.shape[4:], pick)


def columns_of(array, nk, block_k):
    """[b or 1, heads, s] as [.., nk, 1, block_k]."""
    array = pad(array, 2, nk * block_k)
    return array.reshape(*array.shape[:2], nk, 1, block_k)


def placer(array, tiles):
    """(batch, head of the grid) -> the place in an array that may have fewer."""
    b, heads = array.shape[:2]
    assert tiles.heads % heads == 0

    def place(batch, head):
        return (
            batch if b > 1 else zero(),
            lax.div(head, jnp.int32(tiles.heads // heads)),
        )

    return place


def pad(x, axis, size):
    more = [(0, 0)] * x.ndim
    more[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, more) if more[axis][1] else x


def zero():
    """An index, also where Python's integers are 64 bits."""
    return jnp.int32(0)
