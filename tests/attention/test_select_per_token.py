"""Selections of each query for itself: MoBA and Native Sparse Attention."""

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
NK = 7
CAUSAL = np.tril(np.ones((T, T), bool))


def moba_rule(query, key, count, size, offset=0):
    """bool [b, h, t, nk]: the own block, and the best of the past by q . mean k."""
    q = np.moveaxis(np.asarray(query, np.float64), 1, 2)
    means = oracle.repeat(oracle.pool(key, size), q.shape[1])
    scores = q @ means.swapaxes(-1, -2)
    kept = np.zeros(scores.shape, bool)
    for b, h, i in np.ndindex(scores.shape[:3]):
        own = (i + offset) // size
        past = oracle.best(scores[b, h, i, :own], count - 1)
        kept[b, h, i, [own, *past]] = True
    return kept


def elements(kept, size, s):
    return np.repeat(kept, size, axis=-1)[..., :s]


@pytest.mark.slow
@pytest.mark.parametrize("budget, count", [(1, 1), (0.4, 3), (at.Tokens(9), 3)])
def test_moba_budgets(budget, count):
    query, key = oracle.heads(1, b=1)
    mask = oracle.lists(at.moba, query, key, block_shape=SHAPE, budget=budget)
    kept = moba_rule(query, key, count, SHAPE[1])
    wanted = elements(kept, SHAPE[1], T) & CAUSAL
    np.testing.assert_array_equal(mask.to_mask(), wanted)


