"""What device.py does in processes of their own: see there."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import _harness
import bench_block_sparse_matmul as bench
import device_experts
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul import _spec, mosaic_gpu
from sparsejax.layouts import scatter_blocks

OPS = {"forward": "dsd", "dx": "dsd_transposed", "dw": "sdd"}
GPU_FIELDS = ("tile_m", "warpgroups", "tile_k", "unroll", "stages", "cluster", "group")
SHARED_MEMORY = 232_448 - 1_024
SHORTLIST = 4


def main():
    what, job = sys.argv[1], json.loads(sys.argv[2])
    if job["commit"] or not shutil.which("git"):
        _harness._commit = lambda: job["commit"] or "unknown"
    jobs = {"environment": environment, "bench": run_bench, "sweep": run_sweep}
    run = {**jobs, "experts": device_experts.run}[what]
    pathlib.Path(job["out"]).write_text(json.dumps(run(job)))


def environment(job):
    del job
    return _harness.environment()


def run_bench(job):
    """The benchmark as it is, its results kept out of the tree."""
    _harness.RESULTS = pathlib.Path(job["out"]).parent / "bench"
    _harness.RESULTS.mkdir(exist_ok=True)
    sys.argv = ["bench_block_sparse_matmul.py", *job["argv"]]
    bench.main()
    rows = []
    for file in sorted(_harness.RESULTS.iterdir()):
        record = json.loads(file.read_text())
        what = record["benchmark"].removeprefix("block_sparse_matmul_")
        rows += [{"what": what, **row} for row in record["rows"]]
        file.unlink()
    return {"rows": rows}


# --- The sweep ------------------------------------------------------------------------


def candidates(problem):
    """The default tiles, then all others that registers and shared memory allow."""
    bk, bn = problem.block_shape
    side_in, side_out = (bn, bk) if problem.op == "dsd_transposed" else (bk, bn)
    sampled = problem.op == "sdd"
    configs = [_spec.config_mosaic_gpu(problem, "h200")]
    tiles = itertools.product((1, 2), (64, 128, 192, 256, 384), (64, 128), (1, 2))
    for warpgroups, tile_m, tile_k, cluster in tiles:
        rows = tile_m // warpgroups
        if rows % 64 or rows * side_out > 192 * 128 or cluster > 1 == warpgroups:
            continue
        if sampled and (cluster > 1 or tile_m >= 2 * max(bk, 64)):
            continue
        if not sampled and (side_in % tile_k or tile_m >= 2 * problem.m):
            continue
        stage = 2 * tile_k * (tile_m + side_out)
        out = tile_m * math.gcd(2 * side_out, 128) if warpgroups == 2 else 0
        # One program on a multiprocessor, or with a single warpgroup two or four.
        fits = [
            (SHARED_MEMORY // n - out) // stage for n in (1, 2, 4)[: 4 - warpgroups]
        ]
        for stages in sorted({min(6, fit) for fit in fits if fit >= 2}):
            swept = not sampled and (tile_m, warpgroups, cluster) == (256, 2, 1)
            for group in (4, 8, 32) if swept else (8,):
                configs.append(
                    _spec.Config(
                        tile_m,
                        stages=stages,
                        tile_k=tile_k,
                        warpgroups=warpgroups,
                        group=group,
                        cluster=cluster,
                    )
                )
    return list(dict.fromkeys(configs))


def tiles(config):
    return {name: getattr(config, name) for name in GPU_FIELDS}


@dataclasses.dataclass
class Operands:
    """A random problem: what kernels take, what the dense product takes."""

    shape: tuple[int, int, int]
    block: int
    sparsity: float

    def __post_init__(self):
        m, k, n = self.shape
        rng = np.random.default_rng()
        self.layout, self.blocks = bench.random_layout(
            rng, (k, n), (self.block,) * 2, 1 - self.sparsity, "bfloat16"
        )
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        self.x, self.dy = normal(m, k), normal(m, n)
        self.w = scatter_blocks(self.blocks, self.layout)

    def problem(self, op):
        m, k, n = self.shape
        slots = self.layout.capacity
        args = (op, m, k, n, (self.block,) * 2, slots, "bfloat16", "bfloat16")
        problem = _spec.Problem(*args)
        _spec.check_mosaic_gpu(problem, "h200")
        return problem

    def kernel(self, op, config, interpret):
        """(function, arguments) of the kernel alone."""
        at, common = self.layout, dict(config=config, interpret=interpret)
        if op == "sdd":
            shape = dict(block_shape=at.block_shape, dtype=jnp.bfloat16)
            call = lambda *args: mosaic_gpu.sdd(*args, **shape, **common)
            return call, (self.x, self.dy, at.rows, at.cols, at.count)
        if op == "dsd":
            call = lambda x, blocks, source, ptr: mosaic_gpu.dsd(
                x, blocks, None, source, ptr, transpose=False, **common
            )
            return call, (self.x, self.blocks, at.rows, at.column_pointers())
        call = lambda *args: mosaic_gpu.dsd(*args, transpose=True, **common)
        order = at.transpose_order()
        ptr = at.transpose().column_pointers()
        return call, (self.dy, self.blocks, order, at.cols[order], ptr)

    def dense(self, op):
        """(function, arguments) of the dense product of the same operands."""
        if op == "dsd":
            return lambda x, w: x @ w, (self.x, self.w)
        if op == "dsd_transposed":
            return lambda dy, w: dy @ w.T, (self.dy, self.w)
        return lambda x, dy: x.T @ dy, (self.x, self.dy)

    def tolerance(self, op):
        """(result in float64, error allowed): twice that of XLA's in bfloat16."""
        fn, args = self.dense(op)
        low = self.stored(op, fn(*args))
        with jax.enable_x64(True):
            exact = self.stored(op, fn(*(a.astype(jnp.float64) for a in args)))
            error = jnp.max(jnp.abs(low.astype(jnp.float64) - exact))
            return exact, 2 * float(error) + 1e-6 * float(jnp.max(jnp.abs(exact)))

    def stored(self, op, dense):
        if op != "sdd":
            return dense
        (kb, nb), (bk, bn) = self.layout.grid, self.layout.block_shape
        by_block = dense.reshape(kb, bk, nb, bn).transpose(0, 2, 1, 3)
        return by_block[self.layout.rows, self.layout.cols]


