"""Pictures of masks: density over layers, change over time. Needs the extra `plot`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sparsejax import masks as masks_lib
from sparsejax.transforms._report import SparsityReport

# Told apart also without colour vision (Okabe and Ito).
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_FEW = 8  # lines that a legend can name; more are coloured by depth


def mask_change(before: Any, after: Any) -> dict[str, float]:
    r"""Fraction of the kept weights that changed from one set of masks to another.

    .. math:: c_l = 1 - \frac{|m_l \wedge m'_l|}{\max(|m_l|, |m'_l|)}

    Where counts are equal this is the share dropped, and as many grown; where masks
    only shrink or only grow it is the share dropped or grown. Two empty masks have
    changed by 0.

    Reads the masks on the host; not for use inside jit.

    Args:
      before: Tree of boolean arrays, such as `get_masks` returns.
      after: The same at another time.

    Returns:
      The fraction by leaf name, and that of all leaves as one mask by the name
      "all masked leaves".

    Raises:
      ValueError: The trees have different leaves or shapes.

    Example:
      >>> before = {"w": jnp.array([True, True, True, True, False])}
      >>> mask_change(before, {"w": jnp.array([True, True, True, False, True])})
      {'w': 0.25, 'all masked leaves': 0.25}
    """
    before, after = masks_lib.named_leaves(before), masks_lib.named_leaves(after)
    shapes = [{k: mask.shape for k, mask in tree.items()} for tree in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"masks to compare must have equal leaves, got {shapes[1]} after "
            f"{shapes[0]}"
        )
    counts = {}
    for name in before:
        old, new = np.asarray(before[name]), np.asarray(after[name])
        counts[name] = [int(np.count_nonzero(m)) for m in (old & new, old, new)]
    counts[_ALL] = [
        sum(column) for column in zip([0, 0, 0], *counts.values(), strict=True)
    ]
    change = lambda both, most: 1 - both / most if most else 0.0
    return {k: change(both, max(old, new)) for k, (both, old, new) in counts.items()}


def plot_density(reports: SparsityReport | Mapping[str, SparsityReport]) -> Any:
    """Draws the density of every masked leaf, of one model or of several.

    Dashed lines are the densities over all masked leaves. The axis is logarithmic
    where densities differ much.

    Args:
      reports: What `report` returned, or several of them by the name to show; they
        may have different leaves.

    Returns:
      A `matplotlib.figure.Figure`, with `savefig`. It is not pyplot's: nothing has
      to be closed.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: There is no masked leaf to draw.

    Example:
      >>> from sparsejax.transforms import report, sparsify, static
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> tx = sparsify(optax.sgd(0.1), static(sparsity=0.5, key=jax.random.key(0)))
      >>> figure = plot_density(report(tx.init(params), params))
      >>> print(figure.axes[0].get_xlabel())
      density
    """
    figure_type = _figure_type()
    single = isinstance(reports, SparsityReport)
    named = {"": reports} if single else dict(reports)
    names = _in_order(k for found in named.values() for k in found.leaves)
    if not names:
        raise ValueError("reports must hold a masked leaf to draw, got none")
    figure = figure_type(
        figsize=(7, 1.6 + 0.3 * max(len(names), 3)), layout="constrained"
    )
    axis = figure.add_subplot()
    height = {name: -i for i, name in enumerate(names)}  # the first leaf on top
    spread = [0.36 * (2 * i + 1 - len(named)) / len(named) for i in range(len(named))]
    everything = []
    for (label, found), color, shift in zip(
        named.items(), _COLORS * len(named), spread, strict=False
    ):
        x = [row.density for row in found.leaves.values()]
        y = [height[name] - shift for name in found.leaves]
        everything += x
        axis.plot(x, y, "o", color=color, markersize=6, label=label or None, zorder=3)
        total = found.masked.density
        axis.axvline(total, color=color, linestyle="--", linewidth=1, alpha=0.7)
        if single:
            axis.annotate(
                f" all: {total:.3g}",
                (total, 1),
                xycoords=("data", "axes fraction"),
                color=color,
                va="bottom",
                ha="center",
            )
            for at, to in zip(x, y, strict=True):
                axis.annotate(
                    f"{at:.3g}",
                    (at, to),
                    xytext=(7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize="small",
                    color="0.35",
                )
    low, high = min(everything), max(everything)
    if 0 < low < high / 4:
        axis.set_xscale("log")
        axis.set_xlim(low / 1.5, high * 1.7)  # room for the labels
        ticks = [digit * 10.0**power for power in range(-9, 1) for digit in (1, 2, 5)]
        axis.set_xticks([x for x in ticks if low / 1.5 <= x <= high * 1.7])
        axis.xaxis.set_major_formatter("{x:.3g}")
        axis.xaxis.set_minor_formatter(lambda *_: "")
    else:
        axis.set_xlim(0, 1.12 * max(high, 1e-3))
    axis.set_yticks([height[name] for name in names], names)
    axis.set_ylim(-len(names) + 0.4, 0.6)
    for i in range(len(names) - 1):
        axis.axhline(-i - 0.5, color="0.92", linewidth=0.7)
    axis.set_xlabel("density")
    _plain(axis)
    axis.grid(axis="x", alpha=0.25)
    if not single:
        figure.legend(
            loc="outside upper center", ncols=min(len(named), 4), frameon=False
        )
    return figure


def plot_mask_change(snapshots: Mapping[int, Any]) -> Any:
    """Draws how masks change over time: between snapshots, and since the first.

    Args:
      snapshots: Masks, such as `get_masks` returns, by the step they were taken at;
        at least two. See `mask_change` for what is drawn.

    Returns:
      A `matplotlib.figure.Figure`, with `savefig`. It is not pyplot's: nothing has
      to be closed.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: There are fewer than two snapshots, or their leaves differ.

    Example:
      >>> masks = [{"w": jnp.arange(8) < 4}, {"w": jnp.arange(8) % 2 == 0}]
      >>> figure = plot_mask_change({0: masks[0], 100: masks[1]})
      >>> [axis.get_title(loc="left") for axis in figure.axes]
      ['since the snapshot before', 'since the first, step 0']
    """
    figure_type = _figure_type()
    if len(snapshots) < 2:
        raise ValueError(f"snapshots must be at least two, got {len(snapshots)}")
    steps = sorted(snapshots)
    masks = [snapshots[step] for step in steps]
    views = (
        (
            "since the snapshot before",
            [mask_change(*two) for two in zip(masks[:-1], masks[1:], strict=True)],
        ),
        (
            f"since the first, step {steps[0]}",
            [mask_change(masks[0], after) for after in masks],
        ),
    )
    names = _in_order(name for name in views[0][1][0] if name != _ALL)
    many = len(names) > _FEW
    figure = figure_type(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (title, changes) in zip(axes, views, strict=True):
        x = steps[-len(changes) :]
        for i, name in enumerate(names):
            axis.plot(
                x,
                [change[name] for change in changes],
                ".-" if not many else "-",
                color=_depth(i / max(len(names) - 1, 1)) if many else _color(i),
                linewidth=1.4 if not many else 0.8,
                label=None if many else name,
            )
        axis.plot(
            x,
            [change[_ALL] for change in changes],
            "k--" if not many else "k-",
            linewidth=1.6,
            label=_ALL,
            zorder=3,
        )
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        _plain(axis)
    axes[0].set_ylabel("fraction of kept weights that changed")
    handles, labels = axes[0].get_legend_handles_labels()
    title = f"colour: the {len(names)} leaves, from the first to the last" * many
    figure.legend(
        handles,
        labels,
        title=title or None,
        loc="outside lower center",
        ncols=min(len(labels), 5),
        frameon=False,
    )
    return figure


_ALL = "all masked leaves"


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which the extra named plot installs: "
            "pip install 'sparsejax[plot]'"
        ) from error
    return Figure


def _in_order(names: Iterable[str]) -> list[str]:
    """Each name once, layer 2 before layer 10."""
    number = lambda part: (0, int(part), "") if part.isdecimal() else (1, 0, part)
    key = lambda name: [number(part) for part in re.split(r"(\d+)", name)]
    return sorted(set(names), key=key)


def _color(i: int) -> str:
    return [*_COLORS, "#999999", "#8c6d31"][i]


def _depth(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
