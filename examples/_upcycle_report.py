"""What ``upcycle_lm.py`` shows: progress, table, curves, loads."""

import dataclasses
import json
import math
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.progress
from _compare_report import markdown, on_terminal, score

from sparsejax import routing

NAMES = {
    "dense": "dense, before",
    "continued": "dense, continued",
    "upcycled": "MoE, upcycled",
    "scratch": "MoE, from scratch",
}
# Told apart also without colour vision (Okabe and Ito).
COLORS = {
    "dense": "0.45",
    "continued": "#0072B2",
    "upcycled": "#D55E00",
    "scratch": "#009E73",
}
SPLITS = ("validation", "test")


class Row(NamedTuple):
    """One training."""

    arm: str
    seed: int
    parameters: int  # stored
    records: list[dict[str, Any]]  # its log


def make_console() -> rich.console.Console:
    """As wide as the terminal; wide enough for the table where there is none."""
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=150)


class Display:
    """A bar per training on a terminal; elsewhere a line per evaluation."""

    def __init__(
        self, config: Any, arms: Sequence[str], seeds: Sequence[int], text: Any
    ):
        self.config, self.console = config, make_console()
        self.console.print(
            f"text: {text.source}: {len(text.train) / 1e6:.1f} MB to train on, "
            f"{len(text.validation) / 1e6:.1f} MB held out"
        )
        self.progress = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            "{task.fields[loss]:.3f} bits/byte",
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks = {
            (arm, seed): self.progress.add_task(
                f"seed {seed}, {NAMES[arm]}",
                total=config.steps_of(arm),
                loss=math.nan,
                start=False,
            )
            for seed in seeds
            for arm in arms
        }

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def update(self, arm: str, seed: int, records: list[dict[str, Any]]) -> None:
        """Shows the newest record of a training."""
        record, task = records[-1], self.tasks[arm, seed]
        self.progress.start_task(task)
        self.progress.update(task, completed=record["step"], loss=record["validation"])
        if not self.console.is_terminal:
            self.console.print(
                f"seed {seed}, {NAMES[arm]}, step {record['step']}/"
                f"{self.config.steps_of(arm)}: validation {record['validation']:.4f} "
                f"bits per byte, {record['seconds']:.0f} s"
            )


def finish(
    rows: Sequence[Row],
    config: Any,
    report: str,
    command: str,
    source: str,
    out: pathlib.Path,
) -> None:
    """Writes everything and prints the table."""
    lines, results = compare(rows, config)
    seeds, extra = len(seeds_of(rows)), config.extra_steps
    title = f"bits per byte, mean ± standard error over {seeds} seeds"
    dense, moe = (config.flops_per_step(ffn) for ffn in ("dense", "moe"))
    notes = (
        f"A step of the MoE, {config.experts_per_token} of {config.experts} experts "
        f"and the router, costs {moe / dense:.3f} of a dense one: its {extra} "
        f"extra steps are {config.equal_flops_steps} dense steps, which the dense "
        "model takes on the same schedule and further data. All that come after the "
        "dense model see the same batches in the same order. From scratch begins its "
        "own warm-up and has not had the dense model's steps; the others go on at its "
        f"step {config.steps} of the learning rate's schedule. Differences are by "
        "seed, what upcycling gains above 0.",
        f"Upcycled: {config.mode}, moments {config.opt_state}. "
        + report.splitlines()[0][:1].upper()
        + report.splitlines()[0][1:]
        + ".",
        f"Text: {source} (Python {platform.python_version()}).",
        ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items()) + ".",
    )
    by_seed = seed_lines(results, seeds_of(rows))
    (out / "table.md").write_text(
        f"# Upcycling: {title}\n\n    {command}\n\n{markdown(lines)}\n"
        "Validation by seed:\n\n"
        + markdown(by_seed)
        + "".join(f"\n{note}\n" for note in notes)
    )
    found = {
        "command": command,
        "config": dataclasses.asdict(config),
        "flops_per_step": {"dense": dense, "moe": moe},
        "report": report,
        "seeds": seeds_of(rows),
        "text": source,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "results": results,
        "curves": [
            {"arm": row.arm, "seed": row.seed, "step": [r["step"] for r in row.records]}
            | {s: [round(r[s], 5) for r in row.records] for s in SPLITS}
            for row in rows
        ],
    }
    (out / "results.json").write_text(json.dumps(found) + "\n")
    (out / "report.txt").write_text(report + "\n")
    plot_curves(rows, config, out / "curves.png")
    plot_load(rows, out / "load.png")
    console = make_console()
    console.print(on_terminal(lines, title))
    console.print(on_terminal(by_seed, "validation by seed"))
    console.print(report)
    console.print(
        f"wrote table.md, results.json, report.txt, curves.png, load.png to {out}"
    )


# ---- numbers -----------------------------------------------------------------------


def seeds_of(rows: Sequence[Row]) -> list[int]:
    """Those of the rows, rising."""
    return sorted({row.seed for row in rows})


