"""Lists of blocks against masks in full: random expressions, traced contents, edges."""

import inspect
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention as at


def ranks(t, s):
    i, j = np.arange(t)[:, None], np.arange(s)[None]
    return i, j, i - j


def random_leaf(rng, t, s, b, h):
    """An expression and its mask, by the equation."""
    i, j, d = ranks(t, s)
    n, m = (int(x) for x in rng.integers(1, 9, 2))
    ids, key_ids = (np.sort(rng.integers(0, 4, (b, x)), -1) for x in (t, s))
    given = rng.random((1, h, t, s)) < rng.choice([0.02, 0.5, 0.98])
    below = rng.integers(0, s, b)
    per = below[:, None, None, None]
    leaves = [
        lambda: (at.causal(), d >= 0),
        lambda: (at.sliding_window(n), abs(d) < n),
        lambda: (at.sliding_window(n, m), (d < n) & (-d < m)),
        lambda: (at.strided(n), d % n == 0),
        lambda: (at.dilated(m, n), (abs(d) < m * n) & (d % n == 0)),
        lambda: (at.global_tokens(n), (i < n) | (j < n)),
        lambda: (at.block_diagonal(n), i // n == j // n),
        lambda: (at.prefix(jnp.asarray(below)), (j < per) | (d >= 0)),
        lambda: (at.keys_below(jnp.asarray(below)), j < per + 0 * i),
        lambda: (
            at.segments(ids, jnp.asarray(key_ids)),
            ids[:, None, :, None] == key_ids[:, None, None],
        ),
        lambda: (at.from_array(given), given),
        lambda: (at.everything(), d == d),
    ]
    return leaves[rng.integers(len(leaves))]()


def random_tree(rng, depth, *sizes):
    """An expression of up to so many operators over each other, and its mask."""
    kind = rng.integers(4) if depth else 0
    if kind == 0:
        return random_leaf(rng, *sizes)
    expr, mask = random_tree(rng, depth - 1, *sizes)
    if kind == 1:
        return ~expr, ~mask
    other, more = random_tree(rng, depth - 1, *sizes)
    return (expr & other, mask & more) if kind == 2 else (expr | other, mask | more)


def random_heads(rng, t, s, b, h):
    """Different expressions per head, none of which differs over heads itself."""
    pairs = [random_tree(rng, 2, t, s, b, 1) for _ in range(h)]
    masks = [np.broadcast_to(mask, (b, 1, t, s)) for _, mask in pairs]
    return at.per_head([expr for expr, _ in pairs]), np.concatenate(masks, 1)


def check_lists(mask, dense):
    """What a BlockMask promises of its lists, and that it is ``dense``."""
    (t, s), (bq, bk), (nq, nk) = mask.shape, mask.block_shape, mask.grid
    lead = np.broadcast_shapes(mask.kv_idx.shape[:2], ((1, 1) + dense.shape)[-4:-2])
    stored = mask.kv_idx, mask.kv_cnt, mask.kv_full
    idx, cnt, full = (np.broadcast_to(x, (*lead, *x.shape[2:])) for x in stored)
    dense = np.broadcast_to(dense, (*lead, t, s))
    listed = np.zeros((*idx.shape[:2], nq, nk), bool)
    for where in np.ndindex(cnt.shape):
        blocks = idx[where][: cnt[where]]
        assert (np.diff(blocks) > 0).all() and (blocks < nk).all()
        assert (idx[where][cnt[where] :] == (blocks[-1] if len(blocks) else 0)).all()
        assert not full[where][cnt[where] :].any()
        listed[where][blocks] = True
        for block, whole in zip(blocks, full[where], strict=False):
            q = where[2] * bq
            tile = dense[where[:2]][q : q + bq, block * bk : (block + 1) * bk]
            assert tile.all() or not whole
    outside = ~listed.repeat(bq, 2).repeat(bk, 3)[..., :t, :s]
    assert not (dense & outside).any()
    np.testing.assert_array_equal(np.broadcast_to(mask.to_mask(), dense.shape), dense)


def check_transposed(mask):
    """Against numpy: by (key block, query block), with the places they came from."""
    found = [np.asarray(x) for x in mask.transposed()]
    idx, cnt = np.asarray(mask.kv_idx), np.asarray(mask.kv_cnt)
    full, (nq, nk) = np.asarray(mask.kv_full), mask.grid
    for head in np.ndindex(cnt.shape[:2]):
        want = sorted(
            (idx[head][q, r], q, full[head][q, r], q * mask.capacity + r)
            for q in range(nq)
            for r in range(cnt[head][q])
        )
        q_idx, q_full, ptr, slot = (x[head] for x in found)
        assert ptr[0] == 0 and ptr[nk] == len(want) and len(ptr) == nk + 1
        got = [
            (k, q_idx[n], q_full[n], slot[n])
            for k in range(nk)
            for n in range(ptr[k], ptr[k + 1])
        ]
        assert got == want
        assert ((0 <= q_idx) & (q_idx < nq)).all()


SIZES = [(24, 24, (8, 8)), (23, 37, (5, 9)), (40, 9, (16, 4)), (1, 30, (1, 8))]


@pytest.mark.parametrize(
    "seed",
    [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))],
)
@pytest.mark.parametrize("t, s, block_shape", SIZES)
def test_random_expressions(t, s, block_shape, seed):
    """Of depth up to 4, with batch and heads; the lists too.

    Splash's masks have no ~, and lengths that a square of shards must divide.
    """
    rng = np.random.default_rng([seed, t])
    for make in (
        lambda: random_tree(rng, 4, t, s, 2, 3),
        lambda: random_heads(rng, t, s, 2, 3),
    ):
        expr, dense = make()
        want = np.broadcast_to(dense, (2, 3, t, s))
        np.testing.assert_array_equal(
            np.broadcast_to(expr.to_mask(t, s), want.shape), want
        )
        mask = at.block_mask(expr, t, s, block_shape=block_shape)
        check_lists(mask, dense)
        assert not mask.overflow.any()
        check_transposed(mask)


