"""BlockLayout: the places of the stored blocks of a block-sparse matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout:
    """Places of the stored blocks of a block-sparse matrix ``w [k, n]``.

    A pytree: ``rows`` and ``cols`` are leaves, the rest is static. A change of the
    places, or of how many there are within ``capacity``, does not recompile.

    Slots are sorted by (block column, block row). A slot beyond the count is padding
    and stands one past the grid, ``rows = kb`` and ``cols = nb``, where kb = ceil(k /
    bk) and nb = ceil(n / bn). Make one by ``from_mask`` or ``random``.

    Attributes:
      rows: int32 array ``[capacity]``, block row of each slot.
      cols: int32 array ``[capacity]``, block column of each slot.
      shape: (k, n) of the matrix. Blocks at an edge that the block does not divide
        reach over it; what they hold there takes no part.
      block_shape: (bk, bn).
    """

    # Not annotated with shapes: a pytree's leaves may be anything while JAX rebuilds
    # it.
    rows: Any
    cols: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_mask(
        cls,
        block_mask: Shaped[Array, "..."] | Shaped[np.ndarray, "..."],
        block_shape: tuple[int, int],
        *,
        capacity: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> "BlockLayout":
        """Makes the layout that keeps the blocks where ``block_mask`` is True.

        Args:
          block_mask: Boolean ``[kb, nb]``, one entry per block.
          block_shape: (bk, bn).
          capacity: Number of slots; default, the number of kept blocks. Needed where
            the mask is traced, since shapes are static. A traced mask with more kept
            blocks than slots loses the last ones: ``check_layout`` cannot see that, the
            caller must not let it happen.
          shape: (k, n) where the blocks do not divide it; default (kb * bk, nb * bn).

        Returns:
          The layout.

        Raises:
          ValueError: ``capacity`` is missing for a traced mask or too small for a
            concrete one; the mask is not boolean and two-dimensional; the shapes
            disagree.

        Example:
          >>> mask = jnp.array([[True, False], [True, True]])
          >>> layout = sparsejax.layouts.BlockLayout.from_mask(mask, (8, 16))
          >>> layout.shape, layout.capacity, layout.rows, layout.cols
          ((16, 32), 3, Array([0, 1, 1], dtype=int32), Array([0, 0, 1], dtype=int32))
        """
        block_shape = _pair("block_shape", block_shape)
        if block_mask.ndim != 2 or block_mask.dtype != np.bool_:
            raise ValueError(
                "block_mask: got dtype "
                f"{block_mask.dtype} and shape {block_mask.shape}, needed bool [kb, nb]"
            )
        kb, nb = block_mask.shape
        if shape is None:
            shape = (kb * block_shape[0], nb * block_shape[1])
        shape = _pair("shape", shape)
        if _grid(shape, block_shape) != (kb, nb):
            raise ValueError(
                f"shape: got {shape}, which {block_shape} blocks cover by "
                f"{_grid(shape, block_shape)} of them; block_mask is {(kb, nb)}"
            )
        if isinstance(block_mask, jax.core.Tracer):
            if capacity is None:
                raise ValueError(
                    "capacity: got None with a traced block_mask, needed an int: "
                    "the number of slots is a shape and must be known to jit"
                )
        else:
            count = int(np.asarray(block_mask).sum())
            capacity = count if capacity is None else capacity
            if capacity < count:
                raise ValueError(
                    f"capacity: got {capacity}, needed at least {count}, "
                    "the number of kept blocks in block_mask"
                )
        # Column by column, hence the transpose; absent slots land on kb * nb.
        place = jnp.flatnonzero(
            jnp.asarray(block_mask).T, size=capacity, fill_value=kb * nb
        ).astype(jnp.int32)
        real = place < kb * nb
        rows = jnp.where(real, place % max(kb, 1), kb)
        cols = jnp.where(real, place // max(kb, 1), nb)
        return cls(rows, cols, shape, block_shape)

    @classmethod
    def random(
        cls,
        key: Array,
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        *,
        density: float,
    ) -> "BlockLayout":
        """Keeps exactly round(density * kb * nb) blocks, uniformly at random.

        Args:
          key: PRNG key.
          shape: (k, n) of the matrix.
          block_shape: (bk, bn); need not divide ``shape``.
          density: Fraction of blocks kept, in [0, 1].

        Returns:
          The layout; its capacity equals its count.

        Raises:
          ValueError: ``density`` is outside [0, 1].
        """
        if not 0 <= density <= 1:
            raise ValueError(f"density: got {density}, needed a number in [0, 1]")
        shape = _pair("shape", shape)
        block_shape = _pair("block_shape", block_shape)
        grid = _grid(shape, block_shape)
        count = round(density * grid[0] * grid[1])
        mask = jax.random.permutation(key, grid[0] * grid[1]) < count
        return cls.from_mask(
            mask.reshape(grid), block_shape, capacity=count, shape=shape
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(kb, nb): how many blocks the matrix has along each axis."""
        return _grid(self.shape, self.block_shape)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.rows.shape[-1]

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape of the stored array, ``[capacity, bk, bn]``."""
        return (*self.rows.shape, *self.block_shape)

    @property
    def count(self) -> Int[Array, "*stack"]:
        """Number of stored blocks, int32; traced where the layout is."""
        return jnp.sum(self.cols < self.grid[1], axis=-1, dtype=jnp.int32)

    @property
    def density(self) -> Float[Array, "*stack"]:
        """Fraction of the entries of ``w`` that lie in a stored block, float32."""
        # The last block of a row or column may reach over the edge.
        height = _inside(self.rows, self.shape[0], self.block_shape[0])
        width = _inside(self.cols, self.shape[1], self.block_shape[1])
        # Each factor is at most a block, the sum is not: float32 holds its ratio.
        kept = jnp.sum((height * width).astype(jnp.float32), axis=-1)
        return kept / max(self.shape[0] * self.shape[1], 1)

    def to_mask(self) -> Bool[Array, "*stack kb nb"]:
        """Boolean ``[kb, nb]``, True where a block is stored."""

        def one(rows, cols):
            return jnp.zeros(self.grid, bool).at[rows, cols].set(True, mode="drop")

        for _ in range(self.rows.ndim - 1):
            one = jax.vmap(one)
        return one(self.rows, self.cols)

    def transpose(self) -> "BlockLayout":
        """The layout of ``w.T``. Its slots are this one's in ``transpose_order``."""
        order = self.transpose_order()
        return BlockLayout(
            jnp.take_along_axis(self.cols, order, -1),
            jnp.take_along_axis(self.rows, order, -1),
            self.shape[::-1],
            self.block_shape[::-1],
        )

    def transpose_order(self) -> Int[Array, "*stack capacity"]:
        """Permutation of the slots that sorts them by (block row, block column)."""
        # Stable, so equal rows stay in order of columns; padding has the largest row.
        return jnp.argsort(self.rows, axis=-1, stable=True).astype(jnp.int32)

    def column_pointers(self) -> Int[Array, "nb_plus_1"]:
        """First slot of every block column, and the count at the end; int32."""
        wanted = jnp.arange(self.grid[1] + 1, dtype=self.cols.dtype)
        found = jnp.searchsorted(self.cols, wanted, method="compare_all")
        return found.astype(jnp.int32)


