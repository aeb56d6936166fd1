"""global_topk_masks: one threshold over all leaves, exact counts, ties in order."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax.masks import apply_masks, global_topk_masks

topk = jax.jit(global_topk_masks)


def flat(masks):
    return [np.asarray(mask).astype(int).tolist() for mask in jax.tree.leaves(masks)]


def sorted_masks(scores, count, where):
    """Largest first; ties by leaf, then by index; NaN and non-candidates never."""
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        joined = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores])
    allowed = np.concatenate([w.ravel() for w in where]) & ~np.isnan(joined)
    order = [i for i in np.argsort(-joined, kind="stable") if allowed[i]]
    mask = np.zeros(joined.size, bool)
    mask[order[:count]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    parts = np.split(mask, ends)
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def test_by_hand():
    # All scores, falling: 9 (b), 5 (a), 3 (b), 2 (a), 2 (b), 2 (b), 1 (a), -4 (b).
    # At a count of 5 the tie at 2 takes a's, then b's first.
    scores = {
        "a": jnp.array([2.0, 5.0, 1.0]),
        "b": jnp.array([[2.0, 9.0], [2.0, 3.0], [-4.0, jnp.nan]]),
    }
    for count, want in {
        0: [[0, 0, 0], [[0, 0], [0, 0], [0, 0]]],
        1: [[0, 0, 0], [[0, 1], [0, 0], [0, 0]]],
        4: [[1, 1, 0], [[0, 1], [0, 1], [0, 0]]],
        5: [[1, 1, 0], [[1, 1], [0, 1], [0, 0]]],
        6: [[1, 1, 0], [[1, 1], [1, 1], [0, 0]]],
        8: [[1, 1, 1], [[1, 1], [1, 1], [1, 0]]],
        9: [[1, 1, 1], [[1, 1], [1, 1], [1, 0]]],  # NaN is never marked
    }.items():
        assert flat(global_topk_masks(scores, count)) == want
        assert flat(topk(scores, jnp.int32(count))) == want


def test_ties_that_fill_some_leaves_part_of_one_and_none_of_the_rest():
    scores = (jnp.ones(2), jnp.ones((2, 2)), jnp.ones(3))
    assert flat(global_topk_masks(scores, 4)) == [[1, 1], [[1, 1], [0, 0]], [0, 0, 0]]
    assert flat(global_topk_masks(scores, 1)) == [[1, 0], [[0, 0], [0, 0]], [0, 0, 0]]


# By their bits: drawn as numbers, most are thrown away again for not being float16.
ENDS = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf], np.float16).view(np.uint16)
bits = st.one_of(st.integers(0, 2**16 - 1), st.sampled_from(ENDS.tolist()))
arrays = lambda shape: hnp.arrays(np.uint16, shape, elements=bits).map(
    lambda codes: codes.view(np.float16).astype(np.float32)
)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.tuples(arrays((5,)), arrays((3, 4)), arrays((1, 2))),
    mixed=st.booleans(),
    share=st.floats(0, 1),
    candidates=st.integers(0, 2**19 - 1),
)
def test_equals_a_stable_sort_of_everything(scores, mixed, share, candidates):
    bits = np.array([candidates >> i & 1 for i in range(19)], bool)
    where = (bits[:5], bits[5:17].reshape(3, 4), bits[17:].reshape(1, 2))
    want = sorted_masks(scores, round(19 * share), where)
    # The values are float16 exactly, and so are they in float32.
    given = [jnp.asarray(s) for s in scores]
    if mixed:
        given[1] = given[1].astype(jnp.float16)
    got = topk(tuple(given), jnp.int32(round(19 * share)), where=where)
    chex.assert_trees_all_equal(got, tuple(want))


def test_bfloat16_beside_float32_is_compared_exactly():
    # 1 + 2^-10 is no bfloat16: rounded to one it would tie with the first leaf's 1.
    scores = (jnp.array([1.0], jnp.bfloat16), jnp.array([1.0 + 2.0**-10]))
    assert flat(global_topk_masks(scores, 1)) == [[0], [1]]


def test_large_leaves_of_unlike_scales(key):
    sizes = {"a": (300, 401), "b": (70_001,), "c": (8, 16, 33)}
    scores = {
        name: jnp.exp(i * jax.random.normal(jax.random.fold_in(key, i), shape))
        for i, (name, shape) in enumerate(sizes.items())
    }
    everything = [np.ones(shape, bool) for shape in sizes.values()]
    for count in (1, 19_453, 190_000):
        want = sorted_masks(list(scores.values()), count, everything)
        got = topk(scores, jnp.int32(count))
        chex.assert_trees_all_equal(list(got.values()), want)


def test_holes_stay_and_the_tree_is_that_of_the_scores():
    scores = {"w": jnp.array([1.0, 2.0]), "b": optax.MaskedNode(), "n": None}
    masks = global_topk_masks(scores, 1)
    assert masks["b"] == optax.MaskedNode() and masks["n"] is None
    assert masks["w"].tolist() == [False, True]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    masks = global_topk_masks(jax.tree.map(jnp.abs, state), 4)
    assert sum(mask.sum() for mask in jax.tree.leaves(masks)) == 4
    apply_masks(state, masks)


def test_empty_leaves_and_empty_trees():
    assert flat(global_topk_masks([jnp.zeros((0, 2)), jnp.zeros(2)], 1)) == [[], [1, 0]]
    assert global_topk_masks({}, 0) == {}


def test_under_vmap_and_one_trace(key):
    scores = {"a": jax.random.normal(key, (3, 7)), "b": jnp.zeros((3, 2, 2))}
    chex.clear_trace_counter()
    f = jax.jit(
        chex.assert_max_traces(lambda s, c: jax.vmap(global_topk_masks)(s, c), n=1)
    )
    for counts in ([0, 5, 11], [2, 3, 99]):  # a traced count is clipped
        masks = f(scores, jnp.array(counts))
        kept = masks["a"].sum(1) + masks["b"].sum((1, 2))
        assert kept.tolist() == [min(count, 11) for count in counts]


def test_sharded_leaves_equal_the_unsharded(key):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    scores = [jax.random.normal(key, (64, 32)), jnp.round(jnp.ones((8, 16)))]
    sharded = [jax.device_put(leaf, spec) for leaf in scores]
    want, got = topk(scores, jnp.int32(400)), topk(sharded, jnp.int32(400))
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("count", [-1, 6])
def test_refuses_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"count must be in \[0, 5\], got {count}"):
        global_topk_masks({"a": jnp.zeros(3), "b": jnp.zeros(2)}, count)


@pytest.mark.parametrize(
    "where, message",
    [
        ({"a": jnp.ones(3, bool)}, r"at 'b', got only \['a'\]"),
        ({"a": jnp.ones(3, bool), "b": jnp.ones(3, bool)}, r"at 'b', got \(3,\)"),
    ],
)
def test_refuses_a_where_that_does_not_fit(where, message):
    with pytest.raises(ValueError, match=rf"where must have a leaf of .*{message}"):
        global_topk_masks({"a": jnp.zeros(3), "b": jnp.zeros(2)}, 1, where=where)


def test_refuses_integers():
    with pytest.raises(ValueError, match="scores must be floating, got int32 at 'a'"):
        global_topk_masks({"a": jnp.zeros(3, jnp.int32)}, 1)