def test_by_hand():
    """Causal in a window of 3, six queries, blocks of 2 x 2.

    Rows 0-1 see keys 0..1, rows 2-3 keys 0..3, rows 4-5 keys 2..5; a diagonal block has
    a corner above the diagonal, the block below it lacks (i, j) = (3, 0), (5, 2).
    """
    mask = at.block_mask(at.sliding_window(3, 1), 6, 6, block_shape=(2, 2))
    assert mask.grid == (3, 3) and mask.capacity == 2
    np.testing.assert_array_equal(mask.kv_idx[0, 0], [[0, 0], [0, 1], [1, 2]])
    np.testing.assert_array_equal(mask.kv_cnt[0, 0], [1, 2, 2])
    assert not mask.kv_full.any() and int(mask.count) == 5
    np.testing.assert_allclose(mask.density, 5 / 9, rtol=1e-6)
    lists = mask.transposed()
    np.testing.assert_array_equal(lists.ptr[0, 0], [0, 2, 4, 5])
    np.testing.assert_array_equal(lists.q_idx[0, 0][:5], [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(lists.slot[0, 0][:5], [0, 2, 3, 4, 5])


def test_ragged_blocks_can_be_full():
    """Only the part inside the mask counts; the last row and column have one entry."""
    mask = at.block_mask(at.everything(), 5, 7, block_shape=(4, 3))
    assert mask.grid == (2, 3) and mask.kv_full.all() and (mask.kv_cnt == 3).all()
    mask = at.block_mask(at.causal(), 5, 7, block_shape=(4, 3))
    # Row 4 sees keys 0..4: of the blocks 0-2, 3-5 and 6, the first as a whole.
    np.testing.assert_array_equal(mask.kv_full[0, 0, 1], [True, False])


def test_nothing_is_an_empty_list():
    mask = at.block_mask(~at.everything(), 9, 9, block_shape=(4, 4))
    assert mask.capacity == 1 and not mask.kv_cnt.any() and not mask.kv_idx.any()
    assert not mask.to_mask().any() and float(mask.density) == 0
    check_transposed(mask)
    first = at.keys_below(0) | at.causal() & ~at.global_tokens(5)
    mask = at.block_mask(first, 9, 9, block_shape=(4, 4))  # query block 0 is empty
    check_lists(mask, first.to_mask(9, 9))
    check_transposed(mask)


def test_default_capacity_follows_static_numbers():
    """Not contents: other documents of equal shape must not compile again."""
    ids = np.zeros(64, int)
    window = at.sliding_window(9, 1)
    capacity = lambda expr: at.block_mask(expr, 64, 64, block_shape=(8, 8)).capacity
    assert (
        capacity(window) == 2 + 1 - 1 + 0 * 8
    )  # 8 queries and 8 keys before: 2 blocks
    assert capacity(window & at.segments(ids)) == 2
    assert capacity(window & at.segments(np.arange(64))) == 2
    assert capacity(at.segments(np.arange(64))) == 8
    assert capacity(at.per_head([window, at.sliding_window(17, 1)])) == 3
    assert capacity(at.sliding_window(jnp.array(9))) == 8
    assert capacity(window | at.from_array(np.zeros((64, 64), bool))) == 8


# --- traced contents ----------------------------------------------------------------


def document_mask(ids, w):
    return at.block_mask(
        at.causal() & at.segments(ids) & at.sliding_window(w),
        40,
        40,
        block_shape=(8, 8),
    )


def test_masks_inside_jit_equal_those_outside():
    """Segments, widths and lengths traced, one compilation for all of them."""
    traces = []

    @jax.jit
    def build(ids, w):
        traces.append(1)
        mask = document_mask(ids, w)
        return mask, mask.transposed(), mask.to_mask()

    rng = np.random.default_rng(0)
    for w in (3, 17, 40):
        ids = jnp.asarray(np.sort(rng.integers(0, 5, (2, 40)), -1))
        mask, lists, dense = build(ids, jnp.array(w))
        want = document_mask(ids, jnp.array(w))
        for got, plain in zip(
            jax.tree.leaves((mask, lists)),
            jax.tree.leaves((want, want.transposed())),
            strict=True,
        ):
            np.testing.assert_array_equal(got, plain)
        i, j, d = ranks(40, 40)
        same = np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None]
        np.testing.assert_array_equal(dense, (d >= 0) & (d < w) & same)
        check_lists(mask, dense)
        check_transposed(mask)
    assert len(traces) == 1


def test_vmap_and_scan():
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (3, 40)), -1))
    w = jnp.array(11)

    def build(x):
        mask = document_mask(x, w)
        return mask, mask.transposed()

    many = jax.jit(jax.vmap(build))(ids)
    scanned = jax.lax.scan(lambda c, x: (c, build(x)), 0, ids)[1]
    assert many[0].count.shape == (3,) and many[0].density.shape == (3,)
    for n in range(3):
        mask, lists = build(ids[n])
        for stacked, transposed in (many, scanned):
            for name in ("kv_idx", "kv_cnt", "kv_full", "overflow"):
                got = getattr(stacked, name)[n]
                np.testing.assert_array_equal(got, getattr(mask, name), name)
            for got, want in zip(transposed, lists, strict=True):
                np.testing.assert_array_equal(got[n], want)


