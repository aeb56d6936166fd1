"""Selection and attention in one jit: values, and what gradients there are."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at
from sparsejax import ops

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

T = 21
CAUSAL = np.tril(np.ones((T, T), bool))


def value_of(seed, s=T, g=2, dv=5):
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.standard_normal((1, s, g, dv)))


def attend(query, key, value, mask):
    """Dense, [b, t, h, dv] in float64; zeros in rows without keys."""
    probs = oracle.probabilities(query, key, mask)
    v = oracle.repeat(np.moveaxis(np.asarray(value, np.float64), 1, 2), probs.shape[1])
    return np.moveaxis(probs @ v, 1, 2)


SELECTORS = {
    "pooled": lambda q, k: at.pooled_blocks(q, k, block_shape=(4, 3), budget=2),
    "moba": lambda q, k: at.moba(q, k, block_shape=(4, 3), budget=2),
    "quest": lambda q, k: at.quest(q, k, block_shape=(4, 3), budget=3),
}


@pytest.mark.parametrize(
    "name",
    ["moba", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pooled", "quest"))],
)
def test_masks_made_inside_jit(name):
    """No mask object of a peer could be: splash refuses a traced mask in its maker."""
    query, key = oracle.heads(1, b=1)
    value = value_of(2)

    @jax.jit
    def both(q, k, v):
        mask, _ = SELECTORS[name](q, k)
        return ops.block_sparse_attention(q, k, v, mask), mask.to_mask()

    out, mask = both(query, key, value)
    want = attend(query, key, value, oracle.repeat(np.asarray(mask), 4))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_block_that_all_queries_choose():
    """Six entries by key block, two by query block: gradients miss none of them.

    SeerAttention's, SpargeAttn's and MInference's kernels have no gradient at all.
    """
    query, key = oracle.heads(12, b=1, t=24, s=24, h=2, g=1)
    query, key = query.at[..., 0].set(3.0), key.at[:, :4, :, 0].set(9.0)
    value, weights = value_of(13, s=24, g=1), value_of(14, s=24, g=2)

    @jax.jit
    def run(q, k, v):
        mask = at.pooled_blocks(q, k, block_shape=(4, 4), budget=2)[0]
        loss = lambda v: (ops.block_sparse_attention(q, k, v, mask) * weights).sum()
        return mask, jax.grad(loss)(v)

    mask, grad = run(query, key, value)
    assert mask.capacity == 2 and (mask.to_blocks()[..., 0].sum(-1) == 6).all()
    probs = oracle.probabilities(query, key, np.asarray(mask.to_mask()))
    want = np.einsum("bhij,bihv->bjv", probs, np.float64(weights))
    np.testing.assert_allclose(grad[:, :, 0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_straight_through_reaches_the_scores():
    """The gradient of a kept block's score is that of its logits' common shift."""
    query, key = oracle.heads(3, b=1, t=8, s=8, h=2, g=2)
    value = value_of(4, s=8)
    mask = oracle.lists(at.pooled_blocks, query, key, block_shape=(4, 4), budget=2)
    dense = np.asarray(mask.to_mask())

    @jax.jit
    def grad(q, k):
        def loss(scores):
            bias = at.straight_through(scores, mask)
            out = ops.block_sparse_attention(q, k, value, mask, block_bias=bias)
            return (out**2).sum()

        scores = at.pooled_scores(q, k, block_shape=(4, 4))
        return jax.value_and_grad(loss)(scores)

    loss, found = grad(query, key)

    def truth(shift):
        x = oracle.logits(query, key) + oracle.spread(shift, 8, 8, (4, 4))
        probs = oracle.softmax(np.where(dense, x, -np.inf))
        v = np.moveaxis(np.asarray(value, np.float64), 1, 2)
        return ((probs @ v) ** 2).sum()

    zero = np.zeros((1, 2, 2, 2))
    np.testing.assert_allclose(loss, truth(zero), rtol=1e-5)
    for place in np.ndindex(zero.shape):
        step = np.zeros_like(zero)
        step[place] = 1e-5
        slope = (truth(step) - truth(-step)) / 2e-5
        np.testing.assert_allclose(found[place], slope, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_native_sparse_attention_is_three_branches():
    """Groups of two heads, where fla's kernels want sixteen; three softmaxes.

    The first queries are past no compressed key, and that branch of theirs is 0.
    """
    query, key = oracle.heads(5, b=1)
    value = value_of(6)
    gates = jax.nn.sigmoid(
        jnp.float32(np.random.default_rng(7).standard_normal((1, T, 4, 3)))
    )
    mlps = [
        at.nsa_compress_init(jax.random.key(n), head_dim=d, length=4)
        for n, d in ((0, 8), (1, 5))
    ]
    sizes = dict(block_shape=(4, 4), budget=3, length=4, stride=2, local=1)

    @jax.jit
    def run(q, k, v, mlps):
        def out(mlps):
            return ops.native_sparse_attention(
                q, k, v, gates, key_mlp=mlps[0], value_mlp=mlps[1], window=5, **sizes
            )

        small = [
            at.nsa_compress(x, mlp, length=4, stride=2)
            for x, mlp in zip((k, v), mlps, strict=True)
        ]
        chosen, _ = at.nsa(q, k, small[0], **sizes)
        result, pull = jax.vjp(out, mlps)
        return result, chosen.to_mask(), small, pull(jnp.ones_like(result))[0]

    out, chosen, small, grads = run(query, key, value, mlps)
    i, j = np.arange(T)[:, None], np.arange(T)
    ends = 2 * np.arange(9) + 3  # 4 keys, every second: the first ends at key 3
    assert small[0].shape[1] == len(ends)
    branches = [
        attend(query, *small, ends <= i),
        attend(query, key, value, np.asarray(chosen)),
        attend(query, key, value, (i >= j) & (i - j < 5)),
    ]
    want = sum(
        np.asarray(gates, np.float64)[..., n, None] * b for n, b in enumerate(branches)
    )
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_routing_attention_is_the_mean_over_clusters(causal):
    """Zero for a query in no cluster; Routing Transformer divides by 0 + 1e-5 there."""
    query, key = oracle.heads(8, b=1)
    value = value_of(9)
    means = np.random.default_rng(10).standard_normal((4, 3, 8))
    centroids = jnp.float32(means / np.linalg.norm(means, axis=-1, keepdims=True))
    run = lambda q, k, v, c: (
        ops.routing_attention(q, k, v, c, window=6, causal=causal),
        at.balanced_clusters(q, k, c, window=6),
    )
    out, found = jax.jit(run)(query, key, value, centroids)
    total, counts = np.zeros(out.shape), np.zeros((1, T, 4, 1))
    for h, c in np.ndindex(4, 3):
        of_q, of_k = (np.asarray(x[0, h, c]) for x in found)
        mask = np.zeros((T, T), bool)
        mask[np.ix_(of_q, of_k)] = True
        mask &= CAUSAL | (not causal)
        some = mask.any(-1)
        total[0, :, h] += attend(query, key, value, mask)[0, :, h]
        counts[0, :, h, 0] += some
    want = total / np.maximum(counts, 1)
    assert (counts == 0).any() and (counts > 1).any()
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def test_gates_that_do_not_fit_are_refused():
    query, key = oracle.heads(11, b=1)
    with pytest.raises(ValueError, match="gates"):
        ops.native_sparse_attention(query, key, key, jnp.zeros((1, T, 4, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_combiner_equals_the_rule(causal):
    """One softmax over the own block's keys and the other blocks' largest entries."""
    query, key = oracle.heads(15, b=1)
    value = value_of(16)
    run = lambda q, k, v: ops.combiner_attention(q, k, v, size=4, causal=causal)
    out, pull = jax.vjp(jax.jit(run), query, key, value)
    q, k, v = (
        oracle.repeat(np.moveaxis(np.asarray(x, np.float64), 1, 2), 4)[0]
        for x in (query, key, value)
    )
    want = np.zeros((T, 4, 5))
    for h, i in np.ndindex(4, T):
        keys, values = [], []
        for n in range(6):
            block = slice(4 * n, min(T, 4 * n + 4))
            if n == i // 4:
                block = slice(4 * n, i + 1) if causal else block
                keys += [*k[h, block]]
                values += [*v[h, block]]
            elif n < i // 4 or not causal:
                inside = oracle.softmax(k[h, block] @ q[h, block].max(0) * 8**-0.5)
                keys.append(k[h, block].max(0))
                values.append(inside @ v[h, block])
        probs = oracle.softmax(np.stack(keys) @ q[h, i] * 8**-0.5)
        want[i, h] = probs @ np.stack(values)
    np.testing.assert_allclose(out[0], want, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(out)))


@pytest.mark.slow
def test_scatterbrain_equals_the_rule():
    """exp in the listed blocks, features elsewhere, one denominator."""
    query, key = oracle.heads(17, b=1)
    value = value_of(18)
    features = jax.random.normal(jax.random.key(0), (6, 8))
    mask = oracle.lists(at.pooled_blocks, query, key, block_shape=(4, 3), budget=2)
    run = jax.jit(ops.scatterbrain_attention)
    out, pull = jax.vjp(lambda *x: run(*x, mask, features), query, key, value)
    q, k, v = (
        oracle.repeat(np.moveaxis(np.asarray(x, np.float64), 1, 2), 4)[0]
        for x in (query, key, value)
    )

    def phi(x):
        x = x * 8**-0.25
        square = (x * x).sum(-1, keepdims=True) / 2
        return np.exp(x @ np.float64(features).T - square) / 6**0.5

    low = phi(q) @ phi(k).swapaxes(-1, -2)
    full = np.exp(q @ k.swapaxes(-1, -2) * 8**-0.5)
    a = np.where(np.asarray(mask.to_mask())[0], full, low) * CAUSAL
    want = a @ v / a.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[0], want.swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    assert (low * CAUSAL)[:, -1].sum() > 0
    assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(out)))


@pytest.mark.slow
def test_scatterbrain_estimates_attention():
    """Many features and no listed block but a query's own: near the dense result."""
    query, key = oracle.heads(19, b=1, h=2, g=2)
    value = value_of(20)
    features = jax.random.normal(jax.random.key(1), (4096, 8))
    mask = at.block_mask(at.causal() & at.block_diagonal(3), T, T, block_shape=(3, 3))
    out = jax.jit(ops.scatterbrain_attention)(query, key, value, mask, features)
    want = attend(query, key, value, CAUSAL)
    assert np.abs(out - want).max() < 0.25 * np.abs(want).max()
