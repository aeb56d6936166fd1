"""Families beyond chains, and orders of Monarch: matrices, counts, scale, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import structured as st
from sparsejax.testing import assert_close

# Large enough for the law of large numbers.
FAMILIES = {
    "low_rank": st.LowRank(200, 300, 16),
    "kronecker": st.Kronecker(left=(10, 16), right=(24, 16)),  # right factors first
    "kronecker_padded": st.Kronecker(
        left=(16, 16), right=(16, 24), terms=2, in_size=200, out_size=380
    ),
    "compacter": st.phm(250, 380, n=4, rank=8),
    "pixelfly": st.Pixelfly(240, 240, (16, 16), 8, 16),
    "pixelfly_wide": st.Pixelfly(100, 250, (16, 12), 4, 16),
    "dense_nm": st.DenseNM(200, 300, 64, 2, 8),
}


@functools.cache
def drawn(name):
    """Of the family, float32, of scales 1 and 1/2."""
    init = jax.jit(lambda scale: FAMILIES[name].init(jax.random.key(1), scale=scale))
    return tuple(jax.tree.map(np.asarray, init(scale)) for scale in (1.0, 0.5))


def dense(family, params):
    """The matrix in float64 numpy, by the definition."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    k, n = family.shape
    if isinstance(family, st.LowRank):
        return p["down"] @ p["up"]
    if isinstance(family, st.Kronecker):
        if family.rank is not None:
            p["right"] = [d @ u for d, u in zip(p["down"], p["up"], strict=True)]
        pairs = zip(p["left"], p["right"], strict=True)
        return sum(np.kron(left, right) for left, right in pairs)[:k, :n]
    if isinstance(family, st.DenseNM):
        up = p["up"].reshape(-1, family.m, n)
        # The largest of each group, of equal ones the first.
        places = np.argsort(-np.abs(up), axis=1, kind="stable")[:, : family.n]
        kept = np.zeros_like(up)
        np.put_along_axis(kept, places, np.take_along_axis(up, places, 1), 1)
        return p["down"] @ kept.reshape(-1, n)
    bk, bn = family.block_shape
    kb, nb = family.block_mask.shape
    w, place = np.zeros((kb * bk, nb * bn)), 0
    for column in range(nb):
        for row in range(kb):
            if family.block_mask[row, column]:
                block = p["blocks"][place]
                w[row * bk : (row + 1) * bk, column * bn : (column + 1) * bn] = block
                place += 1
    assert place == len(p["blocks"])
    return w[:k, :n] + p["down"] @ p["up"]


def in_float64(name):
    family, (params, _) = FAMILIES[name], drawn(name)
    params = jax.tree.map(lambda p: p.astype(np.float64), params)
    x = np.random.default_rng(2).normal(size=(2, 3, family.in_size))
    return family, params, x


def close(got, want, tolerance):
    for one, two in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_product_and_gradients_are_those_of_the_matrix(name):
    """In float64, and the gradients say how many parameters take part.

    Regression, dense conversion: a peer's raises AttributeError.
    """
    family, params, x = in_float64(name)

    def derivatives(product, params, x):
        loss = lambda params, x: (jnp.sum(jnp.sin(y := product(params, x))), y)
        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    @jax.jit
    def both(params, x):
        by_matrix = lambda params, x: x @ family.to_dense(params)
        results = (derivatives(f, params, x) for f in (family.apply, by_matrix))
        return family.to_dense(params), *results

    with jax.enable_x64(True):
        w, got, want = jax.tree.map(np.asarray, both(params, x))
    exact = dense(family, params)
    assert w.shape == family.shape
    close(w, exact, 1e-13)
    ((dparams, dx), y) = got
    close(y, x @ exact, 1e-12)
    close(dx, np.cos(x @ exact) @ exact.T, 1e-12)
    close(got, want, 1e-11)
    if name == "dense_nm":  # straight through: all of up gets it; 2 of 8 take part
        assert family.params == 64 * 200 + 16 * 300
        assert all(np.count_nonzero(g) == g.size for g in dparams.values())
    else:
        assert family.params == sum(map(np.count_nonzero, dparams.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_gradients_are_those_of_the_matrix(name):
    family, params, x = in_float64(name)

    def second(product, params, x):
        def penalty(params, x):
            loss = lambda params, x: jnp.sum(jnp.sin(product(params, x)))
            first = jax.grad(loss, (0, 1))(params, x)
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(first))

        return jax.grad(penalty, (0, 1))(params, x)

    by_matrix = lambda params, x: x @ family.to_dense(params)
    both = lambda *args: [second(f, *args) for f in (family.apply, by_matrix)]
    with jax.enable_x64(True):
        got, want = jax.jit(both)(params, x)
    close(got, want, 1e-9)


@pytest.mark.parametrize("name", ["compacter", "pixelfly_wide", "dense_nm"])
def test_low_precision(name):
    family, params, x = in_float64(name)
    x = x[0]
    dtypes = "float32", "bfloat16"
    cast = lambda dtype: jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), (params, x))
    operands = [cast(dtype) for dtype in dtypes]
    results = jax.jit(lambda operands: [family.apply(*o) for o in operands])(operands)
    for dtype, (low_params, low_x), y in zip(dtypes, operands, results, strict=True):
        assert y.dtype == dtype
        w = dense(family, low_params)
        want = low_x.astype(np.float64) @ w
        # The plain form: the matrix rounded, then one product.
        low = low_x.astype(np.float32) @ w.astype(dtype).astype(np.float32)
        assert_close(y, want, low.astype(dtype), eps=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("family", "flops"),
    [
        (st.LowRank(12, 20, 5), 2 * (12 * 5 + 5 * 20)),
        # [3, 5] by left 3x4: 5 * 12, then [4, 5] by right 5x2: 4 * 10; or else, less,
        # 3 * 10 + 2 * 12.
        (st.Kronecker(left=(3, 4), right=(5, 2)), 2 * (3 * 10 + 2 * 12)),
        # 4 terms: [4, 3] by left 4x4: 3 * 16, then by right 3x5: 4 * 15; the other way
        # 4 * 15 + 5 * 16.
        (st.phm(12, 20, n=4), 2 * 4 * (3 * 16 + 4 * 15)),
        # Each column of the second keeps 4 of 8.
        (st.DenseNM(12, 20, 8, 2, 4), 2 * (12 * 8 + 4 * 20)),
        # 8 x 8 blocks of 2 x 2: 3 in each row.
        (st.Pixelfly(15, 15, (2, 2), 4, 3), 2 * (24 * 4 + 3 * 30)),
    ],
)
def test_flops(family, flops):
    assert family.flops(1) == flops
    assert family.flops(7) == 7 * flops


