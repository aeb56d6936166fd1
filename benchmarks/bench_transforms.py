"""What `sparsify` adds to training, mask updates included.

Of `--every` steps exactly one updates the masks, and the ratio is to the same steps by
plain AdamW in the same rounds. Three kinds of step:

    optimizer    `tx.update` and `optax.apply_updates` alone
    donated      the same, parameters and state donated: nothing is allocated, and the
                 bytes of the masks show as nowhere else
    train step   donated, with the gradient of an MLP of four layers on `--batch` rows:
                 what a user's loop runs

The first allocates, which costs most of its time and half as much again at some times
as at others: a round runs single steps, with and without an update of the masks, by
AdamW alone and by one transformation, and adds them up, `--every` - 1 and 1. malloc
keeps blocks below 32 MiB and gives back larger ones, which is what glibc adapts to in a
process that trains. What is donated can be used but once: there a round runs all steps
one after the other, by one transformation after the other.

The last with few updaters and the first size of `--train-rows` only: seconds a case.

    python benchmarks/bench_transforms.py                 # 1M, 4M, 16M; writes JSON
    python benchmarks/bench_transforms.py --rows 2048     # 4M weights only
    python benchmarks/bench_transforms.py --anchor        # also one argsort, slow
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from _harness import Case, compiled, interleave, keep_memory, ratio, save, table

from sparsejax import masks, transforms

KEY = jax.random.key(0)
IN_TRAIN_STEP = ("adamw", "rigl", "gradual_magnitude")


def updaters(sparsity, every):
    """(name, updater) for all there are."""
    # From half a period on, so that one chunk of steps holds one update.
    moving = {"sparsity": sparsity, "key": KEY, "every": every, "begin": every // 2}
    yield "static", transforms.static(sparsity=sparsity, key=KEY)
    for name in (
        "gradual_magnitude",
        "granet",
        "sparse_evolutionary_training",
        "rigl",
        "srigl",
        "sparse_momentum",
        "exploration_exploitation",
    ):
        # Far enough for the drop fraction to stay what it is at first.
        yield name, getattr(transforms, name)(end=1000 * every, **moving)
    yield (
        "rigl, 16x16 blocks",
        transforms.rigl(end=1000 * every, structure=masks.Blocks((16, 16)), **moving),
    )


def transformations(sparsity, every):
    """(name, transformation): AdamW alone and under each updater."""
    adamw = optax.adamw(1e-4)
    yield "adamw", adamw
    for name, updater in updaters(sparsity, every):
        yield name, transforms.sparsify(adamw, updater)


def steps(name, tx, params, batches, gradient, every, donate):
    """A case of `every` steps that trains on from what the last one returned."""

    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    program = program.lower(params, state, batches[0]).compile()
    compile_s = time.perf_counter() - start
    held = [jax.tree.map(jnp.copy, (params, state))]

    def run():
        for i in range(every):
            held[0] = program(*held[0], batches[i % len(batches)])
        return held[0]

    return Case(name, run, compile_s)


def one_step(name, tx, params, batches, gradient, begin):
    """Cases of a step that leaves the masks alone, and of the one that updates them."""

    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    first = params, tx.init(params)
    program = jax.jit(step).lower(*first, batches[0]).compile()
    compile_s = time.perf_counter() - start
    before = program(*first, batches[0])
    update = first
    for i in range(begin):
        update = program(*update, batches[i % len(batches)])
    yield Case(name, lambda: program(*before, batches[1]), compile_s)
    yield Case(f"{name}, update", lambda: program(*update, batches[1]), compile_s)


def by_turns(kind, params, batches, gradient, args):
    """(times, name, ratio to AdamW alone) of each transformation beside it."""
    stepped = lambda name, tx: list(
        one_step(name, tx, params, batches, gradient, args.every // 2)
    )
    (_, adamw), *others = transformations(args.sparsity, args.every)
    base = f"{kind}: adamw"
    alone = stepped(base, adamw)
    for name, tx in others:
        name = f"{kind}: {name}"
        timed = interleave(alone + stepped(name, tx), rounds=24 * args.rounds)
        found = amortized(timed, name, base, args.every)
        print(table(timed, base=base))
        print(f"{name}: {found:.3f} of AdamW, updates amortized\n", flush=True)
        for case in alone:
            timed[f"{case.name}, beside {name}"] = timed.pop(case.name)
        yield timed, name, found


def amortized(timed, name, base, every):
    """Median over rounds of the ratio of `every` steps, one of which is an update."""
    of = lambda name: zip(
        timed[name].rounds, timed[f"{name}, update"].rounds, strict=True
    )
    total = lambda step, update: (every - 1) * step + update
    pairs = zip(of(name), of(base), strict=True)
    return statistics.median(total(*one) / total(*other) for one, other in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        help="weights: rows^2",
    )
    parser.add_argument("--train-rows", type=int, default=2048, help="0: no train step")
    parser.add_argument("--batch", type=int, default=2048, help="rows in a train step")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=100, help="steps per mask update")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--anchor", action="store_true", help="time one argsort too")
    parser.add_argument("--json", help="where to write; default: benchmarks/results")
    args = parser.parse_args()
    keep_memory(below=2**25)

    keys = jax.random.split(jax.random.key(1), 4)

    def loss(params, batch):
        h, y = batch
        for layer in params.values():
            h = jnp.tanh(h @ layer["kernel"])
        return jnp.mean((h - y) ** 2)

    def settings():
        """(kind, parameters, batches, gradient of a batch, whether to donate)."""
        for rows in args.rows:
            shape = (rows, rows)
            params = {"kernel": jax.random.normal(KEY, shape) / rows**0.5}
            given = [{"kernel": jax.random.normal(key, shape)} for key in keys[:2]]
            size = f"{rows * rows / 2**20:g}M"
            for donate in (False, True):
                kind = "donated" if donate else "optimizer"
                yield f"{size} {kind}", params, given, lambda params, g: g, donate
        if args.train_rows:
            half = args.train_rows // 2
            params = {
                f"layer{i}": {"kernel": jax.random.normal(k, (half, half)) / half**0.5}
                for i, k in enumerate(keys)
            }
            rows = [jax.random.normal(key, (2, args.batch, half)) for key in keys]
            size = f"{args.train_rows**2 / 2**20:g}M"
            yield f"{size} train step", params, rows, jax.grad(loss), True

    summary, times = {}, {}
    for kind, params, batches, gradient, donate in settings():
        base = f"{kind}: adamw"
        if not donate:
            for timed, name, found in by_turns(kind, params, batches, gradient, args):
                summary[name] = found
                times |= timed
            continue
        cases = [
            steps(f"{kind}: {name}", tx, params, batches, gradient, args.every, donate)
            for name, tx in transformations(args.sparsity, args.every)
            if "train step" not in kind or name in IN_TRAIN_STEP
        ]
        timed = interleave(cases, rounds=args.rounds, warmup=1)
        print(table(timed, base=base), flush=True)
        for case in cases[1:]:
            summary[case.name] = ratio(timed, case.name, base)
        times |= timed
        del cases
    rows = args.rows[-1]
    scores = jax.random.normal(KEY, (rows, rows))
    count = masks.exact_count(1 - args.sparsity, rows**2)
    top = compiled("topk_mask", lambda w: masks.topk_mask(w, count), scores)
    anchors = [top]
    if args.anchor:
        # The selection of JaxPruner: one argsort of the flattened scores.
        order = lambda w: jnp.argsort(-w.ravel())
        anchors.append(compiled("argsort", order, scores))
    timed = interleave(anchors, rounds=args.rounds, warmup=1)
    print(table(timed, base="topk_mask"))
    if args.anchor:
        summary["argsort / topk_mask"] = ratio(timed, "argsort", "topk_mask")
    path = save(
        "transforms",
        times | timed,
        base=next(iter(times)),
        config=vars(args),
        summary=summary,
        path=args.json,
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