def check_layout(layout: BlockLayout) -> None:
    """Raises where the indices of a layout are out of range, unsorted or repeated.

    Args:
      layout: Concrete, or traced inside a function that ``checkify.checkify`` wraps:
        the check is then part of its error value.

    Raises:
      ValueError: A concrete layout is not valid. The message names the first bad slot.
    """
    kb, nb = layout.grid
    rows, cols = layout.rows, layout.cols
    if rows.shape != cols.shape or rows.ndim == 0:
        raise ValueError(
            f"layout: got rows {rows.shape} and cols {cols.shape}, needed equal "
            "shapes [capacity]"
        )
    traced = isinstance(rows, jax.core.Tracer) or isinstance(cols, jax.core.Tracer)
    if not traced:
        rows, cols = np.asarray(rows), np.asarray(cols)
    inside = (rows >= 0) & (rows < kb) & (cols >= 0) & (cols < nb)
    fine = inside | ((rows == kb) & (cols == nb))
    # Order of (column, row); the same block twice is not in increasing order.
    place = cols * max(kb, 1) + rows
    rising = place[..., 1:] > place[..., :-1]
    both_padding = (cols[..., 1:] == nb) & (cols[..., :-1] == nb)
    ordered = rising | both_padding
    if traced:
        checkify.check(
            jnp.all(fine) & jnp.all(ordered),
            "layout: a block index is out of range, out of order or repeated",
        )
        return
    fine[..., 1:] &= ordered
    if not fine.all():
        slot = tuple(int(i) for i in np.argwhere(~fine)[0])
        raise ValueError(
            f"layout: slot {slot[-1]} has block row {int(rows[slot])} and block column "
            f"{int(cols[slot])}; needed indices inside the grid {layout.grid}, sorted "
            "by (column, row), none repeated, padding at the end"
        )


