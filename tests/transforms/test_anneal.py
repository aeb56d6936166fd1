"""anneal: the schedule's value in the optimizer's state, under every wrapper."""

import functools
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import checkpoint, schedules, straight_through, transforms
from sparsejax.transforms import anneal, get_annealed

PARAMS = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2), "bias": jnp.ones(2)}
down = functools.partial(schedules.linear, begin=1, end=5)  # 1, 1, .75, .5, .25, 0
WANT = [1, 1, 0.75, 0.5, 0.25, 0, 0]


def run(tx, steps):
    """The annealed value before each step, in one trace."""
    traces = []

    @jax.jit
    def update(state):
        traces.append(state)
        return tx.update(PARAMS, state, PARAMS)[1]

    values = []
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(tx.init)(PARAMS)
        for _ in range(steps):
            values.append(float(get_annealed(state)))
            state = update(state)
    assert len(traces) == 1
    return values


WRAPPERS = {
    "alone": lambda: anneal(down),
    "first": lambda: optax.chain(anneal(down), optax.adam(1e-3)),
    "last": lambda: optax.chain(optax.adam(1e-3), anneal(down)),
    "sparsify": lambda: transforms.sparsify(
        optax.chain(optax.adam(1e-3), anneal(down)),
        transforms.gradual_magnitude(sparsity=0.5, end=4, every=2),
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(
        optax.chain(optax.adam(1e-3), anneal(down)), 3
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), anneal(down))
    )(rate=0.1),
    "partition": lambda: optax.chain(
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
        ),
        anneal(down),
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_counts_under_every_wrapper(name):
    assert run(WRAPPERS[name](), 7) == WANT


def test_inside_multisteps_it_counts_real_steps():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), anneal(down)), 2)
    assert run(tx.gradient_transformation(), 8) == [1, 1, 1, 1, 0.75, 0.75, 0.5, 0.5]


def test_updates_pass_unchanged_and_extra_arguments_are_taken():
    tx = anneal(down)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), value=jnp.ones(()))
    assert updates is PARAMS


def test_several_values_are_one_tree():
    schedule = lambda t: {
        "b": down(t),
        "stage": schedules.stage(t, stages=2, begin=1, end=3),
        "constant": 0.5,
    }
    tx = anneal(schedule)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, after = tx.update(PARAMS, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))
        state = after
    got = get_annealed(state)
    assert {k: v.item() for k, v in got.items()} == {
        "b": 0.75,
        "stage": 2,
        "constant": 0.5,
    }


def test_a_checkpoint_resumes_it(tmp_path):
    tx = optax.chain(optax.adam(1e-3), anneal(down))
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(PARAMS)
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS)
        checkpoint.save(tmp_path, 3, state, config={})
        found = checkpoint.restore(tmp_path, tx.init(PARAMS), config={}).tree
        assert get_annealed(found) == 0.5
        _, found = tx.update(PARAMS, found, PARAMS)
    assert get_annealed(found) == 0.25


def test_exactly_one_is_needed():
    with pytest.raises(ValueError, match="exactly one AnnealState, got 0 in a tuple"):
        get_annealed(optax.adam(1e-3).init(PARAMS))
    two = optax.chain(anneal(down), anneal(down)).init(PARAMS)
    with pytest.raises(ValueError, match="exactly one AnnealState, got 2"):
        get_annealed(two)


def test_the_loop_of_the_package_docstring_runs():
    doc = straight_through.__doc__
    lines = [line for line in doc.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    loop = textwrap.dedent("\n".join(lines))
    params = PARAMS | {"threshold": jnp.array(-5.0)}
    names = {
        **vars(schedules), **vars(straight_through), **vars(transforms),
        "jax": jax, "optax": optax, "partial": functools.partial, "params": params,
        "f": lambda kernel, bias: ((jnp.ones((1, 4)) @ kernel + bias) ** 2).sum(),
    }  # fmt: skip
    first, rest = loop.split("\n", 1)
    with jax.numpy_dtype_promotion("standard"):
        exec(first, names)
        names["opt_state"] = names["tx"].init(params)
        for _ in range(3):
            exec(rest, names)
    # Three steps into the cosine: 0.75 (1 + cos(3e-4 pi)) / 2.
    value = get_annealed(names["opt_state"])
    np.testing.assert_allclose(value, 0.75 * (1 - 2.22e-7), rtol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), names["params"], params)
    assert moved == {"kernel": True, "bias": True, "threshold": True}
