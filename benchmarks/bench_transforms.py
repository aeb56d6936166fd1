"""What `sparsify` adds to training, mask updates included.

A case runs `--every` consecutive steps, exactly one of which updates the masks, and the
ratio is to the same steps by plain AdamW in the same rounds. Two kinds of step:

    optimizer    `tx.update` and `optax.apply_updates` alone, on donated buffers and
                 gradients that change: the strictest view
    train step   the same with the gradient of an MLP of four layers on `--batch` rows,
                 what a user's loop runs

The temporaries of a mask update are part of the compiled program's one allocation,
also when no update is due. A program with little memory of its own pays for that (fresh
pages at every call, on Linux above 32 MB); a real model's has passed that size anyway.

    python benchmarks/bench_transforms.py                 # 4M weights, writes JSON
    python benchmarks/bench_transforms.py --anchor        # also one argsort, slow
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from _harness import Case, compiled, interleave, ratio, save, table

from sparsejax import masks, transforms

KEY = jax.random.key(0)
NAMES = ("static", "rigl", "sparse_evolutionary_training", "gradual_magnitude")
IN_TRAIN_STEP = ("adamw", "rigl", "gradual_magnitude")  # seconds a case: not all


def transformations(sparsity, every):
    """(name, transformation): AdamW alone and under each updater."""
    adamw = optax.adamw(1e-4)
    yield "adamw", adamw
    for name in NAMES:
        schedule = {} if name == "static" else {"every": every, "end": 10**6}
        # From half a period on, so that one chunk of steps holds one update.
        schedule |= {} if name == "static" else {"begin": every // 2}
        make = getattr(transforms, name)
        updater = make(sparsity=sparsity, key=KEY, **schedule)
        yield name, transforms.sparsify(adamw, updater)


def steps(name, tx, params, batches, gradient, every):
    """A case of `every` steps that trains on: each donates what the last returned."""

    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    build = compiled(
        name, jax.jit(step, donate_argnums=(0, 1)), params, state, batches[0]
    )
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batches[0])
    program = program.compile()
    held = [jax.tree.map(jnp.copy, (params, state))]

    def run():
        for i in range(every):
            held[0] = program(*held[0], batches[i % len(batches)])
        return held[0]

    return Case(name, run, build.compile_s)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="weights: rows x rows")
    parser.add_argument("--batch", type=int, default=2048, help="rows in a train step")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=100, help="steps per mask update")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--anchor", action="store_true", help="time one argsort too")
    parser.add_argument("--json", help="where to write; default: benchmarks/results")
    args = parser.parse_args()

    half = args.rows // 2
    keys = jax.random.split(jax.random.key(1), 4)
    shape = (args.rows, args.rows)
    one = {"kernel": jax.random.normal(KEY, shape) / args.rows**0.5}
    given = [{"kernel": jax.random.normal(key, shape)} for key in keys]
    mlp = {
        f"layer{i}": {"kernel": jax.random.normal(key, (half, half)) / half**0.5}
        for i, key in enumerate(keys)
    }
    rows = [jax.random.normal(key, (2, args.batch, half)) for key in keys]

    def loss(params, batch):
        h, y = batch
        for layer in params.values():
            h = jnp.tanh(h @ layer["kernel"])
        return jnp.mean((h - y) ** 2)

    summary, times = {}, {}
    for kind, params, batches, gradient in (
        ("optimizer", one, given, lambda params, grads: grads),
        ("train step", mlp, rows, jax.grad(loss)),
    ):
        cases = [
            steps(f"{kind}: {name}", tx, params, batches, gradient, args.every)
            for name, tx in transformations(args.sparsity, args.every)
            if kind == "optimizer" or name in IN_TRAIN_STEP
        ]
        timed = interleave(cases, rounds=args.rounds, warmup=1)
        print(table(timed, base=f"{kind}: adamw"))
        for case in cases[1:]:
            summary[case.name] = ratio(timed, case.name, f"{kind}: adamw")
        times |= timed
    count = masks.exact_count(1 - args.sparsity, args.rows**2)
    top = compiled("topk_mask", lambda w: masks.topk_mask(w, count), given[0]["kernel"])
    anchors = [top]
    if args.anchor:
        # The selection of JaxPruner: one argsort of the flattened scores.
        order = lambda w: jnp.argsort(-w.ravel())
        anchors.append(compiled("argsort", order, given[0]["kernel"]))
    timed = interleave(anchors, rounds=args.rounds, warmup=1)
    print(table(timed, base="topk_mask"))
    if args.anchor:
        summary["argsort / topk_mask"] = ratio(timed, "argsort", "topk_mask")
    path = save(
        "transforms",
        times | timed,
        base="optimizer: adamw",
        config=vars(args),
        summary=summary,
        path=args.json,
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
