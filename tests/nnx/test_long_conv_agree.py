"""LongConv in NNX and Linen: same names, shapes, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj

CASES = {
    "default": {},
    "all": dict(
        causal=False,
        keep_frequencies=3,
        use_bias=False,
        dtype=jnp.bfloat16,
        implementation="xla",
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param("default", marks=pytest.mark.slow), "all"]
)
def test_equal_outputs_and_gradients_from_equal_parameters(case):
    arguments = CASES[case]
    module = sj.nnx.LongConv(4, 8, **arguments, rngs=nnx.Rngs(0))
    linen = sj.linen.LongConv(4, 8, **arguments)
    x, gate = jax.random.normal(jax.random.key(1), (2, 3, 8, 4))
    variables = linen.init(jax.random.key(2), x)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(params) == shapes(variables["params"])
    assert set(params) == {"kernel", "bias"} - set(["bias"] * (case == "all"))
    gates = dict(pre_gate=gate, post_gate=-gate)
    graphdef, state = nnx.split(module)

    def of_nnx(state, x):
        y = nnx.merge(graphdef, state)(x, **gates)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    def of_linen(params, x):
        y = linen.apply({"params": params}, x, **gates)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    both = lambda fn: jax.jit(jax.grad(fn, (0, 1), has_aux=True))
    (got, dx), y = both(of_nnx)(state, x)
    (want, of_x), y_linen = both(of_linen)(params, x)
    np.testing.assert_array_equal(y, y_linen)
    assert y.dtype == arguments.get("dtype", jnp.float32) and y.shape == x.shape
    np.testing.assert_array_equal(dx, of_x)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(got), want)
    assert all(a.any() for a in jax.tree.leaves(want))


@pytest.mark.slow
def test_scan_over_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(sj.linen.LongConv(4, 8)(x)), None

    stack = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = jax.random.normal(jax.random.key(1), (2, 8, 4))
    variables = stack.init(jax.random.key(0), x, None)
    y, _ = stack.apply(variables, x, None)
    want = x
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        want = Layer().apply(one, want, None)[0]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
