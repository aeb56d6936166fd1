"""What `sparsify` adds to an optimizer step, mask updates amortized.

A step is `tx.update` and `optax.apply_updates` on donated buffers: the optimizer
alone, no model. Steps that change masks and steps that do not are timed apart in
the same rounds, and

    ratio = ((every - 1) * plain + update) / (every * adamw).

    python benchmarks/bench_transforms.py                 # 4M weights, writes JSON
    python benchmarks/bench_transforms.py --anchor        # also one argsort, slow
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import optax
from _harness import Case, compiled, interleave, save, table

from sparsejax import masks, transforms

KEY = jax.random.key(0)
NEVER, LONG = 2**30, 10_000


def updaters(sparsity):
    """(name, updater that is never due, updater that is due at every step)."""
    common = {"sparsity": sparsity, "key": KEY}
    never = {"begin": NEVER, "end": NEVER, **common}
    always = {"begin": 0, "end": LONG, "every": 1, **common}
    for name in ("rigl", "sparse_evolutionary_training", "gradual_magnitude"):
        make = getattr(transforms, name)
        yield name, make(**never), make(**always)


def optimizer_step(name, tx, params, grads):
    """A case that trains on: each run donates the state the last one returned."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    program = jax.jit(step, donate_argnums=(0, 1))
    built = compiled(name, program, params, state, grads)
    program = program.lower(params, state, grads).compile()
    held = [jax.tree.map(jnp.copy, (params, state))]

    def run():
        held[0] = program(*held[0], grads)
        return held[0]

    return Case(name, run, built.compile_s)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="weights: rows x rows")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=100, help="steps per mask update")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--anchor", action="store_true", help="time one argsort too")
    parser.add_argument("--json", help="where to write; default: benchmarks/results")
    args = parser.parse_args()

    shape = (args.rows, args.rows)
    params = {"kernel": jax.random.normal(KEY, shape)}
    grads = {"kernel": jax.random.normal(jax.random.key(1), shape)}
    adamw = optax.adamw(1e-4)
    cases = [optimizer_step("adamw", adamw, params, grads)]
    static = transforms.sparsify(
        adamw, transforms.static(sparsity=args.sparsity, key=KEY)
    )
    cases.append(optimizer_step("static", static, params, grads))
    names = []
    for name, never, always in updaters(args.sparsity):
        names.append(name)
        for kind, updater in (("plain", never), ("update", always)):
            tx = transforms.sparsify(adamw, updater)
            cases.append(optimizer_step(f"{name} {kind}", tx, params, grads))
    count = masks.exact_count(1 - args.sparsity, args.rows**2)
    top = lambda w: masks.topk_mask(jnp.abs(w), count)
    cases.append(compiled("topk_mask", top, params["kernel"]))

    times = interleave(cases, rounds=args.rounds)
    base = times["adamw"].rounds
    summary = {}
    for name in names:
        pairs = zip(
            times[f"{name} plain"].rounds,
            times[f"{name} update"].rounds,
            base,
            strict=True,
        )
        summary[f"{name}: amortized ratio to adamw, every {args.every}"] = (
            statistics.median(
                ((args.every - 1) * plain + update) / (args.every * alone)
                for plain, update, alone in pairs
            )
        )
    if args.anchor:
        # The selection of JaxPruner: one argsort of the flattened scores.
        order = lambda w: jnp.argsort(-jnp.abs(w).ravel())
        sort = compiled("argsort", order, params["kernel"])
        sort_time = interleave([sort], rounds=3, warmup=1)["argsort"].median
        summary["argsort / topk_mask"] = sort_time / times["topk_mask"].median

    print(table(times, base="adamw"))
    for name, value in summary.items():
        print(f"{name}: {value:.3f}")
    path = save(
        "transforms",
        times,
        base="adamw",
        config=vars(args),
        summary=summary,
        path=args.json,
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
