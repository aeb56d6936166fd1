"""Picture of which experts are busy. Needs the extra `plot`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_MOST_TICKS = 24
_MOST_NUMBERS = 16  # columns in whose cells there is room for a number


def plot_expert_load(loads: Any, *, rows: str = "layer") -> Any:
    """Draws the load of every expert as a heat map, a row per layer or per step.

    White is an even share, red more, blue less; a cross marks an expert that no token
    went to. At the right of each row stands its largest load over the mean.

    Args:
      loads: Tokens per expert, such as ``RoutingMetrics.load``: an array ``[e]`` or
        ``[rows, e]``, or arrays ``[e]`` by the name of the row, such as its step.
        Counts or shares: every row is drawn relative to its mean.
      rows: What a row is, to write beside it.

    Returns:
      A `matplotlib.figure.Figure`, with `savefig`. It is not pyplot's: nothing has
      to be closed.

    Raises:
      ImportError: matplotlib is not there.
      ValueError: There is nothing to draw, rows have different experts, or a load is
        negative or not finite.

    Example:
      >>> loads = {"first": jnp.array([3, 1]), "last": jnp.array([2, 2])}
      >>> figure = plot_expert_load(loads)
      >>> print(figure.axes[0].get_xlabel())
      expert
    """
    figure_type, norm_type = _matplotlib()
    names, loads = _table(loads)
    count, experts = loads.shape
    mean = loads.mean(1, keepdims=True)
    # Of a row without tokens nothing is known: it stays grey.
    ratio = np.divide(loads, mean, out=np.full(loads.shape, np.nan), where=mean > 0)
    most = np.nanmax(ratio, initial=2)

    height = min(max(2.2, 1.4 + 0.32 * count), 9)
    width = min(max(4.5, 2.4 + 0.42 * experts), 11)
    figure = figure_type(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.set_facecolor("0.85")
    image = axis.imshow(
        ratio,
        cmap="RdBu_r",
        norm=norm_type(vcenter=1, vmin=0, vmax=most),
        aspect="auto",
        interpolation="nearest",
    )
    few_rows = count <= _MOST_TICKS
    if few_rows:
        for row, column in np.argwhere(ratio == 0):
            axis.plot(column, row, "x", color="white", markersize=5)
        for row in range(count):
            if mean[row, 0] > 0:
                axis.annotate(
                    f"{ratio[row].max():.2f}",
                    (1, row),
                    xycoords=("axes fraction", "data"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize="small",
                )
        axis.annotate(
            "max",
            (1, 1),
            xycoords="axes fraction",
            xytext=(4, 3),
            textcoords="offset points",
            fontsize="small",
        )
    if few_rows and experts <= _MOST_NUMBERS:
        for row, column in np.argwhere(ratio > 0):
            value = ratio[row, column]
            dark = value < 0.45 or value > 1 + 0.6 * (most - 1)
            axis.annotate(
                f"{value:.2f}",
                (column, row),
                ha="center",
                va="center",
                fontsize="x-small",
                color="white" if dark else "0.25",
            )
    axis.set_xlabel("expert")
    axis.set_ylabel(rows)
    axis.set_xticks(_ticks(experts))
    shown = _ticks(count)
    axis.set_yticks(shown, [names[i] for i in shown])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    beside = 0.1 if few_rows else 0.02  # of the column of the largest loads
    figure.colorbar(image, label="load / mean load", fraction=0.05, pad=beside)
    return figure


def _table(loads: Any) -> tuple[list[str], np.ndarray]:
    """Names of the rows, and loads [rows, e] in float64."""
    if isinstance(loads, Mapping):
        names = [str(name) for name in loads]
        found = [np.asarray(load, np.float64) for load in loads.values()]
        if len({load.shape for load in found}) > 1:
            raise ValueError(
                "loads must have equal numbers of experts, got shapes "
                f"{[load.shape for load in found]}"
            )
        table = np.array(found)
    else:
        table = np.asarray(loads, np.float64)
        table = table[None] if table.ndim == 1 else table
        names = [str(i) for i in range(len(table))] if table.ndim else []
    if table.ndim != 2 or not table.size:
        raise ValueError(f"loads must be [rows, experts] to draw, got {table.shape}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("loads must be finite and not negative")
    return names, table


def _ticks(count: int) -> range:
    return range(0, count, -(-count // _MOST_TICKS))


def _matplotlib() -> Any:
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which the extra named plot installs: "
            "pip install 'sparsejax[plot]'"
        ) from error
    return Figure, TwoSlopeNorm
