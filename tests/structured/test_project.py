"""Projections against singular values in numpy, others by hand, the bugs of peers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import structured as st

CHAINS = {
    "monarch": st.monarch(12, 20, blocks=4, rank=2),
    "monarch_padded": st.monarch(23, 37, blocks=5, rank=3),
    "butterfly": st.butterfly(16),
    "butterfly_padded": st.butterfly(11, 6),
    "train_3": st.tensor_train((2, 3, 4), (5, 2, 3), (2, 3)),
    "train_4": st.tensor_train((2, 3, 2, 4), (3, 2, 4, 2), (2, 4, 3)),
    "train_rank_above": st.tensor_train((2, 3), (3, 2), 5),
    "block_diagonal": st.block_diagonal(7, 10, blocks=3),
    # Two copies side by side, three interleaved: slices where the support is not full.
    "outer_inner": st.Chain((st.Pattern(4, 2, 3, 3), st.Pattern(2, 2, 2, 6)), 36, 24),
}
DTYPES = ["float32", "complex128", "float64", "complex64"]


def normal(shape, dtype="float32", key=0):
    """In float64 or complex128, for numpy."""
    draw = np.random.default_rng(key).standard_normal
    return draw(shape) + (1j * draw(shape) if "complex" in dtype else 0.0)


def draw(chain, dtype="float32"):
    shapes = [p.factor_shape for p in chain.patterns]
    return [normal(shape, dtype, key) for key, shape in enumerate(shapes)]


def dense(factors, k, n):
    """The chain's matrix in numpy."""
    a, d, c, _ = factors[0].shape
    y = np.eye(a * c * d)
    for f in factors:
        a, d, c, b = f.shape
        y = np.einsum("xijk,ikjo->xiok", y.reshape(-1, a, c, d), np.asarray(f))
        y = y.reshape(len(y), -1)
    return y[:k, :n]


def distance(factors, w):
    return np.linalg.norm(w - dense(factors, *w.shape)) / np.linalg.norm(w)


def matrix(chain, dtype=jnp.float32):
    return jnp.asarray(dense(draw(chain), *chain.shape), dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(CHAINS, itertools.cycle(DTYPES), strict=False)]
)
def test_a_chain_is_recovered_and_the_error_is_the_true_one(name, dtype):
    chain = CHAINS[name]
    low = dtype in ("float32", "complex64")
    below = 1e-5 if low else 1e-12
    exact = dense(draw(chain, dtype), *chain.shape)
    noise = normal(chain.shape, dtype, 9)
    with jax.enable_x64(not low):
        for size in (0.0, 1e-3, 1.0, 1e3):
            w = np.asarray(exact + size * noise, dtype)
            factors, error = st.project(jnp.asarray(w), chain)
            assert st.Chain.of(factors, *chain.shape) == chain
            assert {f.dtype for f in factors} == {jnp.dtype(dtype)}
            true = distance(factors, w.astype(exact.dtype))
            np.testing.assert_allclose(error, true, rtol=1e-3, atol=below)
            # The chain is a candidate: p - 1 decompositions, none worse than it.
            off = np.linalg.norm(size * noise) / np.linalg.norm(w)
            assert true <= off * max(1, len(factors) - 1) ** 0.5 * (1 + 1e-5) + below


