"""NNX and Linen modules: same names, shapes and outputs; under scan, remat, a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj

CASES = {
    "MaskedLinear": ({}, {"sparsity": 0.7}),
    "MaskedLinear bf16": ({}, {"sparsity": 0.7, "dtype": jnp.bfloat16}),
    "BlockSparseLinear": ({}, {"sparsity": 0.5, "block_shape": (16, 16)}),
    "BlockSparseLinear no bias": (
        {},
        {"sparsity": 0.5, "block_shape": (16, 32), "use_bias": False},
    ),
    "BlockSparseLinear bf16": (
        {},
        {"sparsity": 0.5, "block_shape": (16, 16), "dtype": jnp.bfloat16},
    ),
}


def both(case, in_features=64, out_features=96):
    name, kwargs = case.split()[0], CASES[case][1]
    module = getattr(sj.nnx, name)(
        in_features, out_features, rngs=nnx.Rngs(0), **kwargs
    )
    return module, getattr(sj.linen, name)(in_features, out_features, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_from_equal_parameters(case):
    module, linen = both(case)
    x = jax.random.normal(jax.random.key(1), (3, 5, 64))
    variables = linen.init(jax.random.key(2), x)
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
    np.testing.assert_array_equal(linen.apply(moved, x), module(x))
    # Linen's own initialisation is the layer's, and the probes may be left out.
    del variables["params"]  # to show that apply needs what init made
    with pytest.raises(Exception, match="rng|params"):
        linen.apply(variables, x)
    moved.pop("probes", None)
    np.testing.assert_array_equal(linen.apply(moved, x), module(x))
    assert module(x).dtype == (linen.dtype or jnp.float32)


@pytest.mark.parametrize("case", ["MaskedLinear", "BlockSparseLinear"])
def test_output_has_the_variance_of_the_input(case):
    """At any sparsity; peers shrink by the square root of the density."""
    name, kwargs = case, dict(CASES[case][1], sparsity=0.9)
    module = getattr(sj.nnx, name)(640, 800, rngs=nnx.Rngs(0), **kwargs)
    y = module(jax.random.normal(jax.random.key(1), (400, 640)))
    used = np.asarray(y).std(axis=0) > 0
    assert used.mean() > 0.95
    assert abs(np.asarray(y)[:, used].std() - 1) < 0.1


def test_under_nnx_scan_and_remat_and_jit_over_a_mesh():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return sj.nnx.BlockSparseLinear(
            64, 64, block_shape=(16, 16), sparsity=0.5, rngs=nnx.Rngs(key)
        )

    layers = make(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (16, 64))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(layer, x)

    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)
    want = x
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], (params, rest))
        want = jnp.tanh(nnx.merge(graphdef, *one)(want))
    np.testing.assert_allclose(run(layers, x), want, rtol=1e-5, atol=1e-6)

    def loss(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.sum(run(model, x) ** 2)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    alone = jax.jit(jax.grad(loss))(params, rest, x)
    over_mesh = jax.jit(jax.grad(loss))(params, rest, sharded)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(over_mesh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_under_linen_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            layer = sj.linen.BlockSparseLinear(
                64, 64, block_shape=(16, 16), sparsity=0.5
            )
            return jnp.tanh(layer(x)), None

    stack = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0, "topology": 0, "probes": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = jax.random.normal(jax.random.key(1), (8, 64))
    variables = stack.init(jax.random.key(0), x, None)
    y, _ = stack.apply(variables, x, None)
    want = x
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        want = Layer().apply(one, want, None)[0]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_a_topology_step_on_a_module():
    """The whole loop that a user writes, without recompiling."""
    model = sj.nnx.BlockSparseLinear(
        64, 96, block_shape=(16, 16), sparsity=0.5, rngs=nnx.Rngs(0)
    )
    graphdef, params, layouts, probes = nnx.split(
        model, nnx.Param, sj.nnx.Layout, sj.nnx.GrowthProbe
    )
    x = jax.random.normal(jax.random.key(1), (8, 64))

    traces = []

    @jax.jit
    def topology_step(params, layouts, moments):
        traces.append(1)
        loss = lambda probes: jnp.sum(
            nnx.merge(graphdef, params, layouts, probes)(x) ** 2
        )
        scores = jax.grad(loss)(probes)
        return sj.topology.step(params, layouts, moments, scores, fraction=0.3)

    before = layouts["kernel_layout"].get_value().to_mask()
    new_params, new_layouts, moments = topology_step(params, layouts, params)
    after = new_layouts["kernel_layout"].get_value().to_mask()
    assert (before != after).sum() == 2 * round(0.3 * 12)
    np.testing.assert_array_equal(
        moments["kernel"].get_value(), new_params["kernel"].get_value()
    )
    topology_step(new_params, new_layouts, moments)
    assert len(traces) == 1
    assert nnx.merge(graphdef, new_params, new_layouts, probes)(x).shape == (8, 96)


def test_bad_arguments():
    with pytest.raises(ValueError, match="sparsity: got 1.5, needed"):
        sj.nnx.MaskedLinear(8, 8, sparsity=1.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"block_shape: got \(0, 8\), needed"):
        sj.nnx.BlockSparseLinear(
            8, 8, block_shape=(0, 8), sparsity=0.5, rngs=nnx.Rngs(0)
        )
    layer = sj.nnx.BlockSparseLinear(
        64,
        64,
        block_shape=(16, 16),
        sparsity=0.5,
        implementation="gpu",
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="implementation: got 'gpu', needed"):
        layer(jnp.ones((2, 64)))
