"""The forms that a condensed weight takes, and the product with any of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparsejax.layouts import (
    BlockLayout,
    expand_fan_in,
    expand_nm,
    scatter_blocks,
)
from sparsejax.ops import (
    block_sparse_matmul,
    fan_in_matmul,
    masked_matmul,
    nm_matmul,
)

# Not annotated with shapes: a pytree's leaves may be anything while JAX rebuilds it.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedBlocks:
    """A weight of whole blocks, for ``ops.block_sparse_matmul``.

    Attributes:
      blocks: ``[capacity, bk, bn]``.
      layout: Their ``layouts.BlockLayout``.
    """

    blocks: Any
    layout: BlockLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedNM:
    """A weight that keeps n of every m along k, for ``ops.nm_matmul``.

    Attributes:
      values: ``[k * n / m, p]``.
      indices: Packed places, as from ``layouts.condense_nm``.
      n: How many of each group are KEPT.
      m: Group size.
    """

    values: Any
    indices: Any
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedFanIn:
    """A weight of equally many entries per column, for ``ops.fan_in_matmul``.

    Attributes:
      values: ``[n, fan_in]``.
      indices: int32 ``[n, fan_in]``, as from ``layouts.condense_fan_in``.
      k: Rows of the weight.
    """

    values: Any
    indices: Any
    k: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedMasked:
    """A weight of no structure, for ``ops.masked_matmul``.

    Attributes:
      w: ``[k, n]``.
      mask: Boolean ``[k, n]``, True = kept.
    """

    w: Any
    mask: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CondensedRegion:
    """A weight that is zero outside some rows and columns: what is left is smaller.

    Attributes:
      inner: The weight of those rows and columns: an array, or another form.
      rows: int32, the rows kept, rising; None: all.
      cols: int32, the columns kept, rising; None: all.
      shape: (k, n) of the whole weight.
    """

    inner: Any
    rows: Any
    cols: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


def apply_condensed(
    x: Float[Array, "*batch k"],
    leaf: Any,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*batch n"]:
    """Multiplies by a weight in whatever form ``condense`` gave it.

    ``y = x W``: by the operator of the form, or ``x @ w`` of a plain array.
    Differentiable in x and in the numbers stored, in reverse mode.

    Args:
      x: Activations ``[..., k]``.
      leaf: A leaf of what ``condense`` returns.
      dtype: In which x and the weight are multiplied, and that of y; default, their
        promoted dtype.

    Returns:
      y ``[..., n]``.

    Raises:
      ValueError: ``leaf`` is no weight, or its shape does not fit x.

    Example:
      >>> mask = jnp.array([[True, False], [False, False]])
      >>> tree, _ = sparsejax.layers.condense({"w": jnp.ones((2, 2))}, {"w": mask})
      >>> print(sparsejax.layers.apply_condensed(jnp.ones((1, 2)), tree["w"]))
      [[1. 0.]]
    """
    match leaf:
        case CondensedRegion(inner, rows, cols, shape):
            part = _within("x", x, -1, shape[0], rows)
            y = apply_condensed(part, inner, dtype=dtype)
            if cols is None:
                return y
            whole = jnp.zeros((*y.shape[:-1], shape[1]), y.dtype)
            return whole.at[..., cols].set(y, unique_indices=True)
        case CondensedBlocks(blocks, layout):
            return block_sparse_matmul(x, blocks, layout, dtype=dtype)
        case CondensedNM(values, indices, n, m):
            return nm_matmul(x, values, indices, n=n, m=m, dtype=dtype)
        case CondensedFanIn(values, indices, k):
            _within("x", x, -1, k, None)
            return fan_in_matmul(x, values, indices, dtype=dtype)
        case CondensedMasked(w, mask):
            x, w = _promote(x, w, dtype)
            return masked_matmul(x, w, mask)
    if getattr(leaf, "ndim", None) != 2:
        raise ValueError(f"leaf: got {type(leaf).__name__}, needed a weight [k, n]")
    return jnp.matmul(*_promote(x, leaf, dtype))


def expand_condensed(leaf: Any) -> Shaped[Array, "..."]:
    """The dense weight of a condensed one; a plain array comes back as it is.

    Args:
      leaf: A leaf of what ``condense`` returns.

    Returns:
      w ``[k, n]``, zero where nothing is kept.
    """
    match leaf:
        case CondensedRegion(inner, rows, cols, shape):
            part = expand_condensed(inner)
            rows = jnp.arange(shape[0]) if rows is None else rows
            cols = jnp.arange(shape[1]) if cols is None else cols
            return jnp.zeros(shape, part.dtype).at[rows[:, None], cols].set(part)
        case CondensedBlocks(blocks, layout):
            return scatter_blocks(blocks, layout)
        case CondensedNM(values, indices, n, m):
            return expand_nm(values, indices, n=n, m=m)
        case CondensedFanIn(values, indices, k):
            return expand_fan_in(values, indices, k)
        case CondensedMasked(w, mask):
            return jnp.where(mask, w, jnp.zeros((), w.dtype))
    return leaf


def _within(name, a, axis, size, places):
    """The entries of ``a`` at ``places`` along an axis of the given size."""
    if a.shape[axis] != size:
        raise ValueError(f"{name}: got shape {a.shape}, needed [..., {size}]")
    return a if places is None else jnp.take(a, places, axis=axis, mode="clip")


def _promote(x, w, dtype):
    dtype = jnp.promote_types(x.dtype, w.dtype) if dtype is None else dtype
    return x.astype(dtype), w.astype(dtype)
