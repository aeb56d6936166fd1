"""Losses, balance by bias, metrics: by hand, and against numpy in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import (
    Routing,
    entropy,
    expert_choice,
    importance_loss,
    load_balance_loss,
    load_loss,
    relu,
    routing_metrics,
    top_k,
    update_bias,
    z_loss,
)


def log(*rows):
    return jnp.log(jnp.array(rows, jnp.float32))


# --- load_balance_loss ----------------------------------------------------------------


@pytest.mark.parametrize(
    "k, score", [(1, "softmax"), (2, "softmax"), (2, "sigmoid"), (4, "softmax")]
)
def test_balance_is_1_for_every_k(k, score):
    """Peers' value there is 1 or k, by whether f is divided by k."""
    # Row i prefers i, i + 1, ...: every expert is asked k times, by equal scores.
    logits = jnp.stack([jnp.roll(log([8, 4, 2, 1])[0], i) for i in range(4)])
    loss = load_balance_loss(top_k(logits, k, score=score))
    np.testing.assert_allclose(loss, 1, rtol=1e-6)
    # All scores equal: P = 1/e, so 1 whomever they choose.
    loss = load_balance_loss(top_k(jnp.zeros((3, 4)), k, score=score))
    np.testing.assert_allclose(loss, 1, rtol=1e-6)


def test_balance_by_hand():
    # f = (3, 1, 0) / 4 of two choices each; P = mean of (.5, .25, .25), (.75, .25, 0).
    routing = Routing(
        indices=jnp.array([[0, 1], [0, 0]]),
        weights=jnp.ones((2, 2)),
        valid=jnp.ones((2, 2), bool),
        probs=jnp.array([[0.5, 0.25, 0.25], [3.0, 1.0, 0.0]]),  # as shares
    )
    want = 3 * (0.75 * 0.625 + 0.25 * 0.25)
    np.testing.assert_allclose(load_balance_loss(routing), want, rtol=1e-6)
    # Counts of a larger batch: f = (0, 0, 1), P_2 = 1/8.
    loss = load_balance_loss(routing, counts=jnp.array([0, 0, 7]))
    np.testing.assert_allclose(loss, 3 * 0.125, rtol=1e-6)


def test_balance_counts_what_was_turned_away():
    """f of served choices is even whatever the router does, under a tight capacity."""
    # Asked (3, 1, 0) times of 4; P = (2.375, 1.125, 0.5) / 4. Served (1, 1, 0).
    logits = log([6, 1, 1], [6, 1, 1], [6, 1, 1], [1, 6, 1])
    loss = load_balance_loss(top_k(logits, 1, capacity=1))
    np.testing.assert_allclose(loss, 3 * (3 * 2.375 + 1.125) / 16, rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -50.0, -200.0])
def test_sigmoids_cannot_shrink_below_an_epsilon(shift):
    """Scores divided by their sum + 1e-20 let a collapsed router have a loss of 0."""
    logits = jnp.tile(jnp.array([[4.0, 0.0, 0.0, 0.0]]), (8, 1)) + shift
    loss = load_balance_loss(top_k(logits, 1, score="sigmoid"))
    s = 1 / (1 + np.exp(-np.array([4.0, 0.0]) - shift))
    np.testing.assert_allclose(loss, 4 * s[0] / (s[0] + 3 * s[1]), rtol=1e-5)
    assert loss > 1


def test_balance_has_the_gradient_of_the_scores_alone():
    # L = e sum f P: dL/dz = e/t * s (f - sum f s), token by token; f is held.
    z = np.array([[1.0, 0.5, -0.5], [0.2, 0.9, -1.0], [2.0, 0.0, 0.3], [0.0, 0.0, 0.0]])
    mask = np.array([True, True, True, False])
    s = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    f = np.array([2, 1, 0]) / 3
    want = 3 / 3 * s * (f - (s @ f)[:, None]) * mask[:, None]
    loss = lambda z: load_balance_loss(top_k(z, 1, mask=jnp.asarray(mask)))
    grad = jax.grad(loss)(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_balance_over_devices_is_that_of_the_batch(key):
    """Micro-batches of one domain each need not be balanced, only their sum."""
    logits = jax.random.normal(key, (4, 6, 5)) + jnp.eye(4, 5)[:, None] * 4
    each = lambda z: load_balance_loss(top_k(z, 2), axis_name="batch")
    whole = lambda z: load_balance_loss(top_k(z.reshape(24, 5), 2))
    mean = lambda z: jnp.mean(jax.vmap(each, axis_name="batch")(z))
    got, want = (jax.jit(jax.value_and_grad(f))(logits) for f in (mean, whole))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-7)
    alone = jnp.mean(jax.vmap(lambda z: load_balance_loss(top_k(z, 2)))(logits))
    assert alone > 1.1 * want[0]


@pytest.mark.slow
def test_a_rematerialized_layer_counts_once(key):
    """Counts kept as a side effect are twice as many under a checkpoint."""
    logits = jax.random.normal(key, (8, 4))

    def loss(z):
        routing = top_k(z, 2)
        return load_balance_loss(routing) + z_loss(z), routing_metrics(routing)

    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    got = jax.jit(jax.value_and_grad(jax.checkpoint(loss), has_aux=True))(logits)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)
    assert got[0][1].load.sum() == 16