@pytest.mark.parametrize("name", FAMILIES)
def test_output_has_the_standard_deviation_of_a_dense_layer(name):
    family, (params, halved) = FAMILIES[name], drawn(name)
    x = np.random.default_rng(0).normal(size=(256, family.in_size))
    # Of entries of variance 1 a weight of variance 1 / fan-in makes such of variance 1.
    assert (x @ dense(family, params)).std() == pytest.approx(1, abs=0.05)
    close(dense(family, halved), dense(family, params) / 2, 1e-6)


@pytest.mark.parametrize("name", ["pixelfly", "pixelfly_wide"])
def test_either_part_of_pixelfly_gives_half_of_the_variance(name):
    params, _ = drawn(name)
    low_rank = params["down"] @ params["up"]
    assert (low_rank**2).sum(0).mean() == pytest.approx(0.5, abs=0.05)
    # Of the blocks every column has its half, beside the edge too.
    sparse = dense(FAMILIES[name], params) - low_rank
    np.testing.assert_allclose((sparse**2).sum(0), 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "params"),
    [
        # 3 inputs are 1 part of 4, 7 outputs are 2 parts of 5: 1 * 2 + 3 * 5.
        (st.Kronecker(left=(2, 3), right=(4, 5), in_size=3, out_size=7), 17),
        # 5 inputs are 3 of 4 parts of 2, so each term has 3 * 4 + 2 * 2.
        (st.phm(5, 8, n=4), 64),
        # 6 x 5 entries in 2 x 2 blocks of 4 x 4, only the diagonal: 4 * 4 + 2 * 1.
        (st.Pixelfly(6, 5, (4, 4), 1, 2), 18 + 2 * 11),
    ],
)
def test_padding_is_not_counted(family, params):
    assert family.params == params


def test_kept_entries_have_norm_one_and_others_are_smaller():
    up = np.abs(drawn("dense_nm")[0]["up"]).reshape(8, 8, 300)
    largest = np.sort(up, axis=1)[:, -2:]
    np.testing.assert_allclose((largest**2).sum((0, 1)), 1, rtol=1e-5)
    assert (up > 0).all()


# --- Flat butterfly -------------------------------------------------------------------


def test_flat_butterfly_is_the_union_of_the_levels():
    mask = st.flat_butterfly(16, 16, block_shape=(1, 1), size=8)
    chain = st.butterfly(16)
    union = np.zeros((16, 16), bool)
    for p in chain.patterns[:3]:
        level = np.kron(np.kron(np.eye(p.a), np.ones((p.c, p.b))), np.eye(p.d))
        union |= level > 0
    np.testing.assert_array_equal(mask, union)


def test_regression_flat_butterfly_of_15_blocks_has_15():
    """480 entries in blocks of 32 are 15 of them; a peer's layout is 14 x 14."""
    mask = st.flat_butterfly(480, 480, block_shape=(32, 32), size=16)
    assert mask.shape == (15, 15) and mask.dtype == bool
    # Of the 16 x 16 pattern, 5 in each row, without block 15, which stands beside
    # blocks 14, 13, 11 and 7.
    want = [4 if p in (14, 13, 11, 7) else 5 for p in range(15)]
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == want
    assert mask.diagonal().all()


