"""Structured modules: NNX and Linen agree; scale, sizes that do not divide, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax.structured import Chain, Pattern

# 30 -> 50 divides by nothing that is below.
TRAIN = sj.structured.tensor_train((3, 3, 4), (4, 4, 4), 2, in_size=30, out_size=50)
CASES = {
    "MonarchLinear": {"blocks": 4},
    "MonarchLinear rank": {"blocks": 3, "rank": 2, "use_bias": False},
    "MonarchLinear bf16": {"blocks": 4, "dtype": jnp.bfloat16},
    "ButterflyLinear": {},
    "KroneckerSparseLinear": {"pattern": TRAIN},
    "KroneckerSparseLinear one": {"pattern": Pattern(a=4, b=13, c=8, d=1)},
    "LowRankLinear": {"rank": 5},
    "LowRankLinear bf16": {"rank": 5, "dtype": jnp.bfloat16, "use_bias": False},
    "PixelflyLinear": {"block_shape": (4, 8), "size": 4, "rank": 3},
    "PixelflyLinear bf16": {
        "block_shape": (8, 8),
        "size": 2,
        "rank": 3,
        "dtype": jnp.bfloat16,
    },
}
SHAPES = {
    # ceil(30 / 4) = 8, ceil(50 / 4) = 13; rank ceil(8 / 4) = 2 for each of 4 x 4 pairs.
    "MonarchLinear": {"factor_0": (4, 1, 8, 8), "factor_1": (1, 4, 8, 13)},
    # ceil(30 / 3) = 10, ceil(50 / 3) = 17.
    "MonarchLinear rank": {"factor_0": (3, 1, 10, 6), "factor_1": (1, 3, 6, 17)},
    "ButterflyLinear": {f"factor_{i}": (32 >> i, 1 << i, 2, 2) for i in range(6)},
    "LowRankLinear": {"down": (30, 5), "up": (5, 50)},
}


def both(case, k=30, n=50):
    name, kwargs = case.split()[0], CASES[case]
    module = getattr(sj.nnx, name)(k, n, rngs=nnx.Rngs(0), **kwargs)
    return module, getattr(sj.linen, name)(k, n, **kwargs)


SLOW = {"MonarchLinear rank", "PixelflyLinear"}
SLOW |= {case for case in CASES if "bf16" in case or "Kronecker" in case}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES],
)
def test_equal_parameters_and_outputs(case):
    module, linen = both(case)
    x = jax.random.normal(jax.random.key(1), (2, 3, 30))
    variables = jax.eval_shape(linen.init, jax.random.key(2), x)
    params = nnx.to_pure_dict(nnx.state(module))
    # A value for every leaf: a fresh bias is zero.
    params = {name: leaf + 0.1 for name, leaf in params.items()}
    shapes = lambda tree: {name: (a.shape, a.dtype) for name, a in tree.items()}
    assert variables.keys() == {"params"}
    assert shapes(params) == shapes(variables["params"])
    for name, shape in SHAPES.get(case, {}).items():
        assert params[name].shape == shape
    nnx.update(module, params)
    y = module(x)
    np.testing.assert_array_equal(linen.apply({"params": params}, x), y)
    assert y.dtype == (linen.dtype or jnp.float32)

    # The equation, in float64.
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    x = np.asarray(x, np.float64)
    want = x
    for i in range(sum(name.startswith("factor_") for name in p)):
        want = times(want, p[f"factor_{i}"])
    want = x @ p["down"] @ p["up"] if "down" in p else want[..., :50]
    if "blocks" in p:
        want = want + x @ scattered(p["blocks"], CASES[case])
    want = want + p.get("bias", 0.0)
    tolerance = 0.02 if y.dtype == jnp.bfloat16 else 1e-5
    error = np.abs(np.asarray(y, np.float64) - want).max() / np.abs(want).max()
    assert error < tolerance


def times(x, factor):
    """y[i, o, k] = sum_j x[i, j, k] factor[i, k, j, o]; x filled up with zeros."""
    a, d, c, b = factor.shape
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, a * c * d - x.shape[-1])])
    x = x.reshape(*x.shape[:-1], a, c, d)
    y = np.einsum("...ijk,ikjo->...iok", x, factor)
    return y.reshape(*y.shape[:-3], -1)


def scattered(blocks, kwargs):
    """Of the flat butterfly, by (column, row), into a matrix [30, 50]."""
    (bk, bn), size = kwargs["block_shape"], kwargs["size"]
    mask = sj.structured.flat_butterfly(30, 50, block_shape=(bk, bn), size=size)
    w = np.zeros((bk * mask.shape[0], bn * mask.shape[1]))
    places = [(r, c) for c in range(mask.shape[1]) for r in range(mask.shape[0])]
    places = [place for place in places if mask[place]]
    for (r, c), block in zip(places, blocks, strict=True):
        w[r * bk : (r + 1) * bk, c * bn : (c + 1) * bn] = block
    return w[:30, :50]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda k, n, **kw: sj.nnx.MonarchLinear(k, n, blocks=7, **kw),
        lambda k, n, **kw: sj.nnx.ButterflyLinear(k, n, **kw),
        lambda k, n, **kw: sj.nnx.LowRankLinear(k, n, rank=20, **kw),
        lambda k, n, **kw: sj.nnx.PixelflyLinear(
            k, n, block_shape=(32, 32), size=4, rank=16, **kw
        ),
    ],
    ids=["monarch", "butterfly", "low_rank", "pixelfly"],
)
def test_a_fresh_layer_has_the_standard_deviation_of_a_dense_one(make):
    """A peer's is sqrt(3) too small, 0.33 beside 0.58."""
    x = jax.random.normal(jax.random.key(1), (300, 500))
    dense = nnx.Linear(500, 300, rngs=nnx.Rngs(2))(x)
    y = make(500, 300, rngs=nnx.Rngs(0))(x)
    assert y.shape == dense.shape
    assert abs(float(jnp.std(y) / jnp.std(dense)) - 1) < 0.05


