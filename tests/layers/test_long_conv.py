"""The long-convolution layer: its equation, initial scale and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import layers


def plain(params, x, causal):
    """y[i, h] = sum_j k[h, j] x[i - j, h] + b[h], in float64 loops."""
    k, x = np.asarray(params["kernel"], np.float64), np.asarray(x, np.float64)
    y = np.zeros(x.shape) + np.asarray(params["bias"], np.float64)
    for i in range(x.shape[-2]):
        for j in range(k.shape[1]):
            if j <= i or not causal:
                y[..., i, :] += k[:, j] * x[..., i - j, :]
    return y


@pytest.mark.parametrize("causal", [True, False])
def test_equation(causal):
    spec = layers.LongConvSpec(features=3, kernel_size=9, causal=causal)
    params = layers.init_long_conv(jax.random.key(0), spec)
    params["bias"] = jnp.array([1.0, -2.0, 0.5])
    x, pre, post = jax.random.normal(jax.random.key(1), (3, 2, 12, 3))
    y = layers.apply_long_conv(spec, params, x)
    np.testing.assert_allclose(y, plain(params, x, causal), rtol=1e-5, atol=1e-5)
    y = layers.apply_long_conv(spec, params, x, pre_gate=pre, post_gate=post)
    want = np.asarray(post) * plain(params, pre * x, causal)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    if causal:  # a shorter sequence than the kernel
        y = layers.apply_long_conv(spec, params, x[0, :5])
        want = plain(params, x[0, :5], causal)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_variance_is_kept():
    spec = layers.LongConvSpec(features=64, kernel_size=128, causal=False)
    params = layers.init_long_conv(jax.random.key(0), spec)
    assert params["kernel"].shape == (64, 128) and not params["bias"].any()
    x = jax.random.normal(jax.random.key(1), (4, 256, 64))
    y = layers.apply_long_conv(spec, params, x)
    assert abs(float(jnp.std(y)) - 1) < 0.05


def test_bad_arguments():
    with pytest.raises(ValueError, match="kernel_size: got 0, needed a positive int"):
        layers.LongConvSpec(features=3, kernel_size=0)
    spec = layers.LongConvSpec(features=3, kernel_size=8, causal=False)
    params = layers.init_long_conv(jax.random.key(0), spec)
    apply = lambda x, **gates: layers.apply_long_conv(spec, params, x, **gates)
    with pytest.raises(
        ValueError, match=r"x: got shape \(5, 8\), needed \[..., t, 3\]"
    ):
        apply(jnp.ones((5, 8)))
    with pytest.raises(ValueError, match="k: got length 8, needed 1 to 5"):
        apply(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"post_gate: got shape \(3,\), needed x's"):
        apply(jnp.ones((8, 3)), post_gate=jnp.ones(3))
