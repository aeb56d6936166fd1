"""The experts' kernels beside dense products of equal work; device.py runs it."""

import dataclasses
import itertools
import json
import pathlib

import _harness
import bench_block_sparse_matmul as bench
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import _spec as grouped_spec
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.moe_mlp import _spec as moe_spec
from pallas_kernels.moe_mlp import mosaic_gpu as moe

OPS = (
    "grouped", "grouped_transposed", "grouped_sampled",
    "moe_hidden", "moe_hidden_gated", "moe_down",
)  # fmt: skip
FIELDS = ("tile_m", "tile_k", "tile_n", "stages", "group", "programs")


def run(job):
    """Measures every kernel at one shape; writes what it has after each."""
    rows = []
    for load, op in itertools.product(job["loads"], OPS):
        operands = Operands(tuple(job["shape"]), load, op)
        rows.append(measure(operands, job["sweep"], job["interpret"]))
        pathlib.Path(job["out"]).write_text(json.dumps({"rows": rows}))
        print(line(rows[-1]), flush=True)
    return {"rows": rows}


def line(row):
    if row["result"] != "ok":
        return f"{row['case']}: {row['result']}"
    best = "" if row["best"] == row["tiles"] else f", best {row['best']}"
    return (
        f"{row['case']}: {row['us']:.1f} us, {row['tflops']:.0f} TFLOP/s, "
        f"{row['ratio_to_dense']:.3f} of dense{best}"
    )


def group_sizes(load, groups, rows):
    """Rows of each group, ``rows`` on average: all alike, or as routers make them."""
    if load == "even":
        return np.full(groups, rows)
    scores = np.random.default_rng(0).normal(0, 0.7, groups)
    share = np.exp(scores) / np.exp(scores).sum()
    sizes = np.floor(share * rows * groups).astype(int)
    sizes[0] += rows * groups - sizes.sum()
    return sizes