def at(rows: Sequence[Row], arm: str, step: int, split: str) -> list[float]:
    """Loss of an arm at a step, by seed."""
    found = {
        row.seed: record[split]
        for row in rows
        if row.arm == arm
        for record in row.records
        if record["step"] == step
    }
    return [found[seed] for seed in seeds_of(rows)]


def compare(
    rows: Sequence[Row], config: Any
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """The table, its head first, and the same as numbers by seed."""
    dense, moe = (config.flops_per_step(ffn) for ffn in ("dense", "moe"))
    extra, equal = config.extra_steps, config.equal_flops_steps
    # Name, arm, step of its log, extra steps, what they cost.
    cases = [
        ("dense, before", "dense", config.steps, 0, 0),
        ("dense, continued, equal steps", "continued", extra, extra, extra * dense),
        ("dense, continued, equal FLOPs", "continued", equal, equal, equal * dense),
        ("MoE, upcycled", "upcycled", extra, extra, extra * moe),
        ("MoE, from scratch", "scratch", extra, extra, extra * moe),
    ]
    head = (
        *("model", "parameters, M", "extra steps", "extra TFLOPs"),
        *("validation", "minus upcycled", "test", "minus upcycled"),
    )
    lines, results = [head], []
    for name, arm, step, steps, flops in cases:
        (parameters,) = {row.parameters for row in rows if row.arm == arm}
        result = {
            "model": name,
            "parameters": parameters,
            "extra_steps": steps,
            "extra_flops": flops,
        }
        cells = []
        for split in SPLITS:
            values = at(rows, arm, step, split)
            upcycled = at(rows, "upcycled", extra, split)
            gap = [v - u for v, u in zip(values, upcycled, strict=True)]
            cells.append(f"{score(values):.4f}")
            cells.append("" if arm == "upcycled" else f"{score(gap):+.4f}")
            result[split] = values
            result[f"{split}_mean"] = statistics.fmean(values)
            result[f"{split}_minus_upcycled"] = gap
        counts = f"{parameters / 1e6:.2f}", str(steps), f"{flops / 1e12:.2f}"
        lines.append((name, *counts, *cells))
        results.append(result)
    return lines, results


def seed_lines(
    results: Sequence[dict[str, Any]], seeds: Sequence[int]
) -> list[tuple[str, ...]]:
    """Rows of text, the head first: validation of each seed."""
    lines = [("model", *(f"seed {seed}" for seed in seeds))]
    return lines + [
        (result["model"], *(f"{loss:.4f}" for loss in result["validation"]))
        for result in results
    ]


# ---- pictures ----------------------------------------------------------------------


def plot_curves(rows: Sequence[Row], config: Any, path: pathlib.Path) -> None:
    """Validation loss over extra steps and over extra FLOPs; a thin line per seed."""
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 4.4), sharey=True, layout="constrained"
    )
    ends = config.extra_steps, config.extra_steps * config.flops_per_step("moe") / 1e12
    means = {}
    for arm in NAMES:
        logs = [row.records for row in rows if row.arm == arm]
        losses = np.array([[r["validation"] for r in log] for log in logs])
        means[arm] = losses.mean(0)
        steps = np.array([r["step"] for r in logs[0]], float)
        steps -= config.steps if arm == "dense" else 0  # it ends where others begin
        ffn = "dense" if arm in ("dense", "continued") else "moe"
        flops = steps * config.flops_per_step(ffn) / 1e12
        for axis, x, end in zip(axes, (steps, flops), ends, strict=True):
            shown = x < 1.001 * end  # equal FLOPs are whole steps
            x, lines, mean = x[shown], losses.T[shown], means[arm][shown]
            axis.plot(x, lines, color=COLORS[arm], alpha=0.35, linewidth=0.8)
            axis.plot(
                x, mean, color=COLORS[arm], linewidth=2, label=NAMES[arm], zorder=3
            )
    # From scratch begins at 8 bits: what matters is near where the dense model is.
    begin, low = means["dense"][-1], min(mean.min() for mean in means.values())
    high = max(means["scratch"][-1], begin) + (begin - low)
    axes[0].set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    for axis, end in zip(axes, ends, strict=True):
        for x in (0, end):
            axis.axvline(x, color="0.5", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(-0.4 * end, 1.03 * end)
    axes[0].set(xlabel="extra steps", ylabel="validation loss, bits per byte")
    axes[1].set(xlabel="extra TFLOPs")
    axes[0].set_title("Equal extra steps", loc="left")
    axes[1].set_title("Equal extra FLOPs", loc="left")
    axes[1].legend(title="thick: mean of the seeds", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Validation tokens at each expert, at first and at last, of the first seed."""
    loads = {}
    for arm in ("upcycled", "scratch"):
        records = next(row for row in rows if row.arm == arm).records
        for record in (records[0], records[-1]):
            for layer, load in enumerate(record["load"]):
                loads[f"{arm}, step {record['step']}, layer {layer}"] = np.array(load)
    figure = routing.plot_expert_load(loads, rows="")
    figure.suptitle("Validation tokens per expert, over an even share")
    figure.savefig(path, dpi=130)
