"""What ``compare_methods.py`` shows: rows on disk, table, claims, picture."""

import collections
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no screen

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import rich.box
import rich.table

# Told apart also without colour vision (Okabe and Ito).
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "osD^vP"

_PERCENT = [0, 20, 40, 60, 80, 90, 95, 97, 98, 99]  # ticks of an accuracy

Row = dict[str, Any]


# ---- rows on disk ------------------------------------------------------------------


class Rows:
    """JSON lines: the settings, then one row per training, each on disk when added."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        """Reads what is there; writes nothing.

        Raises:
          ValueError: The file holds rows of other settings, or is damaged elsewhere
            than in its last line.
        """
        self.path, self.settings, self.rows = path, settings, []
        records, self.good = _read(path)
        if records:
            there, self.rows = records[0].get("settings", {}), records[1:]
            for name in {**there, **settings}:
                if there.get(name) != settings.get(name):
                    raise ValueError(
                        f"--out: got {path.parent}, whose rows have {name} "
                        f"{there.get(name)!r}, needed {settings.get(name)!r}: another "
                        "folder for other settings"
                    )

    def open(self) -> None:
        """Makes the file; takes away a last line that was cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.good)
        if not self.good:
            self._append({"settings": self.settings})

    def add(self, row: Row) -> None:
        """Appends one row."""
        self.rows.append(row)
        self._append(row)

    def _append(self, record: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _read(path: pathlib.Path) -> tuple[list[Row], int]:
    """Records, and how many bytes they are."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records, good = [], 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and line.endswith(b"\n")
        except ValueError:
            whole = False
        if not whole and number == len(lines):  # killed while writing it
            break
        if not whole:
            raise ValueError(
                f"--out: got {path}, whose line {number} is no record, needed a file "
                "of this program: take the line out or use another folder"
            )
        records.append(record)
        good += len(line)
    return records, good


# ---- numbers -----------------------------------------------------------------------


class Score(NamedTuple):
    """Mean over seeds and its standard error, NaN of one seed."""

    mean: float
    error: float
    count: int

    def __format__(self, spec: str) -> str:
        """Mean and error, both as a float is formatted; a sign is the mean's alone."""
        error = f" ± {format(self.error, spec.lstrip('+'))}"
        return format(self.mean, spec) + (error if self.count > 1 else "")


def score(values: Sequence[float]) -> Score:
    """Mean and standard error: the sample's deviation over the root of the count."""
    count = len(values)
    error = statistics.stdev(values) / count**0.5 if count > 1 else math.nan
    return Score(statistics.fmean(values) if values else math.nan, error, count)


class At(NamedTuple):
    """A column of the table; of N:M methods each pattern is one."""

    sparsity: float
    pattern: tuple[int, int] | None = None

    def __str__(self) -> str:
        """0.95 -> 95%, of patterns 1:8 (87.5%)."""
        share = "dense" if self.sparsity == 0 else f"{100 * self.sparsity:.4g}%"
        return f"{show_pattern(self.pattern)} ({share})" if self.pattern else share


def show_pattern(pattern: tuple[int, int]) -> str:
    """(1, 8) -> 1:8."""
    return "{}:{}".format(*pattern)


def column_of(row: Row) -> At:
    """Where the score of a row belongs."""
    pattern = row.get("pattern")
    return At(row["sparsity"], tuple(pattern) if pattern else None)


class Scores:
    """Scores of the rows on one split."""

    def __init__(self, rows: Iterable[Row], split: str, digits: int = 2):
        self.split, self.spec = split, f".{digits}f"
        self.by_seed: dict[tuple[str, At], dict[int, float]] = {}
        for row in rows:
            found = self.by_seed.setdefault((row["method"], column_of(row)), {})
            found[row["seed"]] = row[split]

    def __call__(self, method: str, at: At) -> Score:
        """Of a method at a sparsity; its mean is NaN where there are no rows."""
        return score([*self.by_seed.get((method, at), {}).values()])

    def columns(self, *methods: str) -> list[At]:
        """At which there are rows of any of the methods, by rising sparsity."""
        found = {at for name, at in self.by_seed if name in methods}
        return sorted(found, key=lambda at: (at.sparsity, at.pattern or ()))

    def paired(self, one: tuple[str, At], other: tuple[str, At]) -> "Pair":
        """Of two methods over the seeds that both have: pairs, of equal beginnings."""
        a, b = (self.by_seed.get(key, {}) for key in (one, other))
        seeds = sorted(set(a) & set(b))
        return Pair(
            score([a[seed] for seed in seeds]),
            score([b[seed] for seed in seeds]),
            score([a[seed] - b[seed] for seed in seeds]),
        )


class Pair(NamedTuple):
    """Scores of two methods over the same seeds, and their difference by seed."""

    one: Score
    other: Score
    gap: Score


class Claim(NamedTuple):
    """What the literature has us expect: one of `methods` is better than `other`."""

    text: str
    methods: tuple[str, ...]  # of several the best on the validation split
    other: str
    sparsities: tuple[float, ...]
    within: bool = False  # at most one standard error (of `other`) worse is enough


def check_claims(
    claims: Sequence[Claim], validation: Scores, shown: Scores, sign: int, seeds: int
) -> list[tuple[str, ...]]:
    """Rows of text: claim, sparsity, scores, difference, verdict.

    Args:
      claims: What to check; left out where no seed has rows of both methods.
      validation: Scores by which one of several methods is chosen.
      shown: Scores that are compared.
      sign: 1 where more is better, -1 where less is.
      seeds: How many there should be.
    """
    lines = []
    for claim in claims:
        columns = shown.columns(*claim.methods)
        for at in (at for s in claim.sparsities for at in columns if at.sparsity == s):
            found = _best(claim, at, validation, shown, sign)
            if found is None:
                continue
            best, pair = found
            lines.append(
                (
                    claim.text,
                    str(at) if at.pattern else f"{at.sparsity:.4g}",
                    f"{best} {pair.one:{shown.spec}}",
                    f"{claim.other} {pair.other:{shown.spec}}",
                    f"{pair.gap:+{shown.spec}}",
                    _verdict(claim, pair, sign, seeds),
                )
            )
    return lines


def _best(
    claim: Claim, at: At, validation: Scores, shown: Scores, sign: int
) -> tuple[str, Pair] | None:
    """The claim's best method at a sparsity, and what it is beside the other one."""
    other = (claim.other, at)
    if other not in shown.by_seed:
        other = (claim.other, At(0.0))  # dense
    gains = {
        method: _exact(sign * pair.gap.mean)
        for method in claim.methods
        if (pair := validation.paired((method, at), other)).gap.count
    }
    if not gains:
        return None
    best = max(gains, key=lambda method: gains[method])
    return best, shown.paired((best, at), other)


def _verdict(claim: Claim, pair: Pair, sign: int, seeds: int) -> str:
    """Whether a claim holds, by the differences of the seeds that both methods have."""
    gap = pair.gap
    gain, known = _exact(sign * gap.mean), gap.count > 1
    if claim.within and known:
        words = ["holds" if _exact(gain + pair.other.error) >= 0 else "does not hold"]
    elif claim.within:
        words = ["not decided"]
    else:
        words = ["holds" if gain > 0 else "does not hold"]
        if known and _exact(abs(gain) - gap.error) <= 0:
            words.append("within one standard error")
    if gap.count < seeds:
        words.append(f"on {gap.count} of {seeds} seeds")
    if not known:
        words.append("standard error not known from one seed")
    return ", ".join(words)


def _exact(difference: float) -> float:
    """Without the rounding errors: scores have six decimals."""
    return round(difference, 9)


CLAIMS_HEAD = ("claim", "sparsity", "one", "other", "difference, by seed", "verdict")


def score_lines(scores: Scores, methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of text, the head first: a method per row, a sparsity per column."""
    columns = scores.columns(*methods)
    lines = [("method", *map(str, columns))]
    for method in methods:
        if scores.columns(method):
            found = [scores(method, at) for at in columns]
            lines.append(
                (method, *(f"{x:{scores.spec}}" if x.count else "" for x in found))
            )
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its head first."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rows.insert(1, "|" + " --- |" * len(lines[0]))
    return "\n".join(rows) + "\n"


def on_terminal(lines: Sequence[Sequence[str]], title: str) -> rich.table.Table:
    """The same for the terminal."""
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for name in lines[0]:
        table.add_column(name)
    for line in lines[1:]:
        table.add_row(*line)
    return table


# ---- the picture -------------------------------------------------------------------


def plot(
    scores: Scores,
    families: dict[str, list[str]],
    references: Sequence[str],
    *,
    ylabel: str,
    percent: bool,
    path: pathlib.Path,
) -> None:
    """Score against sparsity: a panel per family, the references in grey in each."""
    there = lambda names: [m for m in names if scores.columns(m)]
    families = {k: there(names) for k, names in families.items() if there(names)}
    # What only is a reference needs no panel.
    families = {k: v for k, v in families.items() if v != ["dense"]} or families
    columns = min(len(families), 3)
    rows = -(-len(families) // columns)
    drawn = [at for m in sum(families.values(), []) for at in scores.columns(m)]
    sparse = [at for at in drawn if at.sparsity > 0]
    places = _places(sparse)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1 + 3.7 * columns, 0.6 + 3.3 * rows),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (family, methods) in zip(axes.flat, families.items(), strict=False):
        for reference in there(references):
            _draw_reference(axis, scores, reference)
        for i, method in enumerate(methods):
            if method in references:
                continue
            ats = scores.columns(method)
            found = [scores(method, at) for at in ats]
            # A little to the side, or bars hide each other.
            axis.errorbar(
                [places[at] * 1.03 ** (i - len(methods) / 2) for at in ats],
                [x.mean for x in found],
                yerr=[0 if math.isnan(x.error) else x.error for x in found],
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=1.4,
                capsize=2,
                label=method,
            )
        axis.set_title(family, loc="left")
        if percent:
            axis.set_yscale("function", functions=(_rank_of, _accuracy_of))
            axis.yaxis.set_major_locator(matplotlib.ticker.FixedLocator(_PERCENT))
        axis.set_xscale("log")
        _name_patterns(axis, scores.columns(*methods), places)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    if places:
        first = axes[0, 0]
        first.set_xlim(max(places.values()) * 1.2, min(places.values()) / 1.2)
        ticks = _apart([at.sparsity for at in sparse])
        first.set_xticks([1 - s for s in ticks], [str(At(s)) for s in ticks])
        first.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    figure.supxlabel("sparsity of the kernels")
    figure.supylabel(f"{ylabel}, {scores.split}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _places(columns: Sequence[At]) -> dict[At, float]:
    """Where columns are drawn: at their density; those of one density side by side."""
    places = {at: 1 - at.sparsity for at in columns}
    for at in places:
        beside = sorted(a for a in places if a.pattern and a.sparsity == at.sparsity)
        if at.pattern:
            places[at] *= 1.2 ** ((len(beside) - 1) / 2 - beside.index(at))
    return places


def _name_patterns(axis: Any, columns: list[At], places: dict[At, float]) -> None:
    """Writes N:M above a panel, where there are patterns; after its scale is set."""
    names = {places[at]: show_pattern(at.pattern) for at in columns if at.pattern}
    if names:
        top = axis.secondary_xaxis("top")
        top.set_xticks([*names], [*names.values()], fontsize="small")
        top.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        top.spines["top"].set_visible(False)


def _rank_of(accuracy: Any) -> Any:
    """Even steps are equal factors of the error."""
    return -np.log(np.maximum(100 - accuracy, 1e-3))


def _accuracy_of(rank: Any) -> Any:
    return 100 - np.exp(-rank)


def _draw_reference(axis: Any, scores: Scores, method: str) -> None:
    columns = scores.columns(method)
    found = [scores(method, at) for at in columns]
    if columns == [At(0.0)]:
        (one,) = found
        axis.axhline(one.mean, color="0.45", linestyle="--", linewidth=1, label=method)
        if not math.isnan(one.error):
            axis.axhspan(one.mean - one.error, one.mean + one.error, color="0.9")
        return
    axis.plot(
        [1 - at.sparsity for at in columns],
        [x.mean for x in found],
        color="0.6",
        linestyle=":",
        linewidth=1.6,
        label=method,
    )


def _apart(sparsities: Sequence[float]) -> list[float]:
    """Those with room for a label on a logarithmic axis; the most frequent go first."""
    kept: list[float] = []
    for s, _ in collections.Counter(sparsities).most_common():
        if all(abs(math.log((1 - s) / (1 - other))) > 0.3 for other in kept):
            kept.append(s)
    return sorted(kept)
