"""Trees and permutations against recursion, brute force and hand-worked values."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.routing import (
    permutation_search,
    round_permutation,
    tree,
    tree_entropy,
)


def step(t):
    """COMET's: 0 to -1/2, 1 from 1/2, the cubic -2 t^3 + 3/2 t + 1/2 between."""
    return 0.0 if t <= -0.5 else 1.0 if t >= 0.5 else -2 * t**3 + 1.5 * t + 0.5


def leaves(z, gamma, node=0):
    """Probabilities of the leaves below a node, left to right; children 2n+1, 2n+2."""
    if node >= len(z):
        return [1.0]
    left = step(z[node] / gamma)
    return [
        share * p
        for share, child in ((left, 2 * node + 1), (1 - left, 2 * node + 2))
        for p in leaves(z, gamma, child)
    ]


def oracle(nodes, scores, gamma=1.0, permutation=None):
    t, k, e = scores.shape
    g = np.zeros((t, e))
    for token in range(t):
        for i, z in enumerate(nodes[token]):
            share = np.array(leaves(z, gamma)) * np.exp(scores[token, i])
            g[token] += share if permutation is None else share @ permutation[i]
    return g / g.sum(1, keepdims=True)


def draw(seed, t=4, k=2, e=5):
    rng = np.random.default_rng(seed)
    return 0.4 * rng.normal(size=(t, k, e - 1)), rng.normal(size=(t, k, e))


@pytest.mark.parametrize(
    "e", [5, *(pytest.param(e, marks=pytest.mark.slow) for e in (1, 2, 3, 8))]
)
def test_leaves_are_those_of_the_recursion(e):
    nodes, scores = draw(e, e=e)
    run = jax.jit(lambda n, s: tree(n, s, gamma=0.7))
    routing = run(jnp.float32(nodes), jnp.float32(scores))
    want = oracle(nodes, scores, 0.7)
    np.testing.assert_allclose(routing.probs, want, rtol=1e-5, atol=1e-7)
    # Exactly 0, not 1e-8, where a step is 0; and then not chosen.
    np.testing.assert_array_equal(routing.probs == 0, want == 0)
    np.testing.assert_array_equal(routing.demand, (want > 0).sum(0))
    np.testing.assert_allclose(routing.weights.sum(1), 1, rtol=1e-6)
    assert (np.diff(routing.weights, axis=1) <= 0).all()


@pytest.mark.slow
def test_gradients_are_the_slopes():
    nodes, scores = draw(3)
    q = np.random.default_rng(1).normal(size=(4, 5))
    loss = lambda n, s: jnp.sum(tree(n, s).probs * jnp.float32(q))
    got = jax.jit(jax.grad(loss, (0, 1)))(jnp.float32(nodes), jnp.float32(scores))
    for which, array in enumerate((nodes, scores)):
        for at in np.ndindex(*array.shape):
            ends = []
            for way in (1e-6, -1e-6):
                moved = [nodes.copy(), scores.copy()]
                moved[which][at] += way
                ends.append(np.sum(oracle(*moved) * q))
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(got[which][at], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_hard_trees_choose_one_leaf_each():
    """Once all steps are 0 or 1 a token has as many experts as trees, or fewer."""
    nodes, scores = draw(4, t=32)
    routing = tree(jnp.sign(jnp.float32(nodes)), jnp.float32(scores))
    assert int(routing.valid.sum(1).max()) == 2
    assert int(routing.valid.sum(1).min()) == 1  # both trees at the same expert
    bounded = tree(jnp.sign(jnp.float32(nodes)), jnp.float32(scores), max_k=1)
    np.testing.assert_allclose(bounded.weights, 1, rtol=1e-6)
    assert (bounded.demand == routing.counts()).all()


@pytest.mark.slow
def test_a_permutation_moves_the_leaves():
    nodes, scores = draw(5)
    p = np.stack([np.eye(5)[[2, 0, 4, 1, 3]], np.eye(5)[[1, 2, 3, 4, 0]]])
    routing = tree(jnp.float32(nodes), jnp.float32(scores), permutation=jnp.float32(p))
    want = oracle(nodes, scores, permutation=p)
    np.testing.assert_allclose(routing.probs, want, rtol=1e-5, atol=1e-7)
    # One for all trees; by hand, the only leaf 0 is expert 2.
    only = tree(
        jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 3)), permutation=jnp.eye(3)[None, ::-1]
    )
    assert only.probs.tolist() == [[0, 0, 1]]


