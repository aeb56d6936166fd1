"""topk_mask against a stable sort in numpy; nm_mask group by group."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax.masks import nm_mask, topk_mask

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
topk = jax.jit(topk_mask)
topk_by_magnitude = jax.jit(functools.partial(topk_mask, by_magnitude=True))


def sorted_mask(scores, count, where=None):
    """Largest first, NaN last, ties by lowest flat index; candidates only."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    keep = np.ones(flat.size, bool) if where is None else np.asarray(where).ravel()
    order = np.lexsort((np.arange(flat.size), -np.nan_to_num(flat, nan=-np.inf)))
    order = sorted(order, key=lambda i: bool(np.isnan(flat[i])))  # stable
    order = [i for i in order if keep[i]]
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(scores))


floats = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, np.inf, -np.inf]),
)


@settings(max_examples=60, deadline=None)
@given(
    scores=hnp.arrays(
        np.float32, st.sampled_from([(1,), (17,), (3, 5)]), elements=floats
    ),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0, 1),
    candidates=st.integers(0, 2**17 - 1),
)
def test_topk_equals_a_stable_sort(scores, dtype, share, candidates):
    with np.errstate(over="ignore"):
        scores = jnp.asarray(scores).astype(dtype)
    count = round(share * scores.size)
    where = np.array([candidates >> i & 1 for i in range(scores.size)], bool)
    where = where.reshape(scores.shape)
    oracle = np.asarray(scores.astype(jnp.float32))
    got = topk(scores, jnp.int32(count))
    np.testing.assert_array_equal(got, sorted_mask(oracle, count))
    got = topk(scores, jnp.int32(count), where=where)
    np.testing.assert_array_equal(got, sorted_mask(oracle, count, where))
    got = topk_by_magnitude(scores, jnp.int32(count), where=where)
    np.testing.assert_array_equal(got, sorted_mask(np.abs(oracle), count, where))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["smooth", "ties", "constant", "heavy tail"])
def test_topk_large_enough_to_sample(key, dtype, kind):
    scores = jax.random.normal(key, (401, 503), jnp.float32)
    if kind == "ties":
        scores = jnp.round(scores)
    if kind == "constant":
        scores = jnp.zeros_like(scores)
    if kind == "heavy tail":
        scores = jnp.exp(20 * scores)
    scores = scores.astype(dtype)
    flat = np.asarray(scores.astype(jnp.float32)).ravel()
    order = np.argsort(-flat, kind="stable")
    for count in (0, 1, 20_170, 100_000, flat.size - 1, flat.size):
        want = np.zeros(flat.size, bool)
        want[order[:count]] = True
        got = np.asarray(topk(scores, jnp.int32(count)))
        np.testing.assert_array_equal(got.ravel(), want)
    order = np.argsort(-np.abs(flat), kind="stable")
    got = topk_by_magnitude(scores, jnp.int32(20_170))
    want = np.isin(np.arange(flat.size), order[:20_170])
    np.testing.assert_array_equal(np.ravel(got), want)


def test_topk_float64():
    with jax.enable_x64(True):
        scores = jnp.array([1.0, 1.0 + 1e-12, -3.0, 1.0])
        assert scores.dtype == jnp.float64
        np.testing.assert_array_equal(topk_mask(scores, 2), [True, True, False, False])


def test_topk_nan_is_marked_only_where_nothing_else_is_left():
    scores = jnp.array([jnp.nan, -jnp.inf, 2.0, -jnp.nan])
    assert topk_mask(scores, 2).tolist() == [False, True, True, False]
    assert topk_mask(scores, 3).tolist() == [True, True, True, False]


def test_topk_under_vmap_and_one_trace(key):
    scores = jax.random.normal(key, (5, 40))
    counts = jnp.arange(5, dtype=jnp.int32) * 10
    chex.clear_trace_counter()
    f = jax.jit(chex.assert_max_traces(lambda s, c: jax.vmap(topk_mask)(s, c), n=1))
    for shift in range(2):
        got = f(scores, jnp.roll(counts, shift))
        assert got.sum(1).tolist() == jnp.roll(counts, shift).tolist()
    for row, count in zip(scores, counts, strict=True):
        np.testing.assert_array_equal(
            jax.vmap(topk_mask, (0, None))(row[None], count)[0], topk(row, count)
        )


def test_topk_on_a_sharded_array_equals_the_unsharded(key):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    scores = jax.random.normal(key, (256, 1024))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    got = topk(jax.device_put(scores, spec), jnp.int32(1234))
    np.testing.assert_array_equal(got, topk(scores, jnp.int32(1234)))


def test_topk_has_no_gradient(key):
    x = jax.random.normal(key, (8,))
    grad = jax.grad(lambda x: jnp.where(topk_mask(jnp.abs(x), 3), x, 0).sum())(x)
    np.testing.assert_array_equal(grad, topk_mask(jnp.abs(x), 3).astype(x.dtype))


def test_topk_orders_subnormals():
    scores = jnp.array([0.0, 1e-45, -1e-45, 3e-45, -0.0], jnp.float32)
    for count, want in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 3, 4])):
        assert np.flatnonzero(topk_mask(scores, count)).tolist() == want


def test_topk_of_nothing():
    assert topk_mask(jnp.zeros((0, 3)), 0).shape == (0, 3)


@pytest.mark.parametrize("count", [-1, 4])
def test_topk_refuses_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"count must be in \[0, 3\], got {count}"):
        topk_mask(jnp.zeros(3), count)


def test_topk_refuses_other_shapes_of_where():
    with pytest.raises(ValueError, match="where must be shaped like scores"):
        topk_mask(jnp.zeros(3), 1, where=jnp.zeros(4, bool))


def test_topk_refuses_an_eight_bit_float():
    with pytest.raises(ValueError, match="scores must be float32.*float8_e4m3fn"):
        topk_mask(jnp.zeros(3, jnp.float8_e4m3fn), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (0, 2), (2, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_nm_keeps_n_of_each_group(key, dtype, n, m, axis):
    scores = jnp.round(2 * jax.random.normal(key, (16, 24, 8))).astype(dtype)
    mask = jax.jit(functools.partial(nm_mask, n=n, m=m, axis=axis))(scores)
    moved = lambda a: np.moveaxis(np.asarray(a), -2 if axis is None else axis, -1)
    groups = moved(mask).reshape(-1, m)
    values = moved(scores.astype(jnp.float32)).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    for row, kept in zip(values[:40], groups, strict=False):
        np.testing.assert_array_equal(kept, sorted_mask(row, n))


def test_nm_default_axis_is_the_input_of_a_flax_kernel(key):
    # JaxPruner groups along the output axis by default, which no kernel can use.
    kernel = jax.random.normal(key, (32, 6))
    mask = nm_mask(jnp.abs(kernel), 2, 4)
    assert (mask.reshape(8, 4, 6).sum(1) == 2).all()
    assert nm_mask(jnp.arange(4.0), 1, 4).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "n, m, axis, message",
    [
        (3, 2, 0, "n and m must satisfy.*got 3:2"),
        (-1, 2, 0, "got -1:2"),
        (0, 0, 0, "got 0:0"),
        (1, 4, 0, r"m must divide the size of axis 0, 6 .*got m=4"),
        (1, 2, 2, r"axis must exist in shape \(6, 2\), got 2"),
    ],
)
def test_nm_refuses(n, m, axis, message):
    with pytest.raises(ValueError, match=message):
        nm_mask(jnp.zeros((6, 2)), n, m, axis)
