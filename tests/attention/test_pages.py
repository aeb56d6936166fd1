"""Summaries of pages: grown with a cache they equal those from scratch; selectors."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

sys.path.insert(0, str(Path(__file__).parent))
import _attention_oracle as oracle  # noqa: E402

SIZE, S = 3, 20  # the last of seven pages has two


def check(pages, key, lengths):
    """Every page of every sequence, in numpy."""
    mean = np.asarray(pages.mean)
    pages = jax.device_get(pages)
    for i, length in enumerate(lengths):
        for j in range(7):
            rows = np.asarray(key)[i, SIZE * j : min(SIZE * j + SIZE, length)]
            assert pages.count[i, j] == len(rows)
            if not len(rows):
                assert (pages.low[i, :, j] == np.inf).all()
                assert (pages.high[i, :, j] == -np.inf).all()
                assert (mean[i, :, j] == 0).all()
                continue
            np.testing.assert_array_equal(pages.low[i, :, j], rows.min(0))
            np.testing.assert_array_equal(pages.high[i, :, j], rows.max(0))
            np.testing.assert_allclose(
                mean[i, :, j], np.float64(rows).mean(0), rtol=1e-5, atol=1e-6
            )


def test_grows_as_from_scratch():
    """Sequences of 4 and 7 keys, then single ones, then nine, one beyond all pages."""
    _, key = oracle.heads(1, b=2, s=S)
    lengths, count = np.array([4, 7], np.int32), 0
    junk = jnp.where(
        jnp.arange(S)[:, None, None] < lengths[:, None, None, None], key, 99
    )

    @jax.jit
    def step(pages, new, start):
        nonlocal count
        count += 1
        return at.update_pages(pages, new, start, size=SIZE)

    taken = lambda n: jnp.stack([key[i, a : a + n] for i, a in enumerate(lengths)])
    pages = jax.jit(lambda n: at.summarize_pages(junk, SIZE, length=n))(lengths)
    check(pages, key, lengths)
    for _ in range(6):
        pages, lengths = step(pages, taken(1), lengths), lengths + 1
        check(pages, key, lengths)
    assert count == 1
    longer = jnp.concatenate([key, 99 + key], axis=1)
    more = jnp.stack([longer[i, a : a + 9] for i, a in enumerate(lengths)])
    check(step(pages, more, lengths), longer, [19, 21])


@pytest.mark.parametrize(
    "name", ["quest", pytest.param("moba", marks=pytest.mark.slow)]
)
def test_a_decoder_selects_by_them(name):
    """By the summary of 14 keys alone, whatever the cache holds: junk, and beyond."""
    query, key = oracle.heads(2, b=1, t=1, s=S)
    junk = jax.random.normal(jax.random.key(0), key.shape)
    options = dict(block_shape=(1, SIZE), budget=3)
    run = jax.jit(
        lambda k, n, pages: getattr(at, name)(
            query, k, offset=n, pages=pages, **options
        )[0].to_blocks()
    )
    pages = jax.jit(lambda n: at.summarize_pages(key, SIZE, length=n))(14)
    whole = run(key.at[:, 14:].set(0.0), 13, None)
    assert (whole.sum(-1) == 3).all()
    np.testing.assert_array_equal(run(junk, 13, pages), whole)
    assert (run(junk, 13, None) != whole).any()


@pytest.mark.slow
def test_an_empty_page_is_not_chosen():
    """Even where the expression allows it, and all bounds are negative."""
    query = -jnp.ones((1, 1, 1, 2))
    key = jnp.ones((1, 8, 1, 2))
    pages = at.summarize_pages(key, 2, length=4)
    many = at.summarize_pages(key[:, :7], 2, length=99)
    np.testing.assert_array_equal(many.count, [[2, 2, 2, 1]])
    mask = oracle.lists(
        at.quest,
        query,
        key,
        block_shape=(1, 2),
        budget=3,
        pages=pages,
        expr=at.everything(),
        offset=3,
    )
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], [[1, 1, 0, 0]])


def test_what_does_not_fit_is_refused():
    query, key = oracle.heads(3, b=1, t=1, s=S)
    pages = at.summarize_pages(key, SIZE)
    for select in (at.quest, at.moba):
        with pytest.raises(ValueError, match="pages: got shape"):
            select(query, key, block_shape=(1, 4), budget=2, pages=pages)
    with pytest.raises(ValueError, match="beside pages"):
        at.update_pages(pages, key[:, :1, :1], 0, size=SIZE)
    with pytest.raises(ValueError, match="size"):
        at.summarize_pages(key, 0)
    with pytest.raises(ValueError, match="key: got shape"):
        at.update_pages(pages, key[0], 0, size=SIZE)
