"""The wrapper: filters, errors, nesting, state, checkpoints, imports."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from sparsejax import transforms
from sparsejax.masks import apply_masks, density, named_leaves
from sparsejax.transforms import _moments

KEY = jax.random.key(0)
PARAMS = {
    "embed": {"embedding": jnp.ones((16, 8))},
    "layer": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
    "norm_1": {"scale": jnp.ones((2, 8))},
}


def rigl(**changes):
    return transforms.rigl(
        **{"sparsity": 0.5, "end": 10, "every": 2, "key": KEY} | changes
    )


def masked_names(leaf_filter, params=PARAMS):
    tx = transforms.sparsify(optax.sgd(0.1), rigl(), leaf_filter=leaf_filter)
    return set(named_leaves(transforms.get_masks(tx.init(params))))


def test_norms_biases_and_embeddings_are_left_dense():
    assert masked_names(None) == {"layer/kernel"}


@pytest.mark.parametrize(
    "name, taken",
    [
        ("decoder/attention/q/kernel", True),
        ("lm_head", True),
        ("blocks/0/w_in", True),
        ("layernorm/weight", False),
        ("ln_f/weight", False),
        ("block/bn1/w", False),
        ("wte", False),
        ("mlp/bias", False),
        ("", True),
    ],
)
def test_default_filter_by_name(name, taken):
    assert transforms.default_leaf_filter(name, jnp.ones((3, 4))) is taken


def test_filters_by_pattern_and_by_function():
    assert masked_names("*kernel") == {"layer/kernel"}
    assert masked_names(["embed/*", "layer/kernel"]) == {
        "embed/embedding",
        "layer/kernel",
    }
    assert masked_names(lambda name, leaf: leaf.ndim == 1) == {"layer/bias"}


@pytest.mark.parametrize(
    "leaf_filter, message",
    [
        (["*kernel", "misspelt/*"], r"leaf_filter: every pattern must.*'misspelt/\*'"),
        (lambda name, leaf: False, "leaf_filter must take at least one leaf"),
    ],
)
def test_a_filter_that_matches_nothing_is_refused(leaf_filter, message):
    with pytest.raises(ValueError, match=message):
        masked_names(leaf_filter)


def test_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match="leaf_filter must take at least one leaf"):
        masked_names(None, {"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="floating leaves, got int32 at 'w'"):
        masked_names("w", {"w": jnp.ones((2, 2), jnp.int32)})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rigl(sparsity=1.1), r"sparsity must be in \[0, 1\], got 1.1"),
        (lambda: rigl(sparsity=-0.1), r"sparsity must be in \[0, 1\], got -0.1"),
        (lambda: rigl(begin=11), "end must be at least begin.*begin=11, end=10"),
        (lambda: rigl(every=0), "every must be at least 1, got 0"),
        (lambda: rigl(drop_fraction=2.0), "drop_fraction must be in"),
        (lambda: rigl(drop_fraction=lambda t: 2.0), "drop_fraction must be in"),
        (
            lambda: transforms.gradual_magnitude(
                sparsity=0.5, initial_sparsity=0.6, end=3
            ),
            "initial_sparsity must be at most sparsity, 0.5, got 0.6",
        ),
        (lambda: transforms.gradual_magnitude(sparsity=2.0, end=3), "sparsity must be"),
        (lambda: transforms.static(sparsity=2.0, key=KEY), "sparsity must be"),
        (
            lambda: transforms.sparse_evolutionary_training(
                sparsity=0.5, key=KEY, drop_fraction=lambda t: 0.1
            ),
            "drop_fraction must be a number where end is None",
        ),
        (
            lambda: transforms.sparsify(optax.sgd(0.1), rigl(), moments="reset"),
            "moments must be one of .*got 'reset'",
        ),
        (lambda: transforms.get_masks(optax.EmptyState()), "got EmptyState"),
        (lambda: transforms.is_update_step(()), "opt_state must contain"),
    ],
)
def test_bad_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_params_must_be_passed_and_nothing_is_overwritten():
    tx = transforms.sparsify(optax.sgd(0.1), rigl())
    with pytest.raises(ValueError, match="params must be passed to update"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_report_over_prunable_leaves_and_whole_model():
    state = transforms.sparsify(optax.sgd(0.1), rigl(sparsity=0.75)).init(PARAMS)
    report = density(transforms.get_masks(state), PARAMS)
    assert report.prunable == 0.25
    assert report.model == (128 + 8 + 16 + 16) / (128 + 64 + 8 + 16)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.partition(
            {"sparse": tx, "dense": optax.sgd(0.1)},
            lambda params: jax.tree.map(
                lambda p: "sparse" if p.shape == (8, 8) else "dense", params
            ),
        ),
        lambda tx: optax.inject_hyperparams(
            lambda rate: transforms.sparsify(optax.sgd(rate), rigl())
        )(rate=0.1),
    ],
)
def test_inside_other_transformations(wrap):
    tx = wrap(transforms.sparsify(optax.adam(1e-2), rigl()))
    state = tx.init(PARAMS)
    params = apply_masks(PARAMS, transforms.get_masks(state))
    assert bool(transforms.is_update_step(state))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            grads = jax.tree.map(lambda p: 0.1 + p, params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
    masks = optax.tree_utils.tree_get(transforms.get_masks(state), "kernel")
    assert int(masks.sum()) == 32
    np.testing.assert_array_equal(params["layer"]["kernel"][~masks], 0.0)


def test_several_in_a_partition_are_merged():
    make = lambda sparsity: transforms.sparsify(
        optax.sgd(0.1), rigl(sparsity=sparsity), leaf_filter="*"
    )
    tx = optax.partition({"a": make(0.5), "b": make(0.75)}, {"x": "a", "y": "b"})
    masks = transforms.get_masks(
        tx.init({"x": jnp.ones((4, 4)), "y": jnp.ones((4, 4))})
    )
    assert int(masks["x"].sum()) == 8 and int(masks["y"].sum()) == 4


def test_optax_tools_see_through_the_state():
    tx = transforms.sparsify(optax.adam(1e-2), rigl(), leaf_filter="*")
    state = tx.init({"w": jnp.ones((4, 4))})
    assert optax.tree_utils.tree_get(state, "masks")["w"].shape == (4, 4)
    assert int(optax.tree_utils.tree_get(state, "skipped_updates")) == 0
    specs = optax.tree_utils.tree_map_params(
        tx, lambda _: "spec", state, transform_non_params=lambda _: None
    )
    assert specs.masks == {"w": "spec"} == specs.inner_state[0].mu


def test_nnx_optimizer():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    tx = transforms.sparsify(optax.adam(1e-2), rigl())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, apply_masks(state, transforms.get_masks(optimizer.opt_state)))
    x = jax.random.normal(KEY, (4, 8))

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        optimizer.update(model, grads)

    for _ in range(4):
        train_step(model, optimizer)
        kernel = model.kernel[...]
        assert int((kernel != 0).sum()) <= 32
    assert (
        int(jax.tree.leaves(transforms.get_masks(optimizer.opt_state))[0].sum()) == 32
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_restored_state_takes_the_same_next_step_bit_for_bit(tmp_path, impl):
    key = jax.random.key(3, impl=impl)
    updater = transforms.sparse_evolutionary_training(sparsity=0.5, every=1, key=key)
    tx = transforms.sparsify(optax.adamw(1e-2), updater)
    state = tx.init(PARAMS)
    params = apply_masks(PARAMS, transforms.get_masks(state))
    update = jax.jit(tx.update)

    def train(params, state, steps):
        for step in steps:
            key = jax.random.key(step)
            grads = jax.tree.map(lambda p, k=key: jax.random.normal(k, p.shape), params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    middle = train(params, state, range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.tree.map(jnp.zeros_like, middle)
        )
    assert jax.tree.structure(restored) == jax.tree.structure(middle)
    for one, two in zip(
        jax.tree.leaves(train(*middle, range(3, 6))),
        jax.tree.leaves(train(*restored, range(3, 6))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_the_mean_of_more_weights_than_float16_counts():
    """A moment of 0.5 everywhere; 90000 kept entries are inf in float16."""
    params = {"w": jnp.ones((300, 301), jnp.float16)}
    grow = transforms.Updater(
        range(0, 9),
        lambda params, key: ({"w": jnp.ones((300, 301), bool).at[:, 0].set(False)}, ()),
        lambda now: ({"w": jnp.ones((300, 301), bool)}, (), jnp.array(True)),
    )
    tx = transforms.sparsify(optax.sgd(0.1, momentum=1.0), grow, moments="mean")
    state = tx.init(params)
    state = optax.tree_utils.tree_set(state, trace={"w": params["w"] / 2})
    none = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(none, state, params)
    [trace] = optax.tree_utils.tree_get_all_with_path(state, "trace")
    np.testing.assert_allclose(trace[1]["w"][:, 0], 0.5, rtol=2e-3)


def test_donated_state_leaves_the_key_alive():
    raw = jax.random.PRNGKey(0)
    tx = transforms.sparsify(optax.adam(1e-2), rigl(key=raw), leaf_filter="*")
    params = {"w": jnp.ones((4, 4))}
    state = tx.init(params)
    jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert not raw.is_deleted()
    tx.init(params)


def test_init_under_jit_equals_eager():
    tx = transforms.sparsify(optax.adam(1e-2), rigl())
    one, two = tx.init(PARAMS), jax.jit(tx.init)(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_iterates_are_told_from_moments():
    params = {"w": jnp.ones((2, 2))}
    find = lambda tx: sum(_moments.find_iterates(tx.init, params))
    assert find(optax.adamw(1e-2)) == 0
    assert find(optax.adafactor(1e-2, min_dim_size_to_factor=1)) == 0
    assert find(optax.contrib.schedule_free_adamw(1e-2)) == 1


def test_state_of_an_unknown_optimizer_is_no_error():
    # A state without any shape of a parameter, and one that only looks alike.
    def init(params):
        return {"odd": [jnp.zeros(3), "text"], "pair": {"kernel": jnp.ones((2, 2))}}

    inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    tx = transforms.sparsify(inner, rigl())
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert (state.inner_state["pair"]["kernel"] == 1).all()


def test_longest_path_owns_the_state():
    params = {"kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}}
    tx = transforms.sparsify(
        optax.sgd(1.0, momentum=0.5), rigl(begin=5), leaf_filter=["a/kernel"]
    )
    _, state = tx.update(params, tx.init(params), params)
    trace = optax.tree_utils.tree_get(state, "trace")
    assert (trace["kernel"] == 1).all() and int((trace["a"]["kernel"] == 0).sum()) == 2


def test_import_loads_neither_flax_nor_orbax_nor_pallas():
    code = (
        "import sys, sparsejax.transforms\n"
        "heads = ('flax', 'orbax', 'triton', 'jax_triton')\n"
        "parts = ('jax.experimental.pallas', 'jax._src.pallas')\n"
        "bad = [m for m in sys.modules if m.startswith(heads + parts)]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
