"""The scale of drawn factors, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import structured as st

CHAINS = {
    "monarch_1": st.monarch(1024, 1024, blocks=1),
    "monarch_4": st.monarch(1024, 1024, blocks=4),
    "monarch_16": st.monarch(1024, 1024, blocks=16),
    "monarch_32": st.monarch(1024, 1024, blocks=32),
    "monarch_padded": st.monarch(500, 300, blocks=7),
    "butterfly": st.butterfly(512),
    "butterfly_padded": st.butterfly(300, 450),
    "train_padded": st.tensor_train(
        (9, 8, 8), (4, 8, 16), (2, 5), in_size=515, out_size=500
    ),
    "block_diagonal": st.block_diagonal(1000, 300, blocks=9),
}


@functools.cache
def draw(chain, **kwargs):
    factors = st.init_chain(jax.random.key(3), chain, **kwargs)
    for factor, p in zip(factors, chain.patterns, strict=True):
        assert factor.shape == p.factor_shape
    return [np.asarray(factor) for factor in factors]


def product(x, factors):
    """The chain in numpy; y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]."""
    for factor in factors:
        a, d, c, b = factor.shape
        x = np.pad(x, ((0, 0), (0, a * c * d - x.shape[1])))
        x = x.reshape(-1, a, c, d).transpose(1, 3, 0, 2) @ factor
        x = x.transpose(2, 0, 3, 1).reshape(-1, a * b * d)
    return x


@pytest.mark.parametrize("name", CHAINS)
def test_output_has_the_standard_deviation_of_a_dense_layer(name):
    chain = CHAINS[name]
    # Of entries of variance 1 a weight of variance 1 / fan-in makes such of variance 1.
    x = np.random.default_rng(0).normal(size=(512, chain.in_size)).astype(np.float32)
    y = product(x, draw(chain))[:, : chain.out_size]
    assert y.std() == pytest.approx(1, abs=0.05)


def test_regression_initial_scale_of_a_product_of_two_factors():
    """A peer's two factors of variance 1/3 each make 1/9 where a dense layer has 1/3.

    Its output is sqrt(3) too small at 1024 entries, for any number of blocks.
    """
    x = np.random.default_rng(1).normal(size=(256, 1024)).astype(np.float32)
    for name in "monarch_1", "monarch_4", "monarch_16", "monarch_32":
        y = product(x, draw(CHAINS[name])) / 3**0.5
        assert y.std() == pytest.approx(0.577, abs=0.03)


def test_padding_is_not_counted():
    # 7 entries in 4 blocks of 2: the last block has one true input, so its entries are
    # 1 or -1, and its second row is 0.
    left, _ = draw(st.monarch(7, 5, blocks=4))
    np.testing.assert_allclose(np.abs(left[3, 0, 0]), 1, atol=1e-6)
    np.testing.assert_array_equal(left[3, 0, 1], 0)
    assert (left[:3] != 0).all()
    # 4 of 6 inputs (j, k), j < 2 and k < 3: of block k = 0 both, of the others one.
    (factor,) = draw(st.Chain((st.Pattern(a=1, b=2, c=2, d=3),), 4, 6))
    np.testing.assert_allclose(np.abs(factor[0, 1:, 0]), 1, atol=1e-6)
    np.testing.assert_array_equal(factor[0, 1:, 1], 0)
    assert (factor[0, 0] != 0).all()
    # 5 of 16 entries: at the third level two blocks of a pair have no true input.
    w = product(np.eye(5), draw(st.butterfly(5, 16)))
    np.testing.assert_allclose((w**2).sum(0), np.ones(16), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_dtype_and_scale(dtype):
    factors = draw(st.butterfly(64), dtype=dtype, scale=0.5)
    assert {factor.dtype.name for factor in factors} == {dtype}
    w = product(np.eye(64), [factor.astype(complex) for factor in factors])
    np.testing.assert_allclose((np.abs(w) ** 2).sum(0), 0.25, rtol=0.02)
    assert (np.abs(w.imag).max() > 0.1) == (dtype == "complex64")


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="dtype: got int32, needed a floating dtype"):
        st.init_chain(jax.random.key(0), st.butterfly(4), jnp.int32)
