"""Mask expressions against their equations in numpy, and against peers' defects."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at

T, S = 11, 14  # unlike each other, and no multiple of anything
I, J = np.arange(T)[:, None], np.arange(S)[None]
D = I - J
IDS = np.array([0, 0, 0, 1, 1, 4, 4, 4, 4, 9, 9])
KEY_IDS = np.array([0, 0, 1, 1, 1, 1, 3, 3, 4, 4, 9, 9, 9, 9])

EQUATIONS = {
    "everything": (at.everything(), np.ones((T, S), bool)),
    "causal": (at.causal(), D >= 0),
    "window": (at.sliding_window(3), abs(D) < 3),
    "one-sided": (at.sliding_window(3, 1), (D >= 0) & (D < 3)),
    "wider ahead": (at.sliding_window(2, 5), (-D < 5) & (D < 2)),
    "strided": (at.strided(4), D % 4 == 0),
    "wide stride": (at.strided(9), D % 9 == 0),
    "stride 1": (at.strided(1), np.ones((T, S), bool)),
    "global": (at.global_tokens(3), (I < 3) | (J < 3)),
    "below": (at.keys_below(5), J < 5 + 0 * I),
    "segments": (at.segments(IDS, KEY_IDS), IDS[:, None] == KEY_IDS),
    "diagonal": (at.block_diagonal(4), I // 4 == J // 4),
    "dilated": (at.dilated(3, 2), (abs(D) < 5) & (D % 2 == 0)),
    "dilated far": (at.dilated(2, 8), (abs(D) < 16) & (D % 8 == 0)),
    "dilated by 1": (at.dilated(7, 1), abs(D) < 7),
    "prefix": (at.prefix(4), (J < 4) | (D >= 0)),
    "array": (at.from_array(D % 3 == 1), D % 3 == 1),
    "array with full blocks": (at.from_array(D > 2), D > 2),
    "function": (at.from_function(lambda b, h, i, j: i * j < 20), I * J < 20),
    "and": (at.causal() & at.strided(3), (D >= 0) & (D % 3 == 0)),
    "or": (at.causal() | at.strided(3), (D >= 0) | (D % 3 == 0)),
    "not": (~at.sliding_window(3), abs(D) >= 3),
    "nothing": (~at.everything(), np.zeros((T, S), bool)),
    "or everything": (at.causal() | at.everything(), np.ones((T, S), bool)),
    "and everything": (at.everything() & at.causal(), D >= 0),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_is_its_equation(name):
    """As a mask, by blocks of three shapes, and shifted to a part of itself.

    LongT5's windows are whole blocks unless masked once more; cuDNN's look back alone.
    """
    expr, mask = EQUATIONS[name]
    np.testing.assert_array_equal(expr.to_mask(T, S), mask)
    for block_shape in ((4, 4), (3, 5), (1, 16)):
        found = at.block_mask(expr, T, S, block_shape=block_shape)
        np.testing.assert_array_equal(found.to_mask(), mask)
    part = expr.shift(2, 3)
    np.testing.assert_array_equal(part.to_mask(7, 6), mask[2:9, 3:9])
    found = at.block_mask(part, 7, 6, block_shape=(2, 3))
    np.testing.assert_array_equal(found.to_mask(), mask[2:9, 3:9])


def test_causal_by_hand():
    np.testing.assert_array_equal(
        at.causal().to_mask(3, 3), [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    )


def test_each_status_is_as_sharp_as_it_can_be():
    """A block listed has an allowed element; full ones, and no others, are full.

    Where it is one pattern, intervals lose nothing; blocks 3 x 4 meet each differently.
    """
    for name, (expr, mask) in EQUATIONS.items():
        if name in ("and", "or"):
            continue
        found = at.block_mask(expr, T, S, block_shape=(3, 4))
        padded = np.full((12, 16), np.nan)
        padded[:T, :S] = mask
        tiles = padded.reshape(4, 3, 4, 4)
        listed = np.nanmax(tiles, (1, 3)) == 1
        full = np.nanmin(tiles, (1, 3)) == 1
        np.testing.assert_array_equal(found.to_blocks()[0, 0], listed, name)
        assert found.kv_full.sum() == full.sum(), name


def test_per_head_and_per_batch():
    widths = jnp.array([1, 4])
    lengths = jnp.array([3, 14])
    expr = at.per_head([at.sliding_window(2), at.causal(), at.strided(5)])
    expr = expr & at.keys_below(lengths) & at.sliding_window(widths)
    heads = np.stack([abs(D) < 2, D >= 0, D % 5 == 0])[None]
    batch = np.stack([(J < 3) & (abs(D) < 1), (J < 14) & (abs(D) < 4)])[:, None]
    np.testing.assert_array_equal(expr.to_mask(T, S), heads & batch)
    found = at.block_mask(expr, T, S, block_shape=(4, 3))
    assert found.kv_idx.shape[:2] == (2, 3)
    np.testing.assert_array_equal(found.to_mask(), heads & batch)


def test_alike_heads_are_stacked():
    """The predicate is that of one head; numbers that differ come per head."""

    def one(w, stride, ids):
        return at.sliding_window(w) & at.strided(stride) & at.segments(ids, KEY_IDS)

    heads = [one(2, 3, IDS), one(5, 2, IDS), one(3, 3, IDS[::-1].copy())]
    expr = at.per_head(heads)
    mask = np.stack([e.to_mask(T, S) for e in heads])[None]
    np.testing.assert_array_equal(expr.to_mask(T, S), mask)
    lowered = expr.lower(T, S)
    # -w < i - j, i - j < w; i % s, segment: none of them a flag
    assert [len(x) for x in lowered[1:]] == [2, 2, 2, 0]
    assert all(x.shape == (1, 3) for x in lowered.scalars)
    # Unlike ones: one flag for each kind, and no numbers, which are constants here.
    unlike = at.per_head([at.causal(), at.strided(3), at.causal()]).lower(T, S)
    assert [len(x) for x in unlike[1:]] == [1, 1, 2, 0]
    assert len(at.per_head([at.causal(), at.causal()]).lower(T, S).scalars) == 0
    assert at.per_head([at.causal(), at.causal()]).to_mask(T, S).shape == (1, 2, T, S)


def test_random_blocks():
    """Each block of queries has ``count`` blocks of keys; a shift sees the same."""
    keys = jax.random.split(jax.random.key(1), 2)
    expr = at.per_head([at.random_blocks(k, 3, block_shape=(2, 4)) for k in keys])
    mask = np.asarray(expr.to_mask(16, 40))
    tiles = mask.reshape(2, 8, 2, 10, 4)
    assert (tiles.any((2, 4)) == tiles.all((2, 4))).all()
    assert (tiles.all((2, 4)).sum(-1) == 3).all()
    assert (mask[0, 0] != mask[0, 1]).any()
    for block_shape in ((2, 4), (4, 8), (3, 5), (1, 2)):
        found = at.block_mask(expr, 16, 40, block_shape=block_shape)
        np.testing.assert_array_equal(found.to_mask(), mask)
    aligned = at.block_mask(expr, 16, 40, block_shape=(2, 4))
    assert (aligned.kv_cnt == 3).all() and (aligned.kv_full.sum(-1) == 3).all()
    coarse = at.block_mask(expr, 16, 40, block_shape=(4, 8)).to_blocks()
    np.testing.assert_array_equal(coarse, mask.reshape(1, 2, 4, 4, 5, 8).any((3, 5)))
    part = at.block_mask(expr.shift(5), 7, 40, block_shape=(2, 4))
    np.testing.assert_array_equal(part.to_mask(), mask[:, :, 5:12])
    everywhere = at.random_blocks(keys[0], 99, block_shape=(2, 4))
    assert everywhere.to_mask(6, 9).all()
    raw = at.random_blocks(jax.random.PRNGKey(3), 1, block_shape=(2, 4))
    typed = at.random_blocks(jax.random.key(3), 1, block_shape=(2, 4))
    np.testing.assert_array_equal(raw.to_mask(16, 40), typed.to_mask(16, 40))


def test_function_of_heads_and_its_bounds():
    """Bounds are believed, and asked instead of the function."""
    asked = []

    def fn(b, h, i, j):
        asked.append(1)
        return (i + h >= j) & (b < 2)

    def bounds(b, h, i_low, i_high, j_low, j_high):
        return (i_high + h >= j_low) & (b < 2), (i_low + h >= j_high) & (b < 2)

    expr = at.from_function(fn, bounds, batch=3, heads=2)
    h, b = np.arange(2)[:, None, None], np.arange(3)[:, None, None, None]
    mask = (I + h >= J) & (b < 2)
    found = at.block_mask(expr, T, S, block_shape=(4, 4))
    assert not asked
    np.testing.assert_array_equal(found.to_mask(), mask)
    slow = at.block_mask(
        at.from_function(fn, batch=3, heads=2), T, S, block_shape=(4, 4)
    )
    for name in ("kv_idx", "kv_cnt", "kv_full"):
        np.testing.assert_array_equal(getattr(slow, name), getattr(found, name), name)
    assert not (expr & at.causal()).lowers
    assert not at.per_head([at.causal(), expr.shift(1)]).lowers
    assert (at.strided(2) | ~at.causal()).lowers


def test_traced_shift_of_every_kind_of_content():
    """One compiled function for every step of a decoder."""
    given = np.random.default_rng(0).random((1, 2, T, S)) < 0.5
    expr = (
        at.causal() & at.segments(IDS, KEY_IDS)
        | at.strided(3) & at.from_array(given)
        | at.dilated(2, 3)
        | at.random_blocks(jax.random.key(0), 1, block_shape=(2, 3))
        | at.from_function(lambda b, h, i, j: i + j == 9)
        | at.block_diagonal(3) & at.global_tokens(2)
    )
    whole = np.asarray(expr.to_mask(T, S))

    traces = []

    @jax.jit
    def step(start):
        traces.append(1)
        part = expr.shift(start)
        mask = at.block_mask(part, 2, S, block_shape=(1, 4))
        return mask.to_mask(), part.to_mask(2, S)

    for start in (0, 4, T - 2):
        for got in step(start):
            np.testing.assert_array_equal(got, whole[..., start : start + 2, :])
    starts = jnp.array([1, 5, 3])  # of each entry of the batch
    for got in step(starts):
        for b, start in enumerate(starts):
            np.testing.assert_array_equal(got[b], whole[0, :, start : start + 2])
    assert len(traces) == 2  # of a number, of an array


def test_shifts_add_up():
    both = at.causal().shift(2, 1).shift(1, 2)
    np.testing.assert_array_equal(both.to_mask(4, 6), at.causal().to_mask(4, 6))
    inner = (at.causal().shift(3) & at.strided(2)).shift(1)
    mask = (I + 4 >= J) & ((I + 1 - J) % 2 == 0)
    np.testing.assert_array_equal(inner.to_mask(T, S), mask)


def test_predicates_hash_by_structure():
    """Equal ones hit jit's cache although the arrays are others."""
    one = at.causal() & at.segments(IDS, KEY_IDS)
    other = at.causal() & at.segments(IDS[::-1].copy(), KEY_IDS)
    assert one.lower(T, S).predicate == other.lower(T, S).predicate
    assert hash(one.lower(T, S).predicate) == hash(other.lower(T, S).predicate)
    wider = at.sliding_window(2) & at.segments(IDS, KEY_IDS)
    assert one.lower(T, S).predicate != wider.lower(T, S).predicate


