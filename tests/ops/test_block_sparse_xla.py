"""The XLA block-sparse products, loops and dense ones, against float64 numpy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sparsejax.ops import _block_sparse_xla as xla
from sparsejax.testing import assert_close

DSD = {"loops": xla.dsd, "dense": xla.dsd_dense}
SDD = {"loops": xla.sdd, "dense": xla.sdd_dense}

# name: (m, blocks in k, blocks in n, block, density, spare slots, dtype)
CASES = {
    "uneven": (37, 5, 6, (16, 32), 0.4, 0, "float32"),
    "spare_slots": (37, 5, 6, (32, 16), 0.4, 7, "float32"),
    "bf16": (40, 6, 4, (16, 16), 0.4, 3, "bfloat16"),
    "f16": (40, 6, 4, (16, 16), 0.4, 3, "float16"),
    "block8": (20, 9, 7, (8, 8), 0.3, 2, "float32"),
    "wide": (33, 4, 2, (8, 256), 0.5, 0, "bfloat16"),
    "tall": (33, 2, 4, (256, 8), 0.5, 1, "float32"),
    "block24": (17, 3, 3, (24, 40), 0.5, 0, "float32"),
    "block128": (130, 3, 2, (128, 128), 0.5, 1, "float32"),
    "one_row": (1, 4, 4, (16, 16), 0.4, 1, "float32"),
    "many_rows": (5000, 1, 3, (256, 8), 0.7, 1, "float32"),
    "many_rows_bf16": (2049, 3, 1, (8, 256), 0.7, 1, "bfloat16"),
    "nothing": (9, 4, 4, (16, 16), 0.0, 4, "float32"),
    "everything": (9, 4, 4, (16, 16), 1.0, 0, "float32"),
    "one_block": (9, 1, 1, (16, 8), 1.0, 0, "bfloat16"),
}


class Lists(NamedTuple):
    """Index lists as the kernels take them; slots from count on hold padding."""

    rows: np.ndarray
    cols: np.ndarray
    ptr: np.ndarray
    order: np.ndarray
    t_source: np.ndarray
    t_ptr: np.ndarray
    count: np.ndarray


def lists_of(mask, slots, rng):
    """Lists of a boolean [kb, nb]; what stands in padding is random, in range."""
    kb, nb = mask.shape
    cols, rows = np.nonzero(mask.T)
    count = len(rows)
    by_row = np.lexsort((cols, rows))
    # Any order within a column is allowed: try one that is not the sorted one.
    by_row = by_row[np.lexsort((rng.permutation(count), rows[by_row]))]

    def fill(values, size):
        padding = rng.integers(0, size, slots - count)
        return np.concatenate([values, padding]).astype(np.int32)

    def pointers(counts):
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    return Lists(
        rows=fill(rows, kb),
        cols=fill(cols, nb),
        ptr=pointers(mask.sum(0)),
        order=fill(by_row, slots),
        t_source=fill(cols[by_row], nb),
        t_ptr=pointers(mask.sum(1)),
        count=np.int32(count),
    )


def make(name, seed=0, slots=None):
    m, kb, nb, (bk, bn), density, spare, dtype = CASES[name]
    rng = np.random.default_rng(seed)
    mask = np.zeros(kb * nb, bool)
    mask[rng.permutation(kb * nb)[: round(density * kb * nb)]] = True
    mask = mask.reshape(kb, nb)
    if slots is None:
        slots = max(1, int(mask.sum()) + spare)
    lists = lists_of(mask, slots, rng)
    x, dy, blocks = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((m, kb * bk), (m, nb * bn), (slots, bk, bn))
    )
    # Padding takes no part: what it holds must not reach any result.
    blocks = blocks.at[int(lists.count) :].set(jnp.nan)
    return x, dy, blocks, jax.tree.map(jnp.asarray, lists), mask


@functools.cache
def programs(form, block_shape, dtype):
    """The three products and how often each was traced."""
    traces = dict.fromkeys(("y", "dx", "dw"), 0)

    @jax.jit
    def forward(x, blocks, lists):
        traces["y"] += 1
        return DSD[form](x, blocks, None, lists.rows, lists.ptr, transpose=False)

    @jax.jit
    def backward(dy, blocks, lists):
        traces["dx"] += 1
        return DSD[form](
            dy, blocks, lists.order, lists.t_source, lists.t_ptr, transpose=True
        )

    @jax.jit
    def weights(x, dy, lists):
        traces["dw"] += 1
        return SDD[form](
            x,
            dy,
            lists.rows,
            lists.cols,
            lists.count,
            block_shape=block_shape,
            dtype=jnp.dtype(dtype),
        )

    return forward, backward, weights, traces


def oracle(x, dy, blocks, lists, mask, dtype):
    """(y, dx, dw) of the dense matrix, multiplied in ``dtype``."""
    kb, nb = mask.shape
    _, bk, bn = blocks.shape
    n = int(lists.count)
    rows, cols = np.asarray(lists.rows)[:n], np.asarray(lists.cols)[:n]
    w = np.zeros((kb, nb, bk, bn), np.float64)
    w[rows, cols] = np.asarray(blocks[:n], np.float64)
    w = w.swapaxes(1, 2).reshape(kb * bk, nb * bn)
    if dtype == np.float64:
        x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    else:
        w = jnp.asarray(w, dtype)
    dw_dense = np.asarray(x.T @ dy, np.float64).reshape(kb, bk, nb, bn)
    dw = np.zeros(blocks.shape)
    dw[:n] = dw_dense[rows, :, cols]
    return x @ w, dy @ w.T, dw


def check(name, form, **kwargs):
    x, dy, blocks, lists, mask = make(name, **kwargs)
    forward, backward, weights, traces = programs(
        form, blocks.shape[1:], str(blocks.dtype)
    )
    out = forward(x, blocks, lists), backward(dy, blocks, lists), weights(x, dy, lists)
    reference = oracle(x, dy, blocks, lists, mask, np.float64)
    low = oracle(x, dy, blocks, lists, mask, blocks.dtype)
    for got, ref, plain in zip(out, reference, low, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, ref, plain)
    assert not np.asarray(out[2])[int(lists.count) :].any()
    empty = ~mask.any(0).repeat(blocks.shape[2])
    assert not np.asarray(out[0])[:, empty].any()
    return traces


@pytest.mark.parametrize("form", ["loops", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, form):
    check(name, form)


@pytest.mark.parametrize("form", ["loops", "dense"])
def test_new_contents_do_not_retrace(form):
    traces = check("uneven", form, slots=20)
    before = dict(traces)
    for seed in (1, 2):
        check("uneven", form, seed=seed, slots=20)
    assert traces == before


def test_float32_blocks_of_bfloat16_operands():
    x, dy, blocks, lists, mask = make("bf16")
    dw = xla.sdd(
        x,
        dy,
        lists.rows,
        lists.cols,
        lists.count,
        block_shape=blocks.shape[1:],
        dtype=jnp.float32,
    )
    assert dw.dtype == jnp.float32
    _, _, reference = oracle(x, dy, blocks, lists, mask, np.float64)
    # Not rounded on the way: as close as float32 products are.
    np.testing.assert_allclose(dw, reference, atol=1e-4)


def test_sums_in_float32():
    # 4096 ones, one block at a time: bfloat16 sums would stop at 256.
    slots, side = 64, 64
    ptr = jnp.asarray([0, slots], jnp.int32)
    source = jnp.arange(slots, dtype=jnp.int32)
    x = jnp.ones((2, slots * side), jnp.bfloat16)
    blocks = jnp.ones((slots, side, 8), jnp.bfloat16)
    y = xla.dsd(x, blocks, None, source, ptr, transpose=False)
    assert (np.asarray(y, np.float32) == 4096).all()


def test_float64():
    with jax.enable_x64(True):
        x, dy, blocks, lists, mask = make("uneven")
        x, dy, blocks = (a.astype(jnp.float64) for a in (x, dy, blocks))
        y = xla.dsd(x, blocks, None, lists.rows, lists.ptr, transpose=False)
        reference = oracle(x, dy, blocks, lists, mask, np.float64)[0]
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, reference, atol=1e-12)


def test_vmap_and_scan():
    made = [make("spare_slots", seed=seed, slots=16) for seed in range(3)]
    x, dy, blocks, lists, _ = jax.tree.map(lambda *a: np.stack(a), *made)
    dtype = jnp.dtype("float32")

    def all_three(x, dy, blocks, lists):
        return (
            xla.dsd(x, blocks, None, lists.rows, lists.ptr, transpose=False),
            xla.sdd(
                x,
                dy,
                lists.rows,
                lists.cols,
                lists.count,
                block_shape=blocks.shape[1:],
                dtype=dtype,
            ),
        )

    args = jax.tree.map(jnp.asarray, (x, dy, blocks, lists))
    mapped = jax.jit(jax.vmap(all_three))(*args)
    scanned = jax.jit(lambda args: jax.lax.map(lambda a: all_three(*a), args))(args)
    for i, (x_, dy_, blocks_, lists_, mask_) in enumerate(made):
        y, _, dw = oracle(x_, dy_, blocks_, lists_, mask_, np.float64)
        for out in (mapped, scanned):
            np.testing.assert_allclose(out[0][i], y, atol=1e-4)
            np.testing.assert_allclose(out[1][i], dw, atol=1e-4)


def test_bfloat16_between_transposes():
    # jax 0.10 and 0.11 fail at a bfloat16 product that a transpose was pulled into.
    x, dy, blocks, lists, mask = make("one_block")
    args = lists.rows, lists.cols, lists.count
    sdd = functools.partial(
        xla.sdd, block_shape=blocks.shape[1:], dtype=jnp.dtype("float32")
    )

    @jax.jit
    def transposed(x_t, dy_t, blocks):
        y = xla.dsd(x_t.T, blocks, None, lists.rows, lists.ptr, transpose=False).T
        return y, sdd(x_t.T, dy_t.T, *args).swapaxes(1, 2)

    y_t, dw_t = transposed(x.T, dy.T, blocks)
    y, _, dw = oracle(x, dy, blocks, lists, mask, np.float64)
    np.testing.assert_allclose(y_t.T.astype(jnp.float32), y, atol=0.1)
    np.testing.assert_allclose(dw_t.swapaxes(1, 2), dw, atol=1e-4)


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
        for inner in jaxprs_in_params(eqn.params):
            yield from shapes_in(inner)


def holds(fn, args, k, n):
    """Whether the program has an array as large as the matrix, however shaped."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return any(np.prod(shape) == k * n for shape in shapes_in(jaxpr))


