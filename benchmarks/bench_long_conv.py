"""Long convolutions beside convolution by jnp.fft, in one run.

    python benchmarks/bench_long_conv.py
    python benchmarks/bench_long_conv.py --gradients --lengths 1024 65536

At each length, causal, a kernel per feature: convolution by jnp.fft as a user writes
it; ``long_conv`` by its own choice; both forms that it chooses from; a partial kernel
of 1/8 of the taps; 1/8 of the frequencies. The last two are compared with the full
convolution by jnp.fft, which has no cheaper form of them. About 2**21 entries of signal
at any length; one JSON file, the ratios at each length in its summary.
"""

import argparse
import functools

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.ops import _long_conv, _long_conv_xla, long_conv, long_conv_reference
from sparsejax.ops._long_conv_xla import GRADIENTS, Problem
from sparsejax.ops._products import PRODUCT

BASE = "jnp.fft"
ENTRIES = 2**21
MONARCH = functools.partial(
    _long_conv_xla.monarch, side=_long_conv._SIDE_CPU, piece=_long_conv._PIECE
)


def fft(problem):
    piece = max(_long_conv._PIECE, _long_conv._TOGETHER * problem.signal)
    return _long_conv_xla.fft(problem, piece)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    add("--features", type=int, default=8)
    add("--dtype", default="float32")
    add("--gradients", action="store_true", help="value and both gradients")
    add("--rounds", type=int, default=9)
    args = parser.parse_args()

    times, ratios = {}, {}
    for t in args.lengths:
        rng = np.random.default_rng(t)
        draw = lambda *s, rng=rng: jnp.asarray(rng.standard_normal(s), args.dtype)
        u = draw(max(1, ENTRIES // t // args.features), args.features, t)
        k = draw(args.features, t) / t**0.5
        wrap = gradients if args.gradients else lambda fn: fn
        sparse = functools.partial(long_conv, keep_frequencies=max(1, t // 8))
        cases = [
            _harness.compiled(BASE, wrap(long_conv_reference), u, k),
            _harness.compiled("auto", wrap(long_conv), u, k),
            _harness.compiled("monarch", alone(MONARCH, args.gradients), u, k),
            _harness.compiled("fft in pieces", alone(fft, args.gradients), u, k),
            _harness.compiled("partial 1/8", wrap(long_conv), u, k[:, : t // 8]),
            _harness.compiled("frequencies 1/8", wrap(sparse), u, k),
        ]
        of_length = _harness.interleave(cases, rounds=args.rounds)
        print(f"\nu {u.shape}, {args.dtype}")
        print(_harness.table(of_length, base=BASE), flush=True)
        for name, timing in of_length.items():
            times[f"{t} {name}"] = timing._replace(name=f"{t} {name}")
            ratios[f"{t} {name}"] = _harness.ratio(of_length, name, BASE)
    what = "long_conv_gradients" if args.gradients else "long_conv"
    base = f"{args.lengths[0]} {BASE}"
    _harness.save(what, times, base=base, config=vars(args), summary=ratios)


def alone(form, with_gradients):
    """``long_conv`` without the rule that chooses the form."""

    def run(u, k):
        def product(op, *arrays):
            t = u.shape[-1]
            sizes = (*u.shape[:2], t, t, t, 2 * t - 1, False, None, u.dtype.name)
            problem = Problem(op, *sizes)
            return _long_conv_xla.run(problem, form(problem), *arrays)

        y = product(PRODUCT, u, k)
        return (y, *product(GRADIENTS, u, k, y)) if with_gradients else y

    return run


def gradients(fn):
    """Value and both gradients."""

    def run(u, k):
        y, vjp = jax.vjp(fn, u, k)
        return y, *vjp(y)

    return run


if __name__ == "__main__":
    main()
