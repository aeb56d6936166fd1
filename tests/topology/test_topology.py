"""Moving blocks: rigl_blocks against numpy, block_scores, growth_probe, step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.layouts import BlockLayout, check_layout, gather_blocks, scatter_blocks
from sparsejax.ops import block_sparse_matmul
from sparsejax.topology import block_scores, growth_probe, rigl_blocks, step


def make(seed=0, density=0.4, spare=2, shape=(40, 48), block=(8, 8)):
    key = jax.random.key(seed)
    layout = BlockLayout.random(key, shape, block, density=density)
    layout = BlockLayout.from_mask(
        layout.to_mask(), block, capacity=layout.capacity + spare
    )
    blocks = jax.random.normal(key, layout.blocks_shape)
    scores = jax.random.uniform(jax.random.fold_in(key, 1), layout.grid)
    return blocks, layout, scores


# Every density at one fraction, every fraction at one density; the others are slow.
CASES = [
    (density, fraction)
    if density == 0.4 or fraction == 0.55
    else pytest.param(density, fraction, marks=pytest.mark.slow)
    for density in (0.0, 0.1, 0.4, 0.9, 1.0)
    for fraction in (0.0, 0.3, 0.55, 1.0)
]


@pytest.mark.parametrize(("density", "fraction"), CASES)
def test_rigl_blocks_equals_the_equation(density, fraction):
    """Drop the smallest norms, grow the largest scores of what was empty; by numpy."""
    blocks, layout, scores = make(density=density)
    moments = {"mu": blocks * 2, "nu": (blocks * 3).astype(jnp.bfloat16)}
    new, moved, new_moments = jax.jit(rigl_blocks)(
        blocks, layout, scores, fraction=fraction, moments=moments
    )
    check_layout(moved)
    before, after = np.asarray(layout.to_mask()), np.asarray(moved.to_mask())
    count = int(before.sum())
    drop = min(round(fraction * count), before.size - count)
    norms = np.full(before.shape, np.inf)
    for s in range(count):
        norms[int(layout.rows[s]), int(layout.cols[s])] = np.linalg.norm(blocks[s])
    want = before.copy()
    want[np.unravel_index(np.argsort(norms, axis=None)[:drop], want.shape)] = False
    candidates = np.where(before, -np.inf, scores)
    grow = np.argsort(-candidates, axis=None, kind="stable")[:drop]
    want[np.unravel_index(grow, want.shape)] = True
    np.testing.assert_array_equal(after, want)
    assert int(moved.count) == count and moved.capacity == layout.capacity

    # Kept blocks and their moments bit for bit, grown ones zero, padding zero.
    stay = np.kron(before & after, np.ones((8, 8), bool))
    dense = lambda b, l: np.asarray(scatter_blocks(b, l), np.float32)
    np.testing.assert_array_equal(
        dense(new, moved), np.where(stay, dense(blocks, layout), 0)
    )
    for name, old in moments.items():
        assert new_moments[name].dtype == old.dtype
        np.testing.assert_array_equal(
            dense(new_moments[name], moved), np.where(stay, dense(old, layout), 0)
        )
    assert not np.asarray(new)[count:].any()


def test_rigl_blocks_never_regrows_what_it_drops():
    """The dropped blocks have by far the largest scores; peers grow them again."""
    blocks, layout, _ = make()
    scores = jnp.where(layout.to_mask(), 1e6, 1.0)
    _, moved, _ = rigl_blocks(blocks, layout, scores, fraction=0.5)
    before, after = np.asarray(layout.to_mask()), np.asarray(moved.to_mask())
    assert (
        (before & ~after).sum() == (after & ~before).sum() == round(0.5 * before.sum())
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_rigl_blocks_keeps_the_layout_where_scores_are_not_finite(bad):
    blocks, layout, scores = make()
    new, moved, _ = rigl_blocks(blocks, layout, scores.at[0, 0].set(bad), fraction=0.5)
    np.testing.assert_array_equal(moved.to_mask(), layout.to_mask())
    np.testing.assert_array_equal(
        scatter_blocks(new, moved), scatter_blocks(blocks, layout)
    )


def test_rigl_blocks_errors():
    blocks, layout, scores = make()
    with pytest.raises(
        ValueError, match=r"scores: got shape \(2, 2\), needed \(5, 6\)"
    ):
        rigl_blocks(blocks, layout, scores[:2, :2], fraction=0.1)
    with pytest.raises(ValueError, match="fraction: got 1.1"):
        rigl_blocks(blocks, layout, scores, fraction=1.1)
    with pytest.raises(ValueError, match="moments: got a leaf of shape"):
        rigl_blocks(blocks, layout, scores, fraction=0.1, moments=[jnp.ones(3)])


def test_block_scores():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 9, 20)), rng.standard_normal((2, 9, 30))
    layout = BlockLayout.random(jax.random.key(0), (20, 30), (8, 16), density=0.5)
    got = block_scores(
        jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32), layout
    )
    g = np.pad(np.einsum("abk,abn->kn", x, dy), ((0, 4), (0, 2)))
    want = np.sqrt((g.reshape(3, 8, 2, 16) ** 2).sum((1, 3)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="x, dy: got shapes"):
        block_scores(jnp.ones((2, 20)), jnp.ones((3, 30)), layout)
    jaxpr = str(
        jax.make_jaxpr(lambda x, dy: block_scores(x, dy, layout))(
            jnp.ones((18, 20)), jnp.ones((18, 30))
        )
    )
    assert "24,32" not in jaxpr and "20,30" not in jaxpr


def probed_loss(blocks, layout, probe, x, t):
    h = block_sparse_matmul(x, blocks, layout)
    return jnp.sum(jnp.tanh(growth_probe(h, x, probe, layout)) * t)


def test_growth_probe_gradient_is_the_block_scores_of_the_dense_gradient():
    blocks, layout, _ = make()
    x = jax.random.normal(jax.random.key(5), (12, 40))
    t = jax.random.normal(jax.random.key(6), (12, 48))
    probe = jnp.zeros(layout.grid)
    dense = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) * t))(
        scatter_blocks(blocks, layout)
    )
    want = np.sqrt((np.asarray(dense).reshape(5, 8, 6, 8) ** 2).sum((1, 3)))
    got = jax.jit(jax.grad(probed_loss, 2))(blocks, layout, probe, x, t)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    # The value and the other gradients are those without a probe.
    plain = lambda b: jnp.sum(jnp.tanh(block_sparse_matmul(x, b, layout)) * t)
    np.testing.assert_array_equal(
        jax.grad(probed_loss)(blocks, layout, probe, x, t), jax.grad(plain)(blocks)
    )
    # Nothing is computed for it in a train step.
    jaxpr = jax.make_jaxpr(jax.grad(probed_loss))(blocks, layout, probe, x, t)
    assert "sqrt" not in str(jaxpr)


def test_growth_probe_sums_over_devices_before_the_norm():
    """|mean of g|, not mean of |g|: peers reduce after the absolute value."""
    blocks, layout, _ = make()
    x = jax.random.normal(jax.random.key(5), (16, 40))
    t = jax.random.normal(jax.random.key(6), (16, 48))
    probe = jnp.zeros(layout.grid)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def loss(probe, x, t):
        return jax.lax.psum(probed_loss(blocks, layout, probe, x, t), "data")

    mapped = jax.shard_map(
        loss, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    np.testing.assert_allclose(
        jax.jit(jax.grad(mapped))(probe, x, t),
        jax.grad(probed_loss, 2)(blocks, layout, probe, x, t),
        rtol=1e-4,
    )


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "partition": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.lion(1e-3)},
        {"up": {"kernel": "a", "bias": "b"}, "down": {"kernel": "b"}, "kernel": "a"},
    ),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
}


QUICK = "adamw", "multi_steps", "partition"


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_step_moves_a_whole_model_with_any_optimizer_state(name):
    tx = OPTIMIZERS[name]
    up, up_layout, up_scores = make(0)
    stack = [make(seed, shape=(48, 40)) for seed in (1, 2)]
    down, down_layout, down_scores = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    params = {
        "up": {"kernel": up, "bias": jnp.ones(48)},
        "down": {"kernel": down},
        "kernel": jnp.ones((3, 5)),  # ends the other paths, and is not sparse
    }
    layouts = {
        "up": {"kernel_layout": up_layout},
        "down": {"kernel_layout": down_layout},
    }
    scores = {"up": {"kernel_probe": up_scores}, "down": {"kernel_probe": down_scores}}
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
    # A moment that says where it belongs: three times the parameter.
    shapes = {up.shape: up, down.shape: down}
    state = jax.tree.map(
        lambda a: 3 * shapes[a.shape] if a.shape in shapes else a, state
    )

    traces = []

    @jax.jit
    def run(*args):
        traces.append(1)
        return step(*args, fraction=0.3)

    new_params, new_layouts, new_state = run(params, layouts, state, scores)
    want, want_layout, _ = rigl_blocks(up, up_layout, up_scores, fraction=0.3)
    np.testing.assert_array_equal(new_params["up"]["kernel"], want)
    got_layout = new_layouts["up"]["kernel_layout"]
    np.testing.assert_array_equal(got_layout.rows, want_layout.rows)
    for i in (0, 1):
        want, _, _ = rigl_blocks(*stack[i], fraction=0.3)
        np.testing.assert_array_equal(new_params["down"]["kernel"][i], want)
    moved = {a.shape: a for a in jax.tree.leaves(new_params) if a.shape in shapes}
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    moments = 0
    for old, new in zip(
        jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
    ):
        assert old.shape == new.shape and old.dtype == new.dtype
        if old.shape in shapes:
            moments += 1
            np.testing.assert_array_equal(new, 3 * moved[old.shape])
        else:
            np.testing.assert_array_equal(new, old)
    assert moments >= (0 if name == "adafactor" else 2)
    run(new_params, new_layouts, new_state, scores)
    assert len(traces) == 1


def test_step_errors():
    blocks, layout, scores = make()
    with pytest.raises(ValueError, match="layouts: up/kernel belongs to no parameter"):
        step(
            {"kernel": blocks}, {"up": {"kernel_layout": layout}}, (), {}, fraction=0.1
        )
    with pytest.raises(ValueError, match="scores: none for kernel"):
        step({"kernel": blocks}, {"kernel": layout}, (), {}, fraction=0.1)
    new, _, _ = step(
        {"kernel": blocks}, {"kernel": layout}, (), {"kernel": scores}, fraction=0.1
    )
    assert new["kernel"].shape == blocks.shape


def test_gather_keeps_a_dense_master_in_step():
    """Blocks moved equal the blocks of a dense matrix moved by the same masks."""
    blocks, layout, scores = make()
    new, moved, _ = rigl_blocks(blocks, layout, scores, fraction=0.4)
    w = scatter_blocks(blocks, layout)
    np.testing.assert_array_equal(new, gather_blocks(w, moved))
