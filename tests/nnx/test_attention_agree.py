"""SparseAttention in NNX and Linen: equal; flax's weights; scan, remat, meshes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import attention as at

N, T = 8, 12
MASK = at.causal() & at.sliding_window(5)
X = jax.random.normal(jax.random.key(1), (2, T, N))
GROUPED = dict(num_kv_heads=2, block_shape=(4, 4), rotary_base=100.0)
CASES = {
    "expression": dict(mask=MASK, **GROUPED),
    "block mask": dict(mask=at.block_mask(MASK, T, T, block_shape=(4, 4)), head_dim=3),
    "selector": dict(
        mask=functools.partial(at.moba, budget=2),
        block_shape=(4, 4),
        use_bias=False,
        dtype=jnp.bfloat16,
    ),
}


SLOW = {"expression", "selector"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES]
)
def test_equal_outputs_and_gradients_from_equal_parameters(case):
    module = sj.nnx.SparseAttention(N, 4, **CASES[case], rngs=nnx.Rngs(0))
    linen = sj.linen.SparseAttention(N, 4, **CASES[case])
    variables = linen.init(jax.random.key(2), X)
    params = {name: getattr(module, name).get_value() for name in module.names}
    shapes = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    assert shapes(params) == shapes(variables["params"])
    # Arrays of the mask are variables beside the parameters; others are the module's.
    assert ("topology" in variables) == (case == "block mask")
    _, _, layouts, rest = nnx.split(module, nnx.Param, sj.nnx.Layout, ...)
    assert bool(jax.tree.leaves(layouts)) == (case == "block mask")
    assert not jax.tree.leaves(rest)

    loss = lambda y: jnp.sum(y.astype(jnp.float32) ** 2)

    @nnx.jit
    def of_module(module, x):
        return module(x), nnx.grad(lambda module: loss(module(x)))(module)

    @jax.jit
    def of_linen(params, x):
        apply = lambda p: linen.apply(variables | {"params": p}, x)
        return apply(params), jax.grad(lambda p: loss(apply(p)))(params)

    (y, gradient), (want, of_params) = of_module(module, X), of_linen(params, X)
    np.testing.assert_array_equal(y, want)
    assert y.dtype == CASES[case].get("dtype", jnp.float32)
    for name in module.names:
        np.testing.assert_array_equal(gradient[name].get_value(), of_params[name])
        assert np.asarray(of_params[name], np.float32).any(), name
    if case == "block mask":
        without = linen.apply({"params": params}, X)  # from the field
        np.testing.assert_allclose(without, want, atol=1e-6)


@pytest.mark.slow
def test_a_mask_of_the_call_takes_the_place_of_the_modules():
    module = sj.nnx.SparseAttention(N, 4, **CASES["expression"], rngs=nnx.Rngs(0))
    params = {name: getattr(module, name).get_value() for name in module.names}
    linen = sj.linen.SparseAttention(N, 4, **GROUPED)  # sees everything
    ids = jnp.array([0] * 7 + [1] * 5, jnp.int32)
    mask = at.segments(ids)
    y = nnx.jit(lambda module, mask: module(X, mask=mask))(module, mask)
    assert y.shape == X.shape
    np.testing.assert_allclose(
        linen.apply({"params": params}, X, mask=mask), y, atol=1e-6
    )
    own = linen.apply({"params": params}, X[:, :7])
    np.testing.assert_allclose(y[:, :7], own, atol=1e-6)
    # Differences of positions count, and are twice as large here.
    wide = dict(mask=mask, positions=2 * jnp.arange(T, dtype=jnp.int32))
    others = module(X, **wide), linen.apply({"params": params}, X, **wide)
    np.testing.assert_allclose(*others, atol=1e-6)
    assert not np.allclose(others[0], y, atol=1e-3)
    _, stats = module(X, return_stats=True, dense=at.causal())
    # Rows of five keys: 1 block, 2, 2 of 3; whatever the heads.
    np.testing.assert_allclose(stats.density, np.full((2, 4), 5 / 9), rtol=1e-6)
    assert 0 < stats.recall.min() and stats.recall.max() < 1


def test_weights_of_flax_give_what_flax_gives():
    theirs = nnx.MultiHeadAttention(4, N, decode=False, rngs=nnx.Rngs(3))
    params = {}
    for name in ("query", "key", "value", "out"):
        linear = getattr(theirs, name)
        bias = jax.random.normal(jax.random.key(4), linear.bias.get_value().shape)
        linear.bias.set_value(bias)
        params |= {name: linear.kernel.get_value(), f"{name}_bias": bias}
    ours = sj.linen.SparseAttention(N, 4, mask=MASK, block_shape=(4, 4))
    want = theirs(X, mask=MASK.to_mask(T, T)[None, None])
    np.testing.assert_allclose(ours.apply({"params": params}, X), want, atol=2e-6)


def test_both_decode():
    module = sj.nnx.SparseAttention(N, 4, **CASES["expression"], rngs=nnx.Rngs(0))
    params = {name: getattr(module, name).get_value() for name in module.names}
    linen = sj.linen.SparseAttention(N, 4, **CASES["expression"])
    whole = module(X)
    cache = sj.layers.init_kv_cache(module.spec, 2, T)
    assert linen.spec == module.spec
    traces = []

    @nnx.jit
    def step(module, x, cache):
        traces.append(1)
        return module.decode(x, cache)

    of_linen = cache
    for i in range(T):
        y, cache = step(module, X[:, i : i + 1], cache)
        np.testing.assert_allclose(y, whole[:, i : i + 1], atol=2e-6)
    assert len(traces) == 1
    piece = functools.partial(linen.apply, {"params": params}, method="decode")
    y, of_linen = piece(X, of_linen)
    np.testing.assert_allclose(y, whole, atol=2e-6)
    np.testing.assert_allclose(of_linen.key, cache.key, atol=1e-6)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        layer = sj.linen.SparseAttention(N, 4, **GROUPED, name="attention")
        return x + layer(x, mask=mask), None


@pytest.mark.slow
def test_scan_and_remat_equal_a_loop():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return sj.nnx.SparseAttention(
            N, 4, mask=CASES["block mask"]["mask"], **GROUPED, rngs=nnx.Rngs(key)
        )

    layers = make(jax.random.split(jax.random.key(0), 3))
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)
    mask = CASES["block mask"]["mask"]

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return nnx.remat(lambda layer, x: x + layer(x))(layer, x)

    def of_nnx(params, x):
        return jnp.sum(run(nnx.merge(graphdef, params, rest, copy=True), x) ** 2)

    stack = nn.scan(
        nn.remat(LinenLayer),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=3,
    )()
    pure = {name: params[name].get_value() for name in params}

    def of_linen(params, x):
        y, _ = stack.apply({"params": {"attention": params}}, x, mask)
        return jnp.sum(y**2)

    def of_loop(params, x):
        for i in range(3):
            one = jax.tree.map(lambda a, i=i: a[i], (params, rest))
            x = x + nnx.merge(graphdef, *one, copy=True)(x)
        return jnp.sum(x**2)

    both = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))
    want, (gradient, of_x) = both(of_loop)(params, X)
    for f, tree in ((of_nnx, params), (of_linen, pure)):
        got, (its_gradient, of_its_x) = both(f)(tree, X)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(of_its_x, of_x, rtol=1e-3, atol=1e-4)
        for name in pure:
            a, b = (jax.tree.leaves(t[name])[0] for t in (its_gradient, gradient))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
def test_sharded_over_a_mesh_computes_the_same(kind):
    """Under jit over eight devices: XLA places the work, or the types say where.

    Batch and heads are cut, and so the product after the heads is summed over devices.
    """
    case = dict(mask=MASK, num_kv_heads=4, block_shape=(4, 4), rotary_base=100.0)
    module = sj.nnx.SparseAttention(N, 4, **case, rngs=nnx.Rngs(0))
    linen = sj.linen.SparseAttention(N, 4, **case)
    graphdef, params = nnx.split(module, nnx.Param)
    pure = {name: params[name].get_value() / 2 + 0.1 for name in module.names}

    def loss(params, x):
        y = linen.apply({"params": params}, x)
        named = nnx.State({n: nnx.Param(a) for n, a in params.items()})
        return jnp.sum(y * nnx.merge(graphdef, named)(x))

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(pure, X)
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(kind,) * 2)
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    specs = dict.fromkeys(("query", "key", "value"), P(None, "heads"))
    specs |= {f"{name}_bias": P("heads") for name in specs} | {"out": P("heads")}
    split = {n: place(a, specs.get(n, P())) for n, a in pure.items()}
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(split, place(X, P("data")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_kv_heads: got 3, needed a divisor of 4"):
        sj.nnx.SparseAttention(N, 4, num_kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_kv_heads: got 3, needed a divisor of 4"):
        sj.linen.SparseAttention(N, 4, num_kv_heads=3).init(jax.random.key(0), X)
