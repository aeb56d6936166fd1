"""HyperSparse and MaskSparsity: values and gradients worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import transforms

penalty = transforms.hypersparse_penalty


def test_hypersparse_gradient_by_hand():
    # Two of |w| = (1, 2, 4) are kept: the smallest is 2, so s = atanh(1/sqrt 3) / 2.
    # tanh(s |w|): of half, once and twice that angle
    #   sqrt 3 - sqrt 2,  1 / sqrt 3,  sqrt 3 / 2
    # gradient = sign(w) s (1 - tanh^2) sum|w| / sum tanh
    squashed = np.array([3**0.5 - 2**0.5, 3**-0.5, 3**0.5 / 2])
    s = 0.6584789484624084 / 2
    want = np.array([1, -1, 1]) * s * (1 - squashed**2) * 7 / squashed.sum()
    # The same in digits.
    np.testing.assert_allclose(want, [1.176380, -0.872384, 0.327144], rtol=1e-5)
    w = jnp.array([[1.0, -2.0, 4.0]])
    value, gradient = jax.value_and_grad(penalty)({"w": w}, sparsity=1 / 3)
    assert value == 0
    np.testing.assert_allclose(gradient["w"][0], want, rtol=1e-5)


def test_hypersparse_looks_at_all_leaves_at_once():
    # The same weights in two leaves, and a bias that has no part in it.
    params = {
        "a": {"kernel": jnp.array([[1.0], [4.0]]), "bias": jnp.full(1, 9.0)},
        "b": {"kernel": jnp.array([[-2.0]])},
    }
    gradient = jax.jit(jax.grad(functools.partial(penalty, sparsity=1 / 3)))(params)
    np.testing.assert_allclose(
        gradient["a"]["kernel"][:, 0], [1.176380, 0.327144], rtol=1e-5
    )
    np.testing.assert_allclose(gradient["b"]["kernel"], [[-0.872384]], rtol=1e-5)
    assert gradient["a"]["bias"] == 0


def test_hypersparse_reference_point_is_the_smallest_kept_weight():
    # One kept: the reference is 4, s = 0.16462: tanh of a quarter, half and once the
    # angle: 0.163148, 0.317837, 0.577350; sum 1.058336, factor 7 / that = 6.614157.
    # s * factor = 1.088824 times (1 - tanh^2) = (0.973383, 0.898979, 0.666667).
    w = {"w": jnp.array([[1.0, -2.0, 4.0]])}
    gradient = jax.grad(penalty)(w, sparsity=2 / 3)["w"][0]
    np.testing.assert_allclose(gradient, [1.059842, -0.978830, 0.725882], rtol=1e-4)


def test_hypersparse_presses_on_small_weights_more():
    w = jnp.linspace(0.01, 1.0, 100).reshape(10, 10)
    gradient = jax.grad(penalty)({"w": w}, sparsity=0.9)["w"].ravel()
    assert (jnp.diff(gradient) < 0).all() and gradient[-1] < gradient[0] / 1.5


@pytest.mark.parametrize("smallest", [0.0, 1e-40])
def test_hypersparse_is_done_where_the_smallest_kept_weight_is_zero(smallest):
    w = {"w": jnp.array([[4.0, smallest, 0.0]])}
    value, gradient = jax.value_and_grad(penalty)(w, sparsity=1 / 3)
    assert value == 0
    np.testing.assert_array_equal(gradient["w"], 0)


def test_hypersparse_at_zero_weights_and_in_bfloat16():
    w = {"w": jnp.array([[1.0, 0.0, -4.0, 2.0]], jnp.bfloat16)}
    gradient = jax.grad(penalty)(w, sparsity=0.5)["w"]
    assert gradient.dtype == jnp.bfloat16
    # The zero adds nothing to the sums: as in the first test.
    np.testing.assert_allclose(
        gradient[0].astype(jnp.float32), [1.176, 0, -0.3271, 0.8724], rtol=8e-3
    )


def test_hypersparse_coefficient_by_hand():
    # 0.0005 * 1.05^(epochs since begin); 0 before.
    at = lambda t: float(transforms.hypersparse_coefficient(t, begin=100, every=10))
    assert at(99) == 0
    np.testing.assert_allclose(
        [at(100), at(109), at(110), at(300)],
        [5e-4, 5e-4, 5.25e-4, 5e-4 * 2.6532977],
        rtol=1e-5,
    )
    traced = jax.jit(
        functools.partial(transforms.hypersparse_coefficient, begin=100, every=10)
    )(jnp.int32(110))
    np.testing.assert_allclose(traced, 5.25e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        transforms.hypersparse_coefficient(1, begin=0, every=0)


def test_adding_hypersparse_follows_the_coefficient_and_keeps_dtypes():
    coefficient = functools.partial(
        transforms.hypersparse_coefficient, initial=0.5, growth=2.0, begin=1, every=1
    )
    tx = transforms.add_hypersparse(sparsity=1 / 3, coefficient=coefficient)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"w": jnp.array([[1.0, -2.0, 4.0]], dtype), "bias": jnp.ones(2, dtype)}
        grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
        for scale in (0, 0.5, 1.0):  # steps 0, 1, 2
            out, state = tx.update(grads, state, params)
            want = 1 + scale * np.array([[1.176380, -0.872384, 0.327144]])
            assert out["w"].dtype == out["bias"].dtype == dtype
            rtol = 1e-5 if dtype == jnp.float32 else 1e-2
            np.testing.assert_allclose(
                out["w"].astype(jnp.float32), want, rtol=rtol, atol=rtol
            )
            np.testing.assert_array_equal(out["bias"].astype(jnp.float32), 1)
        assert int(state.hypersparse_steps) == 3


def test_hypersparse_in_the_chain_equals_hypersparse_in_the_loss():
    params = {"w": jnp.array([[1.0, -2.0, 4.0]])}
    loss = lambda p: (p["w"] ** 2).sum()
    whole = lambda p: loss(p) + 0.3 * penalty(p, sparsity=1 / 3)
    tx = optax.chain(
        transforms.add_hypersparse(sparsity=1 / 3, coefficient=0.3), optax.sgd(0.1)
    )
    one, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    two, _ = optax.sgd(0.1).update(jax.grad(whole)(params), optax.sgd(0.1).init(params))
    np.testing.assert_allclose(one["w"], two["w"], rtol=1e-6)


def test_hypersparse_training_makes_the_others_small():
    # The data keep what they can; the pull ends with two weights out of six.
    target = jnp.array([[3.0, -2.0, 0.3, 0.2, -0.1, 0.05]])
    grow = functools.partial(
        transforms.hypersparse_coefficient, initial=1e-2, growth=1.1, begin=0, every=5
    )
    tx = optax.chain(
        transforms.add_hypersparse(sparsity=0.667, coefficient=grow), optax.sgd(0.05)
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": target}
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    small = jnp.abs(params["w"][0, 2:])
    assert (small < 0.06).all() and (jnp.abs(params["w"][0, :2]) > 1.5).all()


def test_hypersparse_refuses():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="at least one of 4 weights, got 1.0"):
        penalty(params, sparsity=1.0)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        penalty(params, sparsity=1.5)
    with pytest.raises(ValueError, match="leaf_filter must take at least one leaf"):
        penalty({"bias": jnp.ones(3)}, sparsity=0.5)


def test_mask_sparsity_presses_on_what_the_mask_removes_alone():
    # R = |-3| + |0.5|; its gradient is the sign there (0 of 0), 0 elsewhere.
    params = {
        "scale": jnp.array([2.0, -3.0, 0.5, 0.0], jnp.bfloat16),
        "kernel": jnp.array([[5.0]]),
    }
    masks = {
        "scale": jnp.array([True, False, False, False]),
        "kernel": optax.MaskedNode(),
    }
    value, gradient = jax.value_and_grad(transforms.mask_sparsity_penalty)(
        params, masks
    )
    assert value == 3.5 and value.dtype == jnp.float32
    assert gradient["scale"].tolist() == [0, -1, 1, 0]
    assert gradient["kernel"] == 0
    all_kept = {"kernel": jnp.array([[True]])}
    assert transforms.mask_sparsity_penalty(params, all_kept) == 0


def test_mask_sparsity_refuses():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="masks must be shaped like params.*'w'"):
        transforms.mask_sparsity_penalty(params, {"w": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="masks must follow the paths.*'v'"):
        transforms.mask_sparsity_penalty(params, {"v": jnp.ones((2, 2), bool)})