def test_stretched_by_hand():
    # 3 rows over 5 columns: columns count as 0 0 1 1 2; stride 1 joins 0 and 1.
    want = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    mask = st.flat_butterfly(3, 5, block_shape=(1, 1), size=2)
    np.testing.assert_array_equal(mask, want)


def test_every_row_and_column_has_a_block_and_aligned_ones_equally_many():
    for k in range(1, 20):
        for n in range(1, 20):
            mask = st.flat_butterfly(k, n, block_shape=(1, 1), size=1)
            assert mask.shape == (k, n)
            assert mask.any(0).all() and mask.any(1).all()
            assert mask.sum() == max(k, n)
    # 32 x 128 blocks: a peer's has rows of 24 and columns of 6 blocks, as this one.
    mask = st.flat_butterfly(1024, 4096, block_shape=(32, 32), size=32)
    assert set(mask.sum(1)) == {24} and set(mask.sum(0)) == {6}


# --- Monarch of higher order ----------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "kwargs", "dims"),
    [
        ((4096, 4096), dict(order=3), ((16, 16, 16), (16, 16, 16))),
        ((1024, 1024), dict(order=3), ((8, 8, 16), (8, 16, 8))),
        ((1024, 1024), dict(), ((32, 32), (32, 32))),
        ((720, 720), dict(order=3), ((8, 9, 10), (9, 10, 8))),
        ((64, 729), dict(order=3, blocks=4), ((4, 4, 4), (11, 17, 4))),
        ((256, 256), dict(order=4), ((4, 4, 4, 4), (4, 4, 4, 4))),
        ((31, 31), dict(order=3), ((2, 4, 4), (4, 4, 2))),
    ],
)
def test_monarch_of_any_order_has_even_dimensions(sizes, kwargs, dims):
    chain = st.monarch(*sizes, **kwargs)
    assert chain.shape == sizes
    want = st.tensor_train(*dims, 1, in_size=sizes[0], out_size=sizes[1])
    assert chain == want
    assert len(chain.patterns) == kwargs.get("order", 2)


def test_rank_of_order_three():
    chain = st.monarch(64, 64, order=3, rank=4)
    assert chain == st.tensor_train((4, 4, 4), (4, 4, 4), 4)


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.LowRank(8, 6, 7), "rank: got 7, needed 1 to 6, the smaller"),
        (lambda: st.LowRank(8, 6, 0), "rank: got 0, needed 1 to 6"),
        (lambda: st.LowRank(0, 6, 1), "in_size: got 0, needed at least 1"),
        (lambda: st.phm(0, 8, n=2), "in_size: got 0, needed at least 1"),
        (lambda: st.phm(8, 8, n=0), "n: got 0, needed at least 1"),
        (lambda: st.phm(8, 8, n=4, rank=3), "rank: got 3, needed 1 to 2"),
        (
            lambda: st.Kronecker(left=(2, 2), right=(2, 2), in_size=5),
            "in_size: got 5, needed 1 to 4, 2 times 2",
        ),
        (lambda: st.Kronecker(left=(0, 2), right=(2, 2)), r"left: got \(0, 2\)"),
        (lambda: st.Kronecker(left=(1, 1), right=(1, 1), terms=0), "terms: got 0"),
        (lambda: st.DenseNM(8, 8, 6, 2, 4), "rank: got 6, needed a multiple of m=4"),
        (lambda: st.DenseNM(8, 8, 8, 5, 4), "n: got 5:4, needed 1 <= n <= m"),
        (lambda: st.Pixelfly(8, 8, (2, 2), 3, 1), "size: got 3, needed a power of two"),
        (lambda: st.Pixelfly(8, 8, (2, 2), 2, 9), "rank: got 9, needed 1 to 8"),
        (
            lambda: st.flat_butterfly(480, 480, block_shape=(32, 32), size=32),
            r"size: got 32, .*at most 16: the grid has \(15, 15\) blocks",
        ),
        (
            lambda: st.flat_butterfly(8, 0, block_shape=(2, 2), size=1),
            "out_size: got 0, needed at least 1",
        ),
        (
            lambda: st.flat_butterfly(8, 8, block_shape=(2, 0), size=1),
            "block_shape: got 0, needed at least 1",
        ),
        (lambda: st.monarch(64, 64, order=1), "order: got 1, needed at least 2"),
        (lambda: st.monarch(64, 64, order=3, rank=5), "rank: got 5, needed 1 to 4"),
        (lambda: st.monarch(0, 64, order=3), "in_size: got 0, needed at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["low_rank", "kronecker", "pixelfly", "dense_nm"])
def test_complex_into_a_real_family_is_refused(name):
    family, params = FAMILIES[name], jax.tree.map(jnp.asarray, drawn(name)[0])
    what = f"got complex64, needed a real floating dtype: {type(family).__name__} is"
    with pytest.raises(ValueError, match=f"dtype: {what}"):
        family.init(jax.random.key(0), "complex64")
    with pytest.raises(ValueError, match=f"x: {what}"):
        family.apply(params, jnp.ones((2, family.in_size), "complex64"))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 99\), needed \[..., "):
        family.apply(params, jnp.ones((2, 99)))