@dataclasses.dataclass
class Operands:
    """A random problem; ``shape`` is (groups, mean rows of one, k, n)."""

    shape: tuple[int, int, int, int]
    load: str
    op: str

    def __post_init__(self):
        groups, rows, k, n = self.shape
        rng = np.random.default_rng(1)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        # Sums of about 1, where an activation bends.
        weights = lambda *shape: normal(*shape) * jnp.bfloat16(shape[1] ** -0.5)
        sizes = group_sizes(self.load, groups, rows)
        ends = [int(end) for end in itertools.accumulate(sizes, initial=0)]
        self.groups = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.sizes, m = jnp.asarray(sizes, jnp.int32), groups * rows
        if self.op == "grouped_sampled":
            self.args = normal(m, k), normal(m, n)
        elif self.op == "grouped_transposed":
            self.args = normal(m, n), weights(groups, k, n)
        elif self.op == "moe_down":
            self.args = normal(m, n), weights(groups, n, k)
        elif self.op == "moe_hidden_gated":
            self.args = normal(m, k), weights(groups, k, n), weights(groups, k, n)
        else:
            self.args = normal(m, k), weights(groups, k, n)
        # Each token twice, in an order of its own; the kernels fetch and deliver it.
        order = rng.permutation(m)
        self.order = jnp.asarray(order, jnp.int32)
        self.gates = jnp.asarray(rng.random(m), jnp.float32)

    def config(self):
        groups, rows, k, n = self.shape
        m, dtype = groups * rows, "bfloat16"
        if self.op.startswith("moe"):
            spec, args = moe_spec, (self.op, m // 2, m, k, n, groups, dtype)
        else:
            spec, args = grouped_spec, (self.op, m, k, n, groups, dtype, dtype)
        problem = spec.Problem(*args)
        spec.check_mosaic_gpu(problem, "h200")
        return spec.config_mosaic_gpu(problem, "h200")

    def kernel(self, config, interpret):
        """(function, arguments) of the kernel and of what XLA does around it."""
        common = dict(config=config, interpret=interpret)
        if self.op == "grouped_sampled":
            call = lambda x, y, sizes: grouped.sampled(
                x, y, sizes, dtype=x.dtype, **common
            )
            return call, (*self.args, self.sizes)
        if self.op.startswith("grouped"):
            transpose = self.op == "grouped_transposed"
            call = lambda x, w, sizes: grouped.product(
                x, w, sizes, transpose=transpose, **common
            )
            return call, (*self.args, self.sizes)
        if self.op == "moe_down":
            call = lambda h, w, *more: moe.down(h, w, *more, **common)
            return call, (*self.args, self.order, self.gates, self.sizes)
        call = lambda x, tokens, sizes, *weights: moe.hidden(
            x, weights[-1], weights[0] if len(weights) > 1 else None, tokens, sizes,
            activation=jax.nn.silu, **common,
        )  # fmt: skip
        x, *weights = self.args
        tokens = self.order // 2
        return call, (x[: x.shape[0] // 2], tokens, self.sizes, *weights)

    def formula(self, args, gates, wide=jnp.float32):
        """The dense product: of one group's rows with its matrix."""
        dot = lambda a, b: jnp.dot(a, b, preferred_element_type=wide)
        a, b, *more = args
        if self.op == "grouped_sampled":
            return dot(a.T, b)
        if self.op == "grouped_transposed":
            return dot(a, b.T)
        if self.op == "moe_hidden":
            return jax.nn.silu(dot(a, b))
        if self.op == "moe_hidden_gated":
            return jax.nn.silu(dot(a, b)) * dot(a, more[0])
        if self.op == "moe_down":
            return dot(a, b) * gates[:, None]
        return dot(a, b)

    def dense(self):
        """(function, arguments) of the dense product of all rows with one matrix."""
        a, *others = self.args
        if self.op != "grouped_sampled":
            others = [w[0] for w in others]
        call = lambda gates, *args: self.formula(args, gates).astype(jnp.bfloat16)
        return call, (self.gates, a, *others)

    def by_group(self, wide):
        """The kernel's result by XLA, group by group."""
        a, *others = (array.astype(wide) for array in self.args)
        if wide == jnp.bfloat16:
            sums, store = jnp.float32, jnp.bfloat16
        else:
            sums = store = wide
        gates = self.gates.astype(sums)
        if self.op in ("moe_hidden", "moe_hidden_gated"):
            a = a[: a.shape[0] // 2][self.order // 2]
        sampled = self.op == "grouped_sampled"
        out = [
            self.formula(
                (a[rows], *(b[rows] if sampled else b[g] for b in others)),
                gates[rows],
                sums,
            ).astype(store)
            for g, rows in enumerate(self.groups)
        ]
        if sampled:
            return jnp.stack(out)
        out = jnp.concatenate(out)
        if self.op == "moe_down":
            return jnp.zeros_like(out).at[self.order].set(out)
        return out

    def error(self, out):
        """(largest error, error allowed): twice that of XLA's in bfloat16."""
        low = self.by_group(jnp.bfloat16)
        with jax.enable_x64(True):
            exact = self.by_group(jnp.float64)
            largest = lambda a: float(jnp.max(jnp.abs(a.astype(jnp.float64) - exact)))
            allowed = 2 * largest(low) + 1e-6 * float(jnp.max(jnp.abs(exact)))
            return largest(out), allowed

    def flops(self):
        groups, rows, k, n = self.shape
        return 2 * groups * rows * k * n * (2 if self.op == "moe_hidden_gated" else 1)


def candidates(default):
    """The default tiles, then others, none of which needs more memory."""
    changes = [dict(group=group) for group in (2, 4, 16, 32)]
    changes += [dict(stages=stages) for stages in range(2, default.stages)]
    if default.tile_m == 128:
        changes.append(dict(tile_m=64))
    return [default, *(dataclasses.replace(default, **change) for change in changes)]


def measure(operands, sweep, interpret):
    """Checks the kernel, then times it, with other tiles too, beside the dense one."""
    groups, rows, k, n = operands.shape
    name = f"{operands.op}, {groups} groups of {rows} rows, {operands.load}, {k}x{n}"
    row, repeat = {"case": name, "result": "ok"}, 1 if interpret else 20
    default = operands.config()
    if interpret:
        default = dataclasses.replace(default, programs=2)
    row["tiles"] = tiles(default)
    configs = candidates(default) if sweep else [default]
    right = {}
    for config in configs:
        fn, args = operands.kernel(config, True if interpret else None)
        case = bench.compiled(str(tiles(config)), fn, *args, repeat=repeat)
        error, allowed = operands.error(case.run())
        if error <= allowed:  # not so for NaN
            right[config] = case
        elif config == default:
            return row | {"result": "wrong", "max_error": error, "allowed": allowed}
        else:
            row.setdefault("wrong", []).append(tiles(config))
    fn, args = operands.dense()
    dense = bench.compiled("dense", fn, *args, repeat=repeat)
    rounds = 2 if interpret else 9
    times = _harness.interleave([dense, *right.values()], rounds=rounds)
    best = min(right, key=lambda config: times[right[config].name].median)
    us = lambda name: times[name].median / repeat * 1e6
    mine = right[default].name
    return row | {
        "us": us(mine),
        "dense_us": us("dense"),
        "tflops": operands.flops() / us(mine) / 1e6,
        "ratio_to_dense": _harness.ratio(times, mine, "dense"),
        "best": tiles(best),
        "best_ratio_to_dense": _harness.ratio(times, right[best].name, "dense"),
    }


def tiles(config):
    return {name: getattr(config, name) for name in FIELDS}
