"""NMLinear and FanInLinear: NNX and Linen agree; one topology is one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj

CASES = {
    "NMLinear": {"n": 2, "m": 4},
    "NMLinear bf16": {"n": 1, "m": 8, "dtype": jnp.bfloat16, "use_bias": False},
    "FanInLinear": {"fan_in": 9},
    "FanInLinear bf16": {"fan_in": 9, "dtype": jnp.bfloat16, "use_bias": False},
}


def both(case):
    name, kwargs = case.split()[0], CASES[case]
    module = getattr(sj.nnx, name)(64, 96, rngs=nnx.Rngs(0), **kwargs)
    return module, getattr(sj.linen, name)(64, 96, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_from_equal_parameters(case):
    module, linen = both(case)
    x = jax.random.normal(jax.random.key(1), (3, 5, 64))
    y, variables = linen.init_with_output(jax.random.key(2), x)
    state = nnx.to_pure_dict(nnx.state(module))
    moved = {
        collection: {name: state[name] for name in names}
        for collection, names in variables.items()
    }
    shapes = lambda tree: [
        (jax.tree_util.keystr(path), a.shape, a.dtype)
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert shapes(moved) == shapes(variables)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(variables))
    np.testing.assert_array_equal(linen.apply(moved, x), module(x))
    np.testing.assert_array_equal(linen.apply(variables, x), y)
    assert module(x).dtype == (linen.dtype or jnp.float32)


@pytest.mark.parametrize("case", ["NMLinear", "FanInLinear"])
def test_output_has_the_variance_of_the_input(case):
    kwargs = {"n": 1, "m": 8} if case == "NMLinear" else {"fan_in": 16}
    module = getattr(sj.nnx, case)(256, 400, rngs=nnx.Rngs(0), **kwargs)
    y = module(jax.random.normal(jax.random.key(1), (200, 256)))
    assert abs(np.asarray(y).std() - 1) < 0.1


def test_new_indices_do_not_recompile_and_params_train():
    model = sj.nnx.FanInLinear(64, 96, fan_in=9, rngs=nnx.Rngs(0))
    graphdef, params, indices = nnx.split(model, nnx.Param, sj.nnx.Indices)
    x = jax.random.normal(jax.random.key(1), (8, 64))

    traces = []

    @jax.jit
    def grads(params, indices):
        traces.append(1)
        loss = lambda params: jnp.sum(nnx.merge(graphdef, params, indices)(x) ** 2)
        return jax.grad(loss)(params)

    first = grads(params, indices)
    second = grads(params, jax.tree.map(lambda i: (i + 1) % 64, indices))
    assert first["kernel"].get_value().shape == (96, 9)
    assert (first["kernel"].get_value() != second["kernel"].get_value()).any()
    assert len(traces) == 1
