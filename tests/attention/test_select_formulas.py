"""Selectors by a formula of blocks: S2-Attention, SpargeAttn, Quest; the hooks."""

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
NQ, NK = 6, 7
CAUSAL = np.tril(np.ones((T, T), bool))
ALLOWED = np.array(
    [[3 * j <= min(T, 4 * i + 4) - 1 for j in range(NK)] for i in range(NQ)]
)


def check(query, key, mask, stats, blocks):
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    wanted = CAUSAL & oracle.spread(blocks, T, T, SHAPE)
    np.testing.assert_array_equal(mask.to_mask(), wanted)
    np.testing.assert_allclose(stats.density, blocks.mean((-2, -1)), rtol=1e-6)
    truth = oracle.recall(query, key, CAUSAL, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.parametrize(
    "local, stride, phase",
    [
        (1, 8, 1),
        pytest.param(2, 3, 0, marks=pytest.mark.slow),
        pytest.param(3, 1, 0, marks=pytest.mark.slow),
    ],
)
def test_s2_equals_the_rule(local, stride, phase):
    """(i - j) < local or (j + h step + phase) % stride == 0, step = stride // heads."""
    query, key = oracle.heads(1, b=2, s=24, t=24)
    mask, stats = oracle.run(
        at.s2_shards,
        query,
        key,
        block_shape=(3, 3),
        local=local,
        stride=stride,
        phase=phase,
    )
    blocks = np.zeros((1, 4, 8, 8), bool)
    for h, i, j in np.ndindex(4, 8, 8):
        near = 0 <= i - j < local
        shard = i >= j and (j + h * max(1, stride // 4) + phase) % stride == 0
        blocks[0, h, i, j] = near or shard
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    np.testing.assert_allclose(
        stats.density, np.repeat(blocks.mean((-2, -1)), 2, axis=0)
    )


@pytest.mark.slow
def test_s2_heads_see_everything_together():
    x = jnp.zeros((1, 16, 4, 2))
    mask = oracle.lists(at.s2_shards, x, x, block_shape=(2, 2), local=1, stride=4)
    together = np.asarray(mask.to_blocks()[0]).any(axis=0)
    np.testing.assert_array_equal(together, np.tril(np.ones((8, 8))))
    dense = oracle.lists(
        at.s2_shards, x, x, block_shape=(2, 2), local=1, stride=4, dense_heads=1
    )
    np.testing.assert_array_equal(dense.to_blocks()[0, 0], together)


def likeness(x, size):
    """Mean cosine of all pairs of rows of a block."""
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    blocks = []
    for a in range(0, x.shape[1], size):
        rows = np.moveaxis(x[:, a : a + size], 1, 2)
        blocks.append((rows @ rows.swapaxes(-1, -2)).mean((-2, -1)))
    return np.stack(blocks, axis=2)


@pytest.mark.parametrize(
    "budget, theta",
    [
        (at.TopP(0.6), 0.35),
        pytest.param(2, 0.35, marks=pytest.mark.slow),
        pytest.param(2, -1.0, marks=pytest.mark.slow),
    ],
)
def test_sparge_equals_the_rule(budget, theta):
    query, key = oracle.heads(2, b=1)
    mask, stats = jax.jit(
        lambda q, k: at.sparge(q, k, block_shape=SHAPE, budget=budget, similarity=theta)
    )(query, key)
    alike_q = likeness(query, SHAPE[0]) > theta
    alike_k = oracle.repeat(likeness(key, SHAPE[1]), 4) > theta
    assert theta < 0 or (alike_k.any() and not alike_k.all())
    q, k = oracle.pool(query, SHAPE[0]), oracle.pool(key, SHAPE[1])
    scores = q @ oracle.repeat(k, 4).swapaxes(-1, -2) * 8**-0.5
    blocks = np.zeros((1, 4, NQ, NK), bool)
    for h, i in np.ndindex(4, NQ):
        free = ALLOWED[i] & alike_k[0, h]
        line = np.where(free, scores[0, h, i], -np.inf)
        order = [j for j in oracle.best(line, NK) if free[j]]
        if budget == 2:
            kept = order[:2]
        else:
            probs = oracle.softmax(line)
            before = np.cumsum(probs[order]) - probs[order]
            kept = [j for j, mass in zip(order, before, strict=True) if mass < 0.6]
        blocks[0, h, i, kept] = True
        blocks[0, h, i] |= ALLOWED[i] & (~alike_k[0, h] | ~alike_q[0, h, i])
    check(query, key, mask, stats, blocks)


@pytest.mark.slow
def test_sparge_sink_and_thresholds_per_head():
    query, key = oracle.heads(3, b=1)
    mask = oracle.lists(
        at.sparge,
        query,
        key,
        block_shape=SHAPE,
        budget=1,
        similarity=jnp.array([-1.0, -1.0, 1.0, 1.0]),
        sink=True,
    )
    blocks = np.asarray(mask.to_blocks())[0]
    assert blocks[:, :, 0].all()
    assert (blocks[:2].sum(-1) <= 2).all()
    np.testing.assert_array_equal(blocks[2:], np.stack([ALLOWED] * 2))


def test_quest_equals_the_rule():
    """Lists of the two key heads, shared by groups of two query heads."""
    query, key = oracle.heads(4, b=2)
    mask, stats = jax.jit(lambda q, k: at.quest(q, k, block_shape=SHAPE, budget=3))(
        query, key
    )
    low = oracle.pool(key, SHAPE[1], np.min)
    high = oracle.pool(key, SHAPE[1], np.max)
    q = np.moveaxis(np.asarray(query, np.float64), 1, 2)
    blocks = np.zeros((2, 2, NQ, NK), bool)
    for b, g, i in np.ndindex(2, 2, NQ):
        bound = np.full((min(4, T - 4 * i), NK), 0.0)
        for r, j in np.ndindex(bound.shape):
            for h in (2 * g, 2 * g + 1):
                row = q[b, h, 4 * i + r]
                bound[r, j] += np.maximum(row * low[b, g, j], row * high[b, g, j]).sum()
        line = np.where(ALLOWED[i], bound.max(0), -np.inf)
        own = oracle.own(i, T, SHAPE)
        others = [j for j in oracle.best(line, NK) if j not in own and ALLOWED[i][j]]
        blocks[b, g, i, [*own, *others][: max(3, len(own))]] = True
    assert mask.kv_idx.shape[:2] == (2, 2)
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    blocks = oracle.repeat(blocks, 4)
    wanted = CAUSAL & oracle.spread(blocks, T, T, SHAPE)
    np.testing.assert_allclose(stats.density, blocks.mean((-2, -1)), rtol=1e-6)
    truth = oracle.recall(query, key, CAUSAL, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_quest_bound_holds():
    """The page with the largest logit of all is read, whatever the budget of 2."""
    query, key = oracle.heads(5, b=1, t=1, s=16, h=1, g=1)
    key = key.at[0, 6].set(query[0, 0] * 10)
    mask, stats = oracle.run(
        at.quest, query, key, block_shape=(1, 4), budget=2, offset=15
    )
    np.testing.assert_array_equal(mask.to_blocks()[0, 0, 0], [0, 1, 0, 1])
    assert float(stats.recall[0, 0]) > 0.99


@pytest.mark.slow
def test_quest_lists_with_heads_that_differ():
    query, key = oracle.heads(6, b=1, t=12, s=12)
    expr = at.per_head([at.causal(), at.everything()] * 2)
    mask = oracle.lists(at.quest, query, key, block_shape=(4, 3), budget=1.0, expr=expr)
    causal = np.tril(np.ones((12, 12), bool))
    np.testing.assert_array_equal(mask.to_mask()[0, 0], causal)
    assert np.asarray(mask.to_mask()[0, 1]).all()


@pytest.mark.slow
def test_hooks_carry_scores_to_the_lists():
    query, key = oracle.heads(7, b=1)
    mask = oracle.lists(at.pooled_blocks, query, key, block_shape=SHAPE, budget=2)
    rng = np.random.default_rng(0)
    scores = jnp.float32(rng.standard_normal((1, 4, NQ, NK)))
    bias = np.asarray(jax.jit(at.list_scores)(scores, mask))
    for h, i in np.ndindex(4, NQ):
        n = int(mask.kv_cnt[0, h, i])
        index = np.asarray(mask.kv_idx)[0, h, i, :n]
        wanted = [*np.asarray(scores)[0, h, i, index], *[0] * (2 - n)]
        np.testing.assert_array_equal(bias[0, h, i, : max(2, n)], wanted)
    weights = jnp.float32(rng.standard_normal(bias.shape))
    value, grad = jax.jit(
        jax.value_and_grad(lambda s: (at.straight_through(s, mask) * weights).sum())
    )(scores)
    assert value == 0
    np.testing.assert_array_equal(grad != 0, mask.to_blocks())
    with pytest.raises(ValueError, match="scores"):
        at.list_scores(scores[..., :3], mask)


@pytest.mark.slow
def test_double_sparsity_equals_the_rule():
    """Blocks of one: keys by the logits of the calibrated channels."""
    query, key = oracle.heads(8, b=2)
    channels = at.label_channels(query, key, 3)
    q, k = (np.abs(np.asarray(x, np.float64)).mean(1) for x in (query, key))
    size = (q * np.repeat(k, 2, axis=1)).mean(0)
    np.testing.assert_array_equal(channels, [oracle.best(line, 3) for line in size])
    mask, stats = oracle.run(
        at.double_sparsity, query, key, channels, block_shape=(1, 1), budget=4
    )
    q = np.moveaxis(np.asarray(query, np.float64), 1, 2)
    k = oracle.repeat(np.moveaxis(np.asarray(key, np.float64), 1, 2), 4)
    kept = np.zeros((2, 4, T, T), bool)
    for b, h, i in np.ndindex(2, 4, T):
        c = np.asarray(channels[h])
        scores = k[b, h, :i][:, c] @ q[b, h, i, c]
        kept[b, h, i, [i, *oracle.best(scores, 3)]] = True
    np.testing.assert_array_equal(mask.to_mask(), kept)
    truth = oracle.recall(query, key, CAUSAL, kept)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_double_sparsity_of_blocks_is_that_of_their_best_keys():
    query, key = oracle.heads(9, b=1)
    channels = jnp.tile(jnp.arange(8), (4, 1))
    mask = oracle.lists(
        at.double_sparsity,
        query,
        key,
        channels,
        block_shape=SHAPE,
        budget=2,
        expr=at.everything(),
    )
    x = oracle.logits(query, key)
    for h, i in np.ndindex(4, NQ):
        top = [x[0, h, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].max() for j in range(NK)]
        own = oracle.own(i, T, SHAPE)
        others = [j for j in oracle.best(np.array(top), NK) if j not in own]
        kept = sorted([*own, *others][: max(2, len(own))])
        np.testing.assert_array_equal(np.flatnonzero(mask.to_blocks()[0, h, i]), kept)


@pytest.mark.slow
def test_twilight_equals_the_rule():
    query, key = oracle.heads(10, b=1)
    base = oracle.lists(at.pooled_blocks, query, key, block_shape=SHAPE, budget=5)
    mask, stats = oracle.run(at.twilight, query, key, base, p=0.7)
    allowed = np.asarray(base.to_mask())
    k = np.asarray(key, np.float64)
    step = np.abs(k).max(-1, keepdims=True) / 7
    rounded = np.round(k / step) * step
    probs = oracle.probabilities(query, rounded, allowed)
    blocks = np.zeros((1, 4, NQ, NK), bool)
    for h, i in np.ndindex(4, NQ):
        rows = probs[0, h, 4 * i : 4 * i + 4].mean(0)
        mass = np.array([rows[3 * j : 3 * j + 3].sum() for j in range(NK)])
        order = oracle.best(mass, NK)
        before = np.cumsum(mass[order]) - mass[order]
        blocks[0, h, i, order[before < 0.7]] = True
    check(query, key, mask, stats, blocks)
    assert (np.asarray(mask.density) < np.asarray(base.density)).all()


@pytest.mark.parametrize("p, bits", [(0.0, 4), (1.5, 4), (0.5, 1), (0.5, 9)])
def test_twilight_arguments_that_are_refused(p, bits):
    x = jnp.zeros((1, 4, 1, 4))
    base = at.block_mask(at.causal(), 4, 4, block_shape=(2, 2))
    with pytest.raises(ValueError):
        at.twilight(x, x, base, p=p, bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("vertical, slash, last", [(3, 2, 5), (1, 1, 99)])
def test_vertical_slash_equals_the_rule(vertical, slash, last):
    query, key = oracle.heads(11, b=1)
    mask, stats = oracle.run(
        at.vertical_slash,
        query,
        key,
        block_shape=SHAPE,
        vertical=vertical,
        slash=slash,
        last=last,
        initial=1,
    )
    probs = oracle.probabilities(query, key, CAUSAL)[0, :, -last:]
    first = max(0, T - last)
    wanted = np.zeros((1, 4, T, T), bool)
    for h in range(4):
        worth = probs[h].sum(0)
        worth[0] = np.inf
        mass = np.zeros(NK)
        for i, j in np.ndindex(probs[h].shape):
            if j <= first + i:
                mass[(first + i) // 3 - j // 3] += probs[h, i, j]
        mass[0] = np.inf
        columns, distances = oracle.best(worth, vertical), oracle.best(mass, slash)
        for i, j in np.ndindex(T, T):
            wanted[0, h, i, j] = j in columns or i // 3 - j // 3 in distances
    wanted &= CAUSAL
    np.testing.assert_array_equal(mask.to_mask(), wanted)
    truth = oracle.recall(query, key, CAUSAL, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_sparsed_equals_the_rule_and_is_reused():
    """Half of the two prompt blocks, half of the five others; then the same again."""
    query, key = oracle.heads(12, b=1)
    select = lambda q, k: at.sparsed(
        q, k, block_shape=SHAPE, budget=0.5, prompt=6, expr=at.everything()
    )

    @jax.jit
    def run(q, k, again):
        mask, stats = select(q, k)
        return mask, stats, at.reuse(again, lambda: select(-q, k)[0], mask)

    mask, stats, kept = run(query, key, False)
    everywhere = np.ones((T, T), bool)
    probs = oracle.probabilities(query, key, everywhere)
    blocks = np.zeros((1, 4, NQ, NK), bool)
    for h, i in np.ndindex(4, NQ):
        rows = probs[0, h, 4 * i : 4 * i + 4].sum(0)
        mass = np.array([rows[3 * j : 3 * j + 3].sum() for j in range(NK)])
        blocks[0, h, i, oracle.best(mass[:2], 1)] = True
        blocks[0, h, i, 2 + oracle.best(mass[2:], 2)] = True
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    np.testing.assert_array_equal(kept.to_blocks(), blocks)
    wanted = oracle.spread(blocks, T, T, SHAPE)
    truth = oracle.recall(query, key, everywhere, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)
    fresh = run(query, key, True)[2]
    assert (fresh.to_blocks() != blocks).any()
