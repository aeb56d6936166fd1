"""Training begins with factors and goes on dense, its optimizer's state with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import structured as st
from sparsejax.upcycling import reverse_sparsify
from sparsejax.upcycling._reverse_sparsify import _squares

UP = st.monarch(10, 12, blocks=2, rank=2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def structured_model():
    factors = [normal(i, *p.factor_shape) / 2 for i, p in enumerate(UP.patterns)]
    return {
        "up": {"factor_0": factors[0], "factor_1": factors[1], "bias": normal(2, 12)},
        "down": {"down": normal(3, 12, 2), "up": normal(4, 2, 5), "bias": normal(5, 5)},
        "scale": normal(6, 5),
    }


def dense_model():
    kernel = lambda *s: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[-1])}
    return {"up": kernel(10, 12), "down": kernel(12, 5), "scale": jnp.zeros(5)}


def apply(params, x):
    up, down = params["up"], params["down"]
    w = (
        up["kernel"]
        if "kernel" in up
        else st.to_dense([up["factor_0"], up["factor_1"]], 10, 12)
    )
    v = down["kernel"] if "kernel" in down else down["down"] @ down["up"]
    h = jax.nn.relu(x @ w + up["bias"])
    return (h @ v + down["bias"]) * params["scale"]


X, Y = normal(7, 64, 10), normal(8, 64, 5)


def train(optimizer, params, state, steps):
    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((apply(p, X) - Y) ** 2)
        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return params, state, values


def test_training_goes_on_dense_where_it_was():
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(1e-2))
        params = structured_model()
        params, state, before = train(optimizer, params, optimizer.init(params), 20)
        made = jax.jit(
            lambda p, s: reverse_sparsify(
                p, s, target=dense_model(), optimizer=optimizer
            )
        )(params, state)
        expected = optimizer.init(dense_model())
    np.testing.assert_allclose(apply(made.params, X), apply(params, X), atol=1e-5)
    assert jax.tree.structure(made.opt_state) == jax.tree.structure(expected)
    old, new = state[1][0], made.opt_state[1][0]
    assert new.count == old.count == 20
    for field in ("mu", "nu"):
        for at in (("up", "bias"), ("down", "bias"), ("scale",)):
            was, now = getattr(old, field), getattr(new, field)
            for key in at:
                was, now = was[key], now[key]
            np.testing.assert_array_equal(now, was)
    for layer in ("up", "down"):
        assert not new.mu[layer]["kernel"].any() and (new.nu[layer]["kernel"] > 0).all()

    dense, _, after = train(optimizer, made.params, made.opt_state, 20)
    np.testing.assert_allclose(
        after[0], train(optimizer, params, state, 1)[2][0], rtol=1e-5
    )
    assert after[-1] < after[0] < before[0] and after[-1] < before[-1]
    # Late in a run a step of moments of zeros is three times too long.
    moves = []
    for nu in (new.nu, jax.tree.map(jnp.zeros_like, new.nu)):
        late = new._replace(nu=nu, count=jnp.full_like(new.count, 100_000))
        late = made.opt_state[0], (late, *made.opt_state[1][1:])
        moved, _, _ = train(optimizer, made.params, late, 1)
        moved = moved["up"]["kernel"] - made.params["up"]["kernel"]
        moves.append(np.median(np.abs(moved)))
    assert moves[0] < 1e-2 < 3e-2 < moves[1]


def matrix(factors):
    """The chain's matrix in numpy."""
    a, d, c, _ = factors[0].shape
    y = np.eye(a * c * d)
    for f in factors:
        a, d, c, b = f.shape
        y = np.einsum("xijk,ikjo->xiok", y.reshape(-1, a, c, d), f)
        y = y.reshape(len(y), -1)
    return y


@pytest.mark.parametrize(
    "chain", [UP, st.tensor_train((2, 2, 2), (2, 2, 3), 2), st.monarch(7, 5, blocks=3)]
)
def test_mean_squares_by_the_jacobian(chain):
    """Entry by entry of the factors, from all derivatives of the matrix."""
    k, n = chain.shape
    draw = np.random.default_rng(0).standard_normal
    factors = [draw(p.factor_shape) for p in chain.patterns]
    squares = [draw(f.shape) ** 2 for f in factors]
    put, weight, alike = np.zeros((k, n)), np.zeros((k, n)), []
    for t, factor in enumerate(factors):
        alike.append(np.zeros(factor.shape))
        for e in np.ndindex(factor.shape):
            one = np.zeros(factor.shape)  # the matrix is linear in each factor
            one[e] = 1
            j = matrix([*factors[:t], one, *factors[t + 1 :]])[:k, :n] ** 2
            alike[t][e] = 0.25 * j.sum()
            if j.any():
                put += j * (squares[t][e] / j.sum())
                weight += j
    ours = jax.jit(lambda f, s: _squares(f, s, k, n))
    single = lambda arrays: [jnp.asarray(x, jnp.float32) for x in arrays]
    got = ours(single(factors), single(squares))
    np.testing.assert_allclose(got, put / weight, rtol=1e-4)
    # What all entries of the matrix have alike is found again.
    got = ours(single(factors), single(alike))
    np.testing.assert_allclose(got, 0.25, rtol=1e-4)


@pytest.mark.slow
def test_outside_of_blocks_is_the_mean():
    """Blocks of means 1 and 3 along the diagonal: 2 beside them."""
    factor = jnp.ones((2, 1, 2, 2))
    squares = jnp.stack([factor[0], 3 * factor[1]])
    want = [[1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_allclose(_squares([factor], [squares], 4, 4), want, rtol=1e-6)


def test_stacked_layers_and_low_precision():
    factors = {
        f"factor_{i}": normal(i, 3, *p.factor_shape).astype(jnp.bfloat16)
        for i, p in enumerate(UP.patterns)
    }
    target = {"kernel": jax.ShapeDtypeStruct((3, 10, 12), jnp.bfloat16)}
    adam = optax.adam(1e-3)
    state = adam.init(factors)
    state = (state[0]._replace(nu=jax.tree.map(jnp.ones_like, factors)), *state[1:])
    made = jax.jit(lambda p, s: reverse_sparsify(p, s, target=target, optimizer=adam))
    params, state = made(factors, state)
    kernel, nu = params["kernel"], state[0].nu["kernel"]
    assert kernel.dtype == nu.dtype == jnp.bfloat16
    for layer in range(3):
        one = [np.asarray(f[layer], np.float64) for f in factors.values()]
        got = np.asarray(kernel[layer], np.float64)
        np.testing.assert_allclose(got, matrix(one), rtol=8e-3, atol=1e-6)
    assert (nu > 0).all() and nu[0, 0, 0] != nu[1, 0, 0]


def test_what_does_not_fit_is_refused():
    params, target = structured_model(), dense_model()
    with pytest.raises(ValueError, match="scale.* without a place"):
        reverse_sparsify(params, target={k: target[k] for k in ("up", "down")})
    with pytest.raises(ValueError, match="target: got more/bias, more/kernel without"):
        reverse_sparsify(params, target={**target, "more": target["up"]})
    wide = {"kernel": jnp.zeros((10, 13)), "bias": jnp.zeros(12)}
    with pytest.raises(ValueError, match="out_size: got 13"):
        reverse_sparsify(params, target={**target, "up": wide})
    with pytest.raises(ValueError, match="optimizer: got None"):
        reverse_sparsify(params, optax.adam(1.0).init(params), target=target)
