"""Which form a mask allows: the choice that ``condense`` makes for each leaf."""

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
from sparsejax.layers._convert import _layout_of, _over_stack
from sparsejax.layouts import condense_fan_in, condense_nm, gather_blocks
from sparsejax.ops import _fan_in_matmul_xla as fan_in_xla
from sparsejax.ops._block_sparse_xla import prefers_dense
from sparsejax.ops._nm_matmul_xla import form as nm_form


def choose_form(w, mask, stacked, block_sides, groups):
    """(the weight in its form, the form in words, why)."""
    if mask.all():
        return w, "dense", "nothing is pruned"
    if mask.ndim == 2:
        return _choose_of_one(w, mask, block_sides, groups)
    if mask.ndim > 2 and stacked:
        return _choose_of_stack(w, mask, block_sides, groups)
    why = f"{mask.ndim} axes, not a weight [k, n]"
    return CondensedMasked(w, jnp.asarray(mask)), "masked dense", why


def _choose_of_one(w, mask, block_sides, groups):
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
    keep = f"columns keep {counts.min()} to {counts.max()}"
    why = f"no {_tried(block_sides, groups)}, {keep}"
    empty = f"; {whole} keep any" if not (rows.all() and cols.all()) else ""
    return stored, "masked dense", why + empty


def _choose_of_stack(w, mask, block_sides, groups):
    """A form that every layer of ``[..., k, n]`` has, with as many numbers stored."""
    depth, k = mask.ndim - 2, mask.shape[-2]
    # Where no layer keeps anything, a fan-in of 0 is what stores nothing.
    for side in block_sides if mask.any() else ():
        if all(_is_blocks(each, side) for each in mask.reshape(-1, *mask.shape[-2:])):
            layout = _layout_of("w", mask, (side, side))
            blocks = _over_stack(gather_blocks, depth)(w, layout)
            why = f"at most {layout.capacity} whole blocks are kept in a layer"
            return CondensedBlocks(blocks, layout), f"blocks {side}x{side}", why
    stack = lambda fn: _over_stack(fn, depth)(w, jnp.asarray(mask))
    for m in groups:
        n = _group_count(mask, m)
        if n:
            values, indices = stack(
                lambda w, mask, n=n, m=m: condense_nm(w, mask, n=n, m=m)
            )
            why = f"{n} of every {m} rows are kept in every layer"
            return CondensedNM(values, indices, n, m), f"N:M {n}:{m}", why
    counts = mask.sum(axis=-2)
    fan_in = int(counts.max())
    if counts.min() == fan_in:
        values, indices = stack(lambda w, mask: condense_fan_in(w, mask, fan_in=fan_in))
        why = f"every column keeps {fan_in} of {k} in every layer"
        return CondensedFanIn(values, indices, k), f"constant fan-in {fan_in}", why
    keep = f"columns keep {counts.min()} to {fan_in}"
    why = f"layers share no {_tried(block_sides, groups)}, {keep}"
    return CondensedMasked(w, jnp.asarray(mask)), "masked dense", why


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


def _tried(block_sides, groups):
    """The forms looked for, in words."""
    listed = lambda sizes: "/".join(map(str, sizes)) or "(none tried)"
    return f"blocks of side {listed(block_sides)}, N:M of m {listed(groups)}"


def _is_blocks(mask, side):
    """Whether every block of that side is kept whole or not at all."""
    if side > max(mask.shape):  # one block, most of it beyond the edges
        return False
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
    k, n = mask.shape[-2:]
    if k % m or k == m:  # one group: a fan-in
        return 0
    counts = mask.reshape(-1, m, n).sum(axis=1)
    return int(counts.flat[0]) if (counts == counts.flat[0]).all() else 0


def dense_is_faster(stored, rows):
    """Whether a dense product would be faster; None where no static rule tells.

    A rule that finds both about as fast tells nothing.
    """
    on_cpu = current_platform() == "cpu"
    match stored:
        case CondensedRegion(inner, _, _, _):
            return dense_is_faster(inner, rows)
        case CondensedMasked():
            # The same product; on a CPU the weight is masked by a pass of its own, for
            # 1.1 to 1.5 times the dense time at 256 rows, 2 to 7 times at one.
            return True if on_cpu else None
        case CondensedFanIn(values, _, k):
            if not on_cpu:
                return values.size > 0
            return fan_in_xla.dense_is_faster("product", rows, k, *values.shape[-2:])
        case CondensedBlocks(blocks, layout):
            if not on_cpu:
                return None
            shape, block_shape = layout.shape, layout.block_shape
            slots = layout.capacity
            return prefers_dense(rows, *shape, block_shape, slots, blocks.dtype)
        case CondensedNM(values, _, n, m):
            k = values.shape[-2] // n * m
            # But for the few rows that it selects from, a CPU expands, then multiplies.
            return nm_form(rows, k, n, m) != "select" if on_cpu else None
    return False
