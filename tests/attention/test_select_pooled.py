"""Block top-k, top-p, threshold and tokens; statistics; what all selectors share."""

import re
import statistics
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


def allowed(i):
    """Key blocks that any query of block i may see."""
    return [j for j in range(NK) if j * SHAPE[1] <= min(T, (i + 1) * SHAPE[0]) - 1]


def expected(query, key, rule):
    """Blocks [b, h, nq, nk] by ``rule(scores of the allowed, own) -> kept``."""
    q, k = oracle.pool(query, SHAPE[0]), oracle.pool(key, SHAPE[1])
    scores = q @ oracle.repeat(k, q.shape[1]).swapaxes(-1, -2) * query.shape[-1] ** -0.5
    blocks = np.zeros((*q.shape[:2], NQ, NK), bool)
    for b, h, i in np.ndindex(blocks.shape[:3]):
        line = np.full(NK, -np.inf)
        line[allowed(i)] = scores[b, h, i][allowed(i)]
        blocks[b, h, i, rule(line, oracle.own(i, T, SHAPE))] = True
    return blocks


def first_own(line, own):
    """The allowed blocks, own ones first, then falling in score."""
    others = [j for j in oracle.best(line, NK) if j not in own and line[j] > -np.inf]
    return [*own, *others]


def counted(n):
    return lambda line, own: first_own(line, own)[: max(n, len(own))]


def nucleus(p):
    def rule(line, own):
        probs, kept, mass = oracle.softmax(line), [], 0.0
        for j in first_own(line, own):
            if mass >= p and j not in own:
                break
            kept.append(j)
            mass += probs[j]
        return kept

    return rule


def above(value):
    def rule(line, own):
        return sorted({*own, *np.flatnonzero(oracle.softmax(line) > value)})

    return rule


def gaussian(count):
    def rule(line, own):
        real = line[line > -np.inf]
        kept = set(own)
        if len(real) <= count:
            return [*np.flatnonzero(line > -np.inf)]
        z = statistics.NormalDist().inv_cdf(1 - count / len(real))
        return sorted(
            {*kept, *np.flatnonzero(line > real.mean() + real.std(ddof=1) * z)}
        )

    return rule


BUDGETS = {
    "three": (3, counted(3)),
    "share": (0.45, counted(3)),  # 0.45 * 7 = 3.15
    "more than there are": (50, counted(NK)),
    "tokens": (at.Tokens(11), counted(3)),  # three blocks of 3 are 9
    "few tokens": (at.Tokens(1), counted(1)),
    "top-p": (at.TopP(0.7), nucleus(0.7)),
    "all of p": (at.TopP(1.0), nucleus(2.0)),
    "gaussian": (at.GaussianTopK(2), gaussian(2)),
    "threshold": (at.Threshold(0.2), above(0.2)),
}


QUICK = ("three", "top-p", "threshold")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BUDGETS],
)
def test_equals_the_rule(name):
    """Blocks of other sizes for queries than for keys, and few that are allowed.

    MInference lists a fixed number and counts on those of the future to sort last.
    """
    budget, rule = BUDGETS[name]
    query, key = oracle.heads(1, b=1)
    mask = oracle.lists(at.pooled_blocks, query, key, block_shape=SHAPE, budget=budget)
    np.testing.assert_array_equal(mask.to_blocks(), expected(query, key, rule))


def test_statistics_equal_the_dense_truth():
    query, key = oracle.heads(1)
    mask, stats = oracle.run(
        at.pooled_blocks, query, key, block_shape=SHAPE, budget=at.TopP(0.7)
    )
    blocks = expected(query, key, nucleus(0.7))
    wanted = CAUSAL & oracle.spread(blocks, T, T, SHAPE)
    np.testing.assert_array_equal(mask.to_mask(), wanted)
    np.testing.assert_allclose(stats.density, blocks.mean((-2, -1)), rtol=1e-6)
    truth = oracle.recall(query, key, CAUSAL, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)
    assert not stats.overflow.any()


