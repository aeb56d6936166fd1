"""Block-sparse matmul beside dense, masked dense, BCSR and scipy, in one run.

    python benchmarks/bench_block_sparse_matmul.py
    python benchmarks/bench_block_sparse_matmul.py --shape 4096 4096 4096 \\
        --dtype bfloat16 --implementations mosaic_gpu xla --repeat 20 \\
        --sparsities .5 .8 .9 .95

The layouts are random masks of an exact count: uneven columns, some of them empty.
Forward is compared with the dense product, value and both gradients with the dense
product by a masked weight. Two JSON files under results/.
"""

import argparse
import functools

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.layouts import BlockLayout, scatter_blocks
from sparsejax.ops import block_sparse_matmul

DENSE, MASKED = "dense", "masked dense"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--shape",
        type=int,
        nargs=3,
        default=(4096, 1024, 4096),
        metavar=("M", "K", "N"),
    )
    add(
        "--block", type=int, nargs="+", default=[128], help="bk and bn, or one for both"
    )
    add("--sparsities", type=float, nargs="+", default=[0.5, 0.65, 0.8, 0.9, 0.95])
    add("--dtype", default="float32")
    add(
        "--implementations",
        nargs="+",
        default=["auto"],
        help="auto: the default choice",
    )
    add("--no-sparse-anchors", action="store_true", help="leave BCSR and scipy out")
    add("--rounds", type=int, default=15)
    add("--repeat", type=int, default=1, help="products per program, for fast devices")
    add("--label", default="", help="appended to the names of the results")
    args = parser.parse_args()
    block = tuple(args.block * 2)[:2]

    rng = np.random.default_rng(0)
    m, k, n = args.shape
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), args.dtype)
    x, w, dy = normal(m, k), normal(k, n), normal(m, n)
    build = functools.partial(compiled, repeat=args.repeat)
    forward = [build(DENSE, dense, x, w, None)]
    both = [build(DENSE, value_and_grads(dense), x, w, None, dy)]
    for sparsity in args.sparsities:
        name = f"{sparsity:.0%} ".__add__
        layout, blocks = random_layout(rng, (k, n), block, 1 - sparsity, args.dtype)
        sparse_w = scatter_blocks(blocks, layout)
        case = x, sparse_w, sparse_w != 0, dy
        both.append(build(name(MASKED), value_and_grads(masked), *case))
        for choice in args.implementations:
            product = functools.partial(sparse, None if choice == "auto" else choice)
            forward.append(build(name(choice), product, x, blocks, layout))
            case = x, blocks, layout, dy
            both.append(build(name(choice), value_and_grads(product), *case))
        if args.dtype == "float32" and not args.no_sparse_anchors:
            forward += sparse_anchors(name, x, sparse_w)

    config = {**vars(args), "block": block}
    report("forward", forward, DENSE, config)
    # The mask costs the same at every sparsity: one masked dense product is the base.
    base = f"{args.sparsities[0]:.0%} {MASKED}"
    report("value_and_grads", both, base, config)


def report(what, cases, base, config):
    times = _harness.interleave(cases, rounds=config["rounds"])
    print(f"\n{what}, {config['shape']}, blocks {config['block']}, {config['dtype']}")
    print(_harness.table(times, base=base))
    name = f"block_sparse_matmul_{what}{config['label']}"
    platform = jax.devices()[0].platform
    path = _harness.RESULTS / f"{name}.{platform}.json"
    _harness.save(name, times, base=base, config=config, path=path)


def dense(x, w, _):
    return jnp.dot(x, w)


def masked(x, w, mask):
    return jnp.dot(x, jnp.where(mask, w, 0))


def sparse(implementation, x, blocks, layout):
    return block_sparse_matmul(x, blocks, layout, implementation=implementation)


def value_and_grads(product):
    """(y, dx, dw) of product(x, w, structure), for a given dy."""

    def all_three(x, w, structure, dy):
        y, backward = jax.vjp(lambda x, w: product(x, w, structure), x, w)
        return y, *backward(dy)

    return all_three


def compiled(name, fn, *args, repeat):
    """A case that runs ``fn`` ``repeat`` times in one program, one after the other."""

    def program(*args):
        def again(_, carry):
            args, out = jax.lax.optimization_barrier(carry)
            del out  # only waited for
            return args, fn(*args)

        return jax.lax.fori_loop(1, repeat, again, (args, fn(*args)))[1]

    return _harness.compiled(name, program if repeat > 1 else fn, *args)


def random_layout(rng, shape, block, density, dtype):
    kb, nb = shape[0] // block[0], shape[1] // block[1]
    mask = np.zeros(kb * nb, bool)
    mask[rng.permutation(kb * nb)[: round(density * kb * nb)]] = True
    layout = BlockLayout.from_mask(mask.reshape(kb, nb), block)
    return layout, jnp.asarray(rng.standard_normal(layout.blocks_shape), dtype)


def sparse_anchors(name, x, w):
    """What a user has today: JAX's own sparse matrices, and scipy's."""
    from jax.experimental.sparse import BCSR

    w_t = BCSR.fromdense(w.T)  # it multiplies from the left only
    yield _harness.compiled(name("BCSR"), lambda x, w_t: (w_t @ x.T).T, x, w_t)
    try:
        import scipy.sparse
    except ImportError:
        return
    x, w = np.asarray(x), scipy.sparse.csr_array(np.asarray(w))
    yield _harness.plain(name("scipy csr"), lambda: x @ w)


if __name__ == "__main__":
    main()
