"""What ``structured_finetune.py`` shows: progress, table, curves."""

import dataclasses
import json
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import matplotlib.lines

matplotlib.use("Agg")  # pictures go to files, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
import rich.progress
from _compare_report import markdown, on_terminal, score
from _upcycle_report import make_console

NAMES = {
    "dense": "dense",
    "magnitude": "largest entries, masked",
    "monarch": "Monarch",
    "pixelfly": "Pixelfly",
    "low_rank": "low rank",
    "block_diagonal": "block-diagonal",
    "afresh": "Monarch, drawn afresh",
}
# Told apart also without colour vision (Okabe and Ito).
COLORS = {
    "dense": "0.25",
    "magnitude": "#009E73",
    "monarch": "#D55E00",
    "pixelfly": "#0072B2",
    "low_rank": "#CC79A7",
    "block_diagonal": "#E69F00",
    "afresh": "#56B4E9",
}
SPLITS = ("validation", "test")


class Row(NamedTuple):
    """One training."""

    arm: str
    rate: float  # the learning rate's peak
    seed: int
    weights: int  # of the feed-forward layers
    error: float | None  # relative, of the projection
    layers: dict[str, dict[str, Any]]  # form and error of each
    records: list[dict[str, Any]]  # its log


class Display:
    """A bar on a terminal; elsewhere a line per evaluation."""

    def __init__(self, total: int, text: Any):
        self.console = make_console()
        self.console.print(
            f"text: {text.source}: {len(text.train) / 1e6:.1f} MB to train on, "
            f"{len(text.validation) / 1e6:.1f} MB held out"
        )
        self.progress = rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            "{task.description}",
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total)
        self.done: dict[str, int] = {}

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def update(self, name: str, steps: int, record: dict[str, Any]) -> None:
        """Shows a new record of a training."""
        self.done[name] = record["step"]
        loss = f"{name}: {record['validation']:.4f} bits/byte"
        completed = sum(self.done.values())
        self.progress.update(self.task, completed=completed, description=loss)
        if not self.console.is_terminal:
            self.console.print(
                f"{loss}, step {record['step']}/{steps}, {record['seconds']:.0f} s"
            )


def finish(
    rows: Sequence[Row],
    config: Any,
    dense: dict[str, Any],
    command: str,
    source: str,
    out: pathlib.Path,
) -> None:
    """Writes everything and prints the table."""
    lines, results = compare(rows)
    seeds = sorted({row.seed for row in rows})
    title = f"bits per byte, mean ± standard error over {len(seeds)} seeds"
    by_seed = [("model", *(f"seed {seed}" for seed in seeds))] + [
        (NAMES[r["arm"]], *(f"{loss:.4f}" for loss in r["validation"])) for r in results
    ]
    of_dense = dataclasses.asdict(dense["dense"])
    layers = next(row.layers for row in rows if row.arm == "monarch")
    shape = f"{of_dense['width']} x {of_dense['ffn_width']}"
    notes = (
        f"Feed-forward weights of {shape} and back, {len(layers)} of them; the rest of "
        f"the model is dense in all rows and trains on. Each was fine-tuned for "
        f"{config.steps} steps on the same batches, with a fresh optimizer, at each of "
        "the learning rates; the one with the lowest mean loss on the validation half "
        "is in the table. Before: as projected. The error is |W - W'| / |W| over all "
        "feed-forward weights. The mask multiplies as a dense weight does, and its "
        "entries' places are not counted. Differences are by seed, what Monarch gains "
        "above 0.",
        f"Text: {source} (Python {platform.python_version()}).",
        ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items()) + ".",
        "The dense models: "
        + (
            f"checkpoints {', '.join(map(str, dense['checkpoints']))}."
            if dense["checkpoints"]
            else f"`python examples/pretrain_lm.py {dense['pretrain']} "
            f"{dense['pretrain_flags']}".rstrip()
            + "`, a seed each."
        ),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(
        f"# Structured fine-tuning: {title}\n\n    {command}\n\n{markdown(lines)}\n"
        "Validation after, by seed:\n\n"
        + markdown(by_seed)
        + "".join(f"\n{note}\n" for note in notes)
    )
    found = {
        "command": command,
        "config": dataclasses.asdict(config),
        "dense": of_dense,
        "seeds": seeds,
        "text": source,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "results": results,
        "runs": [
            {"arm": row.arm, "rate": row.rate, "seed": row.seed}
            | {"error": row.error, "layers": row.layers}
            | {"step": [r["step"] for r in row.records]}
            | {s: [round(r[s], 5) for r in row.records] for s in SPLITS}
            for row in rows
        ],
    }
    (out / "results.json").write_text(json.dumps(found) + "\n")
    plot(rows, results, out / "curves.png")
    console = make_console()
    console.print(on_terminal(lines, title))
    console.print(on_terminal(by_seed, "validation after, by seed"))
    console.print(f"wrote table.md, results.json and curves.png to {out}")


