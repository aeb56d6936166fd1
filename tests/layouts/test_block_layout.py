"""BlockLayout: invariants, round trips, edges, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from sparsejax.layouts import (
    BlockLayout,
    check_layout,
    gather_blocks,
    scatter_blocks,
    transpose_blocks,
)


@st.composite
def masks(draw):
    kb, nb = draw(st.sampled_from([(1, 1), (6, 1), (3, 5)]))
    bits = draw(st.lists(st.booleans(), min_size=kb * nb, max_size=kb * nb))
    return np.array(bits, bool).reshape(kb, nb)


@settings(max_examples=6, deadline=None)
@given(masks(), *[st.sampled_from(some) for some in ((0, 3), (0, 5), (0, 7))])
def test_round_trips(mask, spare, short_k, short_n):
    """mask -> layout -> mask; dense -> blocks -> dense; transpose twice."""
    block_shape = (8, 16)
    shape = (mask.shape[0] * 8 - short_k, mask.shape[1] * 16 - short_n)
    count = int(mask.sum())
    layout = BlockLayout.from_mask(
        mask, block_shape, capacity=count + spare, shape=shape
    )
    check_layout(layout)
    np.testing.assert_array_equal(layout.to_mask(), mask)
    assert int(layout.count) == count and layout.capacity == count + spare
    places = list(zip(*np.nonzero(mask.T), strict=True))  # by (column, row)
    assert places == [
        (int(c), int(r))
        for c, r in zip(layout.cols[:count], layout.rows[:count], strict=True)
    ]
    ptr = np.concatenate([[0], np.cumsum(mask.sum(0))])
    np.testing.assert_array_equal(layout.column_pointers(), ptr)

    w = np.arange(1.0, shape[0] * shape[1] + 1, dtype=np.float32).reshape(shape)
    kept = np.kron(mask, np.ones(block_shape))[: shape[0], : shape[1]]
    blocks = gather_blocks(jnp.asarray(w), layout)
    assert blocks.shape == layout.blocks_shape
    np.testing.assert_array_equal(scatter_blocks(blocks, layout), w * kept)
    np.testing.assert_allclose(layout.density, kept.mean(), rtol=1e-6)
    assert not np.asarray(blocks)[count:].any()

    blocks_t, layout_t = transpose_blocks(blocks, layout)
    check_layout(layout_t)
    assert layout_t.shape == shape[::-1] and layout_t.block_shape == (16, 8)
    np.testing.assert_array_equal(scatter_blocks(blocks_t, layout_t), (w * kept).T)
    blocks_2, layout_2 = transpose_blocks(blocks_t, layout_t)
    np.testing.assert_array_equal(blocks_2, blocks)
    np.testing.assert_array_equal(layout_2.rows, layout.rows)


def test_random_has_the_exact_count():
    for density in (0.0, 0.1, 0.5, 1.0):
        layout = BlockLayout.random(
            jax.random.key(0), (4096, 4096), (128, 128), density=density
        )
        check_layout(layout)
        assert int(layout.count) == layout.capacity == round(density * 1024)


def test_built_inside_jit_and_stacked():
    mask = np.eye(4, dtype=bool)
    build = jax.jit(lambda m: BlockLayout.from_mask(m, (8, 8), capacity=6))
    np.testing.assert_array_equal(build(mask).to_mask(), mask)
    assert build(~mask[:, :]).capacity == 6
    stacked = jax.vmap(lambda m: BlockLayout.from_mask(m, (8, 8), capacity=6))(
        jnp.stack([mask, mask[::-1]])
    )
    assert stacked.capacity == 6
    np.testing.assert_array_equal(stacked.count, [4, 4])
    np.testing.assert_array_equal(stacked.to_mask()[1], mask[::-1])
    np.testing.assert_array_equal(stacked.density, [0.25, 0.25])


def test_contents_are_traced():
    """A new topology of equal capacity is the same program."""
    traces = []

    @jax.jit
    def run(layout):
        traces.append(1)
        return layout.transpose().count

    for seed in range(3):
        key = jax.random.key(seed)
        run(BlockLayout.random(key, (64, 64), (8, 8), density=0.25))
    assert len(traces) == 1


def test_scatter_and_gather_are_each_others_transposes():
    layout = BlockLayout.random(jax.random.key(0), (24, 32), (8, 8), density=0.5)
    blocks = jax.random.normal(jax.random.key(1), layout.blocks_shape)
    w = jax.random.normal(jax.random.key(2), layout.shape)
    grad = jax.grad(lambda b: jnp.sum(scatter_blocks(b, layout) * w))(blocks)
    np.testing.assert_array_equal(grad, gather_blocks(w, layout))
    grad = jax.grad(lambda w: jnp.sum(gather_blocks(w, layout) * blocks))(w)
    np.testing.assert_array_equal(grad, scatter_blocks(blocks, layout))


def test_errors():
    mask = np.ones((2, 2), bool)
    with pytest.raises(ValueError, match="capacity: got 3, needed at least 4"):
        BlockLayout.from_mask(mask, (8, 8), capacity=3)
    with pytest.raises(ValueError, match="capacity: got None with a traced"):
        jax.jit(lambda m: BlockLayout.from_mask(m, (8, 8)))(mask)
    with pytest.raises(ValueError, match="block_mask: got dtype float32"):
        BlockLayout.from_mask(np.ones((2, 2), np.float32), (8, 8))
    with pytest.raises(ValueError, match=r"shape: got \(20, 16\)"):
        BlockLayout.from_mask(mask, (8, 8), shape=(20, 16))
    with pytest.raises(ValueError, match="density: got 1.5, needed"):
        BlockLayout.random(jax.random.key(0), (16, 16), (8, 8), density=1.5)
    layout = BlockLayout.from_mask(mask, (8, 8))
    with pytest.raises(ValueError, match=r"w: got shape \(8, 8\), needed \(16, 16\)"):
        gather_blocks(jnp.ones((8, 8)), layout)
    with pytest.raises(ValueError, match=r"blocks: got shape \(4, 8, 4\), needed"):
        scatter_blocks(jnp.ones((4, 8, 4)), layout)


@pytest.mark.parametrize(
    "rows, cols",
    [
        ([0, 0], [0, 0]),  # repeated
        ([0, 0], [1, 0]),  # out of order
        ([1, 0], [0, 0]),  # out of order within a column
        ([0, 2], [0, 1]),  # row out of range
        ([0, 0], [0, 5]),  # column out of range
        ([-1, 0], [0, 0]),  # negative
        ([2, 0], [2, 1]),  # padding in front
    ],
)
def test_check_layout(rows, cols):
    layout = BlockLayout(
        jnp.array(rows, jnp.int32), jnp.array(cols, jnp.int32), (16, 16), (8, 8)
    )
    with pytest.raises(ValueError, match="layout: slot"):
        check_layout(layout)
    checked = checkify.checkify(jax.jit(check_layout))
    error, _ = checked(layout)
    assert "out of range, out of order or repeated" in error.get()
    good = BlockLayout.from_mask(np.eye(2, dtype=bool), (8, 8), capacity=4)
    check_layout(good)
    assert checked(good)[0].get() is None
