"""Laws of sparsify: every updater around every optimizer, on every kind of tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import transforms
from sparsejax.masks import apply_masks, exact_count, named_leaves
from sparsejax.schedules import cubic_sparsity

SPARSITY, BEGIN, END, EVERY = 0.75, 1, 5, 2  # updates at 1, 3, 5
STEPS = 7
SHAPES = {"first": (8, 12), "second": (12, 6)}


def matrix_or_vector(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "sgd momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
    "schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(1e-2),
    # b2 is stored in the dtype of the weights, and 0.999 would be 1 in bfloat16.
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10), b2=0.99
    ),
    "MultiSteps inside": lambda: optax.MultiSteps(
        optax.adam(1e-2), 2
    ).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1, momentum=0.9)},
        matrix_or_vector,
    ),
}
times = {"sparsity": SPARSITY, "begin": BEGIN, "end": END, "every": EVERY}
UPDATERS = {
    name: functools.partial(getattr(transforms, name), **times, key=jax.random.key(7))
    for name in ("static", "gradual_magnitude", "sparse_evolutionary_training", "rigl")
}


def as_dict(w):
    return {
        k: {"kernel": v, "bias": jnp.zeros(v.shape[1], v.dtype)} for k, v in w.items()
    }


def as_nested(w):
    return {
        "net": [{"kernel": v} for v in w.values()],
        "norm": {"scale": jnp.ones((2, 3))},
    }


def as_tuple(w):
    return tuple((v, jnp.zeros(v.shape[1], v.dtype)) for v in w.values())


def as_nnx(w):
    class Net(nnx.Module):
        def __init__(self, rngs):
            for name, value in w.items():
                layer = nnx.Linear(*value.shape, rngs=rngs, param_dtype=value.dtype)
                layer.kernel[...] = value
                setattr(self, name, layer)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


TREES = [as_dict, as_nested, as_tuple, as_nnx]


def make_params(build, dtype):
    keys = jax.random.split(jax.random.key(1), len(SHAPES))
    return build(
        {
            name: jax.random.normal(key, shape).astype(dtype)
            for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
        }
    )


def gradients(params, step):
    """Dense, and unlike zero everywhere."""
    key = jax.random.fold_in(jax.random.key(2), step)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, p: (0.1 + jax.random.normal(k, p.shape)).astype(p.dtype)
    return treedef.unflatten([draw(k, p) for k, p in zip(keys, leaves, strict=True)])


def kept_count(updater, size, step):
    """How many of `size` weights are kept after `step` finished steps."""
    if updater != "gradual_magnitude":
        return exact_count(1 - SPARSITY, size)
    done = [t for t in (1, 3, 5) if t < step]
    if not done:
        return size
    sparsity = cubic_sparsity(
        done[-1], final=SPARSITY, begin=BEGIN, end=END, every=EVERY
    )
    return round((1 - float(sparsity)) * size)


def policy_zero(inner, state, changed):
    """The moments policy by optax's own means, as the oracle."""
    is_hole = lambda v: isinstance(v, optax.MaskedNode)

    def clear(value, where):
        if is_hole(value) or value.shape != where.shape:
            return value
        return jnp.where(where, jnp.zeros_like(value), value)

    return optax.tree_utils.tree_map_params(
        inner, clear, state, changed, is_leaf=is_hole
    )


def run(tx, params, *, steps=STEPS, inner=None):
    """Trains; yields what each step saw and made. Checks structure and one trace."""
    traces = []

    @jax.jit
    def train_step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return updates, optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = apply_masks(params, transforms.get_masks(state))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    before = describe((params, state))
    for step in range(steps):
        grads = gradients(params, step)
        # optax promotes silently, so mixed dtypes need the ordinary rules.
        with jax.numpy_dtype_promotion("standard"):
            updates, new_params, new_state = train_step(params, state, grads)
        yield step, (params, state, grads), (updates, new_params, new_state)
        params, state = new_params, new_state
    assert describe((params, state)) == before
    assert len(traces) == 1


def check_exact(updater, params, masks, done):
    masks, leaves = named_leaves(masks), named_leaves(params)
    assert len(masks) == len(SHAPES)
    for name, mask in masks.items():
        assert mask.dtype == bool
        assert int(mask.sum()) == kept_count(updater, mask.size, done)
        np.testing.assert_array_equal(leaves[name][~mask].astype(jnp.float32), 0.0)


