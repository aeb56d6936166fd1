r"""How much of attention can be left out: selectors by budgets on a trained model.

After "The Sparse Frontier": a language model is trained with full attention, then
validated with only the blocks that a selector keeps. The loss, and the share of full
attention's probability on what is kept (recall), over the share of blocks that are
computed: ``BlockStats.work``, not its ``density``, which for MoBA is what each query
chose of them. The commands, from the repository's root:

    python examples/sparse_attention_tradeoffs.py      # stop at any time, run again

    # a larger model, other selectors; what it does not know goes to pretrain_lm.py
    python examples/sparse_attention_tradeoffs.py --selectors window moba --out runs/l \
        --layers 4 --width 256 --steps 2000

The model is ``pretrain_lm.py``'s, on its text, and its training the same program; both
training and validation go on from where they were. Writes ``table.md``,
``tradeoffs.png`` and ``rows.jsonl`` to ``--out``.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import platform
import sys
from typing import Any

import _attention
import _compare_report
import _data
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt  # after _compare_report, which asks for no screen
import numpy as np
import optax
import pretrain_lm
import rich.console
from _attention import Select
from _transformer import Transformer
from flax import nnx

import sparsejax as sj

# A window longer than the sequence is full attention, tile by tile.
TRAINING = (
    "--ffn dense --attention window --window 1000000 --attention-block 64 "
    "--length 2048 --batch 2 --width 128 --ffn-width 512 --heads 4 --layers 2 --scan "
    "--steps 400 --warmup 40 --learning-rate 3e-3 --checkpoint-every 100 "
    "--log-every 20 --eval-every 200 --eval-batches 2"
)
FULL = "full"
BY_COUNT = ("window", *_attention.SELECTORS)  # these have a number of blocks for budget
TOP_P = "pooled_blocks, top-p"  # this has a share of the pooled scores
NAMES = {
    "window": "sliding window",
    "moba": "MoBA",
    "pooled_blocks": "pooled blocks",
    TOP_P: "pooled blocks, top-p",
    "quest": "Quest",
    "sparge": "SpargeAttn",
}
# The guard's default of 0.6 takes no block's keys for alike in so small a model.
MORE = {"sparge": {"similarity": 0.2}}
REMARKS = {
    "moba": "MoBA chooses for each query: a block is computed for all of its queries "
    "where any of them chose it.",
    "sparge": "SpargeAttn's guarded blocks, those whose queries or keys have a "
    "similarity of at most 0.2, come on top of its budget.",
}
# Told apart also without colour vision (Okabe and Ito).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Trains what is not trained, validates what is not validated, reports."""
    args, training = parse(argv)
    out, console = args.out, rich.console.Console(width=120)
    # The last flag of a name counts.
    training = [*TRAINING.split(), *training, "--out", str(out / "training")]
    folder = str(out / "checkpoints")
    (run,) = pretrain_lm.main([*training, "--checkpoint-dir", folder, "--resume"])

    text = _data.load_text(training_data(training), needed=run.config.length + 1)
    batches = _data.validation_batches(
        text.validation, length=run.config.length, batch=1, count=args.sequences
    )
    settings = dataclasses.asdict(run.config) | {"sequences": len(batches)}
    rows = _compare_report.Rows(out / "rows.jsonl", settings)
    rows.open()
    for name, budget in cases(args):
        if not any((r["selector"], r["budget"]) == (name, budget) for r in rows.rows):
            row = {"selector": name, "budget": budget}
            rows.add(row | validate(run, selector(run.config, name, budget), batches))
            console.print(describe(rows.rows[-1]))
    report(rows.rows, run, args, argv, text.source, console)
    return rows.rows


