"""Constant fan-in matmul beside dense and masked dense, in one run.

    python benchmarks/bench_fan_in_matmul.py
    python benchmarks/bench_fan_in_matmul.py --batches 1 --layers 8 --label _layers8

Per shape and batch one table: the dense product, the product by a masked weight, and
``fan_in_matmul`` at each sparsity; random places, equally many per column. Every
program has arrays of its own, so a round goes through all of them as a model goes
through its layers; ``--layers`` puts that many layers of the shape, alike but for their
numbers, into each program, as in a step of decoding. The summary of the JSON has the
ratios to dense.

Programs run in the thread that calls them. By default jax hands even the shortest to
another one, which costs as much as the product of a small layer, sparse or dense;
``--async-dispatch`` times that too.
"""

import argparse

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.ops import fan_in_matmul, masked_matmul

SHAPES = ["768x3072", "1024x1024", "3072x768", "4096x4096"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    add("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    add("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    add("--layers", type=int, default=1, help="of one shape in every program")
    add("--dtype", default="float32")
    add("--rounds", type=int, default=40)
    add("--async-dispatch", action="store_true", help="jax's default")
    add("--label", default="", help="appended to the name of the result")
    args = parser.parse_args()
    jax.config.update("jax_cpu_enable_async_dispatch", args.async_dispatch)

    everything, summary = {}, {}
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        weights = make_weights(k, n, args)
        for batch in args.batches:
            times = _harness.interleave(
                cases(k, batch, weights, args.dtype), rounds=args.rounds
            )
            print(f"\n{shape}, batch {batch}, {args.layers} layers, {args.dtype}")
            print(_harness.table(times, base="dense"), flush=True)
            for name, timing in times.items():
                label = f"{shape} batch {batch} {name}"
                everything[label] = timing
                summary[label] = _harness.ratio(times, name, "dense")
    name = f"fan_in_matmul{args.label}"
    path = _harness.RESULTS / f"{name}.{jax.devices()[0].platform}.json"
    # Rows of different shapes have no common base: the ratios are in the summary.
    base = next(iter(everything))
    _harness.save(
        name, everything, base=base, config=vars(args), summary=summary, path=path
    )


def make_weights(k, n, args):
    """{name: (product, the arrays of each layer)}."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), args.dtype)
    mask = lambda: jnp.asarray(rng.random((k, n)) < 1 - args.sparsities[0])
    layers = range(args.layers)
    weights = {
        "dense": (jnp.matmul, [(normal(k, n),) for _ in layers]),
        "masked dense": (masked_matmul, [(normal(k, n), mask()) for _ in layers]),
    }
    order = [np.argsort(rng.random((n, k), np.float32), axis=1) for _ in layers]
    for sparsity in args.sparsities:
        fan_in = round((1 - sparsity) * k)
        arrays = [
            (normal(n, fan_in), jnp.asarray(np.sort(o[:, :fan_in], axis=1), jnp.int32))
            for o in order
        ]
        weights[f"{sparsity:.0%}"] = fan_in_matmul, arrays
    return weights


def cases(k, batch, weights, dtype):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((batch, k)), dtype)

    def every_layer(product):
        return lambda x, layers: [product(x, *arrays) for arrays in layers]

    return [
        _harness.compiled(name, every_layer(product), x, layers)
        for name, (product, layers) in weights.items()
    ]


if __name__ == "__main__":
    main()