# ---- numbers -----------------------------------------------------------------------


def chosen(rows: Sequence[Row], arm: str) -> list[Row]:
    """The rows of an arm at its best rate, by seed."""
    mine = [row for row in rows if row.arm == arm]
    last = lambda rate: statistics.fmean(
        row.records[-1]["validation"] for row in mine if row.rate == rate
    )
    best = min(dict.fromkeys(row.rate for row in mine), key=last)
    return sorted((row for row in mine if row.rate == best), key=lambda row: row.seed)


def compare(rows: Sequence[Row]) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """The table, its head first, and the same as numbers by seed."""
    head = (
        *("model", "feed-forward weights", "relative error", "learning rate"),
        *("validation before", "validation after", "minus Monarch"),
        *("test after", "minus Monarch"),
    )
    lines, results = [head], []
    monarch = chosen(rows, "monarch")
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = chosen(rows, arm)
        (weights,) = {row.weights for row in mine}
        errors = [row.error for row in mine if row.error is not None]
        before = [row.records[0]["validation"] for row in mine]
        result = {
            "arm": arm,
            "weights": weights,
            "error": errors,
            "rate": mine[0].rate,
            "before": before,
        }
        cells = [
            f"{weights:,}",
            f"{statistics.fmean(errors):.3f}" if errors else "",
            f"{mine[0].rate:g}",
            f"{score(before):.3f}",
        ]
        for split in SPLITS:
            values = [row.records[-1][split] for row in mine]
            against = [row.records[-1][split] for row in monarch]
            gap = [v - m for v, m in zip(values, against, strict=True)]
            cells.append(f"{score(values):.4f}")
            cells.append("" if arm == "monarch" else f"{score(gap):+.4f}")
            result[split] = values
            result[f"{split}_minus_monarch"] = gap
        lines.append((NAMES[arm], *cells))
        results.append(result)
    return lines, results


# ---- the picture -------------------------------------------------------------------


def plot(
    rows: Sequence[Row], results: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
    """Validation loss while fine-tuning, and before and after over the error."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5), layout="constrained")
    lasts = []
    for result in results:
        arm = result["arm"]
        color, mine = COLORS[arm], chosen(rows, arm)
        steps = [r["step"] for r in mine[0].records]
        losses = np.array([[r["validation"] for r in row.records] for row in mine])
        lasts.append(losses[:, -1])
        left.plot(steps, losses.T, color=color, alpha=0.35, linewidth=0.8)
        left.plot(steps, losses.mean(0), color=color, linewidth=2, label=NAMES[arm])
        if arm == "dense":  # projected by nothing: a level, not a point
            levels = zip(losses[:, [0, -1]].mean(0), (":", "-"), strict=True)
            for level, style in levels:
                right.axhline(level, color=color, linewidth=1.2, linestyle=style)
        elif result["error"]:
            at = np.array(result["error"])
            right.plot([at, at], losses[:, [0, -1]].T, color=color, linewidth=0.8)
            dots = dict(linestyle="", marker="o", color=color, zorder=3)
            right.plot(at, losses[:, 0], markerfacecolor="white", **dots)
            right.plot(at, losses[:, -1], **dots)
    # What a projection costs at first is on the right; here is what remains of it.
    low, high = np.min(lasts), np.max(lasts)
    left.set_ylim(low - 0.1 * (high - low), high + 1.2 * (high - low))
    left.set(xlabel="fine-tuning steps", ylabel="validation loss, bits per byte")
    left.set_title("While fine-tuning; thick: mean of the seeds", loc="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    right.set_yscale("log")
    low, high = right.get_ylim()
    ticks = [t for t in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24) if low <= t <= high]
    right.set_yticks(ticks, [f"{t:g}" for t in ticks])
    right.minorticks_off()
    right.set(
        xlabel="relative error of the projection, |W - W'| / |W|",
        ylabel="validation loss, bits per byte",
    )
    right.set_title("Hollow: as projected; full: fine-tuned", loc="left")
    line = matplotlib.lines.Line2D
    right.legend(
        handles=[
            line([], [], color="0.25", linestyle=":", label="dense, before"),
            line([], [], color="0.25", label="dense, fine-tuned"),
        ],
        frameon=False,
        loc="upper left",
    )
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
