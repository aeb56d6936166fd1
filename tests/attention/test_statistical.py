"""Statistical top-k: values, gradients, rows that are short."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

Z = statistics.NormalDist().inv_cdf


def rule(x, count, where, rest):
    """[n] in float64: x less mean + deviation * quantile, where that is positive."""
    real = x[where]
    if len(real) <= count:
        return np.where(where, x, rest)
    bound = real.mean() + real.std(ddof=1) * Z(1 - count / len(real))
    return np.where(where & (x > bound), x - bound, rest)


@pytest.mark.parametrize("rest", [0.0, pytest.param(-np.inf, marks=pytest.mark.slow)])
def test_equals_the_rule_and_its_slope(rest):
    """Causal rows of 1 to 12: the first four have no more than the count of 4."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 12, 12))
    where = np.tril(np.ones((12, 12), bool))

    @jax.jit
    def run(x):
        def loss(x):
            y = at.statistical_top_k(x, 4, where=where, rest=rest)
            return jnp.where(jnp.isfinite(y), y * jnp.float32(weights), 0.0).sum(), y

        (_, y), grad = jax.value_and_grad(loss, has_aux=True)(x)
        return y, grad

    y, grad = run(jnp.float32(x))
    want = np.stack([rule(*row, rest) for row in zip(x, [4] * 12, where, strict=True)])
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert (np.isfinite(want) & (want != 0))[4:].any(-1).all()

    def loss(x):
        rows = [rule(*row, 0.0) for row in zip(x, [4] * 12, where, strict=True)]
        return (np.stack(rows) * weights).sum()

    for i, j in [(2, 1), (5, 0), (9, 3), (11, 11), (11, 4), (3, 9)]:
        step = np.zeros((12, 12))
        step[i, j] = 1e-6
        slope = (loss(x + step) - loss(x - step)) / 2e-6
        np.testing.assert_allclose(grad[i, j], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_keeps_about_as_many_as_asked_for():
    """Of 4096 Gaussian rows of 256, in the mean."""
    x = np.float32(np.random.default_rng(1).standard_normal((4096, 256)) * 3 + 7)
    kept = (np.asarray(jax.jit(lambda x: at.statistical_top_k(x, 20))(x)) > 0).sum(-1)
    assert abs(kept.mean() - 20) < 0.5


@pytest.mark.slow
def test_rows_of_equals_and_of_nothing_have_finite_gradients():
    x = jnp.stack([jnp.full(6, 2.0), jnp.full(6, -jnp.inf), jnp.arange(6.0)])
    y, pull = jax.vjp(jax.jit(lambda x: at.statistical_top_k(x, 2)), x)
    np.testing.assert_array_equal(y[:2], 0)
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all() and y[2, 5] > 0
    half = at.statistical_top_k(x.astype(jnp.bfloat16), 2)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "x, count, match",
    [(np.ones(3, np.int32), 1, "x: got int32"), (np.ones(3), 0, "count")],
)
def test_arguments_that_are_refused(x, count, match):
    with pytest.raises(ValueError, match=match):
        at.statistical_top_k(jnp.asarray(x), count)
