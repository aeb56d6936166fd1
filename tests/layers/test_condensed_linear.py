"""Linear layers with condensed kernels: literals of the equation, spread, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import layers


def test_nm_linear_by_hand():
    """W has rows 1 and 2 of 4 in column 0, rows 0 and 3 in column 1."""
    spec = layers.NMLinearSpec(in_features=4, out_features=2, n=2, m=4)
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
    indices = jnp.array([[1 + (2 << 2), 0 + (3 << 2)]], jnp.uint32)
    x = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
    # y = (10 * 1 + 100 * 3, 1 * 2 + 1000 * 4) + 1
    y = layers.apply_nm_linear(spec, params, indices, x)
    np.testing.assert_array_equal(y, [[311, 4003]])


def test_fan_in_linear_by_hand():
    spec = layers.FanInLinearSpec(in_features=4, out_features=2, fan_in=2)
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
    indices = jnp.array([[1, 2], [0, 3]])
    x = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
    # y = (10 * 1 + 100 * 2, 1 * 3 + 1000 * 4) + 1
    y = layers.apply_fan_in_linear(spec, params, indices, x)
    np.testing.assert_array_equal(y, [[211, 4004]])


def test_init_draws_distinct_places_everywhere():
    spec = layers.FanInLinearSpec(in_features=20, out_features=300, fan_in=5)
    params, topology = layers.init_fan_in_linear(jax.random.key(0), spec)
    indices = np.asarray(topology["kernel_indices"])
    assert indices.shape == params["kernel"].shape == (300, 5)
    assert (np.diff(indices, axis=1) > 0).all()
    counts = np.bincount(indices.ravel(), minlength=20)
    assert (abs(counts - 75) < 5 * np.sqrt(75 * 0.75)).all()  # 300 * 5 / 20 each
    params, topology = layers.init_fan_in_linear(
        jax.random.key(0),
        layers.FanInLinearSpec(in_features=4, out_features=3, fan_in=0),
    )
    y = layers.apply_fan_in_linear(
        layers.FanInLinearSpec(in_features=4, out_features=3, fan_in=0),
        params,
        topology["kernel_indices"],
        jnp.ones((2, 4)),
    )
    np.testing.assert_array_equal(y, np.zeros((2, 3)))


def test_errors():
    with pytest.raises(ValueError, match=r"fan_in: got 9, needed an int in \[0, 8\]"):
        layers.FanInLinearSpec(in_features=8, out_features=4, fan_in=9)
    with pytest.raises(ValueError, match="in_features, out_features: got 8, 0, needed"):
        layers.FanInLinearSpec(in_features=8, out_features=0, fan_in=1)
    with pytest.raises(ValueError, match="n, m: got 5:4, needed 1 <= n <= m"):
        layers.NMLinearSpec(in_features=8, out_features=4, n=5, m=4)
    with pytest.raises(ValueError, match="in_features: got 10, needed a multiple of m"):
        layers.NMLinearSpec(in_features=10, out_features=4, n=2, m=4)
    assert layers.NMLinearSpec(in_features=8, out_features=4, n=1, m=4).sparsity == 0.75
    assert (
        layers.FanInLinearSpec(in_features=8, out_features=4, fan_in=6).sparsity == 0.25
    )
