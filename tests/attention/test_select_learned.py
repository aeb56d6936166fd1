"""Selectors with parameters of their own: SeerAttention, Routing Transformer."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

T, SHAPE = 21, (4, 3)
CAUSAL = np.tril(np.ones((T, T), bool))


def gate_of(seed=0):
    return at.seer_init(
        jax.random.key(seed), heads=4, kv_heads=2, head_dim=8, gate_dim=6
    )


def seer_rule(query, key, gate, base=10_000.0):
    """[b, h, nq, nk]: rope(W mean q) . rope(W [max; min; mean] k) / sqrt(6)."""

    def rope(x, size):
        out = np.empty_like(x)
        for n, c in np.ndindex(x.shape[2], 3):
            angle = n * size / base ** (c / 3)
            pair = x[:, :, n, c] + 1j * x[:, :, n, c + 3]
            pair = pair * np.exp(1j * angle)
            out[:, :, n, c], out[:, :, n, c + 3] = pair.real, pair.imag
        return out

    pooled = [oracle.pool(key, SHAPE[1], how) for how in (np.max, np.min, np.mean)]
    wide = lambda w: np.asarray(w, np.float64)[None]
    q = oracle.pool(query, SHAPE[0]) @ wide(gate.query)
    k = np.concatenate(pooled, axis=-1) @ wide(gate.key)
    q, k = rope(q, SHAPE[0]), oracle.repeat(rope(k, SHAPE[1]), 4)
    return q @ k.swapaxes(-1, -2) / 6**0.5


def test_seer_equals_the_rule():
    query, key = oracle.heads(1, b=2)
    gate = gate_of()
    scores = seer_rule(query, key, gate)
    logits, (mask, stats) = jax.jit(
        lambda q, k: (
            at.seer_logits(q, k, gate, block_shape=SHAPE),
            at.seer(q, k, gate, block_shape=SHAPE, budget=at.Threshold(0.25)),
        )
    )(query, key)
    np.testing.assert_allclose(logits, scores, rtol=1e-5, atol=1e-5)
    allowed = np.array(
        [[3 * j <= min(T, 4 * i + 4) - 1 for j in range(7)] for i in range(6)]
    )
    blocks = oracle.softmax(np.where(allowed, scores, -np.inf)) > 0.25
    for i in range(6):
        blocks[:, :, i, oracle.own(i, T, SHAPE)] = True
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    wanted = CAUSAL & oracle.spread(blocks, T, T, SHAPE)
    np.testing.assert_allclose(
        stats.recall, oracle.recall(query, key, CAUSAL, wanted), rtol=1e-5
    )


@pytest.mark.slow
def test_seer_loss_is_a_divergence_that_training_lowers():
    query, key = oracle.heads(2, b=1)
    expr, sizes = at.causal(), dict(shape=(T, T), block_shape=SHAPE)
    target = at.attention_block_probabilities(query, key, block_shape=SHAPE, expr=expr)

    @jax.jit
    def value_and_grad(gate):
        def loss(gate):
            logits = at.seer_logits(query, key, gate, block_shape=SHAPE)
            return at.seer_loss(logits, target, expr=expr, **sizes)

        return jax.value_and_grad(loss)(gate)

    gate = gate_of()
    first, _ = value_and_grad(gate)
    # KL in float64, on the normalised target.
    p = np.asarray(target, np.float64)
    p /= p.sum(-1, keepdims=True)
    q = oracle.softmax(np.where(p > 0, seer_rule(query, key, gate), -np.inf))
    want = np.where(p > 0, p * np.log(np.where(p > 0, p / np.where(q > 0, q, 1), 1)), 0)
    np.testing.assert_allclose(first, want.sum(-1).mean(), rtol=1e-5)
    for _ in range(100):
        last, grads = value_and_grad(gate)
        gate = jax.tree.map(lambda w, g: w - 0.5 * g, gate, grads)
    assert 0 < last < 0.5 * first


def test_seer_wants_a_gate_that_fits():
    query, key = oracle.heads(3, b=1, h=2)
    with pytest.raises(ValueError, match="gate: got"):
        at.seer(query, key, gate_of(), block_shape=SHAPE, budget=2)


def clusters_rule(x, centroids, window):
    """bool [b, h, c, n]: of each centroid the most similar, by cosine."""
    x = np.moveaxis(np.asarray(x, np.float64), 1, 2)
    x = oracle.repeat(x / np.linalg.norm(x, axis=-1, keepdims=True), len(centroids))
    scores = np.asarray(centroids, np.float64) @ x.swapaxes(-1, -2)
    member = np.zeros(scores.shape, bool)
    for b, h, c in np.ndindex(scores.shape[:3]):
        member[b, h, c, oracle.best(scores[b, h, c], window)] = True
    return member


def centroids_of(seed, c=3):
    means = np.random.default_rng(seed).standard_normal((4, c, 8))
    return jnp.float32(means / np.linalg.norm(means, axis=-1, keepdims=True))


def test_routing_equals_the_rule():
    query, key = oracle.heads(4, b=2)
    centroids = centroids_of(5)
    (mask, stats), found = jax.jit(
        lambda q, k, c: (
            at.routing(q, k, c, block_shape=SHAPE, window=5),
            at.balanced_clusters(q, k, c, window=5),
        )
    )(query, key, centroids)
    of_q = clusters_rule(query, centroids, 5)
    of_k = clusters_rule(key, centroids, 5)
    np.testing.assert_array_equal(of_q.sum(-1), 5)
    shared = np.einsum("bhci,bhcj->bhij", of_q, of_k) & CAUSAL
    np.testing.assert_array_equal(mask.to_mask(), shared)
    for rule, index in ((of_q, found.queries), (of_k, found.keys)):
        wanted = [np.flatnonzero(line) for line in rule.reshape(-1, T)]
        np.testing.assert_array_equal(np.reshape(index, (-1, 5)), wanted)
    probs = oracle.probabilities(query, key, CAUSAL)
    truth = (probs * shared).sum(-1).mean(-1)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_routing_leaves_out_blocks_that_share_nothing():
    """Tokens of two kinds, one after the other: half of the blocks."""
    x = jnp.zeros((1, 16, 1, 2)).at[:, :8, :, 0].set(1.0).at[:, 8:, :, 1].set(1.0)
    mask, stats = oracle.run(
        at.routing, x, x, jnp.eye(2)[None], block_shape=(4, 4), expr=at.everything()
    )
    np.testing.assert_array_equal(
        mask.to_blocks()[0, 0], np.kron(np.eye(2), np.ones((2, 2)))
    )
    np.testing.assert_allclose([stats.density, stats.work], 0.5)


def test_centroids_run_after_their_members():
    query, key = oracle.heads(6, b=2)
    start = centroids_of(7, c=5)
    new = jax.jit(at.update_centroids)(start, query, key, decay=0.9)
    rows = []
    for x in (query, key):
        x = np.moveaxis(np.asarray(x, np.float64), 1, 2)
        rows.append(oracle.repeat(x / np.linalg.norm(x, axis=-1, keepdims=True), 4))
    rows = np.moveaxis(np.concatenate(rows, axis=2), 1, 0).reshape(4, -1, 8)
    for h in range(4):
        nearest = (rows[h] @ np.float64(start[h]).T).argmax(-1)
        for c in range(5):
            total = rows[h][nearest == c].sum(0)
            length = np.linalg.norm(total)
            want = np.float64(start[h, c])
            if length:
                want = 0.9 * want + 0.1 * total / length
            np.testing.assert_allclose(new[h, c], want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "centroids, window, match",
    [
        (jnp.zeros((3, 2, 8)), 4, "centroids"),
        (jnp.zeros((4, 2, 8)), 22, "window"),
        (jnp.zeros((4, 2, 8)), 0, "window"),
    ],
)
def test_routing_arguments_that_are_refused(centroids, window, match):
    query, key = oracle.heads(8, b=1)
    with pytest.raises(ValueError, match=match):
        at.routing(query, key, centroids, block_shape=SHAPE, window=window)


def test_sparsifiner_equals_the_rule():
    """Blocks of one: each query's keys by softmax(Q (Wd K)^T) Wu."""
    query, key = oracle.heads(9, b=1)
    found = at.sparsifiner_init(jax.random.key(0), length=T, rank=4)
    mask, stats = oracle.run(
        at.sparsifiner,
        query,
        key,
        found,
        block_shape=(1, 1),
        budget=4,
        expr=at.everything(),
    )
    few = np.einsum("rs,bsgd->brgd", np.float64(found.down), np.float64(key))
    scores = oracle.softmax(oracle.logits(query, few)) @ np.float64(found.up)
    kept = np.zeros((1, 4, T, T), bool)
    for h, i in np.ndindex(4, T):
        line = np.where(np.arange(T) == i, np.inf, scores[0, h, i])
        kept[0, h, i, oracle.best(line, 4)] = True
    np.testing.assert_array_equal(mask.to_mask(), kept)
    truth = oracle.recall(query, key, np.ones((T, T), bool), kept)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)
    with pytest.raises(ValueError, match="connectivity"):
        at.sparsifiner(query, key[:, 1:], found, budget=2)


@pytest.mark.slow
def test_sparsifiner_learns_from_the_target():
    """Its logits of blocks have a gradient, panels and short blocks included."""
    query, key = oracle.heads(10, b=1)
    found = at.sparsifiner_init(jax.random.key(1), length=T, rank=4)
    few = np.einsum("rs,bsgd->brgd", np.float64(found.down), np.float64(key))
    full = oracle.softmax(oracle.logits(query, few)) @ np.float64(found.up)

    @jax.jit
    def run(found):
        logits = lambda w: at.sparsifiner_logits(query, key, w, block_shape=SHAPE)
        return logits(found), jax.grad(lambda w: logits(w).sum())(found)

    out, grads = run(found)
    for i, j in np.ndindex(6, 7):
        top = full[:, :, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].max((-2, -1))
        np.testing.assert_allclose(out[:, :, i, j], top, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)
