"""From masked weights to the really sparse forms that their masks allow."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparsejax.layers._condensed_choice import choose_form, dense_is_faster
from sparsejax.masks import match_names, named_leaves, path_name


@dataclasses.dataclass(frozen=True)
class CondensedChoice:
    """What became of one leaf, and why.

    Attributes:
      shape: Of the weight.
      density: Fraction of the entries kept.
      form: The form chosen, in words.
      why: What in the mask allowed it, or ruled the others out.
      dense_is_faster: Whether the dense product of a weight with zeros would be, on the
        platform at hand; None where both are about as fast, or where only
        ``sparsejax.explain`` at the shapes of a run can tell.
    """

    shape: tuple[int, ...]
    density: float
    form: str
    why: str
    dense_is_faster: bool | None


@dataclasses.dataclass(frozen=True)
class CondenseReport:
    """What ``condense`` chose; ``print(report)`` shows a table.

    Attributes:
      leaves: A ``CondensedChoice`` of each leaf that has a mask, by name.
      rows: Rows of x for which dense was compared.
    """

    leaves: dict[str, CondensedChoice]
    rows: int

    def __str__(self) -> str:
        faster = {True: "yes", False: "no", None: "see explain"}
        head = ("leaf", "shape", "density", "form", "dense faster", "why")
        lines = [head] + [
            (
                name,
                "x".join(map(str, each.shape)),
                f"{each.density:.4f}",
                each.form,
                faster[each.dense_is_faster],
                each.why,
            )
            for name, each in self.leaves.items()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda cells: [
            cell.ljust(w) for cell, w in zip(cells, widths, strict=True)
        ]
        rows = "row" if self.rows == 1 else "rows"
        last = f"dense faster: at {self.rows} {rows} of x, by static rules"
        return "\n".join(["  ".join(pad(cells)).rstrip() for cells in lines] + [last])


def condense(
    params: Any,
    masks: Any,
    *,
    rows: int = 1,
    stacked: Sequence[str] = (),
    block_sides: Sequence[int] = (128, 64, 32, 16, 8),
    groups: Sequence[int] = (4, 8, 16, 32),
) -> tuple[Any, CondenseReport]:
    """Stores every masked weight in the form that its mask allows, and says which.

    Of these the first that holds a mask exactly, so that a model computes the same:

    1. whole rows and columns are pruned, the rest is dense: a smaller dense weight;
    2. whole square blocks: block-sparse, the largest side of ``block_sides``;
    3. n kept of every m along the contraction axis: N:M, the smallest m of ``groups``;
    4. equally many kept in every column: constant fan-in;
    5. masked dense.

    For 3 and 4 columns that keep nothing (ablated neurons) are taken out first, for 5
    empty rows too. Reads the masks on the host; not for use inside jit.

    Args:
      params: Tree of arrays.
      masks: Tree of boolean arrays with the paths and shapes of leaves of ``params``,
        as from ``transforms.get_masks``; leaves without a mask are None, empty or
        absent. Weights are ``[k, n]``; of another rank they stay masked dense, unless
        declared as a stack.
      rows: Rows of x at which the report compares with dense, at least 1.
      stacked: Glob patterns of names whose leading axes are layers, as under scan:
        they get the first of 2 to 5 that all layers have, arrays stacked alike.
      block_sides: Sides of blocks to look for.
      groups: Sizes m to look for, at most 256; with none, N:M masks become constant
        fan-in, which is faster on a CPU.

    Returns:
      (a tree like ``params`` whose masked leaves are small dataclasses of arrays for
      ``apply_condensed``, or arrays where nothing is pruned; the report).

    Raises:
      ValueError: A mask has no leaf of ``params`` at its path, another shape, or is not
        boolean or concrete; the message names the leaf. ``rows``, ``block_sides`` or
        ``groups`` are not positive ints, or a group is larger than 256.

    Example:
      >>> mask = jnp.array([[True, False], [False, True], [True, True]])
      >>> tree, report = sparsejax.layers.condense(
      ...     {"up": jnp.ones((3, 2)), "bias": jnp.ones(2)}, {"up": mask})
      >>> print(tree["up"].values.shape, report.leaves["up"].form)
      (2, 2) constant fan-in 2

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2023, for ablated neurons and fan-in.
    """
    _check_ints("rows", rows, (rows,), "a positive int")
    _check_ints("block_sides", block_sides, block_sides, "positive ints")
    _check_ints("groups", groups, groups, "ints in [1, 256]", most=256)
    found = {name: _checked(name, mask) for name, mask in named_leaves(masks).items()}
    leaves = named_leaves(params)
    for name, mask in found.items():
        if name not in leaves:
            raise ValueError(
                f"masks: got a mask at {name!r}, needed the paths of params, which has "
                f"{list(leaves)}"
            )
        if mask.shape != leaves[name].shape:
            raise ValueError(
                f"masks: got shape {mask.shape} at {name!r}, needed "
                f"{leaves[name].shape} of its parameter"
            )
    stacks = match_names(stacked, found, "stacked")
    choices: dict[str, CondensedChoice] = {}

    def one(path, leaf):
        name = path_name(path)
        if name not in found:
            return leaf
        mask = found[name]
        stored, form, why = choose_form(leaf, mask, name in stacks, block_sides, groups)
        density = float(mask.mean()) if mask.size else 1.0
        faster = dense_is_faster(stored, rows)
        choices[name] = CondensedChoice(mask.shape, density, form, why, faster)
        return stored

    return jax.tree_util.tree_map_with_path(one, params), CondenseReport(choices, rows)


def _check_ints(name, got, sizes, needed, most=math.inf):
    for size in sizes:
        if not isinstance(size, int | np.integer) or not 1 <= size <= most:
            raise ValueError(f"{name}: got {got}, needed {needed}")


def _checked(name, mask):
    """The mask as numpy."""
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(f"masks: got a traced mask at {name!r}, needed a concrete one")
    if getattr(mask, "dtype", None) != np.bool_:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(f"masks: got {got} at {name!r}, needed bool")
    return np.asarray(mask)
