"""Monarch products beside a dense layer, and how near each is to its FLOP limit.

    python benchmarks/bench_structured.py
    python benchmarks/bench_structured.py --sizes 4096 --rows 256 --blocks 16 32 64 \
        --rounds 5 --out benchmarks/results/structured_4096.cpu.json

Forward, and value with all gradients, of square layers for each number of rows and of
blocks. The anchors: the dense product, the same Monarch matrix as two einsums, and with
the axes moved as fly's ``blockdiag_butterfly_multiply`` moves them. One JSON file under
results/; the summary has the ratios to dense and the FLOP limits, the multiply-adds of
the factors over those of the dense layer. Long convolutions, which are structured
products too, are beside convolution by ``jnp.fft`` in ``bench_long_conv.py``.
"""

import argparse

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.ops import monarch_matmul


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[1024])
    add("--rows", type=int, nargs="+", default=[16, 256, 4096])
    add("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    add("--dtype", default="float32")
    add("--implementation", default=None, help="default: the automatic choice")
    add("--rounds", type=int, default=9)
    add("--out", help="the JSON file; benchmarks/results/ by default")
    args = parser.parse_args()
    _harness.keep_memory()

    everything, summary = {}, {}
    for size in args.sizes:
        for rows in args.rows:
            for mode in ("forward", "gradients"):
                times = _harness.interleave(
                    cases(size, rows, mode, args), rounds=args.rounds
                )
                print(f"\n{rows}x{size}, {mode}, {args.dtype}")
                limits = {
                    name: limit(size, int(name.split()[1])) if "," in name else 1
                    for name in times
                }
                print(with_limits(_harness.table(times, base="dense"), limits))
                for name, timing in times.items():
                    label = f"{rows}x{size} {mode} {name}"
                    everything[label] = timing
                    summary[label] = _harness.ratio(times, name, "dense")
        for blocks in args.blocks:
            summary[f"{size}, {blocks} blocks: limit"] = limit(size, blocks)
    # Rows of different sizes have no common base: the ratios are in the summary.
    _harness.save(
        "structured",
        everything,
        base=next(iter(everything)),
        config={k: v for k, v in vars(args).items() if k != "out"},
        summary=summary,
        path=args.out,
    )


def limit(size, blocks):
    """Multiply-adds of the factors over those of a dense product."""
    return 2 * blocks * (size // blocks) ** 2 / size**2


def with_limits(table, limits):
    """The table with two columns more: the limit, and the time over it."""
    head, *lines = table.splitlines()
    added = [f"{head}  FLOP limit  ratio to it"]
    for line, least in zip(lines, limits.values(), strict=True):
        ratio = float(line.split()[-1])
        added.append(f"{line:{len(head)}}  {least:10.3f}  {ratio / least:11.2f}")
    return "\n".join(added)


def cases(size, rows, mode, args):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s) * s[-2] ** -0.5, args.dtype)
    build = gradients if mode == "gradients" else lambda fn: fn
    ours = lambda *a: monarch_matmul(*a, implementation=args.implementation)
    x = draw(rows, size)
    found = [_harness.compiled("dense", build(jnp.matmul), x, draw(size, size))]
    for blocks in args.blocks:
        side = size // blocks
        factors = draw(blocks, 1, side, side), draw(1, blocks, side, side)
        for name, fn in (("monarch", ours), ("einsum", einsums), ("fly", fly)):
            label = f"{name}, {blocks} blocks"
            found.append(_harness.compiled(label, build(fn), x, *factors))
    return found


def gradients(fn):
    """Value and gradients, in x and all weights."""

    def run(*arrays):
        y, vjp = jax.vjp(fn, *arrays)
        return y, *vjp(y)

    return run


def einsums(x, left, right):
    (k, _, p, _), (_, l, r, s) = left.shape, right.shape
    h = jnp.einsum("mkp,kpq->mkq", x.reshape(-1, k, p), left[:, 0])
    y = jnp.einsum("mrl,lrs->msl", h.reshape(-1, r, l), right[0])
    return y.reshape(-1, s * l)


def fly(x, left, right):
    """Blocks outermost between the axes' moves, as in fly."""
    (k, _, p, _), (_, l, r, s) = left.shape, right.shape
    h = jnp.einsum("mkp,kpq->kmq", x.reshape(-1, k, p), left[:, 0])
    h = h.transpose(1, 0, 2).reshape(-1, r, l).transpose(2, 0, 1)
    y = jnp.einsum("lmr,lrs->lms", h, right[0])
    return y.transpose(1, 2, 0).reshape(-1, s * l)


if __name__ == "__main__":
    main()