def error_of(out, exact):
    with jax.enable_x64(True):
        return float(jnp.max(jnp.abs(out.astype(jnp.float64) - exact)))


def run_sweep(job):
    end = time.monotonic() + job["seconds"]
    log = pathlib.Path(job["log"])
    past = [json.loads(line) for line in log.read_text().splitlines()]
    deadly = last_words(past)

    def note(**row):
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for sparsity, (name, op) in itertools.product(job["sparsities"], OPS.items()):
        head = f"{'x'.join(map(str, job['shape']))} blocks {job['block']} {name}"
        group = f"{head} {sparsity:.0%}"
        if {"finished": group} in past or {"busy": group} in deadly:
            continue
        if time.monotonic() > end:
            return {"complete": False}
        operands = Operands(tuple(job["shape"]), job["block"], sparsity)
        default, *others = candidates(operands.problem(op))
        fullest = f"{head} {job['sparsities'][0]:.0%}"
        first = [row for row in past if row.get("group") == fullest]
        best = [r["tiles"] for r in sorted(first, key=lambda r: r["us"])[:SHORTLIST]]
        if best:
            others = [config for config in others if tiles(config) in best]
        if job["quick"] or job["interpret"]:
            others = others[:: max(1, len(others) // 6)]
        skip = [row["trying"] for row in deadly if row.get("of") == group]
        configs = {
            config: config == default
            for config in (default, *others)
            if tiles(config) not in skip
        }
        rows = measure(operands, op, configs, group, job["interpret"], note, end)
        past += rows
        for row in rows:
            note(**row)
        note(finished=group)
    return {"complete": True}


def last_words(past):
    """What was under way when an earlier process died; it is not tried again."""
    return [a for a, b in itertools.pairwise(past) if "died" in b and "died" not in a]


@contextlib.contextmanager
def watchdog(seconds):
    """Ends the process if the device hangs."""
    timer = threading.Timer(seconds, os._exit, (3,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure(operands, op, configs, group, interpret, note, end):
    """Compiles all, checks all, times those that are right beside the dense product.

    ``configs`` says of each whether it is the default.
    """
    repeat = 1 if interpret else 20

    def build(config):
        if time.monotonic() > end:
            return TimeoutError("no time left")
        fn, args = operands.kernel(op, config, True if interpret else None)
        try:
            return bench.compiled(str(tiles(config)), fn, *args, repeat=repeat)
        except Exception as error:  # a configuration that does not compile is a result
            return error

    note(busy=group)
    with ThreadPoolExecutor(1 if interpret else 8) as pool:
        built = list(pool.map(build, configs))
    exact, allowed = operands.tolerance(op)
    right = {}
    for (config, default), case in zip(configs.items(), built, strict=True):
        what = dict(of=group, tiles=tiles(config), default=default)
        if isinstance(case, Exception):
            note(**what, result="does not compile", error=repr(case)[:300])
            continue
        note(trying=tiles(config), of=group)
        with watchdog(60):
            error = error_of(case.run(), exact)
        ok = error <= allowed  # not so for NaN
        note(**what, result="ok" if ok else "wrong", max_error=error, allowed=allowed)
        if ok:
            right[config] = case
    del exact
    note(busy=group)
    fn, args = operands.dense(op)
    dense = bench.compiled("dense", fn, *args, repeat=repeat)
    with watchdog(120):
        rounds = 2 if interpret else 9
        times = _harness.interleave([dense, *right.values()], rounds=rounds)
    each_us = lambda seconds: seconds / repeat * 1e6
    dense_us = each_us(times["dense"].median)
    print(f"\n{group}, dense {dense_us:.1f} us", flush=True)
    rows = [
        dict(
            group=group,
            tiles=tiles(config),
            default=configs[config],
            us=each_us(times[case.name].median),
            iqr_us=each_us(times[case.name].iqr),
            dense_us=dense_us,
            ratio_to_dense=_harness.ratio(times, case.name, "dense"),
        )
        for config, case in right.items()
    ]
    rows.sort(key=lambda row: row["us"])
    for row in rows:
        mark = " (default)" if row["default"] else ""
        print(f"  {row['us']:8.1f} us {row['tiles']}{mark}", flush=True)
    return rows


if __name__ == "__main__":
    main()
