r"""Compares sparse-training methods on real data: methods x sparsities x seeds.

A multilayer perceptron learns scikit-learn's handwritten digits, or guesses the next
byte of the Python standard library's sources (as ``pretrain_lm.py`` does). Every method
gets the same initial weights, batches and steps for a seed; the members of a soup train
half as long again. From the repository's root:

    # all methods at 80, 90, 95 and 98%, five seeds: some minutes on two cores
    python examples/compare_methods.py

    # some of them; what is there already is not done again
    python examples/compare_methods.py --methods dense static_uniform rigl \
        --sparsities 0.9 0.95 --seeds 3

    # the next byte of real source code instead of digits
    python examples/compare_methods.py --data text

    # while choosing settings: look at the validation split alone
    python examples/compare_methods.py --split validation --learning-rate 3e-3 \
        --out runs/tuning

Each finished training is one line of ``rows.jsonl`` in ``--out``: stop at any time and
run the same command again. At the end ``table.md`` and ``comparison.png`` hold mean and
standard error over the seeds of what the command asks for, and what the literature
claims is checked against them, seed by seed.
A method is an entry of METHODS below; how each trains is in ``_compare_recipes.py``.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import _compare
import _compare_recipes as recipes
import _compare_report
import jax
import jax.numpy as jnp
import rich.console
import rich.progress
from _compare import Case, fit
from _compare_recipes import Method, chosen, seen, updated
from _compare_report import At, Claim

from sparsejax import masks, transforms

# ---- methods -----------------------------------------------------------------------

TO_SPARSE = "dense to sparse"
MOVING = "sparse to sparse"
FIXED = "masks from before training"
SEEN = "straight-through"
PATTERN = "N:M"
AVERAGED = "averages"


SPARSITIES = (0.8, 0.9, 0.95, 0.98)
ER = {"distribution": masks.erdos_renyi}

METHODS = {
    "dense": Method(TO_SPARSE, fit, "dense"),
    "gradual_magnitude": Method(TO_SPARSE, updated(transforms.gradual_magnitude)),
    "gradual_magnitude_global": Method(
        TO_SPARSE, updated(transforms.gradual_magnitude, distribution="global")
    ),
    "granet": Method(TO_SPARSE, updated(transforms.granet)),
    "static_uniform": Method(FIXED, updated(transforms.static)),
    "static_erdos_renyi": Method(FIXED, updated(transforms.static, **ER)),
    "snip": Method(FIXED, chosen(recipes.snip)),
    "grasp": Method(FIXED, chosen(recipes.grasp)),
    "synflow": Method(FIXED, chosen(recipes.synflow)),
    "set": Method(MOVING, updated(transforms.sparse_evolutionary_training, **ER)),
    "rigl": Method(MOVING, updated(transforms.rigl, **ER)),
    "sparse_momentum": Method(MOVING, updated(transforms.sparse_momentum, **ER)),
    "exploration_exploitation": Method(
        MOVING, updated(transforms.exploration_exploitation, **ER)
    ),
    "srigl": Method(MOVING, updated(transforms.srigl, **ER)),
    "autosparse": Method(SEEN, recipes.autosparse),
    "sr_ste": Method(PATTERN, recipes.sr_ste(2e-4), "pattern"),
    "mask_decay": Method(PATTERN, seen(recipes.mask_decay, recipes.fading), "pattern"),
    "mask_decay_exponential": Method(
        PATTERN, seen(recipes.mask_decay, recipes.fading_fast), "pattern"
    ),
    "mask_decay_scaled": Method(
        PATTERN,
        seen(functools.partial(recipes.mask_decay, backward="scaled"), recipes.fading),
        "pattern",
    ),
    "structure_decay": Method(
        PATTERN, seen(recipes.structure_decay, recipes.stages), "pattern"
    ),
    "soup_member": Method(AVERAGED, recipes.retrained),
    "soup": Method(AVERAGED, recipes.retrained, finish=recipes.soup),
}
REFERENCES = ("dense", "static_erdos_renyi")

CLAIMS = (
    Claim("RigL beats static random", ("rigl",), "static_erdos_renyi", (0.95, 0.98)),
    Claim(
        "sparse momentum beats static random",
        ("sparse_momentum",),
        "static_erdos_renyi",
        (0.95, 0.98),
    ),
    Claim(
        "Erdos-Renyi beats uniform",
        ("static_erdos_renyi",),
        "static_uniform",
        (0.95, 0.98),
    ),
    Claim(
        "gradual magnitude is within one standard error of dense",
        ("gradual_magnitude",),
        "dense",
        (0.8,),
        within=True,
    ),
    Claim(
        "a decay recipe beats SR-STE",
        (
            *("mask_decay", "mask_decay_exponential", "mask_decay_scaled"),
            "structure_decay",
        ),
        "sr_ste",
        (1 - 1 / 8, 1 - 1 / 16),
    ),
    Claim("soups beat their single members", ("soup",), "soup_member", SPARSITIES),
)


# ---- the comparison ----------------------------------------------------------------


class Point(NamedTuple):
    """A method at a sparsity."""

    method: str
    sparsity: float
    pattern: tuple[int, int] | None = None

    @property
    def at(self) -> At:
        """Its column of the table."""
        return At(self.sparsity, self.pattern)

    def __str__(self) -> str:
        return f"{self.method} {self.at}"


def points_of(
    methods: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[tuple[int, int]],
) -> list[Point]:
    """Every method at each sparsity of its kind."""
    points = []
    for name in methods:
        kind = METHODS[name].kind
        if kind == "dense":
            points.append(Point(name, 0.0))
        elif kind == "pattern":
            points += [Point(name, 1 - n / m, (n, m)) for n, m in patterns]
        else:
            points += [Point(name, sparsity) for sparsity in sparsities]
    return points


def point_of(row: dict[str, Any]) -> Point:
    """What a row was trained as."""
    return Point(row["method"], *_compare_report.column_of(row))


def read_rows(path: pathlib.Path, settings: _compare.Settings) -> _compare_report.Rows:
    """What is there already.

    Rows of N:M methods without a pattern are of a time when it was not written: they
    stand for one kept of M.
    """
    rows = _compare_report.Rows(path, dataclasses.asdict(settings))
    for row in rows.rows:
        method = METHODS.get(row["method"])
        if method and method.kind == "pattern" and "pattern" not in row:
            m = round(1 / (1 - row["sparsity"]))
            if row["sparsity"] == 1 - 1 / m:
                row["pattern"] = [1, m]
    return rows


def asked(
    rows: _compare_report.Rows, points: Sequence[Point], seeds: int
) -> list[dict[str, Any]]:
    """The rows of these points and seeds; the file may have more."""
    return [r for r in rows.rows if point_of(r) in points and r["seed"] < seeds]


def find_missing(
    rows: _compare_report.Rows, points: Sequence[Point], seeds: int
) -> dict[Point, list[int]]:
    """The seeds of each point that have no row yet."""
    there = {(point_of(row), row["seed"]) for row in rows.rows}
    todo = {
        point: [s for s in range(seeds) if (point, s) not in there] for point in points
    }
    return {point: missing for point, missing in todo.items() if missing}


def trace_points(
    points: Iterable[Point], settings: _compare.Settings, task: _compare.Task
) -> dict[Point, Any]:
    """The program of each point, key and data -> list of params; none is compiled yet.

    Raises:
      ValueError: Methods that cannot train at some sparsity or pattern, one per line.
    """
    traced, refused = {}, []
    for point in points:
        try:
            traced[point] = trace_point(point, settings, task)
        except ValueError as error:
            flag, got = "sparsities", point.sparsity
            if point.pattern:
                flag, got = "patterns", _compare_report.show_pattern(point.pattern)
            refused.append(
                f"--{flag}: got {got}, needed one at which {point.method} can train: "
                f"{error}"
            )
    if refused:
        raise ValueError("\n".join(refused))
    return traced


def trace_point(point: Point, settings: _compare.Settings, task: _compare.Task) -> Any:
    """Traces how the point's method trains, for all seeds."""
    method = METHODS[point.method]

    def program(key, train):
        case = Case(task, train, settings, point.sparsity, point.pattern, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            found = method.run(case)
        return found if isinstance(found, list) else [found]

    return jax.jit(program).trace(jax.random.key(0), task.train)


def compile_point(
    point: Point,
    traced: Any,
    task: _compare.Task,
    evaluate: Callable[[Any], dict[str, Any]],
) -> Callable[[int], dict[str, float]]:
    """Returns seed -> scores, compiled once for all seeds."""
    method = METHODS[point.method]
    compiled = traced.lower().compile()

    def run(seed: int) -> dict[str, float]:
        found = method.finish(compiled(jax.random.key(seed), task.train))
        scores = [evaluate(params) for params in found]
        mean = lambda name: statistics.fmean(float(score[name]) for score in scores)
        return {name: round(mean(name), 6) for name in scores[0]}

    return run


def make_console() -> rich.console.Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=160)