@pytest.mark.slow
def test_losses_of_nothing_are_0_and_have_no_nan():
    none = jnp.zeros(3, bool)
    for z, mask in ((jnp.full((3, 4), jnp.nan), none), (jnp.zeros((0, 4)), None)):
        for loss in (
            lambda z: load_balance_loss(top_k(z, 2, mask=mask)),  # noqa: B023
            lambda z: importance_loss(top_k(z, 2, mask=mask)),  # noqa: B023
            lambda z: entropy(top_k(z, 2, mask=mask)),  # noqa: B023
            lambda z: z_loss(z, mask),  # noqa: B023
            lambda z: load_loss(z, 2, jitter=0.5, key=jax.random.key(0), mask=mask),  # noqa: B023
        ):
            value, grad = jax.value_and_grad(loss)(z)
            assert value == 0 and (grad == 0).all()


# --- z_loss, importance, load, entropy ------------------------------------------------


def test_z_loss_by_hand():
    # Of sums 8, e^2 and padding: ((log 8)^2 + 2^2) / 2.
    logits = jnp.concatenate([log([1, 2, 5]), jnp.array([[-jnp.inf, 2, -jnp.inf]])])
    logits = jnp.concatenate([logits, jnp.full((1, 3), jnp.nan)])
    mask = jnp.array([True, True, False])
    np.testing.assert_allclose(
        z_loss(logits, mask), (math.log(8) ** 2 + 4) / 2, rtol=1e-6
    )
    # d/dz = 2 log(sum) softmax / t: of the first, log 8 (1, 2, 5) / 8.
    grad = jax.grad(z_loss)(logits, mask)
    want = math.log(8) * np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(grad[0], want, rtol=1e-6)
    assert (grad[2] == 0).all() and jnp.isfinite(grad).all()
    # In bfloat16, log(sum) of 1000 equal logits would be off by 2%.
    flat = z_loss(jnp.zeros((1, 1000), jnp.bfloat16))
    np.testing.assert_allclose(flat, math.log(1000) ** 2, rtol=1e-6)


@pytest.mark.slow
def test_importance_by_hand():
    # Sums of scores (1.25, .5, .25): mean 2/3, squares of what is off: 49, 4, 25 / 144.
    routing = top_k(log([4, 2, 2], [6, 2, 0]), 1)
    want = (49 + 4 + 25) / 144 / 3 / (4 / 9)
    np.testing.assert_allclose(importance_loss(routing), want, rtol=1e-5)
    grad = jax.grad(lambda z: importance_loss(top_k(z, 1)))(jnp.zeros((2, 3)))
    assert (grad == 0).all()  # not NaN, of a standard deviation of 0