def test_moba_equals_the_rule_for_every_query():
    """Inside jit, and for grouped heads, where the published code has neither.

    FlexAttention has no mask of each row's best (attention-gym#92).
    """
    query, key = oracle.heads(1, b=2)
    mask, stats = oracle.run(at.moba, query, key, block_shape=SHAPE, budget=3)
    kept = moba_rule(query, key, 3, SHAPE[1])
    wanted = elements(kept, SHAPE[1], T) & CAUSAL
    np.testing.assert_array_equal(mask.to_mask(), wanted)
    # Lists: the union over a query block, whatever the elements.
    union = np.stack([kept[:, :, i : i + 4].any(2) for i in range(0, T, 4)], axis=2)
    np.testing.assert_array_equal(mask.to_blocks(), union)
    np.testing.assert_allclose(stats.work, union.mean((-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(stats.density, kept.mean((-2, -1)), rtol=1e-6)
    truth = oracle.recall(query, key, CAUSAL, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_moba_decodes_as_it_read():
    """The last queries alone, from a traced offset, choose as in the whole."""
    query, key = oracle.heads(2, b=1)
    whole = oracle.lists(at.moba, query, key, block_shape=(1, 3), budget=2)
    one = jax.jit(
        lambda q, n: at.moba(q, key, block_shape=(1, 3), budget=2, offset=n)[
            0
        ].to_mask()
    )
    for i in (4, 20):
        np.testing.assert_array_equal(
            one(query[:, i : i + 1], i)[:, :, 0], whole.to_mask()[:, :, i]
        )


@pytest.mark.slow
def test_moba_capacity_keeps_what_most_queries_chose():
    query, key = oracle.heads(3, b=1)
    kept = moba_rule(query, key, 3, SHAPE[1])
    mask, stats = oracle.run(
        at.moba, query, key, block_shape=SHAPE, budget=3, capacity=3
    )
    blocks, lost = np.zeros((1, 4, 6, NK), bool), np.zeros((1, 4), int)
    for h, i in np.ndindex(4, 6):
        votes = kept[0, h, 4 * i : 4 * i + 4].sum(0)
        order = [j for j in oracle.best(votes, NK) if votes[j]]
        blocks[0, h, i, order[:3]] = True
        lost[0, h] += len(order[3:])
    assert lost.any()
    np.testing.assert_array_equal(mask.to_blocks(), blocks)
    np.testing.assert_array_equal(stats.overflow, lost)
    given = kept & np.repeat(blocks, 4, axis=2)[:, :, :T]
    np.testing.assert_allclose(stats.density, given.mean((-2, -1)), rtol=1e-6)


def test_moba_ties_go_to_the_lowest_block():
    zeros = jnp.zeros((1, 8, 1, 4))
    mask = oracle.lists(at.moba, zeros, zeros, block_shape=(2, 2), budget=2)
    np.testing.assert_array_equal(
        mask.to_blocks()[0, 0],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]],
    )


@pytest.mark.slow
def test_moba_needs_no_dense_array():
    """Lists for 64k tokens in panels of 1024 queries by 512 blocks.

    MaxText adds a mask of tokens by tokens to the logits: 4 GiB here.
    """
    t, shape = 65_536, (1024, 128)
    x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    fn = lambda q, k: at.moba(q, k, block_shape=shape, budget=4)[0].kv_cnt
    memory = jax.jit(fn).lower(x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 50 * 2**20


@pytest.mark.parametrize("budget", [at.TopP(0.5), at.Threshold(0.1), 0, 1.5])
def test_moba_budgets_that_are_refused(budget):
    x = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(ValueError, match="budget"):
        at.moba(x, x, block_shape=(2, 2), budget=budget)


def nsa_rule(query, key, count, size, length, stride, initial, local):
    """bool [b, g, t, nk] by compressed attention, summed over a group.

    Probabilities, as published; lucidrains' has the mean of the group's logits.
    """
    q = np.moveaxis(np.asarray(query, np.float64), 1, 2)
    k = np.moveaxis(np.asarray(key, np.float64), 1, 2)
    (b, h, t, d), g, s = q.shape, k.shape[1], k.shape[2]
    starts = range(0, s - length + 1, stride)
    small = np.stack([k[:, :, c : c + length].mean(2) for c in starts], axis=2)
    kept = np.zeros((b, g, t, -(-s // size)), bool)
    for n, group, i in np.ndindex(b, g, t):
        score = np.zeros(kept.shape[-1])
        done = [c for c, at in enumerate(starts) if at + length <= i + 1]
        for head in range(group * h // g, (group + 1) * h // g):
            if not done:
                continue
            probs = oracle.softmax(small[n, group, done] @ q[n, head, i] * d**-0.5)
            for c, p in zip(done, probs, strict=True):
                for x in range(c * stride, c * stride + length, stride):
                    score[x // size] += p
        own = i // size
        fixed = {
            *range(min(initial, own + 1)),
            *range(max(0, own - local + 1), own + 1),
        }
        score[list(fixed)] = np.inf
        kept[n, group, i, oracle.best(score[: own + 1], count)] = True
    return kept


@pytest.mark.parametrize(
    "size, length, stride, initial, local, count",
    [
        (4, 4, 2, 1, 1, 3),
        pytest.param(4, 4, 4, 1, 2, 4, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, 0, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_nsa_equals_the_rule(size, length, stride, initial, local, count):
    query, key = oracle.heads(4, b=1, t=22, s=22)
    mask, stats = jax.jit(
        lambda q, k: at.nsa(
            q,
            k,
            block_shape=(4, size),
            budget=count,
            length=length,
            stride=stride,
            initial=initial,
            local=local,
        )
    )(query, key)
    kept = nsa_rule(query, key, count, size, length, stride, initial, local)
    causal = np.tril(np.ones((22, 22), bool))
    wanted = elements(oracle.repeat(kept, 4), size, 22) & causal
    np.testing.assert_array_equal(mask.to_mask(), wanted)
    truth = oracle.recall(query, key, causal, wanted)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)


@pytest.mark.slow
def test_nsa_takes_learned_keys():
    """Keys of an MLP choose; the MLP is position, GELU and two products."""
    query, key = oracle.heads(5, b=1, t=12, s=12)
    sizes = dict(block_shape=(1, 4), budget=2, length=4, stride=2, initial=0, local=1)

    @jax.jit
    def run(mlp):
        compress = lambda mlp: at.nsa_compress(key, mlp, length=4, stride=2)
        small, pull = jax.vjp(compress, mlp)
        mean = compress(None)
        masks = [at.nsa(query, key, k, **sizes)[0] for k in (None, mean, -mean)]
        return small, [m.to_mask() for m in masks], pull(jnp.ones_like(small))[0]

    mlp = at.nsa_compress_init(jax.random.key(0), head_dim=8, length=4)
    small, (default, mean, turned), grads = run(mlp)
    rows = np.float64(key)[:, 2:6, 1] + np.float64(mlp.position)
    inner = rows.reshape(1, 32) @ np.float64(mlp.w_in)
    inner *= 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    want = inner @ np.float64(mlp.w_out)
    np.testing.assert_allclose(small[:, 1, 1], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(default, mean)
    assert (mean != turned).any()
    assert all(np.abs(g).max() > 0 for g in grads)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(budget=2), "budget"),
        (dict(length=6), "length"),
        (dict(block_shape=(4, 6)), "block_shape"),
        (dict(compressed=jnp.zeros((1, 3, 2, 8))), "compressed"),
        (dict(local=0), "local"),
    ],
)
def test_nsa_arguments_that_are_refused(change, match):
    query, key = oracle.heads(6, b=1)
    call = dict(block_shape=(4, 4), budget=4, length=4, stride=4) | change
    with pytest.raises(ValueError, match=match):
        at.nsa(query, key, **call)
