"""Soft MoE against its equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import apply_soft, soft, soft_logits, soft_mlp
from sparsejax.testing import assert_close

T, D, E, P, F = 6, 3, 2, 2, 4
MASK = np.array([True, True, False, True, True, False])


def oracle(x, slots, scale, w_in, w_out, w_gate=None, mask=MASK):
    """Slot by slot: an average of tokens, its expert, shares of the output."""
    z = np.zeros((T, E, P))
    for t in range(T):
        for at in np.ndindex(E, P):
            lengths = np.linalg.norm(x[t]) * np.linalg.norm(slots[:, *at])
            z[t, *at] = scale * (x[t] @ slots[:, *at]) / lengths if lengths else 0
    p = np.exp(z) * mask[:, None, None]
    dispatch = p / p.sum(0)
    combine = p / np.maximum(p.sum((1, 2), keepdims=True), 1e-300)
    y = np.zeros_like(x)
    for e, slot in np.ndindex(E, P):
        mixed = dispatch[:, e, slot] @ x
        h = mixed @ w_in[e]
        if w_gate is None:
            h = h / (1 + np.exp(-h))
        else:
            g = mixed @ w_gate[e]
            h = g / (1 + np.exp(-g)) * h
        y += combine[:, e, slot, None] * (h @ w_out[e])
    return y


def draw(gated):
    rng = np.random.default_rng(gated)
    shapes = {"x": (T, D), "slots": (D, E, P), "w_in": (E, D, F), "w_out": (E, F, D)}
    if gated:
        shapes["w_gate"] = (E, D, F)
    arrays = {n: rng.normal(size=shape) for n, shape in shapes.items()}
    arrays["x"][3] = 0  # a token of zeros is a token
    arrays = {n: np.asarray(a, jnp.bfloat16).astype(float) for n, a in arrays.items()}
    return arrays, rng.normal(size=(T, D))


def layer(x, slots, w_in, w_out, w_gate=None):
    mask = jnp.asarray(MASK)
    routing = soft(soft_logits(x, slots, 2.0, mask=mask), mask=mask)
    return soft_mlp(x, routing, w_in, w_out, w_gate=w_gate)


@jax.jit
def run(arrays, g):
    y, pull = jax.vjp(lambda a: layer(**a), arrays)
    return y, pull(g.astype(y.dtype))[0]


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_value_and_gradients_are_those_of_the_loop(gated):
    arrays, g = draw(gated)
    want = oracle(scale=2.0, **arrays)
    low = {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()}
    low["x"] = low["x"].at[2].set(jnp.nan)  # padding may be anything
    y, grads = run(low, jnp.float32(g))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert (y[2] == 0).all() and (grads["x"][jnp.array([2, 5])] == 0).all()
    for name, array in arrays.items():
        for at in np.ndindex(*array.shape):
            if name == "x" and at[0] in (2, 3):
                continue  # padding, and the zero vector, where the cosine has no slope
            ends = []
            for way in (1e-6, -1e-6):
                moved = array.copy()
                moved[at] += way
                ends.append(np.sum(oracle(scale=2.0, **{**arrays, name: moved}) * g))
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(grads[name][at], slope, rtol=1e-3, atol=2e-5)
    assert jnp.isfinite(grads["x"]).all()


@pytest.mark.slow
def test_bfloat16_is_routed_in_float32():
    arrays, g = draw(True)
    low = {n: jnp.asarray(a, jnp.bfloat16) for n, a in arrays.items()}
    y, grads = run(low, jnp.bfloat16(g))
    assert y.dtype == grads["x"].dtype == jnp.bfloat16
    # Plainly, all in bfloat16.
    unit = lambda a, axis: (
        a
        / jnp.maximum(jnp.linalg.norm(a, axis=axis, keepdims=True), jnp.bfloat16(1e-6))
    )
    z = 2 * jnp.einsum("td,dep->tep", unit(low["x"], 1), unit(low["slots"], 0))
    z = jnp.where(MASK[:, None, None], z, -jnp.inf)
    dispatch = jax.nn.softmax(z, 0)
    combine = jnp.where(MASK[:, None, None], jax.nn.softmax(z, (1, 2)), 0)
    mixed = jnp.einsum("tep,td->epd", dispatch, low["x"])
    product = lambda w: jnp.einsum("epd,edf->epf", mixed, w)
    h = jax.nn.silu(product(low["w_gate"])) * product(low["w_in"])
    plain = jnp.einsum(
        "tep,epd->td", combine, jnp.einsum("epf,efd->epd", h, low["w_out"])
    )
    assert_close(y, oracle(scale=2.0, **arrays), plain)


def test_shares_by_hand():
    # exp: 1 and 3 over two tokens, 1 and 3 over two slots of one token.
    logits = jnp.log(jnp.array([[[1.0, 3.0]], [[3.0, 1.0]], [[9.0, 9.0]]]))
    routing = soft(logits, mask=jnp.array([True, True, False]))
    want = [[[0.25, 0.75]], [[0.75, 0.25]], [[0, 0]]]
    np.testing.assert_allclose(routing.dispatch, want, rtol=1e-6)
    np.testing.assert_allclose(routing.combine, want, rtol=1e-6)


@pytest.mark.slow
def test_padding_alone_is_zeros():
    logits = jnp.full((3, 2, 2), jnp.nan)
    mask = jnp.zeros(3, bool)

    def loss(logits):
        return jnp.sum(apply_soft(jnp.ones((3, 4)), soft(logits, mask=mask), jnp.sin))

    value, grad = jax.value_and_grad(loss)(logits)
    assert value == 0 and (grad == 0).all()


@pytest.mark.slow
def test_cosines_of_tiny_and_huge_vectors():
    """A square of 1e-30 is 0 in float32, of 1e30 infinite."""
    x = jnp.array([[3e-30, 4e-30], [3e30, 4e30]])
    slots = jnp.array([[[1e-30]], [[0.0]]])
    np.testing.assert_allclose(soft_logits(x, slots)[:, 0, 0], [0.6, 0.6], rtol=1e-6)


Z = jnp.zeros((4, 2, 3))
X, W = jnp.ones((4, 8)), jnp.ones((2, 8, 16))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: soft(Z[0]), r"logits: got shape \(2, 3\)"),
        (lambda: soft(Z, mask=jnp.ones(3, bool)), r"mask: got bool \(3,\)"),
        (lambda: soft_logits(X, jnp.ones((7, 2, 3))), r"slots: got \(7, 2, 3\)"),
        (
            lambda: soft_logits(X, jnp.ones((8, 2, 3)), mask=jnp.ones(3, bool)),
            r"mask: got bool \(3,\)",
        ),
        (lambda: apply_soft(X[:3], soft(Z), jnp.sin), r"x: got shape \(3, 8\)"),
        (lambda: apply_soft(X, soft(Z), lambda s: s[0]), r"expert_fn: made \(3, 8\)"),
        (lambda: soft_mlp(X, soft(Z), W[:, :7], W.mT), r"w_in: got \(2, 7, 16\)"),
        (lambda: soft_mlp(X, soft(Z), W, W), r"w_out: got \(2, 8, 16\)"),
        (lambda: soft_mlp(X, soft(Z), W, W.mT, w_gate=W.mT), r"w_gate: got"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