@pytest.mark.slow
def test_load_is_the_chance_under_the_same_noise(key):
    z = np.array([[1.0, 0.2, -0.3, 0.1], [0.0, 0.4, 0.5, -1.0], [0.3, 0.3, 0.2, 0.9]])
    z, sigma = z.astype(np.float32).astype(np.float64), 0.5
    noisy = z + sigma * np.asarray(jax.random.normal(key, z.shape), np.float64)
    phi = np.vectorize(lambda a: 0.5 * (1 + math.erf(a / math.sqrt(2))))

    def oracle(z, noisy):
        bar = np.sort(noisy, 1)[:, -2:-1]
        load = phi((z - bar) / sigma).mean(0)
        return load.var() / load.mean() ** 2

    loss = partial(load_loss, k=2, jitter=sigma, key=key)
    value, grad = jax.value_and_grad(loss)(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(value, oracle(z, noisy), rtol=1e-5)
    for at in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[at] = 1e-5
        slope = (oracle(z + step, noisy + step) - oracle(z - step, noisy - step)) / 2e-5
        np.testing.assert_allclose(grad[at], slope, rtol=1e-3, atol=1e-6)
    # The noise is that of top_k.
    routing = top_k(jnp.asarray(z, jnp.float32), 2, jitter=sigma, key=key)
    np.testing.assert_array_equal(routing.indices, np.argsort(-noisy, 1)[:, :2])


@pytest.mark.slow
def test_entropy_by_hand():
    # log 2, 0 (of scores 0, 1), and padding.
    logits = jnp.array([[0.0, 0.0], [-jnp.inf, 0.0], [jnp.nan, 0.0]])
    mask = jnp.array([True, True, False])
    value, grad = jax.value_and_grad(lambda z: entropy(top_k(z, 1, mask=mask)))(logits)
    np.testing.assert_allclose(value, math.log(2) / 2, rtol=1e-6)
    assert jnp.isfinite(grad).all()


# --- update_bias ----------------------------------------------------------------------


def test_bias_by_hand():
    # Mean 2: signs (-, 0, +, +) of 0.1, less their mean 0.025.
    bias, counts = jnp.array([0.5, -0.5, 0.0, 0.0]), jnp.array([5, 2, 1, 0])
    want = np.array([0.4, -0.5, 0.1, 0.1]) - 0.025
    np.testing.assert_allclose(update_bias(bias, counts, rate=0.1), want, rtol=1e-5)
    # By (2 - c) / 2: (-1.5, 0, .5, 1), of mean 0.
    want = np.array([0.35, -0.5, 0.05, 0.1])
    moved = update_bias(bias, counts, rate=0.1, rule="proportional")
    np.testing.assert_allclose(moved, want, rtol=1e-5)


def test_bias_does_not_drift():
    """Signs do not sum to 0: without centring, 1000 steps add 1000 times their mean."""
    counts = jnp.array([[9, 1, 1, 1], [1, 9, 2, 2]])
    step = lambda b, i: (update_bias(b, counts[i % 2], rate=0.01), None)
    bias, _ = jax.lax.scan(step, jnp.zeros(4), jnp.arange(1000))
    np.testing.assert_allclose(bias.mean(), 0, atol=1e-5)


def test_bias_rests_at_balance():
    for count in (0, 7, 100_000_003, 2_000_000_000):
        for rule in ("sign", "proportional"):
            even = jnp.full(7, count, jnp.int32)
            assert (update_bias(jnp.zeros(7), even, rule=rule) == 0).all()
    assert update_bias(jnp.array([0.5, -0.5]), jnp.array([3, 3])).tolist() == [
        0.5,
        -0.5,
    ]


@pytest.mark.slow
def test_bias_balances_a_router(key):
    logits = 0.3 * jax.random.normal(key, (256, 4)) + jnp.array([1.0, 0.5, 0.0, -0.5])

    def step(bias, _):
        routing = top_k(logits, 1, score="sigmoid", bias=bias)
        return update_bias(bias, routing.demand, rate=0.01), routing.demand

    _, demand = jax.lax.scan(step, jnp.zeros(4), length=200)
    assert demand[0].max() > 200 and demand[-1].max() < 80


# --- Metrics --------------------------------------------------------------------------


def test_metrics_by_hand():
    logits = log([5, 3, 2], [6, 3, 1], [7, 1, 2], [1, 1, 1])
    mask = jnp.array([True, True, True, False])
    metrics = routing_metrics(top_k(logits, 1, capacity=2, mask=mask))
    assert metrics.load.tolist() == [2, 0, 0]
    p = np.array([[5, 3, 2], [6, 3, 1], [7, 1, 2]]) / 10
    want = {
        "dropped": 1 / 3,
        "unserved": 1 / 3,
        "usage": 1 / 3,
        "max_over_mean": 3,
        "load_entropy": 0,
        "entropy": -(p * np.log(p)).sum() / 3,
        "margin": (0.2 + 0.3) / 2,  # the third token has no expert
    }
    for name, value in want.items():
        np.testing.assert_allclose(
            getattr(metrics, name), value, rtol=1e-5, atol=1e-7, err_msg=name
        )


@pytest.mark.slow
def test_metrics_of_choices_by_expert():
    # Expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 1; nobody takes 3.
    logits = log([3, 1], [2, 2], [1, 3], [2.1, 2])
    metrics = routing_metrics(expert_choice(logits.at[3].add(-0.0), 2))
    assert metrics.load.tolist() == [2, 2] and metrics.dropped == 0
    np.testing.assert_allclose(metrics.load_entropy, math.log(2), rtol=1e-6)


@pytest.mark.slow
def test_metrics_of_nothing():
    metrics = routing_metrics(relu(-jnp.ones((3, 4))))
    assert metrics.load.tolist() == [0] * 4 and metrics.unserved == 1
    assert [float(m) for m in metrics[3:]] == [0] * 5 and metrics.dropped == 0


@pytest.mark.slow
def test_metrics_over_devices_are_those_of_the_batch(key):
    logits = jax.random.normal(key, (4, 6, 5))
    route = lambda z: top_k(z, 2)
    each = lambda z: routing_metrics(route(z), axis_name="batch")
    got = jax.jit(jax.vmap(each, axis_name="batch"))(logits)
    want = jax.jit(lambda z: routing_metrics(route(z.reshape(24, 5))))(logits)
    same = lambda a, b: np.testing.assert_allclose(a, np.stack([b] * 4), rtol=1e-5)
    jax.tree.map(same, got, want)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: load_balance_loss(r, counts=jnp.ones(3)), r"counts.*\(3,\)"),
        (lambda r: update_bias(jnp.zeros(4), jnp.ones(3)), r"counts.*\(3,\)"),
        (lambda r: update_bias(jnp.zeros(4), jnp.ones(4), rule="x"), "rule.*'x'"),
        (lambda r: z_loss(jnp.zeros(4)), r"logits.*\(4,\)"),
        (lambda r: z_loss(jnp.zeros((2, 4)), jnp.ones(2)), "mask.*float32"),
        (lambda r: load_loss(r.probs, 5, jitter=1.0, key=jax.random.key(0)), "k.* 5"),
        (lambda r: load_loss(r.probs, 1, jitter=0.0, key=jax.random.key(0)), "jitter"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(top_k(jnp.zeros((2, 4)), 1))
