"""What the examples show of a run: log, progress, table, pictures."""

import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.progress
import rich.table

from sparsejax import routing, transforms
from sparsejax.layouts import BlockLayout

# Told apart also without colour vision (Okabe and Ito).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


class Log:
    """JSON lines, one record per line, each on disk when ``write`` returns."""

    def __init__(self, path: pathlib.Path):
        self.path, self.records = path, []

    def open(self, *, keep: int) -> None:
        """Begins the file; keeps records up to step ``keep``, where a run resumes.

        Those after it are of steps that the run will do again.
        """
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line, if killed while writing it
                break
            if record["step"] <= keep:
                self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Display:
    """A bar per run on a terminal; elsewhere a line per validation."""

    def __init__(self, runs: Sequence[Any], text: Any):
        self.console = rich.console.Console()
        self.console.print(
            f"text: {text.source}: {len(text.train) / 1e6:.1f} MB to train on, "
            f"{len(text.validation) / 1e6:.1f} MB to validate on"
        )
        for run in runs:
            where = f", resumed at step {run.step}" if run.step else ""
            self.console.print(
                f"{run.name}: {stored_parameters(run):,} parameters, compiled in "
                f"{run.compile_seconds:.1f} s{where}"
            )
        self.progress = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            "{task.fields[loss]:.3f} bits/byte",
            "{task.fields[speed]:,.0f} tokens/s",
            "density {task.fields[density]:.1%}",
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks = {
            run.name: self.progress.add_task(
                run.name,
                total=run.config.steps,
                completed=run.step,
                loss=math.nan,
                speed=math.nan,
                density=density(run),
            )
            for run in runs
        }

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def update(self, run: Any) -> None:
        """Shows the newest record of a run."""
        if not run.log.records:
            return
        record = run.log.records[-1]
        loss, seconds = record["train_bits_per_byte"], record["step_seconds"]
        speed = run.config.batch * run.config.length / seconds
        self.progress.update(
            self.tasks[run.name], completed=run.step, loss=loss, speed=speed
        )
        validation = record.get("validation_bits_per_byte")
        if validation is not None and not self.console.is_terminal:
            more = ""
            if "attention_density" in record:
                more = f", attention {attended(run):.1%} dense"
            if "load" in record:
                more += (
                    f", busiest expert {busiest(record['load']):.2f}x the mean, "
                    f"{record['dropped']:.1%} dropped"
                )
            self.console.print(
                f"{run.name} step {run.step}/{run.config.steps}: {loss:.3f} bits/byte, "
                f"validation {validation:.3f}, {speed:,.0f} tokens/s{more}"
            )


