"""Masks of a whole model: applying them, and reporting what they keep."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks._paths import named_leaves, path_name


def apply_masks(params: Any, masks: Any) -> Any:
    """Sets the entries to zero whose mask is False.

    `out = where(mask, param, 0)`, so that NaN and inf are zeroed too. Leaves are
    found by their path, and leaves without a mask pass through: `masks` may hold
    None or empty nodes there, or lack them.

    Args:
      params: Tree of arrays.
      masks: Tree of boolean arrays with the paths and shapes of leaves of `params`.

    Returns:
      A tree like `params`, dtypes kept.

    Raises:
      ValueError: A mask has no leaf of `params` at its path, another shape, or is not
        boolean.

    Example:
      >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
      >>> out = apply_masks(params, {"kernel": jnp.array([True, False])})
      >>> print(out["kernel"], out["bias"])
      [1. 0.] [3.]
    """
    masks = named_leaves(masks)
    leaves = named_leaves(params)
    for name, mask in masks.items():
        if name not in leaves:
            raise ValueError(
                f"masks must follow the paths of params, got a mask at {name!r}; "
                f"params has {list(leaves)}"
            )
        if mask.shape != leaves[name].shape:
            raise ValueError(
                f"masks must be shaped like params, got {mask.shape} for "
                f"{leaves[name].shape} at {name!r}"
            )
        if mask.dtype != bool:
            raise ValueError(f"masks must be boolean, got {mask.dtype} at {name!r}")

    def apply(path, leaf):
        mask = masks.get(path_name(path))
        if mask is None:
            return leaf
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(apply, params)


@dataclasses.dataclass(frozen=True)
class DensityReport:
    """What masks keep, counted from the masks themselves.

    A kept weight counts as kept whatever its value: a weight just grown is zero and
    is not sparse. `float(report)` is `prunable`; `print(report)` shows a table.

    Attributes:
      leaves: (kept, size) of each masked leaf, by name.
      prunable: Fraction kept of the entries that have a mask; 1 if there are none.
      model: Fraction kept of all entries, leaves without a mask included; None
        where the report was made without params.
    """

    leaves: dict[str, tuple[int, int]]
    prunable: float
    model: float | None

    def __float__(self) -> float:
        return self.prunable

    def __str__(self) -> str:
        rows = [(name, *numbers) for name, numbers in self.leaves.items()]
        kept, size = (
            sum(column) for column in zip(*[(0, 0), *self.leaves.values()], strict=True)
        )
        rows.append(("all masked leaves", kept, size))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'leaf':{width}}  {'kept':>12}  {'size':>12}  density"]
        for name, kept, size in rows:
            share = kept / size if size else 1.0
            lines.append(f"{name:{width}}  {kept:12}  {size:12}  {share:7.4f}")
        if self.model is not None:
            lines.append(
                f"{'whole model':{width}}  {'':12}  {'':12}  {self.model:7.4f}"
            )
        return "\n".join(lines)


def density(masks: Any, params: Any = None) -> DensityReport:
    """Counts what masks keep: per leaf, over masked leaves, over the whole model.

    Reads the masks on the host; not for use inside jit.

    Args:
      masks: Tree of boolean arrays; leaves without a mask are None, empty or absent.
      params: The whole model. With it the report covers unmasked leaves too.

    Returns:
      A `DensityReport`.

    Example:
      >>> masks = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> report = density(masks, {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
      >>> print(report.prunable, report.model)
      0.25 0.5
    """
    leaves = {name: _count(mask) for name, mask in named_leaves(masks).items()}
    kept = sum(count for count, _ in leaves.values())
    size = sum(total for _, total in leaves.values())
    model = None
    if params is not None:
        everything = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        model = (everything - size + kept) / everything if everything else 1.0
    return DensityReport(leaves, kept / size if size else 1.0, model)


def _count(mask: Any) -> tuple[int, int]:
    # Rows are summed on the device, in int32; their sum may need more.
    rows = jnp.sum(mask, axis=-1, dtype=jnp.int32) if mask.ndim else mask
    return int(np.sum(np.asarray(rows), dtype=np.int64)), math.prod(mask.shape)