@pytest.mark.parametrize("name", ["monarch", "outer_inner"])
def test_two_factors_are_the_best(name):
    """What is left are the last singular values of w[(i u j k), (i o v k)]."""
    chain = CHAINS[name]
    one, two = chain.patterns
    rank = two.c * two.a // one.a
    w = np.random.default_rng(0).standard_normal(chain.shape)
    left = np.sum(w**2)
    slices = w.reshape(two.a, one.a // two.a, one.c, one.d, two.a, two.b, -1, one.d)
    for i, u, k in np.ndindex(two.a, one.a // two.a, one.d):
        for v in range(two.d // one.d):
            values = np.linalg.svd(slices[i, u, :, k, i, :, v, k], compute_uv=False)
            assert len(values) > rank
            left -= np.sum(values[:rank] ** 2)
    _, error = st.project(jnp.asarray(w, jnp.float32), chain)
    np.testing.assert_allclose(error, np.sqrt(left / np.sum(w**2)), rtol=1e-5)


def test_two_factors_by_hand():
    """Slice (k, j) = (0, 0) is diag(3, 1), (1, 0) is diag(0, 2): cut off is 1 of 14."""
    w = jnp.zeros((4, 4)).at[0, 0].set(3).at[1, 2].set(1).at[3, 2].set(2)
    (left, right), error = st.project(w, st.monarch(4, 4, blocks=2, rank=1))
    np.testing.assert_allclose(error, (1 / 14) ** 0.5, rtol=1e-6)
    want = w.at[1, 2].set(0)
    np.testing.assert_allclose(st.to_dense((left, right)), want, atol=1e-6)
    # The square roots of 3 and 2 on both sides, at input i and output o of each block.
    np.testing.assert_allclose(jnp.abs(left[0, 0, 0, 0]), 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(right[0, 0, 0, 0]), 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(left[1, 0, 1, 0]), 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(right[0, 0, 1, 1]), 2**0.5, rtol=1e-6)


def test_factors_have_equal_parts_of_the_scale():
    """2 ** 12 times the Hadamard matrix of 8: entries of 16 in all of three factors."""
    block = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    w = 2.0**12 * jnp.kron(block, jnp.kron(block, block))
    factors, error = st.project(w, st.butterfly(8))
    assert error < 1e-6
    for factor in factors:
        np.testing.assert_allclose(jnp.abs(factor), 16.0, rtol=1e-5)


def test_rank_replaces_the_chains():
    w = jax.random.normal(jax.random.key(0), (24, 30))
    chain = st.tensor_train((2, 3, 4), (5, 2, 3), (2, 3))
    for rank in (1, (3, 2)):
        want = st.tensor_train((2, 3, 4), (5, 2, 3), rank)
        factors, error = st.project(w, chain, rank=rank)
        assert st.Chain.of(factors) == want
        assert error == st.project(w, want)[1]


def test_leading_axes_vmap_and_jit():
    chain = CHAINS["monarch_padded"]
    w = jax.random.normal(jax.random.key(0), (2, 3, *chain.shape))
    factors, error = st.project(w, chain)
    assert error.shape == (2, 3)
    assert [f.shape[:2] for f in factors] == [(2, 3), (2, 3)]
    traces = []

    @jax.jit
    def again(w):
        traces.append(1)
        return jax.vmap(lambda w: st.project(w, chain))(w)

    for row in (0, 1):
        got, errors = again(w[row])
        np.testing.assert_allclose(errors, error[row], rtol=1e-5)
        for i in range(3):
            whole = st.to_dense([f[row, i] for f in factors], *chain.shape)
            one = st.to_dense([f[i] for f in got], *chain.shape)
            np.testing.assert_allclose(one, whole, atol=1e-5)
    assert len(traces) == 1


def test_zeros_nan_and_extreme_scales():
    chain = CHAINS["monarch"]
    w = jax.random.normal(jax.random.key(0), chain.shape)
    factors, error = st.project(w, chain)
    zeros, none = st.project(jnp.zeros_like(w), chain)
    assert none == 0 and not any(f.any() for f in zeros)
    assert jnp.isnan(st.project(w.at[3, 4].set(jnp.nan), chain)[1])
    for scale in (1e30, 1e-30):  # squares are beyond float32
        scaled, same = st.project(w * scale, chain)
        np.testing.assert_allclose(same, error, rtol=1e-5)
        true = distance(scaled, np.asarray(w * scale, np.float64))
        np.testing.assert_allclose(true, error, rtol=1e-5)


def test_bfloat16_is_projected_in_float32():
    chain = CHAINS["train_3"]
    w = matrix(chain, jnp.bfloat16)
    factors, error = st.project(w, chain)
    assert {f.dtype for f in factors} == {jnp.dtype("float32")}
    true = distance(factors, np.asarray(w, np.float64))
    np.testing.assert_allclose(error, true, rtol=1e-3)
    assert 1e-4 < error < 4e-3  # what bfloat16 has rounded


# ---- permutations ------------------------------------------------------------------


def fourier(n):
    return jnp.asarray(np.fft.fft(np.eye(n)))


@pytest.mark.parametrize("dims", [(2, 2, 2, 2), (2, 3, 5), (4, 4), (5, 2)])
def test_fourier_is_recovered_in_digit_reversed_order(dims):
    n = int(np.prod(dims))
    with jax.enable_x64(True):
        w, chain = fourier(n), st.tensor_train(dims, dims)
        assert st.project(w, chain)[1] > 0.1
        factors, error, p, q = st.project(w, chain, permutations="bit_reversal")
        assert error < 1e-12 and distance(factors, np.asarray(w)[p]) < 1e-12
        # The last digit comes first: input (i, j) takes entry i + dims[0] j and so on.
        weights = np.cumprod((1, *dims[:-1]))
        want = [np.dot(digits, weights) for digits in np.ndindex(*dims)]
        np.testing.assert_array_equal(p, want)
        np.testing.assert_array_equal(q, np.arange(n))


def test_the_eight_orders():
    """Of 8 inputs; two of them by hand, the others as products of levels in numpy."""
    from sparsejax.structured._permutations import candidates

    orders = {
        tuple(p) for p in candidates("default_8", (1, (2, 2, 2), 1), "p").tolist()
    }
    halves = {
        "a": lambda n: np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)]),
        "b": lambda n: np.concatenate([np.arange(n // 2)[::-1], np.arange(n // 2, n)]),
        "c": lambda n: np.concatenate([np.arange(n // 2), np.arange(n // 2, n)[::-1]]),
    }
    want = set()
    for some in itertools.product((0, 1), repeat=3):
        order = np.arange(8)
        for n in (8, 4, 2):
            for on, name in zip(some, "abc", strict=True):
                level = np.arange(8).reshape(-1, n)
                order = order[(level[:, halves[name](n)] if on else level).ravel()]
        want.add(tuple(order.tolist()))
    assert (0, 4, 2, 6, 1, 5, 3, 7) in orders  # separate
    assert (0, 1, 3, 2, 7, 6, 4, 5) in orders  # reverse the second part
    assert orders == want


@pytest.mark.slow
def test_the_best_of_both_sides_is_found():
    """w[p][:, q] has four factors for one pair; inputs and outputs stay beside w."""
    n = 8
    chain = st.butterfly(n)
    with jax.enable_x64(True):
        bits = np.arange(n).reshape(2, 2, 2).T.ravel()
        w = jnp.stack([fourier(n)[:, bits], fourier(n)])
        sides = dict(permutations="default_8", out_permutations="default_8")
        factors, error, p, q = st.project(w, chain, **sides)
        assert error.shape == (2,) and max(error) < 1e-12
        x = np.random.default_rng(0).standard_normal((3, n))
        for i in range(2):
            y = np.zeros((3, n), complex)
            y[:, q[i]] = x[:, p[i]] @ dense([f[i] for f in factors], n, n)
            np.testing.assert_allclose(y, x @ np.asarray(w[i]), atol=1e-12)


def test_orders_of_ones_own_and_padding():
    chain = st.butterfly(6, 8)
    exact = dense(draw(chain), 8, 8)
    order = np.array([7, 0, 3, 6, 1, 2, 5, 4])
    w = np.zeros((8, 8))
    w[order] = exact
    w[6:] = 0  # of padding
    orders = ["identity", order]
    small = jnp.asarray(w[:6], jnp.float32)
    errors = [st.project(small, chain, permutations=[p])[1] for p in orders]
    _, error, p, _ = st.project(small, chain, permutations=orders)
    assert error == errors[1] < 1e-6 < 0.1 < errors[0]
    np.testing.assert_array_equal(p, order)


@pytest.mark.parametrize("n", [1, 7, 12, 16])
def test_a_circulant_is_recovered_by_two_transforms(n):
    c = normal(n, "complex128")
    w = np.stack([np.roll(c, j) for j in range(n)])
    with jax.enable_x64(True):
        factors, error = st.project_circulant(jnp.asarray(w))
        assert error < 1e-12 and distance(factors, w) < 1e-12
        assert n != 16 or len(factors) == 2 * 4 - 1
        # As near as there is: the Fourier transform is diagonal, what is not is left.
        w = normal((n, n))
        factors, error = st.project_circulant(jnp.asarray(w))
        left = np.fft.fft(np.fft.ifft(w, axis=0), axis=1)
        left -= np.diag(np.diag(left))
        np.testing.assert_allclose(error, np.linalg.norm(left) / np.linalg.norm(w))
        np.testing.assert_allclose(error, distance(factors, w), atol=1e-12)


# ---- beside low rank ---------------------------------------------------------------


def test_hadamard_and_gaussian_beside_low_rank():
    """Of a 64 x 64 matrix 768 parameters are rank 6."""
    block = np.array([[1, 1], [1, -1]])
    hadamard = functools.reduce(np.kron, [block] * 6)
    w = jnp.asarray(hadamard, jnp.float32)
    report = st.compare_low_rank(w, st.butterfly(64))
    assert report.better and report.relative_error < 1e-6
    np.testing.assert_allclose(report.low_rank_error, (58 / 64) ** 0.5, rtol=1e-5)
    assert (report.params, report.low_rank, report.low_rank_params) == (768, 6, 768)
    text = "with 768 parameters: nearer than low rank, 0.952 with 768 (rank 6)"
    assert text in str(report)

    # A matrix of rank 6: nothing is nearer than low rank, and the report says it.
    flat = jnp.asarray(np.diag([1.0] * 6 + [0.0] * 58) @ hadamard, jnp.float32)
    report = st.compare_low_rank(flat, st.monarch(64, 64, blocks=8))
    assert not report.better and "no better than low rank" in str(report)


@pytest.mark.slow
def test_gaussian_is_as_near_by_monarch_as_by_low_rank():
    w = jax.random.normal(jax.random.key(0), (256, 256))
    for blocks in (4, 8, 16):
        report = st.compare_low_rank(w, st.monarch(256, 256, blocks=blocks))
        assert report.low_rank_params == report.params == 2 * 256**2 // blocks
        assert report.relative_error < report.low_rank_error * 1.001


def multiplied_out(z, part):
    """A peer's factors of z [.., n, n], z x = y: halves with roots of the values each.

    The first half has ``part(levels)`` levels; each is decomposed on its own after.
    """
    n = z.shape[-1]
    if n == 2:
        return z
    p = 2 ** part(n.bit_length() - 1)
    slices = z.reshape(*z.shape[:-2], p, n // p, p, n // p)
    u, values, v = np.linalg.svd(np.einsum("...arbs->...rbas", slices))
    root = np.sqrt(values[..., :1])
    outer = multiplied_out(np.swapaxes(u[..., 0] * root, -1, -2), part)
    inner = multiplied_out(np.swapaxes(v[..., 0, :] * root, -2, -3), part)
    return np.einsum("...rab,...brs->...arbs", outer, inner).reshape(z.shape)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda levels: levels // 2, id="balanced"),
        pytest.param(lambda levels: 1, id="unbalanced"),
        pytest.param(lambda levels: levels - 1, id="the_other_way"),
    ],
)
def test_gaussian_is_no_farther_than_by_the_trees_of_others(part):
    for n in (8, 16):
        chain = st.butterfly(n)
        w = np.random.default_rng(n).standard_normal((30, n, n))
        _, errors = st.project(jnp.asarray(w.swapaxes(1, 2), jnp.float32), chain)
        off = np.linalg.norm(multiplied_out(w, part) - w, axis=(1, 2))
        theirs = off / np.linalg.norm(w, axis=(1, 2))
        assert (theirs < 1).all() and (errors <= theirs).all()


# ---- bugs of others ----------------------------------------------------------------


@pytest.mark.slow
def test_peer_bug_four_block_monarch_at_1024_is_projected_to_rank_one():
    """0.92 there, of exactly such a matrix, by 32 blocks of rank 1 in its place."""
    chain = st.monarch(1024, 1024, blocks=4)
    keys = jax.random.split(jax.random.key(0))
    factors = [
        jax.random.normal(key, p.factor_shape)
        for key, p in zip(keys, chain.patterns, strict=True)
    ]
    w = st.to_dense(factors)
    assert st.project(w, chain)[1] < 1e-5
    assert 0.85 < st.project(w, st.monarch(1024, 1024, blocks=32))[1] < 0.95


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(st.monarch(48, 20, blocks=4, rank=2), id="only_square"),
        pytest.param(st.monarch(31, 31, blocks=6), id="prime_sizes_degenerate"),
        pytest.param(st.butterfly(48), id="48x48_refused"),
        pytest.param(
            st.butterfly(512, 256), id="512x256_refused", marks=pytest.mark.slow
        ),
        # Rectangular blocks, whose number is not the square root of the size.
        pytest.param(st.tensor_train((3, 10), (14, 2), 4), id="only_rank_one"),
    ],
)
def test_peer_bug_sizes(chain):
    assert chain.params < np.prod(chain.shape)
    assert st.project(matrix(chain), chain)[1] < 1e-5


# ---- refusals ----------------------------------------------------------------------

W = jnp.ones((8, 8))
TWO = st.monarch(8, 8, blocks=2)
# Blocks of 3 outputs do not fill 2 interleaved blocks evenly.
UNEVEN = st.Chain((st.Pattern(2, 3, 4, 1), st.Pattern(1, 4, 3, 2)), 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.project(W[:4], TWO), r"w: got shape \(4, 8\), needed \(8, 8\)"),
        (lambda: st.project(W.astype("int32"), TWO), "w: got int32, needed floats"),
        (lambda: st.project(W, UNEVEN), "chain: got .*after .*no slices of one rank"),
        (
            lambda: st.project(W, TWO, rank=5),
            "rank: got 5, needed 1 to 4.*block of 4x4",
        ),
        (lambda: st.project(W, TWO, rank=0), "rank: got 0, needed 1"),
        (
            lambda: st.project(W, TWO, rank=(1, 1)),
            r"rank: got \(1, 1\) for a chain of 2",
        ),
        (
            lambda: st.project(W, st.block_diagonal(8, 8, blocks=2), rank=1),
            "rank: got 1 for a chain of 1",
        ),
        (
            lambda: st.project(W, TWO, permutations="bitrev"),
            "permutations: got 'bitrev', needed identity, bit_reversal, default_8",
        ),
        (
            lambda: st.project(W, TWO, out_permutations=np.zeros(8, int)),
            "out_permutations: got an array .*each of 0 to 7 once",
        ),
        (
            lambda: st.project_circulant(W[:4]),
            r"w: got shape \(4, 8\), needed a square",
        ),
        (lambda: st.compare_low_rank(W[None], TWO), r"w: got shape \(1, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