def finish(runs: Sequence[Any], out: pathlib.Path) -> None:
    """Prints the table and writes ``summary.json`` and the pictures."""
    rows = [summarize(run) for run in runs]
    (out / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")
    pictures = {"loss.png": plot_loss}
    if any(run.first_topology for run in runs):
        pictures["topology.png"] = plot_topology
    if any(run.config.ffn == "moe" and run.log.records for run in runs):
        pictures["load.png"] = plot_load
    for name, plot in pictures.items():
        plot(runs, out / name)
    console = rich.console.Console()
    console.print(make_table(rows))
    console.print(f"wrote {', '.join(pictures)}, summary.json and the logs to {out}")


# ---- numbers -----------------------------------------------------------------------


def is_layout(x: Any) -> bool:
    """Whether a node of a tree is a layout, for ``is_leaf``."""
    return isinstance(x, BlockLayout)


def topology_of(state: Any, config: Any) -> dict[str, np.ndarray]:
    """Share kept of each block of each sparse layer, [k / block, n / block]."""
    found = {}
    if config.ffn == "block_sparse":
        leaves = jax.tree.leaves_with_path(state.layouts, is_leaf=is_layout)
        for path, layout in leaves:
            if layout.rows.ndim == 1:
                found |= by_layer(path, layout.to_mask())
            else:  # stacked for scan
                found |= by_layer(path, jax.vmap(BlockLayout.to_mask)(layout))
    elif config.ffn == "masked":
        masks = transforms.get_masks(state.opt_state)
        for path, mask in jax.tree.leaves_with_path(masks):
            found |= by_layer(path, pool(mask, config.block))
    return found


def by_layer(path: tuple, share: Any) -> dict[str, np.ndarray]:
    """``blocks.0.mlp.up.kernel_layout.value`` -> ``{"layer 0 up": share}``.

    Stacked layers have no number in their path and a leading axis instead.
    """
    words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    at, share = words.index("mlp"), np.asarray(share, np.float32)
    if share.ndim == 2:
        return {f"layer {words[at - 1]} {words[at + 1]}": share}
    return {f"layer {i} {words[at + 1]}": layer for i, layer in enumerate(share)}


def pool(mask: jax.Array, side: int) -> np.ndarray:
    """Share of True in tiles of side x side; those at the edges may be smaller."""
    total = np.asarray(mask, np.float32)
    area = np.ones_like(total)
    for axis in (-2, -1):
        starts = range(0, mask.shape[axis], side)
        total, area = (np.add.reduceat(x, starts, axis) for x in (total, area))
    return total / area


def density(run: Any) -> float:
    """Share of the feed-forward weights that a token meets; 1 where all are dense.

    Of structured ones how many numbers they are, over those of dense ones.
    """
    config, topology = run.config, topology_of(run.state, run.config)
    if config.ffn == "moe":
        return config.experts_per_token / config.experts
    if not topology:
        leaves = jax.tree.leaves_with_path(run.state.params)
        stored = sum(
            p.size for path, p in leaves if "mlp" in jax.tree_util.keystr(path)
        )
        return stored / (2 * config.layers * config.width * config.ffn_width)
    sizes = sum(share.size for share in topology.values())
    return sum(float(share.sum()) for share in topology.values()) / sizes


def attended(run: Any) -> float:
    """Share of attention's blocks that is computed, of all layers; 1 where all are."""
    records = [r for r in run.log.records if "attention_density" in r]
    return float(np.mean(records[-1]["attention_density"])) if records else 1.0


def stored_parameters(run: Any) -> int:
    """How many numbers the parameters are, padding of the block arrays apart."""
    padding = sum(
        (layout.rows.size - int(jnp.sum(layout.rows < layout.grid[0])))
        * math.prod(layout.block_shape)
        for layout in jax.tree.leaves(run.state.layouts, is_leaf=is_layout)
    )
    return sum(p.size for p in jax.tree.leaves(run.state.params)) - padding


def idle_parameters(config: Any) -> int:
    """How many of a mixture's parameters a token does not use."""
    if config.ffn != "moe":
        return 0
    expert = 2 * config.width * (config.expert_width or config.ffn_width)
    return config.layers * (config.experts - config.experts_per_token) * expert


def busiest(load: Any) -> float:
    """Load of the busiest expert over the mean of its layer's; of (layers, E)."""
    load = np.asarray(load)
    return float((load.max(axis=1) / load.mean(axis=1)).max())


def flops_per_token(run: Any) -> int:
    """Of a train step: forward, and backward at twice that.

    Six for each weight of a product (a masked weight is multiplied all the same), and
    attention's two products, over the positions that are computed. The embedding is a
    lookup.
    """
    config = run.config
    norms = (2 * config.layers + 1) * config.width
    products = stored_parameters(run) - norms - 256 * config.width
    products -= idle_parameters(config)
    pairs = attended(run) * config.length  # of each token
    return 6 * products + round(12 * config.layers * pairs * config.width)


def summarize(run: Any) -> dict[str, Any]:
    """One row of the table, times as medians over the turns of this log."""
    config, records = run.config, run.log.records
    step = statistics.median([r["step_seconds"] for r in records] or [math.nan])
    topology_steps = [s for r in records for s in r["topology_step_seconds"]]
    topology_step = statistics.median(topology_steps or [0.0])
    amortized = step + topology_step / config.every
    experts = {}
    if config.ffn == "moe" and records:
        experts = {
            "busiest_expert": busiest(records[-1]["load"]),
            "dropped": records[-1]["dropped"],
        }
    return {
        "name": run.name,
        "ffn": config.ffn,
        "updater": config.updater,
        "density": density(run),
        "attention": config.attention,
        "attention_density": attended(run),
        "steps": run.step,
        "validation_bits_per_byte": run.validation,
        "stored_parameters": stored_parameters(run),
        "flops_per_token": flops_per_token(run),
        "step_seconds": step,
        "topology_step_seconds": topology_step,
        "amortized_step_seconds": amortized,
        "tokens_per_second": config.batch * config.length / amortized,
        "compile_seconds": run.compile_seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **experts,
    }


def make_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """The runs side by side, each with its ratio to the first."""
    table = rich.table.Table(title=f"After {rows[0]['steps']} steps")
    table.add_column("")
    for row in rows:
        table.add_column(row["name"], justify="right")

    def add(label: str, show: str, key: str, scale: float = 1, ratio: bool = True):
        cells = []
        for row in rows:
            if key not in row:
                cells.append("")
                continue
            cell = show.format(row[key] * scale)
            if ratio and row is not rows[0]:
                cell += f" ({row[key] / rows[0][key]:.2f}x)"
            cells.append(cell)
        table.add_row(label, *cells)

    add("validation, bits per byte", "{:.3f}", "validation_bits_per_byte", ratio=False)
    add("feed-forward density", "{:.1%}", "density", ratio=False)
    if any(row["attention"] != "dense" for row in rows):
        add("attention density", "{:.1%}", "attention_density", ratio=False)
    add("stored parameters, M", "{:.2f}", "stored_parameters", 1e-6)
    add("MFLOPs per token", "{:.1f}", "flops_per_token", 1e-6)
    add("train step, ms, topology amortized", "{:.1f}", "amortized_step_seconds", 1e3)
    add("  train step alone, ms", "{:.1f}", "step_seconds", 1e3)
    add("  topology step alone, ms", "{:.1f}", "topology_step_seconds", 1e3, False)
    add("tokens per second", "{:,.0f}", "tokens_per_second")
    add("compiling, s", "{:.1f}", "compile_seconds", ratio=False)
    if any("dropped" in row for row in rows):
        add("busiest expert over the mean", "{:.2f}", "busiest_expert", ratio=False)
        add("choices dropped", "{:.1%}", "dropped", ratio=False)
    return table


# ---- pictures ----------------------------------------------------------------------


def plot_loss(runs: Sequence[Any], path: pathlib.Path) -> None:
    """Bits per byte over steps and over time; thin: training, dots: validation."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        records = run.log.records
        steps = np.array([r["step"] for r in records])
        turns = np.diff(steps, prepend=0)
        seconds = np.cumsum(
            [
                n * r["step_seconds"] + sum(r["topology_step_seconds"])
                for n, r in zip(turns, records, strict=True)
            ]
        )
        train = np.array([r["train_bits_per_byte"] for r in records])
        held = np.array([r.get("validation_bits_per_byte", np.nan) for r in records])
        dots = np.isfinite(held)
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.plot(x, train, color=color, alpha=0.35, linewidth=1)
            axis.plot(
                x[dots], held[dots], "o-", color=color, markersize=4, label=run.name
            )
    axes[0].set(xlabel="train steps", ylabel="loss, bits per byte")
    axes[1].set(xlabel="time in train and topology steps, seconds")
    axes[0].set_title("Equal steps", loc="left")
    axes[1].set_title("Equal time", loc="left")
    axes[1].legend(title="dots: validation\nthin line: training", frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_load(runs: Sequence[Any], path: pathlib.Path) -> None:
    """Tokens per expert while training, per layer; of the first mixture of experts."""
    run = next(run for run in runs if run.config.ffn == "moe" and run.log.records)
    records, layers = run.log.records, run.config.layers
    some = max(2, 24 // layers)  # first and last turn at least; 24 lines can be read
    turns = np.unique(np.linspace(0, len(records) - 1, some).round().astype(int))
    loads = {
        f"layer {layer}, step {records[turn]['step']}": records[turn]["load"][layer]
        for layer in range(layers)
        for turn in turns
    }
    figure = routing.plot_expert_load(loads, rows="mean of the steps up to this one")
    figure.suptitle(f"{run.name}: tokens per expert")
    figure.savefig(path, dpi=150)


def plot_topology(runs: Sequence[Any], path: pathlib.Path) -> None:
    """Which blocks are alive before and after, per layer; of the first sparse run."""
    sparse = [run for run in runs if run.first_topology]
    moving = [run for run in sparse if run.config.updater != "static"]
    run = (moving or sparse)[0]
    after = topology_of(run.state, run.config)
    # Up before down; in both the hidden features run to the right.
    layers = sorted(after, key=lambda name: (int(name.split()[1]), "down" in name))
    turn = lambda name, x: x.T if name.endswith("down") else x
    figure, axes = plt.subplots(
        len(layers),
        2,
        figsize=(11, 0.9 + 1.2 * len(layers)),
        layout="constrained",
        squeeze=False,
    )
    dark, light = np.full(3, 0.2), np.full(3, 0.94)
    dropped, grown = (np.array(matplotlib.colors.to_rgb(c)) for c in COLORS[1:3])
    for row, name in zip(axes, layers, strict=True):
        before, now = (turn(name, x) for x in (run.first_topology[name], after[name]))
        both = np.minimum(before, now)[..., None]
        for axis, share, color in ((row[0], before, dropped), (row[1], now, grown)):
            only = share[..., None] - both
            image = light + both * (dark - light) + only * (color - light)
            axis.imshow(image.clip(0, 1), interpolation="nearest", aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.set_xticks(np.arange(1, share.shape[1]) - 0.5, minor=True)
            axis.set_yticks(np.arange(1, share.shape[0]) - 0.5, minor=True)
            axis.grid(which="minor", color="white", linewidth=0.8)
            axis.tick_params(which="minor", length=0)
        row[0].set_ylabel(f"{name}\n(d / {run.config.block})")
    axes[0, 0].set_title("before training", loc="left")
    axes[0, 1].set_title(f"after {run.step} steps", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel(f"hidden features / {run.config.block}")
    patch = matplotlib.patches.Patch
    figure.legend(
        handles=[
            patch(color="0.2", label="alive before and after"),
            patch(color=COLORS[1], label="dropped"),
            patch(color=COLORS[2], label="grown"),
            patch(facecolor="0.95", edgecolor="0.7", label="empty"),
        ],
        ncols=4,
        loc="outside upper center",
        frameon=False,
        title=f"{run.name}: blocks of the feed-forward weights",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
