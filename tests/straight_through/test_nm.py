"""SR-STE, mask and structure decay, and BDWP by hand; the traps of earlier codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import schedules
from sparsejax import straight_through as st

W = jnp.array([[4.0, -1.0], [2.0, 3.0], [-3.0, 0.5], [1.0, -2.0]])
G = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])


def gradient(f, w=W, g=G):
    return jax.jit(lambda w, g: jax.vjp(f, w)[1](g)[0])(w, g)


def test_sr_ste_by_hand():
    f = lambda w: st.sr_ste(w, n=2, m=4)
    np.testing.assert_array_equal(f(W), [[4, 0], [0, 3], [-3, 0], [0, -2]])
    # g + 2e-4 (1 - m) w.
    want = [[1, 10 - 2e-4], [2 + 4e-4, 20], [3, 30 + 1e-4], [4 + 2e-4, 40]]
    np.testing.assert_allclose(gradient(f), want, rtol=1e-7)


def test_sr_ste_heeds_its_decay():
    f = lambda w: st.sr_ste(w, n=2, m=4, decay=0.5)
    want = [[1, 9.5], [3, 20], [3, 30.25], [4.5, 40]]
    np.testing.assert_array_equal(gradient(f), want)


def test_n_of_m_is_kept_not_pruned_and_has_no_default():
    assert (st.sr_ste(W, n=1, m=4) != 0).sum() == 2
    assert (st.sr_ste(W, n=3, m=4) != 0).sum() == 6
    with pytest.raises(TypeError):
        st.sr_ste(W)


def test_groups_run_along_the_forward_contraction_axis():
    """x @ w sums over axis 0 of a kernel (in, out), axis 2 of (kh, kw, in, out)."""
    kernel = jnp.arange(1.0, 9.0).reshape(4, 2)
    np.testing.assert_array_equal(st.sr_ste(kernel, n=1, m=4)[3], kernel[3])
    assert (st.sr_ste(kernel, n=1, m=4)[:3] == 0).all()
    conv = kernel[None, None] * jnp.ones((3, 3, 1, 1))
    assert (st.sr_ste(conv, n=1, m=4)[:, :, :3] == 0).all()
    # Other layouts say which: (in, heads, dim).
    heads = kernel.reshape(4, 1, 2)
    assert (st.sr_ste(heads, n=1, m=4, axis=0)[:3] == 0).all()


def test_groups_never_straddle_rows():
    """12 entries are three groups of 4, but no column of 6 is whole groups."""
    with pytest.raises(ValueError, match="m must divide the size of axis 0, 6"):
        st.sr_ste(jnp.ones((6, 2)), n=2, m=4)
    with pytest.raises(ValueError, match="m must divide the size of axis 0, 6"):
        st.structure_decay(jnp.ones((6, 2)), 0, sequence=((1, 2), (1, 4)))


@jax.numpy_dtype_promotion("standard")  # which optax needs
def test_decoupled_decay_escapes_the_preconditioner():
    """Adam's first step is the gradient's sign; the pull comes beside it, as it is."""
    lr, decay = 0.1, 0.5
    tx = optax.adam(lr)
    g = gradient(lambda w: st.sr_ste(w, n=2, m=4, decay=None))
    np.testing.assert_array_equal(g, G)
    updates, _ = tx.update(g, tx.init(W), W)
    updates -= lr * decay * st.pruned_part(W, n=2, m=4)
    # w - 0.1 sign(g) - 0.05 (1 - m) w.
    want = [[3.9, -1.05], [1.8, 2.9], [-3.1, 0.375], [0.85, -2.1]]
    np.testing.assert_allclose(optax.apply_updates(W, updates), want, rtol=1e-5)
    # Coupled, the pull is lost in the quotient: every step is 0.1 long.
    coupled = gradient(lambda w: st.sr_ste(w, n=2, m=4, decay=decay))
    updates, _ = tx.update(coupled, tx.init(W), W)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


def test_mask_decay_by_hand_in_both_backward_forms():
    b = 0.25
    want = [[4, -0.25], [0.5, 3], [-3, 0.125], [0.25, -2]]
    for backward in ("straight_through", "scaled"):
        np.testing.assert_array_equal(
            st.mask_decay(W, b, n=2, m=4, backward=backward), want
        )
    # Straight-through: g. Scaled: g (m + b (1 - m)).
    np.testing.assert_array_equal(gradient(lambda w: st.mask_decay(w, b, n=2, m=4)), G)
    scaled = functools.partial(st.mask_decay, b=b, n=2, m=4, backward="scaled")
    want = [[1, 2.5], [0.5, 20], [3, 7.5], [1, 40]]
    np.testing.assert_array_equal(gradient(scaled), want)


def test_mask_decay_ends_as_a_binary_mask():
    b = schedules.exponential(jnp.int32(9000), end=9000)
    f = lambda w: st.mask_decay(w, b, n=2, m=4, backward="scaled")
    np.testing.assert_array_equal(f(W), st.sr_ste(W, n=2, m=4))
    np.testing.assert_array_equal(gradient(f), [[1, 0], [0, 20], [3, 0], [0, 40]])


def test_sequences_by_hand():
    assert st.stepwise_sequence(1, 16) == ((15, 16), (8, 16), (4, 16), (2, 16), (1, 16))
    assert st.stepwise_sequence(2, 4) == ((3, 4), (2, 4))  # log2(M / N) + 1
    assert st.stepwise_sequence(1, 2) == ((1, 2),)
    assert st.geometric_sequence(2, 4) == ((16, 32), (8, 16), (4, 8), (2, 4))
    assert st.geometric_sequence(1, 8, factors=(2, 1)) == ((2, 16), (1, 8))


def test_structure_decay_walks_the_sequence_in_one_trace():
    w = jnp.array([[8.0], [1.0], [2.0], [3.0], [7.0], [6.0], [5.0], [4.0]])
    sequence = ((4, 8), (2, 4), (1, 4))

    traces = []

    @jax.jit
    def used(w, step):
        traces.append(step)
        stage = schedules.stage(step, stages=3, begin=10, end=40)
        f = lambda w: st.structure_decay(w, stage, sequence=sequence)
        return f(w)[:, 0], jax.vjp(f, w)[1](w)[0]

    want = {
        0: [8, 1, 2, 3, 7, 6, 5, 4],  # dense before begin
        10: [8, 0, 0, 0, 7, 6, 5, 0],  # 4 of 8
        19: [8, 0, 0, 0, 7, 6, 5, 0],
        20: [8, 0, 0, 3, 7, 6, 0, 0],  # 2 of 4
        30: [8, 0, 0, 0, 7, 0, 0, 0],  # 1 of 4
        40: [8, 0, 0, 0, 7, 0, 0, 0],  # and on
    }
    for step, kept in want.items():
        value, grad = used(w, jnp.int32(step))
        np.testing.assert_array_equal(value, kept)
        np.testing.assert_array_equal(grad, w)
    # A run resumed within a stage has no memory to lose: the step says it all.
    np.testing.assert_array_equal(used(w, jnp.int32(15))[0], want[10])
    np.testing.assert_array_equal(used(w, jnp.int32(25))[0], want[20])
    assert len(traces) == 1


def test_bdwp_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    w = jnp.array([[4.0, -3.0], [1.0, 2.0]])
    y, back = jax.vjp(lambda x, w: st.bdwp_matmul(x, w, n=1, m=2), x, w)
    # Forward 1 of 2 down the columns: [[4, -3], [0, 0]].
    np.testing.assert_array_equal(y, [[4, -3], [12, -9]])
    dy = jnp.array([[1.0, 10.0], [100.0, 1000.0]])
    dx, dw = back(dy)
    # Backward 1 of 2 along the rows: [[4, 0], [0, 2]]; dx = dy @ its transpose.
    np.testing.assert_array_equal(dx, [[4, 20], [400, 2000]])
    # dw = x^T dy, dense.
    np.testing.assert_array_equal(dw, [[301, 3010], [502, 5020]])


@jax.numpy_dtype_promotion("standard")
def test_bdwp_takes_any_leading_axes_and_mixed_dtypes(key):
    keys = jax.random.split(key, 2)
    x, w = jax.random.normal(keys[0], (3, 2, 8)), jax.random.normal(keys[1], (8, 4))
    f = jax.jit(lambda x, w: st.bdwp_matmul(x, w, n=2, m=4))
    y, back = jax.vjp(f, x, w)
    want, want_back = jax.vjp(f, x.reshape(6, 8), w)
    np.testing.assert_allclose(y.reshape(6, 4), want, rtol=1e-6)
    dx, dw = back(jnp.ones_like(y))
    want_dx, want_dw = want_back(jnp.ones_like(want))
    np.testing.assert_allclose(dx.reshape(6, 8), want_dx, rtol=1e-6)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5)
    assert f(x[0, 0], w).shape == (4,)
    half = x.astype(jnp.bfloat16)
    assert f(half, w).dtype == jnp.float32
    dx, dw = jax.grad(lambda x, w: f(x, w).sum(), (0, 1))(half, w)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


def test_bdwp_gradient_of_the_gradient():
    # s(x) = sum(dx^2) / 2 with dx = dy wb^T, wb = [[4, 0], [0, 2]], dy = ones:
    # dx = [4, 2], so ds/dw = dx_i dy_j where wb keeps: [[4, 0], [0, 2]].
    w = jnp.array([[4.0, -3.0], [1.0, 2.0]])

    def size(w):
        dx = jax.grad(lambda x: st.bdwp_matmul(x, w, n=1, m=2).sum())(jnp.ones(2))
        return (dx**2).sum() / 2

    np.testing.assert_array_equal(jax.grad(size)(w), [[4, 0], [0, 2]])


@pytest.mark.parametrize("nested", ["sr_ste", "bdwp"])
def test_the_bias_is_kept(nested):
    """A layer around a form has its bias in the value and in the gradient."""

    def layer(params, x):
        if nested == "bdwp":
            product = st.bdwp_matmul(x, params["kernel"], n=1, m=2)
        else:
            product = x @ st.sr_ste(params["kernel"], n=1, m=2)
        return product + params["bias"]

    params = {
        "kernel": jnp.array([[4.0, -3.0], [1.0, 2.0]]),
        "bias": jnp.array([0.5, 0.25]),
    }
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    np.testing.assert_array_equal(layer(params, x), [[4.5, -2.75], [12.5, -8.75]])
    grads = jax.grad(lambda p: layer(p, x).sum())(params)
    np.testing.assert_array_equal(grads["bias"], [2, 2])


@pytest.mark.parametrize(
    "x, w, m, message",
    [
        ((2, 3), (4, 4), 4, r"x must be .* got shapes \(2, 3\) and \(4, 4\)"),
        ((2, 4), (4, 4, 1), 4, "x must be"),
        ((2, 4), (4, 6), 4, r"m must divide both sizes of w, \(4, 6\), got m=4"),
        ((2, 6), (6, 4), 4, "m must divide both sizes of w"),
        ((2, 4), (4, 4), 0, "m must divide both sizes of w"),
        ((2, 4), (4, 4), 1, "0 <= n <= m"),
    ],
)
def test_bdwp_refuses_what_does_not_fit(x, w, m, message):
    with pytest.raises(ValueError, match=message):
        st.bdwp_matmul(jnp.ones(x), jnp.ones(w), n=2, m=m)


def test_bdwp_refuses_integers():
    with pytest.raises(ValueError, match="x must be floating, got int32"):
        st.bdwp_matmul(jnp.ones((2, 2), int), jnp.ones((2, 2)), n=1, m=2)
    with pytest.raises(ValueError, match="w must be floating, got int32"):
        st.bdwp_matmul(jnp.ones((2, 2)), jnp.ones((2, 2), int), n=1, m=2)