def test_density_is_within_a_block_of_the_budget():
    """30 keys: the last of eight blocks has two, and their mean counts like others."""
    query, key = oracle.heads(2, b=1, t=32, s=30)
    mask, stats = oracle.run(
        at.pooled_blocks,
        query,
        key,
        block_shape=(4, 4),
        budget=0.375,
        expr=at.everything(),
        keep_own=False,
    )
    assert mask.capacity == 3
    np.testing.assert_allclose(stats.density, 3 / 8)
    keys = oracle.repeat(oracle.pool(key, 4), 4)
    scores = oracle.pool(query, 4) @ keys.swapaxes(-1, -2)
    blocks = np.zeros((1, 4, 8, 8), bool)
    for h, i in np.ndindex(4, 8):
        blocks[0, h, i, oracle.best(scores[0, h, i], 3)] = True
    assert blocks[..., 7].any()
    np.testing.assert_array_equal(mask.to_blocks(), blocks)


@pytest.mark.slow
def test_capacity_keeps_the_best_and_counts_the_rest():
    query, key = oracle.heads(3, b=1)
    full = oracle.lists(
        at.pooled_blocks, query, key, block_shape=SHAPE, budget=at.TopP(0.9)
    )
    mask, stats = oracle.run(
        at.pooled_blocks, query, key, block_shape=SHAPE, budget=at.TopP(0.9), capacity=3
    )
    blocks = expected(query, key, lambda line, own: nucleus(0.9)(line, own)[:3])
    assert mask.capacity == 3
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    lost = (np.asarray(full.to_blocks()) & ~blocks).sum((-2, -1))
    assert lost.any()
    np.testing.assert_array_equal(stats.overflow, lost)


@pytest.mark.slow
def test_ties_go_to_the_lowest_index():
    zeros = jnp.zeros((1, 8, 1, 4))
    mask = oracle.lists(at.pooled_blocks, zeros, zeros, block_shape=(2, 2), budget=2)
    own_and_first = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], own_and_first)


@pytest.mark.slow
def test_offset_of_a_decoded_query():
    """The last 3 queries of 21 alone: the keys of blocks 6 are their own."""
    query, key = oracle.heads(4, b=1)
    select = jax.jit(
        lambda q, k, n: at.pooled_blocks(q, k, block_shape=(3, 3), budget=2, offset=n)[
            0
        ].to_mask()
    )
    whole = oracle.lists(at.pooled_blocks, query, key, block_shape=(3, 3), budget=2)
    np.testing.assert_array_equal(
        select(query[:, 18:], key, 18), whole.to_mask()[:, :, 18:]
    )


@pytest.mark.slow
def test_segments_are_not_crossed():
    query, key = oracle.heads(5, b=1)
    ids = np.array([0] * 10 + [1] * 11)
    same = at.segments(ids)
    mask, stats = oracle.run(
        at.pooled_blocks,
        query,
        key,
        block_shape=SHAPE,
        budget=2,
        expr=at.causal() & same,
    )
    elements = np.asarray(mask.to_mask())
    dense = CAUSAL & (ids[:, None] == ids)
    assert not (elements & ~dense).any() and elements.any(-1).all()
    np.testing.assert_allclose(
        stats.recall, oracle.recall(query, key, dense, elements), rtol=1e-5
    )


@pytest.mark.slow
def test_heads_of_an_expression():
    """per_head over the query heads, lists of their own."""
    query, key = oracle.heads(6, b=1, h=2, g=1)
    expr = at.per_head([at.causal(), at.everything()])
    mask = oracle.lists(
        at.pooled_blocks, query, key, block_shape=(7, 7), budget=1.0, expr=expr
    )
    np.testing.assert_array_equal(mask.to_mask()[0, 0], CAUSAL)
    assert np.asarray(mask.to_mask()[0, 1]).all()