def compare(
    points: Sequence[Point],
    seeds: int,
    todo: dict[Point, list[int]],
    traced: dict[Point, Any],
    task: _compare.Task,
    rows: _compare_report.Rows,
    split: str,
) -> None:
    """Does the trainings that have no row yet."""
    console = make_console()
    total, left = len(points) * seeds, sum(map(len, todo.values()))
    console.print(f"{total} trainings, {total - left} of them are in {rows.path}")
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    evaluate = jax.jit(functools.partial(_compare.evaluate, task))
    with progress:
        bar = progress.add_task("", total=total, completed=total - left)
        for point, missing in todo.items():
            progress.update(bar, description=f"{point}, compiling")
            begin = time.perf_counter()
            run = compile_point(point, traced[point], task, evaluate)
            compiling = time.perf_counter() - begin
            progress.update(bar, description=str(point))
            for seed in missing:
                begin = time.perf_counter()
                scores = run(seed)
                # Without a pattern rows are as they were before there was one.
                pattern = {"pattern": point.pattern} if point.pattern else {}
                rows.add(
                    {
                        "method": point.method,
                        "sparsity": point.sparsity,
                        **pattern,
                        "seed": seed,
                        **scores,
                        "seconds": round(time.perf_counter() - begin, 3),
                    }
                )
                progress.advance(bar)
            found = _compare_report.Scores(asked(rows, [point], seeds), split)
            score = found(point.method, point.at)
            console.print(
                f"{point}: {score:.3f} ({split}; {compiling:.1f} s to compile)"
            )