@pytest.mark.slow
def test_float32_masters_of_a_bfloat16_layer_have_float32_gradients():
    layer, _ = both("MonarchLinear bf16")
    x = jax.random.normal(jax.random.key(1), (64, 30))
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)
    g = gradient["factor_1"].get_value()
    assert g.dtype == jnp.float32
    # Not float32 numbers that were rounded to bfloat16 on the way.
    assert jnp.any(g.astype(jnp.bfloat16).astype(jnp.float32) != g)


@pytest.mark.slow
def test_stacked_under_nnx_and_linen_scan():
    make = lambda rngs: sj.nnx.MonarchLinear(16, 16, blocks=4, rank=2, rngs=rngs)
    stack = nnx.vmap(make)(nnx.Rngs(0).split(3))
    x = jax.random.normal(jax.random.key(1), (5, 16))
    run = nnx.scan(
        lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    params = nnx.to_pure_dict(nnx.state(stack))
    assert params["factor_0"].shape == (3, 4, 1, 4, 8)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(sj.linen.MonarchLinear(16, 16, blocks=4, rank=2)(x)), None

    scanned = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    (name,) = jax.eval_shape(scanned.init, jax.random.key(0), x, None)["params"]
    y, _ = scanned.apply({"params": {name: params}}, x, None)
    np.testing.assert_allclose(run(x, stack), y, rtol=1e-6)
    want = x
    for i in range(3):
        one = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params)}
        want = jnp.tanh(
            sj.linen.MonarchLinear(16, 16, blocks=4, rank=2).apply(one, want)
        )
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("MonarchLinear", {"blocks": 0}, "blocks: got 0, needed 1 to 30"),
        ("MonarchLinear", {"blocks": 31}, "blocks: got 31, needed 1 to 30"),
        ("MonarchLinear", {"blocks": 4, "rank": 9}, "rank: got 9, needed 1 to 8"),
        ("LowRankLinear", {"rank": 31}, "rank: got 31, needed 1 to 30"),
        ("LowRankLinear", {"rank": 0}, "rank: got 0, needed 1 to 30"),
        (
            "PixelflyLinear",
            {"block_shape": (8, 8), "size": 3, "rank": 2},
            "size: got 3, needed a power of two",
        ),
        (
            "PixelflyLinear",
            {"block_shape": (8, 0), "size": 2, "rank": 2},
            "block_shape: got 0, needed at least 1",
        ),
        (
            "PixelflyLinear",
            {"block_shape": (8, 8), "size": 2, "rank": 31},
            "rank: got 31, needed 1 to 30",
        ),
        (
            "KroneckerSparseLinear",
            {"pattern": Chain((Pattern(1, 50, 40, 1),), 40, 50)},
            "pattern: got a chain from 40 to 50 entries, needed one from 30 to 50",
        ),
        (
            "KroneckerSparseLinear",
            {"pattern": Pattern(1, 50, 29, 1)},
            "in_size: got 30, needed 1 to 29",
        ),
        ("ButterflyLinear", {"param_dtype": jnp.complex64}, "param_dtype: got complex"),
        (
            "LowRankLinear",
            {"rank": 2, "param_dtype": jnp.int32},
            "param_dtype: got int",
        ),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        getattr(sj.nnx, name)(30, 50, rngs=nnx.Rngs(0), **kwargs)
    with pytest.raises(ValueError, match=message):
        linen = getattr(sj.linen, name)(30, 50, **kwargs)
        linen.init(jax.random.key(0), jnp.ones((1, 30)))


@pytest.mark.parametrize("case", ["MonarchLinear", "LowRankLinear", "PixelflyLinear"])
@pytest.mark.parametrize("size", [29, 32])
def test_x_of_another_size_is_not_padded_in_silence(case, size):
    module, _ = both(case)
    with pytest.raises(
        ValueError, match=rf"x: got shape \(2, {size}\), needed \[..., 3"
    ):
        module(jnp.ones((2, size)))


def test_sizes_of_zero():
    with pytest.raises(ValueError, match="in_features, out_features: got 0, 8, needed"):
        sj.nnx.LowRankLinear(0, 8, rank=1, rngs=nnx.Rngs(0))


def test_parameter_counts_are_the_true_ones():
    # 7 -> 7 in four blocks of 2, rank 1: 7 inputs feed 4 each, 7 outputs read 4 each
    # (a block of 2 x 4 of factor 0 has one row that only padding meets: 8 * 4 - 4).
    spec = sj.nnx.MonarchLinear(7, 7, blocks=4, rank=1, rngs=nnx.Rngs(0)).spec
    assert spec.parameter_count == 28 + 28 + 7
    assert both("LowRankLinear")[0].spec.parameter_count == 5 * 80 + 50
