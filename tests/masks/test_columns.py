"""The largest of every column, against a stable sort in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks._columns import top_of_columns


def sorted_mask(scores, count, where):
    """Per column: candidates by falling score, ties by rising row."""
    mask = np.zeros(scores.shape, bool)
    for column in range(scores.shape[1]):
        rows = np.argsort(-scores[:, column], kind="stable")
        rows = [row for row in rows if where[row, column]]
        mask[rows[:count], column] = True
    return mask


@pytest.mark.parametrize("k", [5, 64, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_stable_sort(key, k, dtype, ties):
    scores = jnp.abs(jax.random.normal(key, (k, 7)))
    scores = (jnp.round(scores * 2) if ties else scores).astype(dtype)
    where = jax.random.bernoulli(jax.random.key(1), 0.7, scores.shape)
    top = jax.jit(top_of_columns)
    for count in (0, 1, k // 3, k):
        want = sorted_mask(np.asarray(scores, np.float32), count, np.asarray(where))
        np.testing.assert_array_equal(top(scores, jnp.int32(count), where), want)


def test_a_stack_is_searched_matrix_by_matrix(key):
    scores = jnp.abs(jax.random.normal(key, (2, 3, 32, 5)))
    where = scores > 0.1
    got = top_of_columns(scores, jnp.int32(4), where)
    one_by_one = lambda s, w: top_of_columns(s, jnp.int32(4), w)
    np.testing.assert_array_equal(got, jax.vmap(jax.vmap(one_by_one))(scores, where))
    assert (got.sum(-2) == 4).all()


def test_what_does_not_fit_the_cache_is_searched_in_strips(key):
    # 64 columns at a time; the second strip begins before the first ends.
    scores = jnp.round(jnp.abs(jax.random.normal(key, (8192, 80))) * 64)
    where = jax.random.bernoulli(jax.random.key(1), 0.7, scores.shape)
    count = jnp.arange(80, dtype=jnp.int32)[None] * 75  # the last keep all they have
    program = jax.jit(top_of_columns).lower(scores, count, where).compile()
    assert "dynamic-update-slice" in program.as_text()
    ranked = jnp.where(where, -scores, jnp.inf)
    order = np.argsort(np.asarray(ranked), axis=0, kind="stable")
    rank = np.argsort(order, axis=0)
    want = (rank < np.asarray(count)) & np.asarray(where)
    np.testing.assert_array_equal(program(scores, count, where), want)


def test_nan_ranks_last():
    scores = jnp.array([[jnp.nan], [1.0], [0.0]])
    for count, want in ((2, [False, True, True]), (3, [True, True, True])):
        got = top_of_columns(scores, jnp.int32(count), jnp.ones((3, 1), bool))
        assert got[:, 0].tolist() == want