def report(
    rows: _compare_report.Rows,
    points: Sequence[Point],
    seeds: int,
    settings: _compare.Settings,
    split: str,
    command: str,
) -> None:
    """Prints the tables of what was asked for and writes them and the picture."""
    methods = list(dict.fromkeys(point.method for point in points))
    chosen = asked(rows, points, seeds)
    metric, sign, digits = {
        "digits": ("accuracy in percent", 1, 2),
        "text": ("bits per byte", -1, 3),
    }[settings.data]
    scores = _compare_report.Scores(chosen, split, digits)
    validation = _compare_report.Scores(chosen, "validation")
    lines = _compare_report.score_lines(scores, methods)
    claims = _compare_report.check_claims(CLAIMS, validation, scores, sign, seeds)
    claims.insert(0, _compare_report.CLAIMS_HEAD)

    count = f"{seeds} seed{'s' * (seeds > 1)}"
    title = f"{settings.data}: {metric} ({split} split), mean ± standard error"
    console = make_console()
    console.print(_compare_report.on_terminal(lines, f"{title}, {count}"))
    text = (
        f"# {title}\n\n    {command}\n\n{count}; "
        + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(settings).items())
        + f".\n\n{_compare_report.markdown(lines)}"
    )
    if len(claims) > 1:
        console.print(_compare_report.on_terminal(claims, "What is claimed"))
        text += f"\n## What is claimed\n\n{_compare_report.markdown(claims)}"
    folder = rows.path.parent
    (folder / "table.md").write_text(text)
    families: dict[str, list[str]] = {}
    for name in methods:
        families.setdefault(METHODS[name].family, []).append(name)
    _compare_report.plot(
        scores,
        families,
        REFERENCES,
        ylabel=metric,
        percent=sign > 0,
        path=folder / "comparison.png",
    )
    console.print(f"wrote {folder}/rows.jsonl, table.md and comparison.png")


