"""Weights over eight devices: masks lie where they do, and nothing is traced twice."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import transforms
from sparsejax.masks import Blocks, Columns, FanIn, Rows, apply_masks

KEY = jax.random.key(3)
SPECS = {"up": PartitionSpec("x", None), "down": PartitionSpec(None, "x")}
WEIGHTS = {
    "up": jax.random.normal(KEY, (32, 16)),
    "down": jax.random.normal(jax.random.key(4), (16, 32)),
}
MOVING = {"sparsity": 0.75, "end": 4, "every": 1, "key": KEY}
RULES = {
    "rigl": lambda: transforms.rigl(**MOVING),
    # Cut into blocks, summed over rows and columns, sorted down columns.
    "blocks": lambda: transforms.rigl(structure=Blocks((4, 4)), **MOVING),
    "rows": lambda: transforms.rigl(structure=Rows(), **MOVING),
    "columns": lambda: transforms.rigl(structure=Columns(), **MOVING),
    "fan-in": lambda: transforms.rigl(structure=FanIn(), **MOVING),
    "random growth": lambda: transforms.sparse_evolutionary_training(**MOVING),
    "average": lambda: transforms.sparse_momentum(decay=0.9, **MOVING),
    "counts": lambda: transforms.exploration_exploitation(**MOVING),
    "ramp": lambda: transforms.gradual_magnitude(
        sparsity=0.75, end=4, every=1, structure=Blocks((4, 4))
    ),
    "neurons": lambda: transforms.srigl(**MOVING),
    "static": lambda: transforms.static(sparsity=0.75, key=KEY),
}


def train(tx, weights, steps=5):
    """State and weights after some steps, and how often the step was traced."""
    traces = []

    @jax.jit
    def step(weights, state):
        traces.append(1)
        grads = jax.tree.map(lambda w: jnp.sin(9 * w) + 0.1, weights)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state = tx.init(weights)
    if isinstance(state, transforms.SparsifyState):
        weights = apply_masks(weights, state.masks)
    for _ in range(steps):
        weights, state = step(weights, state)
    return state, weights, len(traces)


def check(tx, kind, mesh_is_set):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
        sharded = {
            name: jax.device_put(np.asarray(w), NamedSharding(mesh, SPECS[name]))
            for name, w in WEIGHTS.items()
        }
        state, weights, traces = train(tx, sharded)
    want_state, want, _ = train(tx, WEIGHTS)
    for one, two in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
        one, two = np.asarray(one), np.asarray(two)
        np.testing.assert_allclose(one.astype(float), two.astype(float), atol=1e-5)
    for name, w in weights.items():
        np.testing.assert_allclose(w, want[name], atol=1e-5)
        assert w.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), 2)
    assert traces == 1
    return state


@pytest.mark.parametrize("rule", RULES)
def test_explicit_axes(rule):
    """The default of `jax.make_mesh`: there shardings are part of types."""
    tx = transforms.sparsify(optax.sgd(0.1), RULES[rule]())
    state = check(tx, AxisType.Explicit, mesh_is_set=rule in ("blocks", "average"))
    for name, mask in state.masks.items():
        assert mask.sharding.spec == SPECS[name]


def test_automatic_axes_need_one_trace():
    tx = transforms.sparsify(optax.adam(0.1), RULES["rigl"]())
    check(tx, AxisType.Auto, mesh_is_set=False)


def test_shrinkage_with_explicit_axes():
    shrink = transforms.iterative_soft_shrinkage(
        sparsity=0.75, end=3, structure=Blocks((4, 4))
    )
    check(optax.chain(optax.sgd(0.1), shrink), AxisType.Explicit, mesh_is_set=True)


def test_an_optimizer_that_keeps_numbers():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    kept = {"rate": 0.1, "table": np.ones(3), "step": jnp.zeros(())}
    inner = optax.GradientTransformation(
        lambda params: kept, lambda grads, state, params: (grads, state)
    )
    sharding = NamedSharding(mesh, SPECS["up"])
    weights = {"up": jax.device_put(np.asarray(WEIGHTS["up"]), sharding)}
    state = transforms.sparsify(inner, RULES["rigl"]()).init(weights).inner_state
    assert state["rate"] == 0.1 and isinstance(state["table"], np.ndarray)
    assert state["step"].sharding.is_fully_replicated
    assert state["step"].sharding.device_set == sharding.device_set


def test_init_inside_jit_places_masks_too():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = transforms.sparsify(optax.sgd(0.1), RULES["blocks"]())
    with jax.set_mesh(mesh):
        sharded = {
            name: jax.device_put(np.asarray(w), NamedSharding(mesh, SPECS[name]))
            for name, w in WEIGHTS.items()
        }
        masks = jax.jit(tx.init)(sharded).masks
    for name, mask in masks.items():
        assert mask.sharding.spec == SPECS[name]
        np.testing.assert_array_equal(mask, tx.init(WEIGHTS).masks[name])