def gather_blocks(
    w: Shaped[Array, "..."], layout: BlockLayout
) -> Float[Array, "capacity bk bn"]:
    """Takes the stored blocks out of a dense matrix; padding slots are zero.

    Args:
      w: Dense matrix ``[k, n]``.
      layout: Where the blocks are.

    Returns:
      Blocks ``[capacity, bk, bn]``, dtype of ``w``.

    Raises:
      ValueError: ``w`` is not ``[k, n]`` of the layout.
    """
    if w.shape != layout.shape:
        raise ValueError(f"w: got shape {w.shape}, needed {layout.shape} of the layout")
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    w = pad_to(w, kb * bk, nb * bn)
    tiles = w.reshape(kb, bk, nb, bn).swapaxes(1, 2)
    return tiles.at[layout.rows, layout.cols].get(mode="fill", fill_value=0)


def scatter_blocks(
    blocks: Shaped[Array, "..."], layout: BlockLayout
) -> Float[Array, "k n"]:
    """Puts blocks into a dense matrix of zeros; padding slots go nowhere.

    Args:
      blocks: ``[capacity, bk, bn]``.
      layout: Where they belong.

    Returns:
      Dense matrix ``[k, n]``, dtype of ``blocks``.

    Raises:
      ValueError: ``blocks`` is not ``[capacity, bk, bn]`` of the layout.
    """
    check_blocks(blocks, layout)
    (kb, nb), (bk, bn) = layout.grid, layout.block_shape
    tiles = jnp.zeros((kb, nb, bk, bn), blocks.dtype)
    tiles = tiles.at[layout.rows, layout.cols].set(blocks, mode="drop")
    w = tiles.swapaxes(1, 2).reshape(kb * bk, nb * bn)
    return w[: layout.shape[0], : layout.shape[1]]


def transpose_blocks(
    blocks: Shaped[Array, "..."], layout: BlockLayout
) -> tuple[Float[Array, "capacity bn bk"], BlockLayout]:
    """Blocks and layout of the transposed matrix.

    Args:
      blocks: ``[capacity, bk, bn]``.
      layout: Where they belong.

    Returns:
      (blocks ``[capacity, bn, bk]``, layout) of ``w.T``.

    Raises:
      ValueError: ``blocks`` is not ``[capacity, bk, bn]`` of the layout.
    """
    check_blocks(blocks, layout)
    return blocks[layout.transpose_order()].swapaxes(-1, -2), layout.transpose()


def check_single(layout: BlockLayout) -> None:
    """What an operator can check of its layout: all if concrete, else the rank."""
    if layout.rows.ndim != 1:
        raise ValueError(
            f"layout: got a stack of layouts, rows {layout.rows.shape}, needed one: "
            "take it apart by vmap or scan"
        )
    traced = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if not isinstance(layout.rows, traced) and not isinstance(layout.cols, traced):
        check_layout(layout)


def check_blocks(blocks: Array, layout: BlockLayout) -> None:
    """Raises ValueError unless ``blocks`` is ``[capacity, bk, bn]`` of the layout."""
    if blocks.shape != layout.blocks_shape:
        raise ValueError(
            f"blocks: got shape {blocks.shape}, needed {layout.blocks_shape}: "
            "(capacity, bk, bn) of the layout"
        )


def pad_to(a: Array, *sizes: int) -> Array:
    """Pads the last axes of ``a`` with zeros at the end, up to ``sizes``."""
    lead = a.ndim - len(sizes)
    short = [size - a.shape[lead + i] for i, size in enumerate(sizes)]
    if not any(short):
        return a
    return jnp.pad(a, [(0, 0)] * lead + [(0, s) for s in short])


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Checks a pair of positive sizes."""
    pair = tuple(int(v) for v in value) if np.iterable(value) else ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}: got {value}, needed two positive ints")
    return pair  # type: ignore[return-value]


def _grid(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks along each axis, rounded up."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def _inside(index: Array, size: int, block: int) -> Array:
    """How many of a block's rows (or columns) lie inside the matrix; 0 for padding."""
    return jnp.clip(size - index * block, 0, block)
