"""What a sparse model keeps, what it costs, and which of its neurons are dead."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import masks as masks_lib
from sparsejax.transforms._leaves import default_leaf_filter
from sparsejax.transforms._sparsify import get_masks


class ReportRow(NamedTuple):
    """Figures of one leaf, or their sum over several. FLOPs are per row of input."""

    kept: int  # weights kept, whatever their value
    size: int  # weights
    forward_flops: int
    backward_flops: (
        int | float
    )  # an integer unless gradients are dense at some steps only
    dense_forward_flops: int
    dense_backward_flops: int
    dead_inputs: int  # inputs that no kept weight reads
    inputs: int
    dead_outputs: int  # outputs that no kept weight writes
    outputs: int

    @property
    def density(self) -> float:
        """Fraction kept; 1 where there is nothing."""
        return self.kept / self.size if self.size else 1.0


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What `report` found. `print(report)` shows a table.

    Attributes:
      leaves: A `ReportRow` for each masked leaf, by name.
      masked: Their sum.
      model: The sum over all leaves, those without a mask included.
      dense_gradients: Fraction of the steps that `backward_flops` takes to need
        gradients of pruned weights.
      skipped_updates: Mask updates not done because of NaN or inf.
    """

    leaves: dict[str, ReportRow]
    masked: ReportRow
    model: ReportRow
    dense_gradients: float
    skipped_updates: int

    def __str__(self) -> str:
        head = (
            *("leaf", "kept", "size", "density", "forward", "of dense"),
            *("backward", "of dense", "dead inputs", "dead outputs"),
        )
        rows = [*self.leaves.items(), ("all masked leaves", self.masked)]
        cells = [head, *(_cells(name, row) for name, row in rows)]
        # Neurons of leaves without a mask are all alive: no more to say of them.
        cells.append((*_cells("whole model", self.model)[:-2], "", ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        lines.append(
            "FLOPs of one row of input; backward with dense gradients at "
            f"{self.dense_gradients:.2%} of the steps"
        )
        if self.skipped_updates:
            lines.append(
                f"{self.skipped_updates} mask updates were skipped because of NaN or "
                "inf"
            )
        return "\n".join(lines)


def report(
    opt_state: Any,
    params: Any,
    *,
    axes: Mapping[str, masks_lib.Axes] | None = None,
    dense_gradients: float = 0.0,
) -> SparsityReport:
    r"""Counts what the masks keep, what products with them cost, and dead neurons.

    A weight of s entries of which n are kept costs, for each row that it multiplies
    (an example, a token, a position of a convolution's output),

    .. math::
      \text{forward} = 2n, \qquad
      \text{backward} = \underbrace{2n}_{dx} +
        \underbrace{2 \bigl((1 - \rho) n + \rho s\bigr)}_{dW}

    against 2s and 4s dense: one multiplication and one addition a weight, in
    operators that skip what is not kept. Growth that looks at gradients needs all of
    dW at a fraction rho of the steps, `dense_gradients`: 1 / every for `rigl`, 1 for
    rules that observe every step, 0 for `static` and
    `sparse_evolutionary_training`. Sums, biases, norms and lookups are not counted.

    An output is dead if no kept weight writes it, an input if none reads it; each
    position of a stacked axis has its own.

    Reads the masks on the host; not for use inside jit.

    Args:
      opt_state: State of `sparsify`, or of transformations around it.
      params: The whole model. Leaves without a mask count as dense, and multiply if
        `default_leaf_filter` would take them.
      axes: Meaning of axes by leaf name, as in `masks.erdos_renyi`; by default the
        last axis is the fan-out and the one before it the fan-in.
      dense_gradients: Fraction of the steps at which dW is dense, rho, in [0, 1].

    Returns:
      A `SparsityReport`.

    Raises:
      ValueError: No `SparsifyState` is in `opt_state`, its masks are not those of
        `params`, `dense_gradients` is outside [0, 1], or a pattern in `axes` matches
        no masked leaf or does not fit its shape.

    Example:
      >>> from sparsejax.transforms import gradual_magnitude, sparsify
      >>> params = {"kernel": jnp.array([[0.1, 3.0], [0.2, 4.0]]), "bias": jnp.ones(2)}
      >>> tx = sparsify(optax.sgd(0.1), gradual_magnitude(sparsity=0.5, end=0))
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> found = report(opt_state, params)
      >>> found.masked.density, found.model.density
      (0.5, 0.6666666666666666)
      >>> found.leaves["kernel"].forward_flops, found.leaves["kernel"].dead_outputs
      (4, 1)
    """
    masks_lib.check_density(dense_gradients, "dense_gradients")
    masks = masks_lib.named_leaves(get_masks(opt_state))
    weights = masks_lib.named_leaves(params)
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            got = weights[name].shape if name in weights else "nothing"
            raise ValueError(
                f"params must hold an array of shape {mask.shape} at {name!r}, where "
                f"opt_state has a mask, got {got}"
            )
    declared = dict(axes or {})
    patterns = masks_lib.match_names(declared, masks, "axes")
    counts = masks_lib.density(masks).leaves
    leaves = {}
    for name, mask in masks.items():
        flops = _flops(*counts[name], mask.ndim >= 2, dense_gradients)
        meaning = declared[patterns[name]] if name in patterns else masks_lib.Axes()
        leaves[name] = ReportRow(*counts[name], *flops, *_dead(mask, meaning))
    others = []
    for name, weight in weights.items():
        if name not in masks:
            size = math.prod(weight.shape)
            flops = _flops(size, size, default_leaf_filter(name, weight), 0.0)
            others.append(ReportRow(size, size, *flops, 0, 0, 0, 0))
    return SparsityReport(
        leaves=leaves,
        masked=_total([*leaves.values()]),
        model=_total([*leaves.values(), *others]),
        dense_gradients=float(dense_gradients),
        skipped_updates=_skipped_updates(opt_state),
    )


def _flops(
    kept: int, size: int, multiplies: bool, rho: float
) -> tuple[int, int | float, int, int]:
    """Forward, backward, and both dense."""
    if not multiplies:
        return 0, 0, 0, 0
    # 0 and 1 give integers, exact at any size.
    dense_dw = kept if rho == 0 else size if rho == 1 else kept + rho * (size - kept)
    return 2 * kept, 2 * kept + 2 * dense_dw, 2 * size, 4 * size


def _dead(mask: Any, axes: masks_lib.Axes) -> tuple[int, int, int, int]:
    """Dead inputs, inputs, dead outputs, outputs; none where there is no product."""
    if mask.ndim < 2:
        return 0, 0, 0, 0
    axes.logical_shape(mask.shape)  # refuses axes that do not fit

    def dead(own: tuple[int, ...]) -> tuple[int, int]:
        stay = {axis % mask.ndim for axis in (*own, *axes.stacked)}
        rest = tuple(axis for axis in range(mask.ndim) if axis not in stay)
        alive = np.asarray(jnp.any(mask, axis=rest))
        return int(np.sum(~alive)), alive.size

    return *dead(axes.fan_in), *dead(axes.fan_out)


def _skipped_updates(opt_state: Any) -> int:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "skipped_updates")
    return sum(int(np.sum(count)) for _, count in found)


def _total(rows: list[ReportRow]) -> ReportRow:
    return ReportRow(*(sum(column) for column in zip(_NOTHING, *rows, strict=True)))


_NOTHING = ReportRow(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def _cells(name: str, row: ReportRow) -> tuple[str, ...]:
    share = lambda part, whole: f"{part / whole:.4f}" if whole else "-"
    return (
        name,
        f"{row.kept:,}",
        f"{row.size:,}",
        f"{row.density:.4f}",
        f"{row.forward_flops:,}",
        share(row.forward_flops, row.dense_forward_flops),
        f"{row.backward_flops:,.0f}",
        share(row.backward_flops, row.dense_backward_flops),
        f"{row.dead_inputs:,} of {row.inputs:,}",
        f"{row.dead_outputs:,} of {row.outputs:,}",
    )