# ---- command line ------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every field of Settings that is not given is the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--data", choices=_compare.PRESETS, default="digits", help="(default: digits)")
    add(
        "--paths",
        nargs="+",
        default=[],
        metavar="PATH",
        help="with --data text: files or folders, not the standard library's sources",
    )
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of: {', '.join(METHODS)} (default: all)",
    )
    add(
        "--sparsities",
        nargs="+",
        type=float,
        default=list(SPARSITIES),
        metavar="S",
        help="shares of the kernels that are zero (0.8 0.9 0.95 0.98)",
    )
    add(
        "--patterns",
        nargs="+",
        default=["1:8", "1:16"],
        metavar="N:M",
        help="N kept of M, for the N:M methods (1:8 1:16)",
    )
    add("--seeds", type=int, default=5, help="how many, from 0 (5)")
    add(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what the table shows: choose settings on validation alone (test)",
    )
    add = parser.add_argument_group("model and training").add_argument
    add("--examples", type=int, help="digits to train on")
    add("--width", type=int, help="features of the two hidden layers")
    add("--context", type=int, help="bytes of text before the one to guess")
    add("--steps", type=int, help="train steps")
    add("--batch", type=int, help="examples per step")
    add("--learning-rate", type=float, help="at first; falls to 0 by a cosine")
    add("--soup-rate", type=float, help="the same of a soup's members")
    add("--weight-decay", type=float, help="AdamW's, of the kernels")
    add("--every", type=int, help="steps between mask updates, which end at 3/4")
    add = parser.add_argument_group("where it goes").add_argument
    add(
        "--out",
        type=pathlib.Path,
        help="folder of rows and reports (runs/compare_methods/<data>)",
    )
    return parser.parse_args(argv)


def configure(args: argparse.Namespace) -> tuple[_compare.Settings, list[Point]]:
    """The settings and what to train, checked."""

    def need(holds: bool, flag: str, got: Any, needed: str) -> None:
        if not holds:
            raise ValueError(f"--{flag}: got {got}, needed {needed}")

    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(_compare.Settings)
        if getattr(args, field.name, None) is not None
    }
    settings = dataclasses.replace(_compare.PRESETS[args.data], **given)
    for flag in ("width", "context", "steps", "batch", "every"):
        got = getattr(settings, flag)
        need(got >= 1, flag, got, "at least 1")
    need(
        settings.every <= settings.end,
        "every",
        settings.every,
        f"at most {settings.end}, three quarters of --steps: else no mask would change",
    )
    for flag in ("learning_rate", "soup_rate"):
        got = getattr(settings, flag)
        need(got > 0, flag.replace("_", "-"), got, "above 0")
    decay = settings.weight_decay
    need(0 <= decay < math.inf, "weight-decay", decay, "a number, 0 or above")
    need(args.seeds >= 1, "seeds", args.seeds, "at least 1")
    for name in args.methods:
        need(name in METHODS, "methods", repr(name), f"some of {', '.join(METHODS)}")
    for sparsity in args.sparsities:
        need(0 < sparsity < 1, "sparsities", sparsity, "numbers between 0 and 1")
    patterns = []
    for text in args.patterns:
        n, _, m = text.partition(":")
        right = n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)
        need(right, "patterns", repr(text), "N:M with N kept of M, such as 1:8")
        patterns.append((int(n), int(m)))
        inputs = (
            64 if settings.data == "digits" else settings.context * _compare.EMBEDDING
        )
        fits = inputs % int(m) == 0 and settings.width % int(m) == 0
        uses = any(METHODS[name].kind == "pattern" for name in args.methods)
        need(
            fits or not uses,
            "patterns",
            repr(text),
            f"M to divide {inputs} inputs and a --width of {settings.width}",
        )
    methods = list(dict.fromkeys(args.methods))
    sparsities = sorted(set(args.sparsities))
    return settings, points_of(methods, sparsities, list(dict.fromkeys(patterns)))


def main(argv: list[str] | None = None) -> _compare_report.Rows:
    """Compares what the command line says and reports."""
    args = parse(argv)
    settings, points = configure(args)
    task = _compare.load_task(settings, args.paths)
    settings = dataclasses.replace(settings, digest=task.digest)
    task = task._replace(train=jax.tree.map(jnp.asarray, task.train))
    folder = args.out or pathlib.Path("runs/compare_methods") / settings.data
    rows = read_rows(folder / "rows.jsonl", settings)
    todo = find_missing(rows, points, args.seeds)
    traced = trace_points(todo, settings, task)
    # Whatever was to be refused has been: from here on files are written.
    rows.open()
    compare(points, args.seeds, todo, traced, task, rows, args.split)
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python examples/compare_methods.py", *words])
    report(rows, points, args.seeds, settings, args.split, command)
    return rows


def run() -> None:
    """As a program: what is refused or interrupted ends without a traceback."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"compare_methods.py: {error}")
    except KeyboardInterrupt:
        sys.stdout.flush()
        print(
            "compare_methods.py: stopped; the same command goes on where it was",
            file=sys.stderr,
            flush=True,
        )
        # At once, what is done being on disk: the interpreter's own end is a
        # segmentation fault where a compilation was interrupted. 130 is for Ctrl-C.
        os._exit(130)


if __name__ == "__main__":
    run()
