"""Block-sparse attention beside dense attention and what one has today, in one run.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --length 16384 --dtype bfloat16 \\
        --implementations mosaic_gpu --anchors --lengths

Two masks: a causal window, and random blocks of each head (10%, an exact count in all).
Forward, and value with all gradients; the mask is an argument, or made in the program.
The anchors: ``jax.nn.dot_product_attention`` with the mask in full and with
``local_window_size``, and windows by contiguous chunks of which each sees itself and
the one before (as in Longformer, without gathers). Then both masks beside dense
attention at growing lengths: where does it begin to pay? Three JSON files under
results/; ratios, temporary memory and the crossover are in the summaries.
"""

import argparse
import functools
import pathlib
import time

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention as at
from sparsejax.ops import block_sparse_attention

MODES = ["forward", "gradients"]
DENSE, LOCAL, CHUNKS = "dense with mask", "local_window_size", "chunks"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--length", type=int, default=4096)
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=None, help="default: --heads")
    add("--head-dim", type=int, default=64)
    add("--block", type=int, default=128)
    add("--window", type=int, default=512)
    add("--density", type=float, default=0.1, help="of the random blocks")
    add("--dtype", default="float32")
    add("--implementations", nargs="+", default=["auto"], help="auto: the default")
    add("--anchors", nargs="*", default=[LOCAL, CHUNKS], choices=[LOCAL, CHUNKS])
    add(
        "--lengths",
        type=int,
        nargs="*",
        default=[64, 128, 256, 512, 1024, 2048],
        help="besides --length, to find the crossover",
    )
    add("--modes", nargs="*", default=MODES, choices=MODES)
    add("--rounds", type=int, default=7)
    add("--out", help="folder of the JSON files; benchmarks/results/ by default")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads

    for mode in args.modes:
        measure(args, mode)
    if args.lengths:
        times, summary = crossover(args)
        save(args, "attention_lengths", times, next(iter(times)), summary)


def measure(args, mode):
    """One JSON file for forward, one for gradients."""
    memory = {}
    times = _harness.interleave(cases(args, mode, memory), rounds=args.rounds, warmup=1)
    print(f"\n{mode}, {shape(args)}\n{_harness.table(times, base=DENSE)}", flush=True)
    summary = {name: _harness.ratio(times, name, DENSE) for name in times}
    for name, size in memory.items():
        print(f"{name:36} {size:8.1f} MiB of temporary memory")
        summary[f"{name}, temporary MiB"] = size
    for kind in ("window", "blocks"):
        mask = mask_of(kind, args, args.length)
        summary[f"{kind}, density of blocks"] = float(mask.density)
        summary[f"{kind}, seconds to make the mask"] = seconds_to_make(kind, args)
    save(args, f"attention_{mode}", times, DENSE, summary)


def save(args, name, times, base, summary):
    config = {k: v for k, v in vars(args).items() if k != "out"}
    path = None
    if args.out:
        platform = jax.devices()[0].platform
        path = pathlib.Path(args.out) / f"{name}.{platform}.json"
    _harness.save(name, times, base=base, config=config, summary=summary, path=path)


def shape(args):
    sizes = args.batch, args.length, args.heads, args.head_dim
    return f"{'x'.join(map(str, sizes))}, blocks of {args.block}, {args.dtype}"


# ---- masks -------------------------------------------------------------------------


