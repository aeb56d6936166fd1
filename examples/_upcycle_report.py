"""What ``upcycle_lm.py`` shows: table, curves, loads."""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no screen

import matplotlib.pyplot as plt
import numpy as np
import rich.console
from _compare_report import markdown, on_terminal, score

from sparsejax import routing

# Told apart also without colour vision (Okabe and Ito).
COLORS = {
    "dense": "0.45",
    "continued": "#0072B2",
    "upcycled": "#D55E00",
    "scratch": "#009E73",
}
NAMES = {
    "dense": "dense, before",
    "continued": "dense, continued",
    "upcycled": "MoE, upcycled",
    "scratch": "MoE, from scratch",
}
Row = dict[str, Any]


def finish(
    rows: Sequence[Row],
    config: Any,
    report: str,
    command: str,
    out: pathlib.Path,
    console: rich.console.Console,
) -> None:
    """Writes everything and prints the table."""
    lines, results = compare(rows, config)
    head = (
        f"Bits per byte, mean ± standard error over {len(seeds_of(rows))} seeds; "
        f"{config.extra_steps} extra steps of the MoE cost what "
        f"{config.equal_flops_steps} of the dense model do.\n\n"
    )
    foot = f"\nUpcycling, {config.mode}, moments {config.opt_state}: "
    foot += report.splitlines()[0] + f"\n\n    {command}\n"
    (out / "table.md").write_text(head + markdown(lines) + foot)
    found = {
        "command": command,
        "config": vars(config) if not hasattr(config, "__dict__") else config.__dict__,
        "report": report,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "results": results,
        "curves": [
            {
                "arm": row["arm"],
                "seed": row["seed"],
                "step": [r["step"] for r in row["records"]],
                "validation": [round(r["validation"], 5) for r in row["records"]],
                "test": [round(r["test"], 5) for r in row["records"]],
            }
            for row in rows
        ],
    }
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "report.txt").write_text(report + "\n")
    plot_curves(rows, config, out / "curves.png")
    plot_load(rows, out / "load.png")
    console.print(on_terminal(lines, head.strip()))
    console.print(report)
    console.print(
        f"wrote table.md, results.json, report.txt, curves.png, load.png to {out}"
    )


# ---- numbers -----------------------------------------------------------------------


def seeds_of(rows: Sequence[Row]) -> list[int]:
    """Those of the rows, rising."""
    return sorted({row["seed"] for row in rows})


def at(rows: Sequence[Row], arm: str, step: int, split: str) -> list[float]:
    """Loss of an arm at a step, by seed."""
    found = {
        row["seed"]: record[split]
        for row in rows
        if row["arm"] == arm
        for record in row["records"]
        if record["step"] == step
    }
    return [found[seed] for seed in seeds_of(rows)]


def compare(
    rows: Sequence[Row], config: Any
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """The table, its head first, and the same as numbers by seed."""
    dense, moe = (config.flops_per_step(ffn) for ffn in ("dense", "moe"))
    extra, equal = config.extra_steps, config.equal_flops_steps
    cases = [
        ("dense, before", "dense", config.steps, 0, 0),
        ("dense, continued, equal steps", "continued", extra, extra, extra * dense),
        ("dense, continued, equal FLOPs", "continued", equal, equal, equal * dense),
        ("MoE, upcycled", "upcycled", extra, extra, extra * moe),
        ("MoE, from scratch", "scratch", extra, extra, extra * moe),
    ]
    head = (
        *("model", "extra steps", "extra TFLOPs", "validation", "test"),
        *("upcycled is lower by, validation", "by, test"),
    )
    lines, results = [head], []
    for name, arm, step, steps, flops in cases:
        cells, result = [], {"model": name, "extra_steps": steps, "extra_flops": flops}
        gaps = []
        for split in ("validation", "test"):
            values = at(rows, arm, step, split)
            best = at(rows, "upcycled", extra, split)
            gap = [v - u for v, u in zip(values, best, strict=True)]
            cells.append(f"{score(values):.4f}")
            gaps.append("" if arm == "upcycled" else f"{score(gap):+.4f}")
            result[split] = values
            result[f"upcycled_lower_by_{split}"] = gap
            result[f"{split}_mean"] = statistics.fmean(values)
        lines.append((name, str(steps), f"{flops / 1e12:.2f}", *cells, *gaps))
        results.append(result)
    return lines, results


# ---- pictures ----------------------------------------------------------------------


def plot_curves(rows: Sequence[Row], config: Any, path: pathlib.Path) -> None:
    """Validation loss over extra steps and over extra FLOPs; a line per seed."""
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 4.4), sharey=True, layout="constrained"
    )
    last = {}
    for row in rows:
        arm, records = row["arm"], row["records"]
        steps = np.array([r["step"] for r in records], float)
        loss = np.array([r["validation"] for r in records])
        cost = config.flops_per_step(
            "moe" if arm in ("upcycled", "scratch") else "dense"
        )
        if arm == "dense":
            steps -= config.steps
        last.setdefault(arm, []).append(loss)
        for axis, x in zip(axes, (steps, steps * cost / 1e12), strict=True):
            axis.plot(x, loss, color=COLORS[arm], alpha=0.35, linewidth=0.9)
    for arm, losses in last.items():
        row = next(row for row in rows if row["arm"] == arm)
        steps = np.array([r["step"] for r in row["records"]], float)
        cost = config.flops_per_step(
            "moe" if arm in ("upcycled", "scratch") else "dense"
        )
        steps -= config.steps if arm == "dense" else 0
        for axis, x in zip(axes, (steps, steps * cost / 1e12), strict=True):
            axis.plot(
                x,
                np.mean(losses, axis=0),
                color=COLORS[arm],
                linewidth=2,
                label=NAMES[arm],
            )
    finite = np.concatenate([np.ravel(x) for x in last.values()])
    low, begin = finite.min(), np.mean(last["dense"], axis=0)[-1]
    # From scratch begins at 8 bits: what matters is near where the dense model is.
    axes[0].set_ylim(
        low - 0.1 * (begin - low) - 0.01, begin + 2.5 * (begin - low) + 0.05
    )
    axes[0].set(xlabel="extra train steps", ylabel="validation loss, bits per byte")
    axes[1].set(xlabel="extra TFLOPs")
    axes[0].set_title("Equal extra steps", loc="left")
    axes[1].set_title("Equal extra FLOPs", loc="left")
    axes[0].set_xlim(-0.4 * config.extra_steps, 1.02 * config.equal_flops_steps)
    most = config.extra_steps * config.flops_per_step("moe") / 1e12
    axes[1].set_xlim(-0.4 * most, 1.02 * most)
    for axis in axes:
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(config.extra_steps, color="0.6", linewidth=0.8, linestyle=":")
    axes[1].legend(title="thick: mean of the seeds", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Tokens of the validation text at each expert, at first and at last."""
    loads = {}
    for arm in ("upcycled", "scratch"):
        row = next(row for row in rows if row["arm"] == arm)
        for record in (row["records"][0], row["records"][-1]):
            for layer, load in enumerate(record["load"]):
                loads[f"{arm}, layer {layer}, step {record['step']}"] = np.array(load)
    figure = routing.plot_expert_load(loads, rows="")
    figure.suptitle("validation tokens per expert, first seed")
    figure.savefig(path, dpi=130)
