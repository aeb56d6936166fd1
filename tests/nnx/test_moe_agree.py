"""MoE in NNX and Linen: same values and gradients; scan, remat, meshes, files."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import checkpoint, routing

D, F, E = 8, 12, 4
TOP2 = functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")
FULL = dict(num_experts=E, router=TOP2, gated=True, shared_experts=1, balance=True)
MASK = np.arange(15).reshape(3, 5) % 4 != 3
X = jax.random.normal(jax.random.key(1), (3, 5, D))
# Choices that the bias changes.
BALANCE = jnp.array([0.3, -0.2, 0.0, -0.1])


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (FULL | {"dtype": jnp.bfloat16}, {"mask": jnp.asarray(MASK)}),
        pytest.param(
            {
                "num_experts": E,
                "router": functools.partial(
                    routing.hash_routing, num_experts=E, k=2, normalize="sum_stopgrad"
                ),
            },
            {"ids": jnp.arange(15).reshape(3, 5)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "num_experts": E,
                "router": functools.partial(routing.expert_choice, capacity=6),
                "jitter": 0.1,
            },
            {"key": jax.random.key(5)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "num_experts": E,
                "router": lambda z: routing.soft(z.reshape(-1, E, 2)),
                "router_outputs": 2 * E,
                "param_dtype": jnp.bfloat16,
                "dtype": jnp.float32,
            },
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["all", "hash", "expert choice", "soft"],
)
@pytest.mark.slow
def test_equal_outputs_and_gradients_from_equal_parameters(arguments, more):
    module = sj.nnx.MoE(D, F, **arguments, rngs=nnx.Rngs(0))
    linen = sj.linen.MoE(D, F, **arguments)
    variables = linen.init(jax.random.key(2), X, **more)
    state = nnx.to_pure_dict(nnx.state(module))
    biased = arguments.get("balance", False)
    if biased:
        module.balance.set_value(BALANCE)
        state["balance"] = variables["balance"]["balance"]
    moved = {"params": {name: state[name] for name in module.names}}
    moved |= {"balance": {"balance": state["balance"]}} if biased else {}
    shapes = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    assert shapes(moved) == shapes(variables)
    assert ("balance" in variables) == biased
    moved |= {"balance": {"balance": BALANCE}} if biased else {}

    def loss(y, aux):
        return jnp.sum(y.astype(jnp.float32) ** 2) + aux.load_balance + aux.z

    @nnx.jit
    def of_module(module, x):
        result = module(x, **more)
        gradient = nnx.grad(lambda module, x: loss(*module(x, **more)), argnums=(0, 1))
        return result, *gradient(module, x)

    @jax.jit
    def of_linen(params, x):
        apply = lambda p, x: linen.apply(moved | {"params": p}, x, **more)
        gradient = jax.grad(lambda p, x: loss(*apply(p, x)), argnums=(0, 1))
        return apply(params, x), *gradient(params, x)

    result, of_params, of_x = of_module(module, X)
    want, of_linen_params, of_linen_x = of_linen(moved["params"], X)
    jax.tree.map(np.testing.assert_array_equal, result, want)
    y, aux = result
    assert y.dtype == arguments.get("dtype", jnp.float32) and y.shape == X.shape
    # The bias has no gradient: it is no nnx.Param.
    assert set(of_params) == set(module.names)
    for name, gradient in of_params.items():
        np.testing.assert_array_equal(gradient.get_value(), of_linen_params[name])
        assert np.asarray(gradient.get_value(), np.float32).any(), name
        assert gradient.get_value().dtype == moved["params"][name].dtype
    np.testing.assert_array_equal(of_x, of_linen_x)
    if biased:
        unbiased = linen.apply(variables | {"params": moved["params"]}, X, **more)[1]
        assert (unbiased.counts != aux.counts).any()


def stacked_nnx():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return sj.nnx.MoE(D, F, **FULL, rngs=nnx.Rngs(key))

    return make(jax.random.split(jax.random.key(0), 3))


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        y, aux = sj.linen.MoE(D, F, **FULL, name="moe")(x, mask=mask)
        return x + y, (aux.load_balance, aux.counts)


@pytest.mark.slow
def test_scan_and_remat_equal_a_loop():
    mask = jnp.asarray(MASK)
    layers = stacked_nnx()
    layers.balance.set_value(jnp.stack([BALANCE, -BALANCE, 2 * BALANCE]))
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def run(layer, x):
        def apply(layer, x):
            y, aux = layer(x, mask=mask)
            return x + y, (aux.load_balance, aux.counts)

        return nnx.remat(apply)(layer, x)

    def of_nnx(params, x):
        y, (balance, counts) = run(nnx.merge(graphdef, params, rest, copy=True), x)
        return jnp.sum(y**2) + balance.sum(), counts

    stack = nn.scan(
        nn.remat(LinenLayer),
        variable_axes={"params": 0, "balance": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=3,
    )()
    shapes = jax.eval_shape(stack.init, jax.random.key(0), X, mask)
    assert shapes["balance"]["moe"]["balance"].shape == (3, E)
    pure = {name: params[name].get_value() for name in params}
    bias = {"moe": {"balance": rest["balance"].get_value()}}

    def of_linen(params, x):
        variables = {"params": {"moe": params}, "balance": bias}
        y, (balance, counts) = stack.apply(variables, x, mask)
        return jnp.sum(y**2) + balance.sum(), counts

    def of_loop(params, x):
        counts, total = [], 0
        for i in range(3):
            one = jax.tree.map(lambda a, i=i: a[i], (params, rest))
            y, aux = nnx.merge(graphdef, *one, copy=True)(x, mask=mask)
            x, total = x + y, total + aux.load_balance
            counts.append(aux.counts)
        return jnp.sum(x**2) + total, jnp.stack(counts)

    both = functools.partial(jax.value_and_grad, has_aux=True, argnums=(0, 1))
    (want, counts), (gradient, of_x) = jax.jit(both(of_loop))(params, X)
    for apply, tree in ((of_nnx, params), (of_linen, pure)):
        (got, its_counts), (its_gradient, of_its_x) = jax.jit(both(apply))(tree, X)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_array_equal(its_counts, counts)
        np.testing.assert_allclose(of_its_x, of_x, rtol=1e-3, atol=1e-4)
        for name in pure:
            a, b = (jax.tree.leaves(t[name])[0] for t in (its_gradient, gradient))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_training_step_moves_the_bias_by_counts_and_not_by_the_optimizer():
    module = sj.nnx.MoE(D, F, **FULL, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(module, optimizer, x):
        traces.append(1)

        def loss(module):
            y, aux = module(x)
            return jnp.mean((y - 1) ** 2) + 1e-2 * aux.load_balance, aux

        (value, aux), gradient = nnx.value_and_grad(loss, has_aux=True)(module)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(module, gradient)
        moved = routing.update_bias(module.balance[...], aux.counts, rate=0.01)
        module.balance.set_value(moved)
        return value, aux.counts

    before = module.router[...]
    values, counts = [], []
    for _ in range(20):
        value, count = step(module, optimizer, X)
        values, counts = [*values, float(value)], [*counts, np.asarray(count)]
    assert len(traces) == 1 and values[-1] < 0.6 * values[0]
    assert (module.router[...] != before).any()
    # The rule, in numpy.
    bias = np.zeros(E)
    for count in counts:
        bias = bias + 0.01 * np.sign(count.mean() - count)
        bias = bias - bias.mean()
    np.testing.assert_allclose(module.balance[...], bias, atol=1e-6)
    assert np.abs(bias).max() > 0.01


@pytest.mark.slow
def test_written_and_read_back(tmp_path):
    linen = sj.linen.MoE(D, F, **FULL)
    variables = linen.init(jax.random.key(0), X)
    variables["balance"]["balance"] = BALANCE
    empty = jax.tree.map(jnp.zeros_like, variables)
    stored = flax.serialization.to_bytes(variables)
    jax.tree.map(
        np.testing.assert_array_equal,
        flax.serialization.from_bytes(empty, stored),
        variables,
    )

    module = sj.nnx.MoE(D, F, **FULL, rngs=nnx.Rngs(0))
    module.balance.set_value(BALANCE)
    other = sj.nnx.MoE(D, F, **FULL, rngs=nnx.Rngs(1))
    checkpoint.save(tmp_path, 3, nnx.state(module), config={})
    found = checkpoint.restore(tmp_path, nnx.state(other), config={})
    nnx.update(other, found.tree)
    jax.tree.map(np.testing.assert_array_equal, other(X), module(X))
    np.testing.assert_array_equal(other.balance[...], BALANCE)


@pytest.mark.slow
def test_experts_sharded_over_a_mesh_compute_the_same():
    """Under jit, where XLA places the work: experts, tokens, or both are split."""
    module = sj.nnx.MoE(D, F, **FULL, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(3), (4, 6, D))

    def loss(params, x):
        y, aux = nnx.merge(graphdef, params, rest)(x)
        return jnp.sum(y**2) + aux.load_balance, aux.counts

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (want, counts), gradient = run(params, x)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    split = jax.tree.map(
        lambda a: place(a, P("expert") if a.ndim == 3 else P()), params
    )
    (got, its_counts), its_gradient = run(split, place(x, P("data")))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(its_counts, counts)
    for a, b in zip(
        jax.tree.leaves(its_gradient), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