def mask_of(kind, args, length):
    sides = args.block, args.block
    if kind == "window":
        near = at.causal() & at.sliding_window(args.window)
        return at.block_mask(near, length, length, block_shape=sides)
    side = -(-length // args.block)
    return at.BlockMask.from_blocks(
        jnp.asarray(random_blocks(args, side)),
        shape=(length, length),
        block_shape=sides,
    )


def random_blocks(args, side):
    """Exactly so many in all heads together; some rows of a head may be empty."""
    rng = np.random.default_rng(0)
    total = args.heads * side * side
    blocks = np.zeros(total, bool)
    blocks[rng.permutation(total)[: max(1, round(args.density * total))]] = True
    return blocks.reshape(1, args.heads, side, side)


def seconds_to_make(kind, args):
    """On the host, as before a training: the median of a few."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(mask_of(kind, args, args.length).kv_idx)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


# ---- programs ----------------------------------------------------------------------


def cases(args, mode, memory):
    q, k, v = arrays(args, args.length)
    build = functools.partial(compiled, memory, mode)
    window, blocks = (mask_of(kind, args, args.length) for kind in ("window", "blocks"))
    dense = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    with_mask = lambda q, k, v, mask: dense(q, k, v, mask=mask)
    found = [build(DENSE, with_mask, q, k, v, window.to_mask()[None, None])]
    if LOCAL in args.anchors:
        sizes = (args.window - 1, 0)
        local = functools.partial(dense, is_causal=True, local_window_size=sizes)
        found.append(build(LOCAL, local, q, k, v))
    if CHUNKS in args.anchors:
        found.append(build(CHUNKS, functools.partial(chunks, args.window), q, k, v))
    for choice in args.implementations:
        implementation = None if choice == "auto" else choice
        ours = functools.partial(block_sparse_attention, implementation=implementation)
        found.append(build(f"{choice}, window", ours, q, k, v, window))
        found.append(build(f"{choice}, blocks", ours, q, k, v, blocks))

        # From numbers that are only known as it runs: intervals, sort and all.
        def made(q, k, v, width, ours=ours):
            near = at.causal() & at.sliding_window(width)
            sizes, sides = q.shape[1:2] * 2, (args.block, args.block)
            return ours(q, k, v, at.block_mask(near, *sizes, block_shape=sides))

        def chosen(q, k, v, block_map, ours=ours):
            sides = args.block, args.block
            mask = at.BlockMask.from_blocks(
                block_map, shape=q.shape[1:2] * 2, block_shape=sides
            )
            return ours(q, k, v, mask)

        width = jnp.int32(args.window)
        found.append(build(f"{choice}, window made inside", made, q, k, v, width))
        block_map = blocks.to_blocks()
        found.append(build(f"{choice}, blocks made inside", chosen, q, k, v, block_map))
    return found


def arrays(args, length):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = args.heads, args.kv_heads, args.kv_heads
    return [
        jax.random.normal(key, (args.batch, length, h, args.head_dim), args.dtype)
        for key, h in zip(keys, heads, strict=True)
    ]


def compiled(memory, mode, name, fn, *arrays):
    start = time.perf_counter()
    program = (
        jax.jit(fn if mode == "forward" else gradients(fn)).lower(*arrays).compile()
    )
    compile_s = time.perf_counter() - start
    memory[name] = program.memory_analysis().temp_size_in_bytes / 2**20
    return _harness.Case(name, lambda: program(*arrays), compile_s)


def gradients(fn):
    """Value and gradients, in query, key and value."""

    def run(q, k, v, *rest):
        y, vjp = jax.vjp(lambda q, k, v: fn(q, k, v, *rest), q, k, v)
        return y, *vjp(y)

    return run


def chunks(window, q, k, v):
    """Causal windows by chunks as wide, each with the one before: no gather."""
    b, t, h, d = q.shape
    n, w = t // window, window
    cut = lambda x: x.reshape(b, n, w, *x.shape[2:])
    before = lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
    pair = lambda x: jnp.concatenate([before(cut(x)), cut(x)], axis=2)
    i, j = np.arange(w)[:, None] + w, np.arange(2 * w)[None]
    near = (j <= i) & (i - j < w)
    there = near & ((np.arange(n)[:, None, None] > 0) | (j >= w))  # before the first
    flat = lambda x: x.reshape(b * n, *x.shape[2:])
    mask = jnp.asarray(np.tile(there, (b, 1, 1)))[:, None]
    y = jax.nn.dot_product_attention(
        flat(cut(q)), flat(pair(k)), flat(pair(v)), mask=mask, implementation="xla"
    )
    return y.reshape(b, t, h, d)


# ---- where it pays -----------------------------------------------------------------


def crossover(args):
    """The shortest of the lengths from which on it is faster than dense attention."""
    times, summary, faster = {}, {}, {}
    for length in sorted({*args.lengths, args.length}):
        for mode in ("forward", "gradients"):
            build = functools.partial(compiled, {}, mode)
            q, k, v = arrays(args, length)
            dense = functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation="xla"
            )
            programs = [build("dense", dense, q, k, v)]
            for kind in ("window", "blocks"):
                mask = mask_of(kind, args, length)
                programs.append(build(kind, block_sparse_attention, q, k, v, mask))
            inner = max(1, min(20, (2048 // length) ** 2))
            found = _harness.interleave(programs, rounds=args.rounds, inner=inner)
            table = _harness.table(found, base="dense")
            print(f"\n{mode}, {length}\n{table}", flush=True)
            for kind in ("window", "blocks"):
                ratio = _harness.ratio(found, kind, "dense")
                summary[f"{kind}, {mode}, {length}"] = ratio
                faster.setdefault((kind, mode), []).append((length, ratio < 1))
            label = f", {mode}, {length}"
            times |= {name + label: timing for name, timing in found.items()}
    for (kind, mode), lengths in faster.items():
        since = None
        for length, is_faster in reversed(lengths):
            if not is_faster:
                break
            since = length
        summary[f"{kind}, {mode}, faster from"] = since
        print(f"{kind}, {mode}: faster than dense causal attention from {since}")
    return times, summary


if __name__ == "__main__":
    main()
