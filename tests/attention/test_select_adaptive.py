"""As much as a head needs: XAttention, FlexPrefill, SampleAttention."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

T = 21
CAUSAL = np.tril(np.ones((T, T), bool))


def fewest(mass, p, first=(), least=0):
    """The fewest that hold p of all, the first ones in any case and before others."""
    order = [*first, *(j for j in oracle.best(mass, len(mass)) if j not in first)]
    kept, held = [], 0.0
    for j in order:
        if held >= p * mass.sum() and len(kept) >= least and j not in first:
            break
        kept.append(j)
        held += mass[j]
    return kept


def tiles(query, key, stride):
    """Coarse attention [h, tiles, tiles]: causal, by the logits on antidiagonals."""
    n = -(-T // stride)
    fill = lambda x: np.concatenate([x, np.zeros((n * stride - T, x.shape[1]))])
    probs = np.zeros((4, n, n))
    for h in range(4):
        q = fill(np.asarray(query, np.float64)[0, :, h])
        k = fill(np.asarray(key, np.float64)[0, :, h // 2])
        for i in range(n):
            z = [
                sum(
                    q[i * stride + stride - 1 - r] @ k[j * stride + r]
                    for r in range(stride)
                )
                for j in range(i + 1)
            ]
            probs[h, i, : i + 1] = oracle.softmax(np.array(z) * 8**-0.5 / stride)
    return probs


@pytest.mark.parametrize("p", [0.7, pytest.param(0.3, marks=pytest.mark.exhaustive)])
def test_xattention_equals_the_rule(p):
    """Block 0 and the own ones first; their mass counts. 21 is no multiple of 2."""
    query, key = oracle.heads(1, b=1)
    query = query * 3
    mask = oracle.lists(
        at.xattention, query, key, block_shape=(4, 6), budget=at.TopP(p), stride=2
    )
    coarse = tiles(query, key, 2)
    blocks = np.zeros((4, 6, 4), bool)
    for h, i in np.ndindex(4, 6):
        rows = coarse[h, 2 * i : 2 * i + 2].sum(0)
        mass = np.array([rows[3 * j : 3 * j + 3].sum() for j in range(4)])
        own = oracle.own(i, T, (4, 6))
        blocks[h, i, fewest(mass, p, sorted({0, *own}))] = True
    assert (blocks.sum(-1).max(0) != blocks.sum(-1).min(0)).any()
    np.testing.assert_array_equal(mask.to_blocks()[0], blocks)


@pytest.mark.slow
def test_xattention_of_the_last_queries():
    """Queries 16 to 19 alone, at a traced offset, as in the whole; and documents."""
    query, key = oracle.heads(2, b=1)
    options = dict(block_shape=(4, 6), budget=2, stride=2)
    ids = at.segments(np.array([0] * 9 + [1] * 12))
    for seen in (at.causal(), at.causal() & ids):
        whole = oracle.lists(at.xattention, query, key, expr=seen, **options)
        one = jax.jit(
            lambda q, n, seen=seen: at.xattention(
                q, key, expr=seen.shift(queries=n), offset=n, **options
            )[0].to_blocks()
        )
        np.testing.assert_array_equal(
            one(query[:, 16:20], 16)[:, :, 0], whole.to_blocks()[:, :, 4]
        )


def flex_rule(query, key, shape, last, alpha, least, taus):
    """[h, nq, nk], the divergences; tau by head."""
    bq, bk = shape
    nq, nk = -(-T // bq), -(-T // bk)
    seen = np.array(
        [[j * bk <= min(T, i * bq + bq) - 1 for j in range(nk)] for i in range(nq)]
    )
    probs = oracle.probabilities(query, key, CAUSAL)[0, :, T - last :]
    qs, ks = oracle.pool(query, bq), oracle.repeat(oracle.pool(key, bk), 4)
    scores = (qs @ ks.swapaxes(-1, -2) * 8**-0.5)[0]
    mean = np.asarray(query, np.float64)[0, T - last :].mean(0)
    blocks, apart = np.zeros((4, nq, nk), bool), np.zeros(4)
    for h in range(4):
        vertical, slash = np.zeros(nk), np.zeros(nk)
        for i, j in np.ndindex(last, T):
            vertical[j // bk] += probs[h, i, j] / last
            if j <= T - last + i:
                slash[(T - last + i) // bk - j // bk] += probs[h, i, j] / last
        told = oracle.softmax(ks[0, h] @ mean[h] * 8**-0.5)
        middle = (told + vertical) / 2
        apart[h] = np.sqrt(
            (told * np.log(told / middle) + vertical * np.log(vertical / middle)).sum()
            / 2
        )
        p = 0.0 if apart[h] < taus[h] else alpha
        columns = fewest(vertical, p, [0], least)
        distances = fewest(slash, p, [0], least)
        for i, j in np.ndindex(nq, nk):
            gaps = {own - j for own in oracle.own(i, T, shape)}
            blocks[h, i, j] = j in columns or bool(gaps & {*distances})
        if apart[h] < taus[h]:
            a = oracle.softmax(np.where(seen, scores[h], -np.inf)).ravel()
            blocks[h].ravel()[fewest(a, alpha)] = True
        blocks[h] &= seen
    return blocks, apart


@pytest.mark.parametrize(
    "shape, last, least",
    [((4, 3), 5, 1), pytest.param((3, 4), 4, 2, marks=pytest.mark.exhaustive)],
)
def test_flex_prefill_equals_the_rule(shape, last, least):
    """Two heads take lines and two take blocks, by a tau between their divergences."""
    query, key = oracle.heads(5, b=1)
    query = query * jnp.array([0.3, 1.0, 2.0, 3.0])[:, None]
    _, apart = flex_rule(query, key, shape, last, 0.6, least, np.zeros(4))
    tau = np.sort(apart)[1:3].mean()
    mask = oracle.lists(
        at.flex_prefill,
        query,
        key,
        block_shape=shape,
        alpha=0.6,
        min_budget=least,
        tau=tau,
        last=last,
    )
    blocks, _ = flex_rule(query, key, shape, last, 0.6, least, np.full(4, tau))
    lines, _ = flex_rule(query, key, shape, last, 0.6, least, np.zeros(4))
    assert ((blocks != lines).any((-2, -1)) == (apart < tau)).all()
    np.testing.assert_array_equal(mask.to_blocks()[0], blocks)


@pytest.mark.parametrize(
    "window, w, alpha",
    [
        (3, 3, 0.6),
        pytest.param(0.2, 4, 0.9, marks=pytest.mark.exhaustive),
    ],  # 0.2 * 21 = 4.2
)
def test_sample_attention_equals_the_rule(window, w, alpha):
    """Of 21 queries those at 0, 4, ... 20 are sampled."""
    query, key = oracle.heads(6, b=1)
    mask = oracle.lists(
        at.sample_attention,
        query,
        key,
        block_shape=(4, 3),
        alpha=alpha,
        window=window,
        stride=4,
    )
    columns = oracle.probabilities(query, key, CAUSAL)[0, :, ::4].sum(1)
    wanted = np.zeros((4, T, T), bool)
    for h, i, j in np.ndindex(4, T, T):
        wanted[h, i, j] = abs(i - j) < w
    for h in range(4):
        wanted[h][:, fewest(columns[h], alpha)] = True
    wanted &= CAUSAL
    np.testing.assert_array_equal(mask.to_mask()[0], wanted)
    blocks = np.zeros((4, 6, 7), bool)
    for i, j in np.ndindex(6, 7):
        blocks[:, i, j] = wanted[:, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].any((-2, -1))
    assert not (blocks & ~np.asarray(mask.to_blocks()[0])).any()


@pytest.mark.parametrize(
    "select, options",
    [
        (at.flex_prefill, dict(alpha=0.5, tau=0.0, last=5)),
        (at.sample_attention, dict(alpha=0.3, window=4, stride=T)),
        (at.vertical_slash, dict(vertical=2, slash=2, last=5, initial=0)),
    ],
)
def test_lines_of_the_last_queries(select, options):
    """Queries 12 to 20 alone, at a traced offset, as in the whole: those that tell."""
    query, key = oracle.heads(8, b=1)
    options |= dict(block_shape=(4, 3))
    whole = oracle.lists(select, query, key, **options).to_mask()[:, :, 12:]
    one = jax.jit(lambda q, n: select(q, key, offset=n, **options)[0].to_mask())
    seen = CAUSAL[12:]
    assert (np.asarray(whole) != seen).any((-2, -1)).sum() > 1  # heads
    np.testing.assert_array_equal(one(query[:, 12:], 12), whole)


@pytest.mark.parametrize(
    "select, change, match",
    [
        (at.xattention, dict(budget=2, stride=3), "block_shape: got"),
        (at.xattention, dict(budget=2, stride=0), "stride"),
        (at.flex_prefill, dict(alpha=0.0), "alpha"),
        (at.flex_prefill, dict(tau=1.5), "tau"),
        (at.flex_prefill, dict(min_budget=0), "min_budget"),
        (at.flex_prefill, dict(last=0), "last"),
        (at.sample_attention, dict(alpha=1.5), "alpha"),
        (at.sample_attention, dict(window=0), "window"),
        (at.sample_attention, dict(window=1.5), "window"),
        (at.sample_attention, dict(stride=0), "stride"),
    ],
)
def test_arguments_that_are_refused(select, change, match):
    query, key = oracle.heads(7, b=1)
    with pytest.raises(ValueError, match=match):
        select(query, key, block_shape=(4, 4), **change)
