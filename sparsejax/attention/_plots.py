"""Pictures of masks, and of what each head keeps. Need the extra `plot`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax.attention._block_mask import BlockMask

_EMPTY, _PARTIAL, _FULL = "white", "#9ecae1", "#08519c"
_MOST_HEADS = 16
_MOST_TICKS = 24
_MOST_NUMBERS = 16  # columns in whose cells there is room for a number


def plot_block_mask(mask: BlockMask, *, batch: int = 0) -> Any:
    """Draws which blocks are computed, a panel per head.

    Dark blocks are allowed as a whole, light ones in part, white ones are not computed.
    Above each panel stands its density, the listed blocks over all.

    Args:
      mask: Concrete. The first 16 heads are drawn, and one panel where all are alike.
      batch: Which entry of the batch.

    Returns:
      A `matplotlib.figure.Figure`, with `savefig`. It is not pyplot's: nothing has
      to be closed.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: ``batch`` is not in the mask.

    Example:
      >>> at = sparsejax.attention
      >>> heads = at.per_head([at.sliding_window(256), at.strided(512)])
      >>> mask = at.block_mask(heads & at.causal(), 2048, 2048)
      >>> figure = at.plot_block_mask(mask)
      >>> print(figure.axes[0].get_title())
      head 0: 17.6%
    """
    figure_type, patch_type, colors = _matplotlib()
    entries, heads = mask.kv_idx.shape[:2]
    if not 0 <= batch < entries and entries > 1:
        raise ValueError(f"batch: got {batch}, needed one of the {entries} entries")
    entry = min(batch, entries - 1)
    state = _states(mask, entry)[:_MOST_HEADS]
    nq, nk = mask.grid

    columns = min(len(state), 4 if len(state) > 3 else len(state))
    rows = -(-len(state) // columns)
    tall = min(max(nq / nk, 0.15), 3)
    wide = 4.2 if columns == 1 else 2.6
    figure = figure_type(
        figsize=(wide * columns + 0.6, (0.9 * wide * tall + 0.45) * rows + 0.8),
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    shades = colors.ListedColormap([_EMPTY, _PARTIAL, _FULL])
    for head, (axis, blocks) in enumerate(zip(axes, state, strict=False)):
        axis.imshow(
            blocks,
            cmap=shades,
            vmin=0,
            vmax=2,
            aspect="equal" if 0.15 <= nq / nk <= 3 else "auto",
            interpolation="nearest",
        )
        which = f"head {head}" if heads > 1 else "all heads"
        axis.set_title(f"{which}: {np.mean(blocks > 0):.1%}", fontsize="medium")
        axis.set_xticks(_ticks(nk, 8))
        axis.set_yticks(_ticks(nq, 8))
        axis.tick_params(labelsize="small", length=2)
    for axis in axes[len(state) :]:
        axis.set_visible(False)
    figure.legend(
        handles=[
            patch_type(facecolor=_FULL, label="in full"),
            patch_type(facecolor=_PARTIAL, label="in part"),
            patch_type(facecolor=_EMPTY, edgecolor="0.6", label="not computed"),
        ],
        loc="outside upper center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    figure.supxlabel(f"block of {mask.block_shape[1]} keys", fontsize="medium")
    figure.supylabel(f"block of {mask.block_shape[0]} queries", fontsize="medium")
    return figure


def plot_heads(stats: Any, *, rows: str = "layer") -> Any:
    """Draws density and recall of every head as two heat maps, a row per layer.

    Args:
      stats: ``BlockStats`` of each layer, in a sequence, or in a mapping by the name of
        its row; or those of one. Means over the batch are drawn.
      rows: What a row is, to write beside it.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: There is nothing to draw, or layers have different heads.

    Example:
      >>> from collections import namedtuple
      >>> Stats = namedtuple("Stats", "density recall overflow")
      >>> layer = Stats(jnp.full((2, 4), 0.1), jnp.full((2, 4), 0.9), None)
      >>> figure = sparsejax.attention.plot_heads({"first": layer, "last": layer})
      >>> print([axis.get_title() for axis in figure.axes[:2]])
      ['density, mean 10.0%', 'recall, mean 90.0%']
    """
    figure_type, *_ = _matplotlib()
    names, density, recall = _tables(stats)
    count, heads = density.shape
    height = min(max(2.4, 1.6 + 0.32 * count), 9)
    width = min(max(7.0, 3.2 + 0.84 * heads), 16)
    figure = figure_type(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    # Densities are small: their scale ends at the largest, that of recall at 1.
    densest = max(np.nanmax(density, initial=0.0), 0.01)
    for axis, table, title, shades, most in (
        (axes[0], density, "density", "Blues", densest),
        (axes[1], recall, "recall", "Greens", 1.0),
    ):
        axis.set_facecolor("0.85")  # what is not finite
        image = axis.imshow(
            table,
            cmap=shades,
            vmin=0,
            vmax=most,
            aspect="auto",
            interpolation="nearest",
        )
        if count <= _MOST_TICKS and heads <= _MOST_NUMBERS:
            for row, head in np.argwhere(np.isfinite(table)):
                axis.annotate(
                    f"{100 * table[row, head]:.0f}",
                    (head, row),
                    ha="center",
                    va="center",
                    fontsize="x-small",
                    color="white" if table[row, head] > 0.6 * most else "0.25",
                )
        mean = np.nanmean(table) if np.isfinite(table).any() else np.nan
        axis.set_title(f"{title}, mean {mean:.1%}", fontsize="medium")
        axis.set_xlabel("head")
        axis.set_xticks(_ticks(heads, _MOST_TICKS))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    axes[0].set_ylabel(rows)
    shown = _ticks(count, _MOST_TICKS)
    axes[0].set_yticks(shown, [names[i] for i in shown])
    return figure


def _states(mask: BlockMask, entry: int) -> np.ndarray:
    """0 not listed, 1 in part, 2 full, of each block: [heads, nq, nk]."""
    listed, full = np.asarray(mask.to_blocks()), np.asarray(mask.full_blocks())
    return listed[entry].astype(int) + full[entry]


def _tables(stats: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the rows; density and recall, [rows, heads] in float64."""
    if hasattr(stats, "density"):
        stats = [stats]
    named = stats if isinstance(stats, Mapping) else dict(enumerate(stats))
    tables = []
    for field in ("density", "recall"):
        found = [np.asarray(getattr(s, field), np.float64) for s in named.values()]
        means = [table.mean(0) if table.ndim == 2 else table for table in found]
        shapes = {table.shape for table in means}
        if len(shapes) != 1 or any(m.ndim != 1 or not m.size for m in means):
            raise ValueError(
                f"stats: got {field} of shapes {[t.shape for t in found]}, needed "
                "[b, h] with equal heads for at least one layer"
            )
        tables.append(np.array(means))
    return [str(name) for name in named], tables[0], tables[1]


def _ticks(count: int, most: int) -> range:
    return range(0, count, -(-count // most))


def _matplotlib() -> Any:
    try:
        from matplotlib import colors
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which the extra named plot installs: "
            "pip install 'sparsejax[plot]'"
        ) from error
    return Figure, Patch, colors
