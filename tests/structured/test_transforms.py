"""Exact constructions against scipy and numpy, in float64 and in complex64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg

from sparsejax import structured as st

LENGTHS = [1, 2, 6, 12, 15, 16, 48, 64]
ATOL = {"complex128": 1e-12, "complex64": 1e-5}


def matrix(factors):
    """The product in complex128: y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]."""
    a, d, c, b = factors[0].shape
    y = np.eye(a * c * d)
    for factor in factors:
        a, d, c, b = factor.shape
        y = y.reshape(-1, a, c, d).transpose(1, 3, 0, 2) @ np.asarray(factor, complex)
        y = y.transpose(2, 0, 3, 1).reshape(-1, a * b * d)
    return y


def check(make, want, dtype, take=lambda factors: matrix(factors)):
    """The factors in dtype are that matrix, relative to its largest entry."""
    with jax.enable_x64(dtype == "complex128"):
        made = make(dtype=dtype)
        factors = made[0] if isinstance(made[0], tuple) else made
        assert {factor.dtype.name for factor in factors} == {dtype}
        got = take(made)
    atol = ATOL[dtype] * max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    return factors


def permuted(made):
    """Rows in the order of x instead of in that of the factors."""
    factors, permutation = made
    w = np.empty_like(matrix(factors))
    w[permutation] = matrix(factors)
    return w


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("n", LENGTHS)
def test_dft(n, dtype):
    forward, backward = np.fft.fft(np.eye(n)), np.fft.ifft(np.eye(n))
    make = lambda dtype: st.dft(n, dtype=dtype)
    factors = check(make, forward, dtype, permuted)
    # One factor for each prime factor: 1, 1, 2, 3, 2, 4, 5 and 6 of them.
    assert len(factors) == dict(zip(LENGTHS, (1, 1, 2, 3, 2, 4, 5, 6), strict=True))[n]
    check(lambda dtype: st.dft(n, inverse=True, dtype=dtype), backward, dtype, permuted)


def test_dft_is_a_tensor_train_of_its_dims():
    factors, permutation = st.dft(64)
    assert st.Chain.of(factors) == st.butterfly(64)
    # Bit reversal: 1 = 000001 takes 100000 = 32, 11 = 001011 takes 110100 = 52.
    assert permutation[1] == 32 and permutation[11] == 52


@pytest.mark.parametrize("dims", [(6, 8), (8, 6), (2, 3, 8), (48,), (1, 48)])
def test_regression_sizes_are_not_ignored(dims):
    """A peer's Fourier layer takes ``sizes`` and overwrites it by its own."""
    make = lambda dtype: st.dft(48, dims=dims, dtype=dtype)
    factors = check(make, np.fft.fft(np.eye(48)), "complex64", permuted)
    assert st.Chain.of(factors) == st.tensor_train(dims, dims)
    assert len(st.circulant(np.ones(48), dims=dims)) == 2 * len(dims) - 1


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("n", LENGTHS)
def test_dct(n, dtype):
    # The oracle for the rows x: the transform of each row of the identity.
    want = scipy.fft.dct(np.eye(n))
    check(lambda dtype: st.dct(n, dtype=dtype), want, dtype, lambda m: permuted(m).real)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_hadamard(n, dtype):
    make = lambda dtype: st.hadamard(n, dtype=dtype)
    factors = check(make, scipy.linalg.hadamard(n), dtype)
    assert n == 1 or st.Chain.of(factors) == st.butterfly(n)
    assert st.hadamard(n)[0].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("n", LENGTHS)
def test_circulant(n, dtype):
    """Any length: a peer has powers of two only."""
    c = np.random.default_rng(n).normal(size=n)
    # scipy's first argument is the first column; c is the first row.
    want = scipy.linalg.circulant(c).T
    factors = check(lambda dtype: st.circulant(c, dtype=dtype), want, dtype)
    stored = sum(factor.size for factor in factors)
    assert stored <= 2 * n * sum(factor.shape[3] for factor in factors)
    check(lambda dtype: st.circulant(1j * c, dtype=dtype), 1j * want, dtype)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("k, n", [(1, 1), (1, 6), (7, 1), (12, 15), (16, 16), (48, 31)])
def test_toeplitz(k, n, dtype):
    generator = np.random.default_rng(n)
    column, row = generator.normal(size=k), generator.normal(size=n)
    check(
        lambda dtype: st.toeplitz(column, row, dtype=dtype),
        scipy.linalg.toeplitz(column, row),
        dtype,
        lambda factors: matrix(factors)[:k, :n],
    )


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("n, taps", [(1, 1), (6, 3), (15, 1), (12, 12), (5, 16)])
def test_convolution(n, taps, dtype):
    generator = np.random.default_rng(n)
    kernel, x = generator.normal(size=taps), generator.normal(size=n)
    check(
        lambda dtype: st.convolution(kernel, n, dtype=dtype),
        np.convolve(x, kernel),
        dtype,
        lambda factors: x @ matrix(factors)[:n, : n + taps - 1],
    )
    wrapped = np.zeros(n)
    np.add.at(wrapped, np.arange(n + taps - 1) % n, np.convolve(x, kernel))
    check(
        lambda dtype: st.convolution(kernel, n, circular=True, dtype=dtype),
        wrapped,
        dtype,
        lambda factors: x @ matrix(factors),
    )


def test_dense_of_complex_factors():
    factors, permutation = st.dft(6)
    x = np.random.default_rng(0).normal(size=6)
    y = x[permutation] @ np.asarray(st.to_dense(factors))
    np.testing.assert_allclose(y, np.fft.fft(x), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.hadamard(0), "n: got 0, needed a length of at least 1"),
        (lambda: st.hadamard(12), "n: got 12, needed a power of two"),
        (lambda: st.dft(0), "n: got 0, needed a length of at least 1"),
        (lambda: st.dct(-1), "n: got -1, needed a length of at least 1"),
        (lambda: st.circulant([]), r"c: got shape \(0,\), needed one axis"),
        (lambda: st.circulant(np.ones((2, 2))), r"c: got shape \(2, 2\)"),
        (lambda: st.toeplitz([], [1.0]), r"column: got shape \(0,\)"),
        (lambda: st.toeplitz([1.0], []), r"row: got shape \(0,\)"),
        (lambda: st.convolution([], 4), r"kernel: got shape \(0,\)"),
        (lambda: st.convolution([1.0], 0), "size: got 0, needed a length"),
        (lambda: st.dft(12, dims=(3, 5)), r"dims: got \(3, 5\), needed .* product 12"),
        (lambda: st.dft(2, dims=(-1, -2)), r"dims: got \(-1, -2\), needed whole"),
        (lambda: st.dft(4, dtype="float32"), "float32, needed complex64.*are complex"),
        (lambda: st.dct(4, dtype="float32"), "dtype: got float32, needed complex64"),
        (lambda: st.circulant([1.0], dtype="float32"), "dtype: got float32, needed"),
        (lambda: st.toeplitz([1.0], [1.0], dtype="int32"), "dtype: got int32, needed"),
        (lambda: st.hadamard(4, dtype="int32"), "int32, needed a floating dtype"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
