"""BlockFFN's losses and metric against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import (
    activation_locality_loss,
    chunk_sparsity,
    chunk_sparsity_loss,
    expert_choice,
    relu,
    token_sparsity_loss,
)

T, E, CHUNK = 7, 4, 3
MASK = np.array([True, True, False, True, True, True, False])


def shares(z):
    a = np.maximum(z, 0)
    total = a.sum(1, keepdims=True)
    return a / np.where(total > 0, total, 1) * MASK[:, None]


def token_loss(z):
    found = []
    for p in shares(z)[MASK]:
        found.append(p.sum() / np.sqrt(E * (p**2).sum()) if p.any() else 0)
    return np.mean(found)


def chunk_loss(z):
    p, found = shares(z), []
    for i in range(0, T, CHUNK):
        if MASK[i : i + CHUNK].any():
            found.append(np.mean(1 - np.prod(1 - p[i : i + CHUNK], axis=0)))
    return np.mean(found)


def locality_loss(z, steepness=3.0):
    q, found = 1 / (1 + np.exp(-steepness * z)), []
    for t in range(1, T):
        if MASK[t] and MASK[t - 1]:
            here, before = q[t], q[t - 1]
            found.append(
                -np.mean(here * np.log(before) + (1 - here) * np.log(1 - before))
            )
    return np.mean(found)


def draw():
    z = np.random.default_rng(0).normal(size=(T, E))
    z[4] = -np.abs(z[4])  # a token without an expert
    z[5] = [2.0, -1, -1, -1]  # of whose one expert the probability is 1
    return z


routed = lambda z: relu(z, mask=jnp.asarray(MASK))
LOSSES = {
    "token": (token_loss, lambda z: token_sparsity_loss(routed(z))),
    "chunk": (chunk_loss, lambda z: chunk_sparsity_loss(routed(z), chunk=CHUNK)),
    "locality": (
        locality_loss,
        lambda z: activation_locality_loss(z, steepness=3.0, mask=jnp.asarray(MASK)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_loop(name):
    oracle, loss = LOSSES[name]
    z = draw()
    low = jnp.float32(z).at[2].set(jnp.nan)  # padding
    value, grad = jax.jit(jax.value_and_grad(loss))(low)
    np.testing.assert_allclose(value, oracle(z), rtol=1e-5)
    for at in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[at] += 1e-6
        down[at] -= 1e-6
        slope = (oracle(up) - oracle(down)) / 2e-6
        np.testing.assert_allclose(grad[at], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shrinking_all_logits_does_not_help():
    """An L1 norm of the scores falls with their scale, with no expert fewer."""
    z = jnp.float32(draw())
    for loss in (LOSSES["token"][1], LOSSES["chunk"][1]):
        np.testing.assert_allclose(loss(z * 1e-3), loss(z), rtol=1e-5)


@pytest.mark.slow
def test_losses_make_routing_sparse(key):
    z = 1.0 + jax.random.normal(key, (12, 8))
    loss = lambda z: (
        token_sparsity_loss(relu(z)) + chunk_sparsity_loss(relu(z), chunk=4)
    )
    down = jax.jit(lambda z: z - 2 * jax.grad(loss)(z))
    before = chunk_sparsity(relu(z))
    for _ in range(100):
        z = down(z)
    assert chunk_sparsity(relu(z)) > before + 0.25


@pytest.mark.slow
def test_sparsity_by_hand():
    # Experts {0, 1}, {1} | {}, padding | {3}: unions of 2, 0 and 1 of 4.
    z = jnp.array([[1, 1, -1, -1], [-1, 1, -1, -1], [-1] * 4, [1] * 4, [0, 0, 0, 1]])
    mask = jnp.array([True, True, True, False, True])
    routing = relu(z.astype(jnp.float32), mask=mask)
    np.testing.assert_allclose(chunk_sparsity(routing, chunk=2), (2 + 4 + 3) / 12)
    np.testing.assert_allclose(chunk_sparsity(routing), (2 + 3 + 4 + 3) / 16)


@pytest.mark.slow
def test_segments_are_not_neighbours():
    z = jnp.array([[1.0], [1.0], [-1.0], [-1.0]])
    apart = activation_locality_loss(z, segments=jnp.array([0, 0, 1, 1]))
    assert apart < 1e-6 < 30 < activation_locality_loss(z)
    assert activation_locality_loss(z[:1]) == activation_locality_loss(z[:0]) == 0


@pytest.mark.slow
def test_of_nothing_they_are_0():
    routing = relu(jnp.zeros((0, 4)))
    assert token_sparsity_loss(routing) == chunk_sparsity_loss(routing, chunk=2) == 0
    assert chunk_sparsity(routing) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: chunk_sparsity_loss(r, chunk=0), "chunk: got 0"),
        (lambda r: chunk_sparsity(expert_choice(r.probs, 1)), "routing: got one by"),
        (
            lambda r: activation_locality_loss(r.probs, segments=jnp.zeros(2, int)),
            r"segments: got shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(relu(jnp.ones((3, 4))))