@pytest.mark.slow
def test_entropy_by_hand():
    # The left child of the root is split again: leaves (1/4, 1/4, 1/2) and (0, 0, 1),
    # 1.5 log 2 and 0; padding is nothing.
    nodes = jnp.array([[[0.0, 0.0]], [[-1.0, 0.0]], [[jnp.nan, 0.0]]])
    mask = jnp.array([True, True, False])
    value, grad = jax.value_and_grad(lambda n: tree_entropy(n, mask=mask))(nodes)
    np.testing.assert_allclose(value, 1.5 * math.log(2) / 2, rtol=1e-6)
    assert jnp.isfinite(grad).all() and (grad[1:] == 0).all()


@pytest.mark.slow
def test_entropy_makes_trees_hard(key):
    nodes = 0.3 * jax.random.normal(key, (8, 2, 3))
    down = jax.jit(lambda n: n - 0.5 * jax.grad(tree_entropy)(n))
    before = tree_entropy(nodes)
    for _ in range(60):
        nodes = down(nodes)
    assert tree_entropy(nodes) < 0.1 * before


@pytest.mark.slow
def test_soft_permutations_become_hard(key):
    scores = jax.random.uniform(key, (2, 4, 4))
    soft = permutation_search(scores, 0.3, iterations=50, key=key)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(soft.sum(2), 1, atol=0.02)
    hard = permutation_search(scores, 1e-3, iterations=2000)
    np.testing.assert_allclose(hard, round_permutation(scores), atol=0.01)
    # By hand: sqrt(ad) : sqrt(bc) for exp of [[0, log 4], [0, 0]], so 1 : 2.
    table = jnp.array([[[0.0, math.log(4)], [0.0, 0.0]]])
    soft = permutation_search(table, 1.0, iterations=50)[0]
    np.testing.assert_allclose(soft, [[1 / 3, 2 / 3], [2 / 3, 1 / 3]], rtol=1e-5)


@pytest.mark.slow
def test_permutations_learn(key):
    """The reason for a search: a gradient exchanges two experts."""
    scores = jax.random.uniform(key, (1, 4, 4))
    wanted = jnp.eye(4)[None, jnp.array([2, 0, 3, 1])]

    @jax.jit
    def down(scores):
        loss = lambda s: jnp.sum((permutation_search(s, 0.1) - wanted) ** 2)
        return scores - 0.05 * jax.grad(loss)(scores)

    for _ in range(100):
        scores = down(scores)
    np.testing.assert_array_equal(round_permutation(scores), wanted)


def test_rounding_is_the_best_of_all():
    scores = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    got = np.asarray(jax.jit(round_permutation)(jnp.asarray(scores)))
    for square, permutation in zip(scores, got, strict=True):
        orders = itertools.permutations(range(4))
        best = max(orders, key=lambda o: sum(square[i, j] for i, j in enumerate(o)))  # noqa: B023
        np.testing.assert_array_equal(permutation, np.eye(4)[list(best)])


N, A = jnp.zeros((4, 2, 4)), jnp.zeros((4, 2, 5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tree(N, A[:, 0]), r"leaves: got shape \(4, 5\)"),
        (lambda: tree(N[:, :, 1:], A), r"nodes: got shape \(4, 2, 3\)"),
        (lambda: tree(N, A, gamma=0.0), "gamma: got 0.0"),
        (lambda: tree(N, A, max_k=6), "max_k: got 6"),
        (
            lambda: tree(N, A, permutation=jnp.eye(5)),
            r"permutation: got shape \(5, 5\)",
        ),
        (lambda: tree(N, A, mask=jnp.ones(2, bool)), r"mask: got bool \(2,\)"),
        (lambda: tree_entropy(N[0]), r"nodes: got shape \(2, 4\)"),
        (lambda: permutation_search(N, 1.0), r"scores: got shape \(4, 2, 4\)"),
        (lambda: permutation_search(jnp.zeros((1, 2, 2)), 0.0), "temperature: got 0.0"),
        (lambda: round_permutation(N), r"scores: got shape \(4, 2, 4\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
