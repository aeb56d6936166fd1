"""AutoSparse by hand: shrinkage, thresholds, annealing, and the traps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparsejax import masks
from sparsejax import straight_through as st

# sigmoid(0) = 1/2, sigmoid'(0) = 1/4; sigmoid(log 3) = 3/4, sigmoid' = 3/16.
W = jnp.array([[2.0, -0.25], [-1.0, 0.625]])
G = jnp.array([[1.0, 10.0], [100.0, 1000.0]])


def vjp(w, threshold, alpha, g=G):
    out, back = jax.vjp(lambda w, t: st.autosparse(w, t, alpha), w, threshold)
    return out, *back(g)


def test_one_threshold_by_hand():
    out, dw, dt = vjp(W, jnp.array(0.0), 0.5)
    # sign(w) max(|w| - 1/2, 0).
    np.testing.assert_array_equal(out, [[1.5, 0], [-0.5, 0.125]])
    np.testing.assert_array_equal(dw, [[1, 5], [100, 1000]])
    # -1/4 sum sign(w) h' g = -(1 - 5 - 100 + 1000) / 4.
    assert dt == -224.0


def test_a_threshold_per_output_channel_by_hand():
    out, dw, dt = vjp(W, jnp.array([0.0, np.log(3.0)]), 0.5)
    np.testing.assert_allclose(out, [[1.5, 0], [-0.5, 0]], atol=1e-7)
    np.testing.assert_array_equal(dw, [[1, 5], [100, 500]])
    # -(1 - 100) / 4 and -3/16 (-5 + 500).
    np.testing.assert_allclose(dt, [24.75, -92.8125], rtol=1e-6)
    column = vjp(W, jnp.array([[0.0], [np.log(3.0)]]), 0.5)
    assert column[2].shape == (2, 1)


def test_backward_is_not_the_autodiff_of_relu():
    """At alpha > 0 pruned weights learn, and push the threshold, as relu's do not."""
    relu = lambda w, t: jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(t))
    out, back = jax.vjp(relu, W, jnp.array(0.0))
    got, dw, dt = vjp(W, jnp.array(0.0), 0.75)
    np.testing.assert_array_equal(got, out)
    assert back(G)[0][0, 1] == 0 and dw[0, 1] == 7.5
    assert back(G)[1] == -225.25 and dt == -(1 - 7.5 - 100 + 1000) / 4
    # At alpha 0 they are the same.
    _, dw, dt = vjp(W, jnp.array(0.0), 0.0)
    np.testing.assert_array_equal(dw, back(G)[0])
    assert dt == -225.25


def test_a_weight_of_zero_may_return():
    """sign(0) is 0, but the weight's own gradient is sign^2 h' g, which is h' g."""
    _, dw, dt = vjp(jnp.zeros((1, 1)), jnp.array(0.0), 0.75, jnp.ones((1, 1)))
    assert dw[0, 0] == 0.75 and dt == 0


def test_at_the_threshold_a_weight_is_pruned():
    w = jnp.array([[0.5, -0.5]])
    out, dw, _ = vjp(w, jnp.array(0.0), 0.25, jnp.ones((1, 2)))
    np.testing.assert_array_equal(out, [[0, 0]])
    np.testing.assert_array_equal(dw, [[0.25, 0.25]])
    assert not st.autosparse_mask(w, jnp.array(0.0)).any()


def test_pruned_weights_are_plus_zero():
    out = st.autosparse(jnp.array([-0.25, -0.0, 0.0]), jnp.array(0.0), 1.0)
    assert not jnp.signbit(out).any()


def test_density_is_reported_not_sparsity():
    w = jnp.array([2.0, 0.25, 0.125, 0.0])
    report = masks.density({"w": st.autosparse_mask(w, jnp.array(0.0))})
    assert float(report) == 0.25
    kept = st.autosparse(w, jnp.array(0.0), 1.0) != 0
    assert report.leaves["w"] == (int(kept.sum()), 4) == (1, 4)


def test_top_k_by_hand():
    w = jnp.array([3.0, -1.0, 1.0, -2.0, 0.5])
    f = lambda w: st.autosparse_topk(w, 3, 0.25)
    # Kept: 3, -2, and of the equal 1s the first. Not shrunk.
    np.testing.assert_array_equal(f(w), [3, -1, 0, -2, 0])
    grad = jax.vjp(f, w)[1](jnp.array([1.0, 10.0, 100.0, 1e3, 1e4]))[0]
    np.testing.assert_array_equal(grad, [1, 10, 25, 1e3, 2500])
    traced = jax.jit(lambda w, k: st.autosparse_topk(w, k, 0.25))
    assert [(traced(w, jnp.int32(k)) != 0).sum() for k in range(6)] == list(range(6))


def test_gradients_of_the_gradient():
    # At alpha 0 the rule is the true derivative, to any order.
    w, t = jnp.array([2.0, -0.25, -1.0]), jnp.array(0.1)
    f = lambda w, t: st.autosparse(jnp.asarray(w), jnp.asarray(t), 0.0) ** 2
    check_grads(f, (w, t), order=2, modes=["rev"], rtol=1e-2)
    # dT = -s'(T) sum(sign h'), whose derivative in T is -s''(T) sum(sign h');
    # s'' = s' (1 - 2 s) = 3/16 * -1/2 at log 3, and the sum 1 - 1 * 1/2 - 1 = -1/2.
    slope = jax.grad(lambda t: st.autosparse(w, t, 0.5).sum())
    np.testing.assert_allclose(jax.grad(slope)(jnp.log(3.0)), -3 / 64, rtol=1e-5)


def test_nan_and_inf_come_through():
    w = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])
    out = st.autosparse(w, jnp.array(0.0), 0.5)
    np.testing.assert_array_equal(out, [np.nan, np.inf, -np.inf, 0.5])
    assert jnp.isnan(st.autosparse(W, jnp.array(jnp.nan), 0.5)).all()
    assert st.autosparse_mask(w, jnp.array(0.0)).tolist() == [False, True, True, True]


def test_half_precision_weights_beside_a_float32_threshold():
    """The threshold's gradient is a sum over all weights: not in bfloat16."""
    w = jnp.ones((64, 64), jnp.bfloat16)
    out, dw, dt = vjp(w, jnp.array(0.0), jnp.float32(0.3), jnp.ones_like(w))
    assert out.dtype == dw.dtype == jnp.bfloat16 and dt.dtype == jnp.float32
    assert dt == -1024  # -4096 / 4; a bfloat16 sum of ones stops at 256
    _, _, dt = vjp(w, jnp.array(0.0, jnp.bfloat16), 0.3, jnp.ones_like(w))
    assert dt.dtype == jnp.bfloat16 and dt == -1024


@pytest.mark.parametrize(
    "threshold, alpha, message",
    [
        (jnp.zeros(3), 0.5, r"threshold must broadcast .* \(2, 2\), got \(3,\)"),
        (jnp.zeros((1, 2, 2)), 0.5, "threshold must broadcast"),
        (jnp.array(0), 0.5, "threshold must be floating, got int32"),
        (jnp.array(0.0), jnp.ones(2), r"alpha must be a scalar, got shape \(2,\)"),
    ],
)
def test_bad_input_is_refused(threshold, alpha, message):
    with pytest.raises(ValueError, match=message):
        st.autosparse(W, threshold, alpha)