def test_lowered_predicate_by_tiles():
    """As a kernel calls it: on a part of each operand, for one head."""
    expr = at.per_head([at.causal(), at.strided(2) & at.segments(IDS, KEY_IDS)])
    lowered = expr.lower(T, S)
    whole = expr.to_mask(T, S)
    assert not lowered.dense
    for head in range(2):
        one = lambda x, h=head: x[0, min(h, x.shape[1] - 1)]
        got = lowered.predicate(
            jnp.arange(4, 8, dtype=jnp.int32)[:, None],
            jnp.arange(5, 10, dtype=jnp.int32)[None],
            tuple(one(x)[4:8, None] for x in lowered.rows),
            tuple(one(x)[None, 5:10] for x in lowered.cols),
            tuple(one(x) for x in lowered.scalars),
            (),
        )
        np.testing.assert_array_equal(got, whole[0, head, 4:8, 5:10])


def test_an_expression_is_a_pytree():
    ids = jnp.asarray(IDS)
    expr = at.per_head([at.segments(ids, KEY_IDS) & at.sliding_window(2), at.causal()])
    leaves, tree = jax.tree.flatten(expr)
    assert [leaf.shape for leaf in leaves] == [(1, 1, T), (1, 1, S)]  # no ints
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again.to_mask(T, S), expr.to_mask(T, S))
    # Anything may stand in a leaf's place for a while, as in vmap's in_axes.
    axes = jax.tree.map(lambda _: None, expr)
    assert jax.tree.structure(axes, is_leaf=lambda x: x is None) == tree
    assert jax.tree.leaves(jax.tree.map(lambda _: 0, expr)) == [0, 0]


