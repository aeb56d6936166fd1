"""Condensed N:M products beside dense and masked dense, in one run.

    python benchmarks/bench_nm_matmul.py
    python benchmarks/bench_nm_matmul.py --dtype bfloat16 --batches 1 16 128 \\
        --implementations mosaic_gpu xla

The weight is random and keeps the n largest of every m. Forward at each batch is
compared with the dense product; one JSON file per batch under results/. The gradients
are timed with ``--gradients``, against those of the dense product.
"""

import argparse
import functools

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.layouts import condense_nm
from sparsejax.masks import nm_mask
from sparsejax.ops import masked_matmul, nm_matmul

DENSE = "dense"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("K", "P"))
    add("--batches", type=int, nargs="+", default=[1, 16, 256, 4096])
    add("--patterns", nargs="+", default=["2:4", "1:8"], help="n:m, n kept")
    add("--dtype", default="float32")
    add(
        "--implementations",
        nargs="+",
        default=["auto"],
        help="auto: the default choice",
    )
    add("--gradients", action="store_true", help="value and both gradients")
    add("--rounds", type=int, default=15)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), args.dtype)
    k, p = args.shape
    w = draw(k, p)
    condensed = {}
    for pattern in args.patterns:
        n, m = map(int, pattern.split(":"))
        mask = nm_mask(jnp.abs(w), n, m)
        condensed[pattern] = (mask, *condense_nm(w, mask, n=n, m=m))
    wrap = gradients if args.gradients else lambda product: product
    for batch in args.batches:
        x = draw(batch, k)
        cases = [_harness.compiled(DENSE, wrap(lambda x, w: x @ w), x, w)]
        for pattern, (mask, values, indices) in condensed.items():
            n, m = map(int, pattern.split(":"))
            masked = functools.partial(with_mask, mask)
            cases.append(
                _harness.compiled(f"{pattern} masked dense", wrap(masked), x, w)
            )
            for choice in args.implementations:
                product = functools.partial(
                    nm_matmul,
                    n=n,
                    m=m,
                    implementation=None if choice == "auto" else choice,
                )
                name = f"{pattern} {choice}"
                cases.append(_harness.compiled(name, wrap(product), x, values, indices))
        report(batch, cases, vars(args))


def with_mask(mask, x, w):
    return masked_matmul(x, w, mask)


def gradients(product):
    """Value and gradients of the product, in x and in what stands for w."""

    def run(x, w, *rest):
        y, vjp = jax.vjp(lambda x, w: product(x, w, *rest), x, w)
        return y, *vjp(y)

    return run


def report(batch, cases, config):
    # Few rounds where one takes a second. Where one takes milliseconds many calls in
    # turn: the first after a neighbour that holds a dense weight of its own is slower.
    rounds = config["rounds"] if batch < 1024 else max(3, config["rounds"] // 4)
    times = _harness.interleave(cases, rounds=rounds, inner=10 if batch < 256 else 1)
    print(f"\nbatch {batch}, {config['shape']}, {config['dtype']}")
    print(_harness.table(times, base=DENSE), flush=True)
    what = "nm_matmul_gradients" if config["gradients"] else "nm_matmul"
    _harness.save(f"{what}_batch{batch}", times, base=DENSE, config=config)


if __name__ == "__main__":
    main()
