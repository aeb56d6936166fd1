"""Interleaved timing: rounds over all cases, medians, ratios, one JSON file.

A ratio between two programs is only fair when both ran under the same load, so
every round runs every case once, in an order that rotates, and a ratio is the
median over rounds of the quotient taken inside one round. Compilation is timed
apart and never enters a median. Wall time of tiny programs measures Python, not
the program: keep cases above about a millisecond, or raise `inner`.

    cases = [
        compiled("dense", lambda x, w: x @ w, x, w),
        compiled("sparse", sparse_fn, x, blocks, layout),
        plain("scipy", lambda: x_np @ w_csr),
    ]
    times = interleave(cases, rounds=20)
    print(table(times, base="dense"))
    save("block_sparse_matmul", times, base="dense", config={"density": 0.1})
"""

import ctypes
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


class Case(NamedTuple):
    """A program to time: `run()` does the work and returns what to wait for."""

    name: str
    run: Callable[[], Any]
    compile_s: float | None = None  # None: nothing was compiled for it


class Timing(NamedTuple):
    """What one case took, in seconds per run."""

    name: str
    rounds: tuple[float, ...]  # one entry per round, in the order of the rounds
    compile_s: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def iqr(self) -> float:
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return high - low


def compiled(name: str, fn: Callable, *args: Any, **jit_options: Any) -> Case:
    """Compiles `fn(*args)` ahead of time and returns a case that calls it."""
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn, **jit_options)
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return Case(name, lambda: program(*args), time.perf_counter() - start)


def plain(name: str, fn: Callable, *args: Any) -> Case:
    """A case that runs as it is: numpy, scipy, or a program already compiled."""
    return Case(name, lambda: fn(*args))


def keep_memory(below: int | None = None) -> None:
    """Has malloc keep what is freed, as it does where one program runs all the time.

    Of programs that take turns, each with buffers of its own sizes, glibc returns to
    the kernel what the last one freed: the next one's pages are new, and to have them
    costs as much as a small program. To be called before the first array is made.

    Args:
      below: Blocks of so many bytes and more are given back. None: all are kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # M_ARENA_MAX, M_TRIM_THRESHOLD, M_MMAP_MAX or M_MMAP_THRESHOLD of malloc.h.
    large = (-4, 0) if below is None else (-3, below)
    for option, value in ((-8, 1), (-1, 2**31 - 1), large):
        if mallopt is not None:
            mallopt(option, value)


def interleave(
    cases: Sequence[Case], *, rounds: int = 20, inner: int = 1, warmup: int = 2
) -> dict[str, Timing]:
    """Times every case once per round (`inner` calls each), for `rounds` rounds."""
    if len({case.name for case in cases}) != len(cases):
        raise ValueError(f"case names must differ, got {[c.name for c in cases]}")
    for case in cases:
        for _ in range(warmup):
            jax.block_until_ready(case.run())
    taken: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in range(rounds):
        # The order rotates so that no case always runs after the same neighbour.
        shift = round_ % len(cases)
        for case in (*cases[shift:], *cases[:shift]):
            start = time.perf_counter()
            for _ in range(inner):
                # Waiting for each call keeps two of them from overlapping.
                jax.block_until_ready(case.run())
            taken[case.name].append((time.perf_counter() - start) / inner)
    return {c.name: Timing(c.name, tuple(taken[c.name]), c.compile_s) for c in cases}


def ratio(times: dict[str, Timing], name: str, base: str) -> float:
    """Median over rounds of time(name) / time(base) within one round."""
    pairs = zip(times[name].rounds, times[base].rounds, strict=True)
    return statistics.median(one / other for one, other in pairs)


def table(times: dict[str, Timing], *, base: str) -> str:
    """One line per case: compile time, median, spread, ratio to `base`."""
    width = max(len(name) for name in times)
    lines = [f"{'case':{width}}  compile ms  median ms     iqr ms  ratio to {base}"]
    for name, t in times.items():
        built = "-" if t.compile_s is None else f"{t.compile_s * 1e3:.0f}"
        lines.append(
            f"{name:{width}}  {built:>10}  {t.median * 1e3:9.3f}  "
            f"{t.iqr * 1e3:9.3f}  {ratio(times, name, base):.3f}"
        )
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Where and on what the numbers were taken."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def save(
    benchmark: str,
    times: dict[str, Timing],
    *,
    base: str,
    config: dict[str, Any],
    summary: dict[str, float] | None = None,
    path: pathlib.Path | str | None = None,
) -> pathlib.Path:
    """Writes `results/<benchmark>.<platform>.json`, or `path`; returns the path.

    `summary` holds numbers derived from the times, such as an amortized ratio. Cases
    that ran in another number of rounds than `base` have no ratio to it.
    """
    env = environment()
    path = pathlib.Path(path or RESULTS / f"{benchmark}.{env['platform']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "case": name,
            "compile_s": t.compile_s,
            "median_s": t.median,
            "iqr_s": t.iqr,
            "rounds": len(t.rounds),
            **(
                {f"ratio_to_{base}": ratio(times, name, base)}
                if len(t.rounds) == len(times[base].rounds)
                else {}
            ),
        }
        for name, t in times.items()
    ]
    record = {
        "benchmark": benchmark,
        "environment": env,
        "config": config,
        "rows": rows,
        "summary": summary or {},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _commit() -> str:
    """The checked-out commit, marked when tracked files differ from it."""
    here = pathlib.Path(__file__).parent
    git = lambda *a: subprocess.run(
        ["git", *a], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    head = git("rev-parse", "HEAD") or "unknown"
    return head + ("+" if git("status", "--porcelain", "-uno") else "")


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