@pytest.mark.parametrize("form", ["loops", "dense"])
def test_loops_hold_no_dense_matrix(form):
    x, dy, blocks, lists, _ = make("uneven")
    k, n = x.shape[1], dy.shape[1]
    forward, backward, weights, _ = programs(form, blocks.shape[1:], "float32")
    dense = form == "dense"  # shows that the search finds one
    assert holds(forward, (x, blocks, lists), k, n) == dense
    assert holds(backward, (dy, blocks, lists), k, n) == dense
    assert holds(weights, (x, dy, lists), k, n) == dense


def test_prefers_dense():
    prefers = functools.partial(xla.prefers_dense, dtype=jnp.dtype("float32"))
    slots = lambda density, side: round(density * 1024 * 4096 / side**2)
    for side in (16, 32, 64, 128, 256):
        assert not prefers(4096, 1024, 4096, (side, side), slots(0.1, side))
        assert prefers(4096, 1024, 4096, (side, side), slots(1.0, side))
    # Small blocks lose sooner.
    assert prefers(4096, 1024, 4096, (8, 8), slots(0.35, 8))
    assert not prefers(4096, 1024, 4096, (128, 128), slots(0.35, 128))
    # A dense matrix is never worth writing down for one row.
    assert not prefers(1, 1024, 4096, (128, 128), slots(0.9, 128))
