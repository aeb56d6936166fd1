"""Patterns, chains and their matrices, against Kronecker products in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import structured as st

CHAINS = {
    "monarch": st.monarch(12, 20, blocks=4, rank=2),
    "monarch_padded": st.monarch(7, 5, blocks=4),
    "butterfly": st.butterfly(8),
    "butterfly_padded": st.butterfly(5, 7),
    "train": st.tensor_train((2, 3, 4), (5, 2, 3), (2, 3)),
    "block_diagonal": st.block_diagonal(7, 10, blocks=3),
}


def draw(chain):
    keys = jax.random.split(jax.random.key(0), len(chain.patterns))
    return [
        jax.random.normal(key, p.factor_shape)
        for key, p in zip(keys, chain.patterns, strict=True)
    ]


def matrix(factor, p):
    """The factor as a matrix, block by block: row (i, j, k), column (i, o, k)."""
    w = np.zeros((p.in_size, p.out_size))
    for i in range(p.a):
        for k in range(p.d):
            for j in range(p.c):
                for o in range(p.b):
                    row, column = (i * p.c + j) * p.d + k, (i * p.b + o) * p.d + k
                    w[row, column] = factor[i, k, j, o]
    return w


@pytest.mark.parametrize("name", CHAINS)
def test_dense_is_the_product_of_the_factors(name):
    chain = CHAINS[name]
    factors = draw(chain)
    want = np.eye(chain.patterns[0].in_size)
    for factor, p in zip(factors, chain.patterns, strict=True):
        want = want @ matrix(np.asarray(factor, np.float64), p)
        ones = [np.eye(p.a), np.ones((p.c, p.b)), np.eye(p.d)]
        support = np.kron(np.kron(*ones[:2]), ones[2])
        np.testing.assert_array_equal(matrix(np.ones(p.factor_shape), p), support)
    k, n = chain.shape
    got = st.to_dense(factors, k, n)
    np.testing.assert_allclose(got, want[:k, :n], rtol=1e-5, atol=1e-5)
    assert st.Chain.of(factors, k, n) == chain


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_params_are_those_that_the_matrix_depends_on(name):
    chain = CHAINS[name]
    factors = draw(chain)
    total = lambda factors: jnp.sum(jnp.sin(st.to_dense(factors, *chain.shape)))
    gradients = jax.grad(total)(factors)
    assert chain.params == sum(int(np.count_nonzero(g)) for g in gradients)
    assert chain.stored == sum(math.prod(f.shape) for f in factors)
    assert chain.flops(3) == 6 * chain.stored


def test_monarch_blocks_have_the_rank():
    chain = CHAINS["monarch"]
    w = np.asarray(st.to_dense(draw(chain)), np.float64).reshape(4, 3, 5, 4)
    for k in range(4):
        for j in range(4):
            values = np.linalg.svd(w[k, :, :, j], compute_uv=False)
            assert values[1] > 0.1 and values[2] < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.Pattern(0, 1, 1, 1), "a: got 0, needed at least 1"),
        (lambda: st.Pattern.of(jnp.ones((2, 3))), r"factor: got shape \(2, 3\)"),
        (lambda: st.Chain((), 1, 1), "patterns: got none"),
        (
            lambda: st.Chain((st.Pattern(1, 2, 3, 1), st.Pattern(1, 2, 3, 1)), 3, 2),
            "patterns: got .*which takes 3, after .*needed one that takes its 2",
        ),
        (lambda: st.Chain((st.Pattern(1, 2, 3, 1),), 4, 2), "in_size: got 4, needed 1"),
        (lambda: st.to_dense([], 4, 2), "patterns: got none"),
        (lambda: st.to_dense([jnp.ones((1, 2, 3, 1))], 0), "in_size: got 0, needed 1"),
        (lambda: st.Chain.of([jnp.ones((1, 2, 3, 1))], 3, 0), "out_size: got 0"),
        (lambda: st.tensor_train((2, 3), (2, 2), in_size=0), "in_size: got 0, needed"),
        (lambda: st.tensor_train((2, 3), (2,)), r"out_dims: got \(2,\), needed 2"),
        (lambda: st.tensor_train((2, 3), (2, 2), (1, 2)), "ranks: got .*needed 1"),
        (lambda: st.tensor_train((2, 0), (2, 2)), "in_dims: got .*1 or more"),
        (lambda: st.monarch(8, 8, blocks=9), "blocks: got 9, needed 1 to 8"),
        (lambda: st.monarch(8, 8, blocks=0), "blocks: got 0"),
        (lambda: st.monarch(8, 8, blocks=2, rank=5), "rank: got 5, needed 1 to 4"),
        (lambda: st.monarch(0, 8, blocks=1), "in_size: got 0, needed at least 1"),
        (lambda: st.butterfly(0), "size: got 0, needed at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