@pytest.mark.parametrize("inner_name", INNER)
@pytest.mark.parametrize("updater", UPDATERS)
def test_zeros_counts_and_kept_updates(updater, inner_name):
    inner = INNER[inner_name]()
    tx = transforms.sparsify(inner, UPDATERS[updater]())
    # Trees and optimizers are paired off; each pair of the two meets some updater.
    index = list(INNER).index(inner_name) + list(UPDATERS).index(updater)
    params = make_params(TREES[index % len(TREES)], jnp.float32)

    @jax.jit
    def oracle(grads, state, params, old, new):
        full = lambda tree, fill: jax.tree.map(
            lambda p, m: fill(p) if isinstance(m, optax.MaskedNode) else m,
            params,
            tree,
            is_leaf=lambda v: isinstance(v, optax.MaskedNode),
        )
        old = full(old, lambda p: jnp.ones(p.shape, bool))
        new = full(new, lambda p: jnp.ones(p.shape, bool))
        changed = jax.tree.map(jnp.not_equal, old, new)
        grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, new)
        with jax.numpy_dtype_promotion("standard"):
            state = policy_zero(inner, state, changed)
            return inner.update(grads, state, params)[0], new

    moved = 0
    for step, (before, state, grads), (updates, after, new) in run(tx, params):
        due = bool(transforms.is_update_step(state))
        assert due == (step in (1, 3, 5) and updater != "static")
        check_exact(updater, after, new.masks, step + 1)
        want, full = oracle(grads, state.inner_state, before, state.masks, new.masks)
        for got, expected, mask in zip(
            *map(jax.tree.leaves, (updates, want, full)), strict=True
        ):
            np.testing.assert_allclose(
                got[mask], expected[mask], rtol=3e-6, atol=1e-8, err_msg=str(step)
            )
        if inner_name == "schedule_free_adamw":
            evaluated = optax.contrib.schedule_free_eval_params(new.inner_state, after)
            check_exact(updater, evaluated, new.masks, step + 1)
        pairs = zip(*map(jax.tree.leaves, (state.masks, new.masks)), strict=True)
        changed = any(bool((a != b).any()) for a, b in pairs)
        assert due or not changed
        moved += changed
        assert int(new.skipped_updates) == 0
    assert (moved > 0) == (updater != "static")


@pytest.mark.parametrize("inner_name", INNER)
def test_zeros_in_bfloat16(inner_name):
    inner = INNER[inner_name]()
    tx = transforms.sparsify(inner, UPDATERS["rigl"]())
    index = list(INNER).index(inner_name)
    params = make_params(TREES[index % len(TREES)], jnp.bfloat16)
    for step, _, (_, after, new) in run(tx, params, steps=5):
        check_exact("rigl", after, new.masks, step + 1)
        for leaf in jax.tree.leaves(after):
            assert bool(jnp.isfinite(leaf).all())
        if inner_name == "schedule_free_adamw":
            evaluated = optax.contrib.schedule_free_eval_params(new.inner_state, after)
            check_exact("rigl", evaluated, new.masks, step + 1)


@pytest.mark.parametrize("updater", UPDATERS)
def test_multi_steps_outside(updater):
    tx = transforms.sparsify(optax.adam(1e-2), UPDATERS[updater]())
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
    params = make_params(as_dict, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps is the caller's here
        for step, (_, state, _), (_, after, new) in run(tx, params, steps=2 * STEPS):
            masks = transforms.get_masks(new)
            check_exact(updater, after, masks, (step + 1) // 2)
            due = bool(transforms.is_update_step(state))
            assert due == (step // 2 in (1, 3, 5) and updater != "static")


@pytest.mark.parametrize("policy", ["keep", "mean"])
@pytest.mark.parametrize(
    "inner_name", ["adamw", "adafactor", "muon", "schedule_free_adamw", "partition"]
)
def test_other_moment_policies_keep_the_zeros(inner_name, policy):
    tx = transforms.sparsify(INNER[inner_name](), UPDATERS["rigl"](), moments=policy)
    params = make_params(as_dict, jnp.float32)
    for step, _, (_, after, new) in run(tx, params):
        check_exact("rigl", after, new.masks, step + 1)
        if inner_name == "schedule_free_adamw":
            evaluated = optax.contrib.schedule_free_eval_params(new.inner_state, after)
            check_exact("rigl", evaluated, new.masks, step + 1)


def test_bfloat16_weights_under_float32_updates_and_the_reverse():
    for weights, updates in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        cast = optax.stateless(
            lambda u, p, to=updates: jax.tree.map(lambda x: x.astype(to), u)
        )
        tx = transforms.sparsify(optax.chain(optax.sgd(0.1), cast), UPDATERS["rigl"]())
        for step, _, (emitted, after, new) in run(tx, make_params(as_dict, weights)):
            assert emitted["first"]["kernel"].dtype == jnp.float32
            check_exact("rigl", after, new.masks, step + 1)


def test_vmap_over_seeds():
    def train(key):
        updater = transforms.rigl(**times, key=key)
        tx = transforms.sparsify(optax.adamw(1e-2), updater)
        params = make_params(as_dict, jnp.float32)
        state = tx.init(params)
        params = apply_masks(params, transforms.get_masks(state))
        for step in range(3):
            updates, state = tx.update(gradients(params, step), state, params)
            params = optax.apply_updates(params, updates)
        return params, transforms.get_masks(state)

    keys = jax.random.split(jax.random.key(3), 2)
    params, masks = jax.jit(jax.vmap(train))(keys)
    for name, mask in named_leaves(masks).items():
        counts = mask.sum((1, 2)).tolist()
        assert counts == [kept_count("rigl", mask[0].size, 3)] * 2
        assert (mask[0] != mask[1]).any()
        np.testing.assert_array_equal(named_leaves(params)[name][~mask], 0.0)
    alone = jax.jit(train)(keys[1])[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1]), alone, masks)
