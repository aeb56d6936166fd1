"""The soft mask: its sum, its gradient, its limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparsejax import masks
from sparsejax.straight_through import soft_topk

soft = jax.jit(soft_topk)


def test_two_entries_by_hand():
    # s = (log 9, 0), k = 1: by symmetry tau = log 3, so mu = sigmoid(+-log 3).
    scores = jnp.array([np.log(9.0), 0.0])
    np.testing.assert_allclose(soft(scores, 1, 1.0), [0.75, 0.25], rtol=1e-6)
    # At twice the temperature the logit halves: 1 / (1 + 3^-1/2).
    high = 1 / (1 + 3**-0.5)
    np.testing.assert_allclose(soft(scores, 1, 2.0), [high, 1 - high], rtol=1e-6)
    # mu' = 3/16 for both; the mean of g is 1/2: 3/16 (1 - 1/2).
    grad = jax.grad(lambda s: soft(s, 1, 1.0)[0])(scores)
    np.testing.assert_allclose(grad, [3 / 32, -3 / 32], rtol=1e-5)
    # And over the temperature.
    slope = high * (1 - high) / 2
    grad = jax.grad(lambda s: soft(s, 1, 2.0)[0])(scores)
    np.testing.assert_allclose(grad, [slope / 2, -slope / 2], rtol=1e-5)


def test_equal_scores_have_equal_shares():
    np.testing.assert_allclose(soft(jnp.ones(8), 2, 0.5), 0.25, rtol=1e-6)


@pytest.mark.parametrize("temperature", [100.0, 1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("count", [1, 37, 999])
@pytest.mark.parametrize("tail", [1.0, 20.0])
def test_it_sums_to_count_and_is_ordered(key, count, temperature, tail):
    scores = jnp.exp(tail * jax.random.normal(key, (10, 100)))
    mask = np.asarray(soft(scores, count, temperature), np.float64)
    np.testing.assert_allclose(mask.sum(), count, rtol=2e-5)
    assert mask.min() >= 0 and mask.max() <= 1
    order = np.argsort(np.ravel(scores))
    assert (np.diff(mask.ravel()[order]) >= -1e-6).all()


def test_it_hardens_to_the_exact_top_k(key):
    scores = jax.random.normal(key, (1000,))
    hard = masks.topk_mask(scores, 100).astype(jnp.float32)
    distance = [
        float(jnp.abs(soft(scores, 100, t) - hard).sum())
        for t in (1.0, 0.1, 0.01, 1e-3, 1e-6, 1e-30, 0.0)
    ]
    assert all(a > b or a == b == 0 for a, b in itertools.pairwise(distance))
    assert distance[0] > 10 and distance[-3:] == [0, 0, 0]
    # Ties share the last place above 0, where the lowest index takes it.
    tied = jnp.array([1.0, 2.0, 1.0])
    np.testing.assert_allclose(soft(tied, 2, 1e-6), [0.5, 1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(soft(tied, 2, 0.0), [1, 1, 0])
    np.testing.assert_array_equal(jax.grad(lambda s: soft(s, 2, 0.0)[0])(tied), 0)
    # Neighbours in float32, far below the resolution of score / temperature.
    near = jnp.array([1.0, 1 + 2**-23, 1 - 2**-24])
    np.testing.assert_array_equal(soft(near, 1, 1e-12), [0, 1, 0])
    np.testing.assert_array_equal(soft(near, 2, 1e-12), [1, 1, 0])


def test_gradients_are_those_of_the_implicit_function():
    scores = jnp.array([0.3, -1.0, 0.5, 2.0, 0.45])
    f = lambda s: soft_topk(jnp.asarray(s), 2, 0.5)
    check_grads(f, (scores,), order=2, modes=["rev"], rtol=1e-2, atol=1e-2)
    # What one gains the others lose: the columns of the Jacobian sum to 0.
    np.testing.assert_allclose(jax.jacrev(f)(scores).sum(0), 0, atol=1e-6)


def test_a_weight_with_its_soft_mask():
    # d/dw of w mu(|w|) = mu + w mu' sign(w) / theta (1 - share), alone of two: 1/2.
    w = jnp.array([-np.log(9.0), 0.0])
    used = lambda w: w * soft_topk(jnp.abs(w), 1, 1.0)
    grad = jax.grad(lambda w: used(w)[0])(w)
    want = 0.75 + np.log(9.0) * 3 / 32
    np.testing.assert_allclose(grad[0], want, rtol=1e-5)


def test_all_none_and_traced_counts(key):
    scores = jax.random.normal(key, (6,))
    for count, want in ((0, 0.0), (6, 1.0)):
        np.testing.assert_array_equal(soft(scores, jnp.int32(count), 1.0), want)
        grad = jax.grad(lambda s, k=count: soft_topk(s, k, 1.0)[0])(scores)
        np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(soft(scores, jnp.int32(9), 1.0), 1)
    np.testing.assert_allclose(soft(scores, jnp.int32(4), 1.0).sum(), 4, rtol=1e-6)
    assert soft_topk(jnp.zeros((0, 3)), 0, 1.0).shape == (0, 3)


def test_rows_by_vmap(key):
    scores = jax.random.normal(key, (3, 16))
    rows = jax.vmap(lambda s, t: soft_topk(s, 4, t))
    temperatures = jnp.array([1.0, 0.0, 1e-3])
    got = jax.jit(rows)(scores, temperatures)
    np.testing.assert_allclose(got.sum(1), 4, rtol=1e-5)
    want = [soft_topk(s, 4, t) for s, t in zip(scores, temperatures, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-7)


def test_nan_is_last_and_infinities_hold():
    scores = jnp.array([jnp.nan, 1.0, jnp.inf, -jnp.inf, 1.5])
    mask = soft(scores, 2, 0.5)
    assert mask[0] == 0 and mask[3] == 0 and mask[2] == 1
    # The two others share one place: +-1/4 around 1.25, in units of 1/2.
    np.testing.assert_allclose(mask[1] + mask[4], 1, rtol=1e-6)
    np.testing.assert_allclose(mask[4], 1 / (1 + np.exp(-0.5)), rtol=1e-6)
    grad = jax.grad(lambda s: soft(s, 2, 0.5)[4])(scores)
    assert jnp.isfinite(grad).all() and grad[0] == 0 and grad[4] > 0
    equal = jnp.array([jnp.inf, 1.0, jnp.inf])
    np.testing.assert_allclose(soft(equal, 1, 0.5), [0.5, 0, 0.5], rtol=1e-6)
    # A temperature of 0 makes none, not even on the way.
    with jax.debug_nans(True):
        np.testing.assert_array_equal(soft_topk(jnp.ones(3), 1, 0.0), [1, 0, 0])


def test_bfloat16_is_worked_out_in_float32(key):
    scores = jax.random.normal(key, (512,)).astype(jnp.bfloat16)
    mask = soft(scores, 100, jnp.float32(0.3))
    assert mask.dtype == jnp.bfloat16
    want = soft(scores.astype(jnp.float32), 100, 0.3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(mask, want)


@pytest.mark.parametrize(
    "args, message",
    [
        ((jnp.ones(3), 4, 1.0), r"count must be in \[0, 3\], got 4"),
        ((jnp.ones(3), -1, 1.0), r"count must be in \[0, 3\], got -1"),
        ((jnp.ones(3, int), 1, 1.0), "floating, got int32"),
        ((jnp.ones(3), 1, jnp.ones(3)), "temperature must be a scalar"),
    ],
)
def test_bad_input_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        soft_topk(*args)
