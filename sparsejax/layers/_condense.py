"""From masked weights to the really sparse forms that their masks allow."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax._dispatch import current_platform
from sparsejax.layers._condensed import (
    CondensedBlocks,
    CondensedFanIn,
    CondensedMasked,
    CondensedNM,
    CondensedRegion,
)
from sparsejax.layers._convert import _layout_of
from sparsejax.layouts import condense_fan_in, condense_nm, gather_blocks
from sparsejax.masks import named_leaves, path_name
from sparsejax.ops._block_sparse_xla import prefers_dense
from sparsejax.ops._fan_in_matmul_xla import costs


@dataclasses.dataclass(frozen=True)
class CondensedChoice:
    """What became of one leaf, and why.

    Attributes:
      shape: Of the weight.
      density: Fraction of the entries kept.
      form: The form chosen, in words.
      why: What in the mask allowed it, or ruled the others out.
      dense_is_faster: Whether the dense product of a weight with zeros would be, on the
        platform at hand; None where only ``sparsejax.explain`` at the shapes of a run
        can tell.
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
        absent. Weights are ``[k, n]``; of another rank they stay masked dense: take a
        stack of layers apart first.
      rows: Rows of x at which the report compares with dense.
      block_sides: Sides of blocks to look for.
      groups: Sizes m to look for; with none, N:M masks become constant fan-in, which is
        faster on a CPU.

    Returns:
      (a tree like ``params`` whose masked leaves are small dataclasses of arrays for
      ``apply_condensed``, or arrays where nothing is pruned; the report).

    Raises:
      ValueError: A mask has no leaf of ``params`` at its path, another shape, or is not
        boolean or concrete. The message names the leaf.

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
    choices: dict[str, CondensedChoice] = {}

    def one(path, leaf):
        name = path_name(path)
        if name not in found:
            return leaf
        mask = found[name]
        stored, form, why = _stored(leaf, mask, block_sides, groups)
        density = float(mask.mean()) if mask.size else 1.0
        faster = _dense_is_faster(stored, rows)
        choices[name] = CondensedChoice(mask.shape, density, form, why, faster)
        return stored

    return jax.tree_util.tree_map_with_path(one, params), CondenseReport(choices, rows)


def _checked(name, mask):
    """The mask as numpy."""
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(f"masks: got a traced mask at {name!r}, needed a concrete one")
    if getattr(mask, "dtype", None) != np.bool_:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(f"masks: got {got} at {name!r}, needed bool")
    return np.asarray(mask)


def _stored(w, mask, block_sides, groups):
    """(the weight in its form, the form in words, why)."""
    if mask.all():
        return w, "dense", "nothing is pruned"
    if mask.ndim != 2:
        why = f"{mask.ndim} axes, not a weight [k, n]"
        return CondensedMasked(w, jnp.asarray(mask)), "masked dense", why
    rows, cols = mask.any(axis=1), mask.any(axis=0)
    whole = f"{rows.sum()} of {rows.size} rows and {cols.sum()} of {cols.size} columns"
    if mask[np.ix_(rows, cols)].all():
        stored = _region(w, rows, cols, lambda part: part)
        return stored, "smaller dense", f"{whole} are kept whole"
    for side in block_sides:
        if _is_blocks(mask, side):
            layout = _layout_of("w", mask, (side, side))
            blocks = gather_blocks(w, layout)
            why = f"{layout.capacity} whole blocks are kept"
            return CondensedBlocks(blocks, layout), f"blocks {side}x{side}", why
    live = mask[:, cols]
    ablated = int((~cols).sum())
    also = f", {ablated} ablated columns taken out" if ablated else ""
    for m in groups:
        n = _group_count(live, m)
        if n:
            inner = lambda part, n=n, m=m: CondensedNM(
                *condense_nm(part, live, n=n, m=m), n, m
            )
            why = f"{n} of every {m} rows are kept{also}"
            return _region(w, None, cols, inner), f"N:M {n}:{m}", why
    counts = live.sum(axis=0)
    if (counts == counts[0]).all():
        inner = lambda part: CondensedFanIn(*condense_fan_in(part, live), mask.shape[0])
        why = f"every column keeps {counts[0]} of {mask.shape[0]}{also}"
        return _region(w, None, cols, inner), f"constant fan-in {counts[0]}", why
    part = jnp.asarray(mask[np.ix_(rows, cols)])
    stored = _region(w, rows, cols, lambda w: CondensedMasked(w, part))
    why = f"no blocks, no N:M, columns keep {counts.min()} to {counts.max()}"
    empty = f"; {whole} keep any" if not (rows.all() and cols.all()) else ""
    return stored, "masked dense", why + empty


def _region(w, rows, cols, inner):
    """``inner`` of the kept rows and columns; a region only if some are left out."""
    places = lambda kept: (
        None
        if kept is None or kept.all()
        else jnp.asarray(np.flatnonzero(kept), jnp.int32)
    )
    shape, rows, cols = w.shape, places(rows), places(cols)
    w = w if rows is None else w[rows]
    w = w if cols is None else w[:, cols]
    if rows is None and cols is None:
        return inner(w)
    return CondensedRegion(inner(w), rows, cols, shape)


def _is_blocks(mask, side):
    """Whether every block of that side is kept whole or not at all."""
    starts = [np.arange(0, size, side) for size in mask.shape]
    sums = np.add.reduceat(mask.astype(np.int64), starts[0], axis=0)
    sums = np.add.reduceat(sums, starts[1], axis=1)
    heights, widths = (
        np.minimum(side, size - start)
        for size, start in zip(mask.shape, starts, strict=True)
    )
    return bool(((sums == 0) | (sums == np.outer(heights, widths))).all())


def _group_count(mask, m):
    """How many of every m rows are kept, if that is the same everywhere; else 0."""
    if mask.shape[0] % m or mask.shape[0] == m:  # one group: a fan-in
        return 0
    counts = mask.reshape(-1, m, mask.shape[1]).sum(axis=1)
    return int(counts.flat[0]) if (counts == counts.flat[0]).all() else 0


def _dense_is_faster(stored, rows):
    """Whether a dense product would be faster; None where no static rule tells."""
    on_cpu = current_platform() == "cpu"
    match stored:
        case CondensedRegion(inner, _, _, _):
            return _dense_is_faster(inner, rows)
        case CondensedMasked():
            return True  # the same product, and a mask to read
        case CondensedFanIn(values, _, k):
            *forms, dense = costs("product", rows, k, *values.shape)
            return not on_cpu or dense < min(forms)
        case CondensedBlocks(blocks, layout):
            if not on_cpu:
                return None
            shape, block_shape = layout.shape, layout.block_shape
            slots = layout.capacity
            return prefers_dense(rows, *shape, block_shape, slots, blocks.dtype)
        case CondensedNM():
            return True if on_cpu else None  # on a CPU it is expanded, then multiplied
    return False