def test_a_mask_is_an_argument_without_retrace():
    """flaxattention's is a static argument of jit: other contents compile again."""
    traces = []

    @jax.jit
    def count(mask):
        traces.append(1)
        return mask.count

    counts = []
    for seed in range(3):
        ids = jnp.sort(jax.random.randint(jax.random.key(seed), (40,), 0, 5))
        mask = at.block_mask(at.segments(ids) & at.causal(), 40, 40, block_shape=(8, 8))
        counts.append(int(count(mask)))
        assert counts[-1] == int(mask.kv_cnt.sum())
        given = jax.random.bernoulli(jax.random.key(seed), 0.02, (40, 40))
        count(at.BlockMask.from_mask(given, (8, 8)))
    assert len(traces) == 2 and len(set(counts)) > 1


# --- given masks and blocks ---------------------------------------------------------


@pytest.mark.parametrize("t, s, block_shape", SIZES)
def test_from_mask(t, s, block_shape):
    """Empty rows, empty columns, full blocks; concrete and traced alike."""
    rng = np.random.default_rng(t)
    mask = rng.random((2, 3, t, s)) < 0.1
    mask[:, :, : t // 2, : s // 2] = True
    mask[:, :, t // 3 : t // 2 + 1] = False
    mask[0, 1] = False
    found = at.BlockMask.from_mask(mask, block_shape)
    check_lists(found, mask)
    check_transposed(found)
    traced = jax.jit(lambda m: at.BlockMask.from_mask(m, block_shape))(mask)
    for got, want in zip(jax.tree.leaves(traced), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(got, want)
    plain = at.BlockMask.from_mask(mask[0, 0], block_shape)
    np.testing.assert_array_equal(plain.to_mask(), mask[0, 0])


def test_from_blocks():
    """Blocks where the expression allows nothing are dropped, full ones told."""
    blocks = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    mask = at.BlockMask.from_blocks(blocks, shape=(10, 11), block_shape=(4, 4))
    assert mask.expr is None and mask.kv_full.sum() == 5
    wide = blocks.repeat(4, 0).repeat(4, 1)[:10, :11]
    np.testing.assert_array_equal(mask.to_mask(), wide)
    check_transposed(mask)
    mask = at.BlockMask.from_blocks(
        blocks, shape=(10, 11), block_shape=(4, 4), expr=at.causal()
    )
    np.testing.assert_array_equal(mask.kv_cnt[0, 0], [1, 2, 0])
    np.testing.assert_array_equal(mask.kv_full[0, 0].sum(-1), [0, 1, 0])
    np.testing.assert_array_equal(mask.to_mask(), wide & np.tri(10, 11, dtype=bool))
    heads = np.stack([blocks, ~blocks])[None]
    build = jax.jit(
        lambda x: at.BlockMask.from_blocks(x, shape=(10, 11), block_shape=(4, 4))
    )
    np.testing.assert_array_equal(build(heads).to_blocks(), heads)


def test_capacity():
    """Too small: refused where that is known, else the last blocks are counted out."""
    ids = jnp.zeros(40, jnp.int32)
    causal = at.causal() & at.segments(ids)
    with pytest.raises(
        ValueError, match="capacity: got 4, needed at least 5, the most"
    ):
        at.block_mask(causal, 40, 40, block_shape=(8, 8), capacity=4)
    with pytest.raises(ValueError, match="capacity: got 0, needed at least 1"):
        at.block_mask(causal, 40, 40, block_shape=(8, 8), capacity=0)

    @jax.jit
    def build(ids):
        expr = at.causal() & at.segments(ids)
        return at.block_mask(expr, 40, 40, block_shape=(8, 8), capacity=3)

    mask = build(ids)
    # Lists of 1, 2, 3, 4, 5 blocks: 1 + 2 too many.
    np.testing.assert_array_equal(mask.overflow, [[3]])
    np.testing.assert_array_equal(mask.kv_cnt[0, 0], [1, 2, 3, 3, 3])
    np.testing.assert_array_equal(mask.kv_idx[0, 0, 4], [0, 1, 2])
    check_transposed(mask)
    fits = build(jnp.arange(40, dtype=jnp.int32) // 8)
    assert int(fits.overflow.sum()) == 0 and int(fits.count) == 5
    more = at.block_mask(causal, 40, 40, block_shape=(8, 8), capacity=99)
    assert more.capacity == 5  # there are no more key blocks


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: at.block_mask(at.causal(), 8, 8, block_shape=(4, 0)),
            r"block_shape: got \(4, 0\), needed two positive ints",
        ),
        (
            lambda: inspect.unwrap(at.block_mask)(np.ones((8, 8), bool), 8, 8),
            "expr: got ndarray, needed a mask expression; BlockMask.from_mask",
        ),
        (
            lambda: at.block_mask(at.segments(np.arange(9)), 8, 8),
            "query_ids: got 9 positions, needed 8, the queries",
        ),
        (
            lambda: at.BlockMask.from_mask(np.ones((8, 8)), (4, 4)),
            "mask: got dtype float64",
        ),
        (
            lambda: at.BlockMask.from_blocks(
                np.ones((2, 3), bool), shape=(8, 8), block_shape=(4, 4)
            ),
            r"block_map: got \(2, 3\) blocks, needed \(2, 2\)",
        ),
        (
            lambda: at.BlockMask.from_blocks(
                np.ones((1, 2, 2), bool), shape=(8, 8), block_shape=(4, 4)
            ),
            r"block_map: got dtype bool and shape \(1, 2, 2\)",
        ),
        (
            lambda: at.BlockMask.from_blocks(
                np.ones((2, 2), bool), shape=(8, 8), block_shape=(4, 4), capacity=1
            ),
            "capacity: got 1, needed at least 2",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- size ---------------------------------------------------------------------------


def test_a_long_sequence_is_quick_and_small():
    """131,072 tokens of packed documents: under 0.5 s, 100 MiB; dense has 16 GiB.

    FlexAttention's create_block_mask runs out of memory at 96,000 (pytorch#134756);
    splash takes 4 to 6 s at 32,768, four times as much for twice the length.
    Nothing is compiled. The time is the best of three, for machines at work.
    """
    length = 131_072
    ids = np.sort(np.random.default_rng(0).integers(0, 40, length))
    expr = at.causal() & at.sliding_window(4096) & at.segments(ids)
    took = []
    tracemalloc.start()
    for _ in range(3):
        start = time.process_time()
        mask = at.block_mask(expr, length, length)
        took.append(time.process_time() - start)
        if len(took) == 1:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert mask.capacity == 33 and 10_000 < int(mask.count) < 33 * 1024
    assert peak < 100 * 2**20
    assert min(took) < 0.5


def test_memory_inside_jit_is_that_of_the_blocks():
    """16,384 tokens, 128 x 128 blocks: 16,384 of these, not 268 million elements.

    Splash's and tokamax's dynamic masks, and MaxText's of DSA, begin with those.
    """
    length = 16_384

    def build(ids):
        expr = at.causal() & at.sliding_window(1024) & at.segments(ids)
        return at.block_mask(expr, length, length)

    ids = jax.ShapeDtypeStruct((length,), jnp.int32)
    memory = jax.jit(build).lower(ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**20


# --- what other libraries do wrong ---------------------------------------------------


def test_a_mask_of_other_lengths_has_its_own_counts():
    """FlexAttention's BlockMask._adjust counts indices below the *number* of blocks.

    A mask of 1024 that is not causal, adjusted to 640, raised IndexError there.
    """
    expr = ~at.sliding_window(300)  # keys far away, so lists start late
    long = at.block_mask(expr, 1024, 1024)
    short = at.block_mask(expr, 640, 640)
    i, j, d = ranks(640, 640)
    check_lists(short, abs(d) >= 300)
    np.testing.assert_array_equal(short.to_mask(), long.to_mask()[:640, :640])


def test_both_of_two_masks_stay_a_predicate():
    """Splash loses the function of causal & local, and reads tiles of it instead."""
    expr = at.causal() & at.sliding_window(300)
    lowered = expr.lower(4096, 4096)
    assert not lowered.dense and not lowered.rows and not lowered.cols
    mask = at.block_mask(expr, 4096, 4096)
    assert mask.capacity == 4  # 128 queries and 299 keys before them meet 4 blocks


def test_different_heads_keep_short_lists():
    """Splash visits all blocks as soon as two heads have different masks."""
    expr = at.causal() & at.per_head([at.sliding_window(w) for w in (64, 256)])
    mask = at.block_mask(expr, 2048, 2048)
    assert mask.capacity == 3
    np.testing.assert_array_equal(mask.kv_cnt[0, :, 8], [2, 3])


def test_documents_remove_blocks():
    """Splash and FlexAttention's users pay the full causal cost for packed rows."""
    ids = np.repeat(np.arange(8), 128)
    mask = at.block_mask(at.causal() & at.segments(ids), 1024, 1024)
    np.testing.assert_array_equal(mask.kv_cnt[0, 0], 1)
    np.testing.assert_array_equal(mask.kv_idx[0, 0, :, 0], np.arange(8))


def test_a_data_dependent_mask_inside_jit():
    """Splash's dynamic masks raise TracerBoolConversionError when made inside jit."""

    @jax.jit
    def build(scores):
        best = jax.lax.top_k(scores, 2)[1]
        blocks = jnp.any(best[..., None] == jnp.arange(4), -2)
        return at.BlockMask.from_blocks(blocks, shape=(32, 32), block_shape=(8, 8))

    scores = jax.random.normal(jax.random.key(0), (1, 3, 4, 4))  # a map per head
    mask = build(scores)
    assert (mask.kv_cnt == 2).all()
    best = np.sort(np.argsort(-np.asarray(scores), -1)[..., :2], -1)
    np.testing.assert_array_equal(mask.kv_idx[..., :2], best)


def test_transposed_lists_have_no_cap():
    """A column may be chosen by every row, whatever the capacity of the rows.

    And has those rows alone: fla's gradients of keys go through all later queries.
    """
    blocks = np.zeros((16, 16), bool)
    blocks[:, 3] = True
    mask = at.BlockMask.from_blocks(
        blocks, shape=(128, 128), block_shape=(8, 8), capacity=1
    )
    lists = mask.transposed()
    np.testing.assert_array_equal(lists.ptr[0, 0], [0] * 4 + [16] * 13)
    np.testing.assert_array_equal(lists.q_idx[0, 0], np.arange(16))


def test_windows_of_unequal_lengths():
    """tokamax's local_window_size broadcasts wrongly where t is not s."""
    mask = at.block_mask(at.sliding_window(5), 24, 48, block_shape=(8, 8))
    i, j, d = ranks(24, 48)
    check_lists(mask, abs(d) < 5)