BAD = [
    (lambda: at.sliding_window(0), "w: got 0, needed at least 1"),
    (lambda: at.sliding_window(3, 0), "ahead: got 0, needed at least 1"),
    (lambda: at.sliding_window(jnp.array([2, 0])), "w: got .*needed at least 1"),
    (lambda: at.sliding_window(2.5), "w: got 2.5, needed an int"),
    (lambda: at.keys_below(jnp.zeros((1, 2, 3), jnp.int32)), r"n: got shape \(1, 2, 3"),
    (lambda: at.strided(0), "s: got 0, needed at least 1"),
    (lambda: at.global_tokens(-1), "n: got -1, needed at least 0"),
    (lambda: at.dilated(0, 2), "window: got 0"),
    (lambda: at.dilated(2, -1), "dilation: got -1"),
    (lambda: at.block_diagonal(0), "size: got 0"),
    (lambda: at.random_blocks(jax.random.key(0), 0, block_shape=(2, 2)), "count: got"),
    (
        lambda: at.random_blocks(jax.random.key(0), 1, block_shape=(2, 0)),
        r"block_shape: got \(2, 0\)",
    ),
    (
        lambda: at.random_blocks(
            jax.random.split(jax.random.key(0)), 1, block_shape=(2, 2)
        ),
        r"key: got shape \(2,\), needed one key",
    ),
    (lambda: at.from_array(jnp.ones((3, 3))), "mask: got dtype float32"),
    (lambda: at.from_array(jnp.ones((2, 3, 3), bool)), r"shape \(2, 3, 3\), needed"),
    (lambda: at.segments(jnp.ones(3)), "query_ids: got dtype float32"),
    (lambda: at.segments(IDS, IDS[None, None]), "key_ids: got dtype int64 and shape"),
    (lambda: at.segments(IDS).to_mask(T, S), r"key_ids is None\): got 11 .* needed 14"),
    (lambda: at.segments(IDS).to_mask(T + 1, T), "query_ids: got 11 .* needed 12"),
    (lambda: at.segments(IDS, IDS).to_mask(T, S), "key_ids: got 11 .* needed 14"),
    (
        lambda: at.segments(IDS).shift(5).to_mask(7, 5),
        "got 11 positions, needed 5 to 12",
    ),
    (lambda: at.segments(IDS).shift(-1).to_mask(2, 2), "needed -1 to 1"),
    (lambda: at.from_array(D > 0).to_mask(T, T), "mask: got 14 positions, needed 11"),
    (lambda: at.per_head([]), "exprs: got none"),
    (
        lambda: inspect.unwrap(at.per_head)([at.causal(), jnp.ones(3)]),
        "for head 1, needed an expression",
    ),
    (
        lambda: at.per_head([at.per_head([at.causal()])]),
        "head 0 differs over heads itself",
    ),
    (
        lambda: at.per_head([at.from_array(np.ones((1, 2, 3, 3), bool))]),
        "head 0 differs over heads itself",
    ),
    (
        lambda: (
            at.per_head([at.causal()] * 3) & at.per_head([at.causal()] * 2)
        ).to_mask(3, 3),
        "per_head: got 2 expressions, needed 3",
    ),
    (lambda: at.from_function(lambda b, h, i, j: i, heads=0), "heads: got 0"),
    (
        lambda: at.block_mask(at.from_function(lambda b, h, i, j: i + j), 3, 3),
        "fn: got a result of int32, needed bool",
    ),
    (lambda: at.causal().to_mask(0, 3), "t, s: got 0 and 3, needed positive"),
    (lambda: at.block_mask(at.causal(), 3, -1), "t, s: got 3 and -1"),
]


@pytest.mark.parametrize("make, message", BAD)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_expressions_compose():
    with pytest.raises(TypeError, match="unsupported operand"):
        at.causal() & True
    with pytest.raises(TypeError, match="unsupported operand"):
        at.causal() | jnp.ones((3, 3), bool)
