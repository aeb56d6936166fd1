"""What every selector reports: density against its budget, recall, work."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

T, SHAPE = 22, (4, 3)  # the last block of queries has 2, the last of keys 1
NQ, NK = 6, 8
CAUSAL = np.tril(np.ones((T, T), bool))
EVERY = np.ones((T, T), bool)
# By block of queries: the key blocks it may see, and those at its own positions.
LAST = [min(T, 4 * i + 4) - 1 for i in range(NQ)]
SEEN = np.array([j // 3 + 1 for j in LAST])
OWN = np.array([len(oracle.own(i, T, SHAPE)) for i in range(NQ)])


def blocks(count):
    """``count`` per query block: own ones in any case, no more than there are."""
    return np.minimum(SEEN, np.maximum(count, OWN))


def each(count):
    """``count`` per query, its own and past ones."""
    return np.minimum(np.arange(T) // 3 + 1, count)


def parts(first, rest, prompt=2):
    """``first`` of the prompt's blocks and ``rest`` of the others."""
    return np.minimum(np.minimum(SEEN, prompt), first) + np.minimum(
        np.maximum(SEEN - prompt, 0), rest
    )


def shards(local, stride, heads=4):
    """[heads, nq]: the last ``local``, and every ``stride``-th from the head's own."""
    kept = np.zeros((heads, NQ, NK), bool)
    for h, i, j in np.ndindex(kept.shape):
        near = j > 4 * i // 3 - local
        kept[h, i, j] = near or (j + h * max(1, stride // heads)) % stride == 0
    return (kept & (np.arange(NK) < SEEN[:, None])).sum(-1)


def gate():
    return at.seer_init(jax.random.key(0), heads=4, kv_heads=2, head_dim=8, gate_dim=6)


def centroids():
    means = np.random.default_rng(1).standard_normal((4, 3, 8))
    return jnp.float32(means / np.linalg.norm(means, axis=-1, keepdims=True))


def twilight(q, k):
    base, _ = at.pooled_blocks(q, k, block_shape=SHAPE, budget=5)
    return at.twilight(q, k, base, p=0.7)


class Case(NamedTuple):
    """A selector, and the blocks that its budget gives each query or query block."""

    select: Callable
    count: np.ndarray | None
    dense: np.ndarray


def case(name, count=None, dense=CAUSAL, after=(), **options):
    if dense is EVERY:
        options["expr"] = at.everything()
    select = functools.partial(getattr(at, name), block_shape=SHAPE, **options)
    return Case(lambda q, k: select(q, k, *(make() for make in after)), count, dense)


label = functools.partial(jnp.tile, jnp.arange(3), (4, 1))
predicted = functools.partial(at.sparsifiner_init, jax.random.key(0), length=T, rank=4)
CASES = {
    "pooled_blocks": case("pooled_blocks", blocks(3), budget=3),
    "pooled_blocks, share": case("pooled_blocks", blocks(4), budget=0.45),
    "pooled_blocks, tokens": case("pooled_blocks", blocks(2), budget=at.Tokens(8)),
    "pooled_blocks, one": case("pooled_blocks", blocks(1), budget=1),
    "moba": case("moba", each(3), budget=3),
    "moba, share": case("moba", each(2), budget=0.25),
    "nsa": case("nsa", each(3), budget=3, length=3, stride=3, local=1),
    "quest": case("quest", blocks(3), budget=3),
    "sparge": case("sparge", np.minimum(SEEN, 3), budget=3, similarity=-1.0),
    "seer": case("seer", blocks(3), budget=3, after=[gate]),
    "double_sparsity": case("double_sparsity", blocks(3), budget=3, after=[label]),
    "sparsifiner": case("sparsifiner", blocks(3), budget=3, after=[predicted]),
    "sparsed": case("sparsed", parts(1, 3), budget=4, prompt=6),
    "s2_shards": case("s2_shards", shards(2, 5), local=2, stride=5),
    "xattention": case(
        "xattention",
        np.minimum(SEEN, np.maximum(3, OWN + (np.arange(NQ) * 4 >= 3))),
        budget=3,
        stride=1,
    ),
    "flex_prefill": case("flex_prefill", alpha=0.6, last=5),
    "sample_attention": case(
        "sample_attention", dense=EVERY, alpha=0.6, window=3, stride=4
    ),
    "twilight": Case(twilight, None, CAUSAL),
    "routing": case("routing", dense=EVERY, after=[centroids]),
    "vertical_slash": case(
        "vertical_slash", dense=EVERY, vertical=3, slash=1, last=5, initial=1
    ),
}
BY_KEYS = ("routing", "sample_attention", "vertical_slash")
QUICK = ("moba", "s2_shards")


def marked(name):
    if name in QUICK:
        return name
    mark = pytest.mark.exhaustive if ", " in name else pytest.mark.slow
    return pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_density_is_the_budget_and_recall_the_dense_truth(name):
    select, count, dense = CASES[name]
    query, key = oracle.heads(sum(map(ord, name)), b=2, t=T, s=T)
    mask, stats = jax.jit(select)(query, key)
    elements = oracle.repeat(np.asarray(mask.to_mask()), 4)
    truth = oracle.recall(query, key, dense, elements)
    assert truth.shape == stats.recall.shape == stats.density.shape == (2, 4)
    np.testing.assert_allclose(stats.recall, truth, rtol=1e-5)
    work = oracle.repeat(np.asarray(mask.to_blocks()).mean((-2, -1)), 4)
    np.testing.assert_allclose(stats.work, np.broadcast_to(work, (2, 4)), rtol=1e-6)
    if name in BY_KEYS:
        np.testing.assert_allclose(stats.density, elements.mean((-2, -1)), rtol=1e-6)
    if count is not None:
        given = np.broadcast_to(count.mean(-1), (2, 4))
        np.testing.assert_allclose(stats.density * NK, given, rtol=1e-6)
    elif name == "vertical_slash":  # three keys and a block of three, which may overlap
        assert (stats.density * T <= 6).all() and (stats.density * T >= 6 - 3).all()
    elif name == "routing":  # three clusters of 7 queries and 7 keys
        assert (stats.density * T * T <= 3 * 7 * 7).all()


@pytest.mark.slow
def test_density_of_what_a_query_may_not_see_is_not_counted():
    """MoBA in documents of 5: of its two blocks those with a key of its own document.

    All queries are one block: what the first document's chose is listed for the
    second's too.
    """
    ids = jnp.array([0] * 5 + [1] * 5)
    query, key = oracle.heads(3, b=1, t=10, s=10, h=1, g=1)
    mask, stats = oracle.run(
        at.moba,
        query,
        key,
        block_shape=(10, 4),
        budget=2,
        expr=at.causal() & at.segments(ids),
    )
    seen = np.array([[i // 5 == j // 5 for j in range(10)] for i in range(10)])
    seen = np.stack([seen[:, j : j + 4].any(1) for j in range(0, 10, 4)], axis=1)
    means = oracle.pool(key, 4)[0, 0] @ np.asarray(query, np.float64)[0, :, 0].T
    count = 0
    for i in range(10):
        own = i // 4
        past = oracle.best(means[:own, i], 1)
        count += sum(seen[i, j] for j in {own, *past})
    np.testing.assert_allclose(stats.density, count / 30, rtol=1e-6)
    assert stats.work[0, 0] == mask.density
