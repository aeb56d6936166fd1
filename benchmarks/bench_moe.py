"""Dropless experts beside what one has today, and a dense layer of equal work.

    python benchmarks/bench_moe.py
    python benchmarks/bench_moe.py --dtype bfloat16 --implementations mosaic_gpu xla

Forward, and value with all gradients, for each number of experts; every case has the
same routing. The anchors: one-hot dispatch and combine (Mesh TensorFlow, capacity 1.25,
which drops tokens), ``jax.lax.ragged_dot`` on sorted rows, and a dense layer through
which all choices go as rows. The first two take seconds and gigabytes, after which what
runs next is slower: they get a few rounds of their own. One JSON file for each number
of experts under results/; the ratios and the temporary memory are in its summary.
"""

import argparse
import functools
import math
import pathlib
import time

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.ops import moe_mlp
from sparsejax.routing import top_k

DENSE, ONE_HOT, RAGGED = "dense", "one-hot", "ragged_dot"
CAPACITY = 1.25


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=4096)
    add("--shape", type=int, nargs=2, default=(512, 2048), metavar=("D", "F"))
    add("--experts", type=int, nargs="+", default=[8, 32])
    add("--top-k", type=int, default=2)
    add("--gated", action="store_true", help="SwiGLU, in all cases but the anchors'")
    add("--dtype", default="float32")
    add(
        "--implementations",
        nargs="+",
        default=["auto"],
        help="auto: the default choice",
    )
    add("--anchors", nargs="*", default=[ONE_HOT, RAGGED], choices=[ONE_HOT, RAGGED])
    add("--rounds", type=int, default=15)
    add("--anchor-rounds", type=int, default=3)
    add("--out", help="folder of the JSON files; benchmarks/results/ by default")
    args = parser.parse_args()
    if args.gated and args.anchors:
        parser.error("--gated has no anchors but the dense layer: pass --anchors")

    for experts in args.experts:
        times, memory, summary = {}, {}, {}
        for mode in ("forward", "gradients"):
            quick, slow = cases(args, experts, mode, memory)
            base = quick[0].name
            taken = _harness.interleave(quick, rounds=args.rounds)
            print(f"\n{experts} experts, {mode}\n{_harness.table(taken, base=base)}")
            for name in taken:
                summary[name] = _harness.ratio(taken, name, base)
            times |= taken
            if slow:
                few = _harness.interleave(slow, rounds=args.anchor_rounds, warmup=1)
                for name, taken_ in few.items():
                    summary[name] = taken_.median / taken[base].median
                    summary[f"{name}, seconds"] = taken_.median
                    print(
                        f"{name:22} {taken_.median * 1e3:9.3f} ms, {summary[name]:.2f}"
                    )
        for name, size in memory.items():
            print(f"{name:24} {size:7.1f} MiB of temporary memory")
            summary[f"{name}, temporary MiB"] = size
        save(args, experts, times, summary)


def save(args, experts, times, summary):
    """Ratios of both modes, each to its own dense layer, are in the summary."""
    config = vars(args) | {"experts": experts}
    del config["out"]
    path = None
    if args.out:
        path = pathlib.Path(args.out) / f"moe_experts{experts}.json"
    _harness.save(
        f"moe_experts{experts}",
        times,
        base=next(iter(times)),
        config=config,
        summary=summary,
        path=path,
    )


def cases(args, experts, mode, memory):
    """(cases of all rounds, the slow anchors), the dense layer first."""
    rng = np.random.default_rng(0)
    t, (d, f), k = args.tokens, args.shape, args.top_k
    draw = lambda *s: jnp.asarray(rng.standard_normal(s) * s[-2] ** -0.5, args.dtype)
    x = draw(t, d) * t**0.5
    ws = [draw(experts, d, f), draw(experts, f, d), *[draw(experts, d, f)] * args.gated]
    dense_ws = [w[0] for w in ws]
    routing = top_k(x.astype(jnp.float32) @ draw(d, experts).astype(jnp.float32), k)
    rows = jnp.repeat(x, k, axis=0)

    def build(name, layer, *arrays):
        name, start = f"{name} {mode}", time.perf_counter()
        run = layer if mode == "forward" else gradients(layer)
        program = jax.jit(run).lower(*arrays).compile()
        compile_s = time.perf_counter() - start
        memory[name] = program.memory_analysis().temp_size_in_bytes / 2**20
        return _harness.Case(name, lambda: program(*arrays), compile_s)

    quick = [build(DENSE, dense, rows, *dense_ws)]
    for choice in args.implementations:
        implementation = None if choice == "auto" else choice
        layer = functools.partial(ours, routing, implementation)
        quick.append(build(choice, layer, x, *ws))
    anchors = {ONE_HOT: one_hot, RAGGED: ragged}
    slow = [
        build(name, functools.partial(anchors[name], routing), x, *ws)
        for name in args.anchors
    ]
    return quick, slow


def gradients(layer):
    """Value and gradients, in x and all weights."""

    def run(*arrays):
        y, vjp = jax.vjp(layer, *arrays)
        return y, *vjp(y)

    return run


def dense(x, w_in, w_out, w_gate=None):
    h = x @ w_in
    h = jax.nn.silu(h) if w_gate is None else jax.nn.silu(x @ w_gate) * h
    return h @ w_out


def ours(routing, implementation, x, w_in, w_out, w_gate=None):
    return moe_mlp(
        x, routing, w_in, w_out, w_gate=w_gate, implementation=implementation
    )


def one_hot(routing, x, w_in, w_out):
    """Dispatch and combine as dense products; drops tokens beyond the capacity."""
    (t, k), e = routing.indices.shape, w_in.shape[0]
    capacity = math.ceil(CAPACITY * t * k / e)
    chosen = jax.nn.one_hot(routing.indices.T.reshape(-1), e, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, 1)  # first choices first
    place = jax.nn.one_hot(place, capacity, dtype=x.dtype)  # 0 beyond the capacity
    pairs = chosen.astype(x.dtype).reshape(k, t, e), place.reshape(k, t, capacity)
    dispatch = jnp.einsum("kte,ktc->tec", *pairs)
    part = routing.weights.T.astype(x.dtype)
    combine = jnp.einsum("kt,kte,ktc->tec", part, *pairs)
    rows = jnp.einsum("tec,td->ecd", dispatch, x)
    h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, w_in))
    y = jnp.einsum("ecf,efd->ecd", h, w_out)
    return jnp.einsum("tec,ecd->td", combine, y)


def ragged(routing, x, w_in, w_out):
    tokens, experts, weights = routing.choices()
    order = jnp.argsort(experts, stable=True)
    tokens, part = tokens[order], weights[order].astype(x.dtype)
    sizes = routing.counts()
    h = jax.nn.silu(jax.lax.ragged_dot(x[tokens], w_in, sizes))
    y = jax.lax.ragged_dot(h, w_out, sizes) * part[:, None]
    return jnp.zeros_like(x).at[tokens].add(y)


if __name__ == "__main__":
    main()