def cases(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """(selector, budget), full attention first."""
    found: list[tuple[str, Any]] = [(FULL, None)]
    found += [(s, n) for s in args.selectors if s != TOP_P for n in args.budgets]
    return found + [(TOP_P, p) for p in args.top_p if TOP_P in args.selectors]


def selector(config: Any, name: str, budget: Any) -> Select:
    """The function of queries and keys."""
    side = config.attention_block
    sides = side, side
    if name == FULL:
        return functools.partial(_attention.window, config.length, sides)
    if name == "window":
        return functools.partial(_attention.window, budget * side, sides)
    if name == TOP_P:
        name, budget = "pooled_blocks", sj.attention.TopP(budget)
    chosen = functools.partial(getattr(sj.attention, name), **MORE.get(name, {}))
    return functools.partial(chosen, block_shape=sides, budget=budget)


def validate(run: Any, select: Select, batches: list[np.ndarray]) -> dict[str, Any]:
    """Loss in bits per byte, and what was computed and kept, the mean of all heads."""
    attend = _attention.attend_by(select, lambda stats: stats)

    def make(key):
        rngs = nnx.Rngs(params=key)
        model = Transformer(run.config, None, attend=attend, rngs=rngs)
        return nnx.split(model, nnx.Param, ...)

    graphdef, _, rest = nnx.eval_shape(make, jax.random.key(0))
    if jax.tree.leaves(rest):
        raise ValueError(f"--ffn: got {run.config.ffn}, needed one of parameters alone")

    @jax.jit
    def program(params, batch):
        tokens = batch.astype(jnp.int32)
        logits, _, stats = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        means = lambda x: x.mean(axis=1)  # over sequences: (layers, heads)
        return loss.mean() / math.log(2), means(stats.work), means(stats.recall)

    found = [jax.device_get(program(run.state.params, batch)) for batch in batches]
    loss, work, recall = (np.stack(x) for x in zip(*found, strict=True))
    return {
        "loss": loss.tolist(),  # of each sequence
        "work": work.mean(axis=0).tolist(),  # by layer and head
        "recall": recall.mean(axis=0).tolist(),
    }


# ---- what is shown -----------------------------------------------------------------


def describe(row: dict[str, Any]) -> str:
    """One line while it runs."""
    return (
        f"{label(row)}: {np.mean(row['loss']):.4f} bits per byte, "
        f"{np.mean(row['work']):.1%} of the blocks, recall "
        f"{np.mean(row['recall']):.3f}"
    )


def label(row: dict[str, Any]) -> str:
    """Selector and budget."""
    if row["selector"] == FULL:
        return "full attention"
    if row["selector"] == TOP_P:
        return f"pooled blocks, p = {row['budget']}"
    return f"{NAMES.get(row['selector'], row['selector'])}, {row['budget']} blocks"


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of text, the head first."""
    full = rows[0]
    head = "attention", "blocks", "of full", "recall", "least head", "bits per byte"
    lines = [(*head, "above full")]
    for row in rows:
        work, recall = np.array(row["work"]), np.array(row["recall"])
        above = np.array(row["loss"]) - full["loss"]  # by sequence
        error = np.std(above, ddof=1) / len(above) ** 0.5 if len(above) > 1 else 0.0
        lines.append(
            (
                label(row),
                f"{work.mean():.1%}",
                f"{work.mean() / np.mean(full['work']):.1%}",
                f"{recall.mean():.3f}",
                f"{recall.min():.3f}",
                f"{np.mean(row['loss']):.4f}",
                "" if row is full else f"{above.mean():+.4f} ± {error:.4f}",
            )
        )
    return lines


def report(rows, run, args, argv, source, console) -> None:
    """Prints the table; writes it, and the picture."""
    order = {case: place for place, case in enumerate(cases(args))}
    rows = [r for r in rows if (r["selector"], r["budget"]) in order]
    rows.sort(key=lambda row: order[row["selector"], row["budget"]])
    lines, config = table(rows), run.config
    command = " ".join(
        [
            "python examples/sparse_attention_tradeoffs.py",
            *(sys.argv[1:] if argv is None else argv),
        ]
    )
    blocks = -(-config.length // config.attention_block)
    notes = (
        f"A model trained for {run.step} steps with full causal attention, validated "
        f"on {len(rows[0]['loss'])} sequences of {config.length} bytes. Blocks: share "
        f"of the {blocks} x {blocks} blocks of {config.attention_block} x "
        f"{config.attention_block} that are computed, realized, the mean of layers and "
        "heads; of full: over those that causal attention needs. Recall: share of full "
        "attention's probability on what is allowed, the mean; least head: of the "
        "layer and head that keeps least. Above full: mean and standard error over "
        "sequences.",
        *(REMARKS[name] for name in args.selectors if name in REMARKS),
        f"Text: {source} (Python {platform.python_version()}).",
        ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items()) + ".",
    )
    (args.out / "table.md").write_text(
        f"# What attention can leave out\n\n    {command}\n\n"
        + _compare_report.markdown(lines)
        + "".join(f"\n{note}\n" for note in notes)
    )
    plot(rows, args.out / "tradeoffs.png")
    console.print(_compare_report.on_terminal(lines, f"After {run.step} steps"))
    console.print(f"wrote table.md, tradeoffs.png and rows.jsonl to {args.out}")


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss and recall over the share of blocks, a line per selector."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    full, names = rows[0], dict.fromkeys(row["selector"] for row in rows[1:])
    for name, color, marker in zip(names, COLORS * 9, "osD^vP" * 9, strict=False):
        of_name = [row for row in rows if row["selector"] == name]
        of_name.sort(key=lambda row: np.mean(row["work"]))
        x = [np.mean(r["work"]) / np.mean(full["work"]) for r in of_name]
        above = [np.mean(r["loss"]) - np.mean(full["loss"]) for r in of_name]
        recall = [np.mean(r["recall"]) for r in of_name]
        style = dict(color=color, marker=marker, markersize=5, linewidth=1.4)
        axes[0].plot(x, above, label=NAMES.get(name, name), **style)
        axes[1].plot(x, recall, **style)
    axes[0].axhline(0, color="0.5", linewidth=0.8, linestyle=":")
    axes[1].axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("validation loss above full attention's, bits per byte")
    axes[1].set_ylabel("recall of full attention's probability")
    figure.legend(loc="outside right center", frameon=False)
    for axis in axes:
        axis.set_xlabel("blocks computed, share of full causal attention's")
        axis.set_xlim(0, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- command line ------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Its own flags, and those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,  # --budget is the training's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The training's flags, unless others are given: {TRAINING}",
    )
    add = parser.add_argument
    every = (*BY_COUNT, TOP_P)
    add("--selectors", nargs="+", choices=every, default=every, help="(all)")
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16],
        help="blocks of keys for each block of queries; a window is as many long",
    )
    add("--top-p", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="shares")
    add("--sequences", type=int, default=16, help="to validate on (16)")
    add("--out", type=pathlib.Path, default="runs/sparse_attention_tradeoffs")
    args, training = parser.parse_known_args(argv)
    for flag, values in (("budgets", args.budgets), ("sequences", [args.sequences])):
        if min(values) < 1:
            raise ValueError(f"--{flag}: got {min(values)}, needed at least 1")
    if not all(0 < p <= 1 for p in args.top_p):
        raise ValueError(f"--top-p: got {args.top_p}, needed above 0, at most 1")
    return args, training


def training_data(flags: list[str]) -> list[str]:
    """Where the training's text was."""
    return pretrain_lm.parse(flags).data


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        sys.exit(f"sparse_attention_tradeoffs.py: {error}")