def test_vmap_and_contents_do_not_recompile():
    query, key = oracle.heads(7, b=3)
    count = 0

    @jax.jit
    def select(q, k, p):
        nonlocal count
        count += 1
        one = lambda q, k: at.pooled_blocks(
            q[None], k[None], block_shape=SHAPE, budget=at.TopP(p)
        )[0].to_blocks()[0]
        return jax.vmap(one)(q, k)

    for p in (0.5, 0.8):
        whole = oracle.lists(
            at.pooled_blocks, query, key, block_shape=SHAPE, budget=at.TopP(p)
        )
        np.testing.assert_array_equal(select(query, key, p), whole.to_blocks())
    assert count == 1


def test_nothing_has_a_gradient():
    query, key = oracle.heads(8, b=1)
    recall = lambda q: at.pooled_blocks(q, key, block_shape=SHAPE, budget=2)[
        1
    ].recall.sum()
    assert not jax.jit(jax.grad(recall))(query).any()


@pytest.mark.parametrize(
    "budget",
    [
        0,
        -1,
        0.0,
        1.5,
        -0.5,
        True,
        at.TopP(0.0),
        at.TopP(1.5),
        at.Tokens(0),
        at.GaussianTopK(0),
    ]
    + [at.Threshold(1.0), at.Threshold(-0.1), np.nan],
)
def test_budgets_that_are_refused(budget):
    query, key = oracle.heads(9, b=1)
    with pytest.raises(ValueError, match="budget"):
        at.pooled_blocks(query, key, block_shape=SHAPE, budget=budget)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(query=jnp.zeros((1, 21, 8))), "query: got shape"),
        (dict(key=jnp.zeros((1, 21, 3, 8))), "key: got 3 heads"),
        (dict(key=jnp.zeros((1, 21, 2, 4))), "same batch and head_dim"),
        (dict(key=jnp.zeros((1, 21, 2, 8), jnp.int32)), "needed floating"),
        (dict(block_shape=(0, 4)), "block_shape"),
        (dict(capacity=0), "capacity"),
    ],
)
def test_arguments_that_are_refused(change, match):
    query, key = oracle.heads(10, b=1)
    call = dict(query=query, key=key, block_shape=SHAPE, budget=2) | change
    with pytest.raises(ValueError, match=match):
        at.pooled_blocks(**call)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["max", "sum"])
def test_block_probabilities(pool):
    query, key = oracle.heads(11, b=1, s=17)
    dense = np.tril(np.ones((21, 17), bool))
    probs = oracle.probabilities(query, key, dense)
    want = np.zeros((1, 4, 6, 6))
    for i, j in np.ndindex(6, 6):
        tile = probs[:, :, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
        if pool == "max":
            want[:, :, i, j] = tile.max((-2, -1))
        else:
            want[:, :, i, j] = tile.sum(-1).mean(-1)
    out = at.attention_block_probabilities(
        query, key, block_shape=SHAPE, expr=at.causal(), pool=pool
    )
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


def test_recall_of_rows_without_keys():
    """Query 0 sees nothing in dense attention: nothing of it is lost."""
    query, key = oracle.heads(12, b=1, t=4, s=4, h=1, g=1)
    dense = at.causal() & ~at.global_tokens(1)
    mask = at.block_mask(dense, 4, 4, block_shape=(2, 2))
    recall = jax.jit(lambda q, k: at.block_stats(q, k, mask, dense).recall)
    np.testing.assert_allclose(recall(query, key), 1.0)


def test_memory_is_a_panel():
    """No array of t x t in the statistics: the largest is block_q x t per head."""
    t, bq = 512, 32
    q = jax.ShapeDtypeStruct((1, t, 2, 4), jnp.float32)
    fn = lambda q, k: at.pooled_blocks(q, k, block_shape=(bq, bq), budget=4)[1].recall
    text = str(jax.make_jaxpr(fn)(q, q))
    found = re.findall(r"(?:f32|bool|i32)\[([\d,]+)\]", text)
    sizes = {tuple(map(int, s.split(","))) for s in found}
    assert max(int(np.prod(s)) for s in sizes) <= 2 * bq * t
    assert all(s.count(t) < 2 for s in sizes)
