"""Iso-FLOP layers: sizes worked out by hand, equal FLOPs, equations, variance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax.layers import apply_iso_flop, init_iso_flop, iso_flop, iso_flop_chain

KINDS = ["wide", "parallel", "factorized", "doped"]


def drawn(spec):
    return jax.jit(init_iso_flop, static_argnums=1)(jax.random.key(0), spec)


# (sizes, kind, sparsity) -> structure, kept weights by matrix, parameters with biases.
SIZES = [
    # 64 * 96 = 6144. k = 1/sqrt(1/4) = 2: [128, 192], one bias each of 192.
    ((64, 96), "wide", 0.75, {"wide_in": 128, "wide_out": 192}, [6144], 6336),
    # k = sqrt(10) = 3.162..: 31.62 and 63.25, rounded up to 32 and 64.
    ((10, 20), "wide", 0.9, {"wide_in": 32, "wide_out": 64}, [200], 264),
    # k = 1/0.4 = 2.5 at both: 12.5 -> 13, exactly 10 stays 10.
    ((5, 4), "wide", 0.84, {"wide_in": 13, "wide_out": 10}, [20], 30),
    # 1 / (1/10) = 10 branches, 10 * 96 biases.
    ((64, 96), "parallel", 0.9, {"branches": 10}, [6144], 7104),
    # 1 / 0.7 = 1.43, rounded up.
    ((64, 96), "parallel", 0.3, {"branches": 2}, [6144], 6336),
    # 6144 / (160 / 4) = 153.6 -> 154; 6144 * 64/160 = 2457.6 -> 2458, the rest 3686.
    ((64, 96), "factorized", 0.75, {"inner": 154}, [2458, 3686], 6240),
    # 32 * 32 / 64 = 16 at sparsity 0: both factors [32, 16] are whole.
    ((32, 32), "factorized", 0.0, {"inner": 16}, [512, 512], 1056),
    # 0.75 * 6144 / 160 = 28.8 -> 28; 28 * 64, 28 * 96, and 6144 - 28 * 160 = 1664.
    ((64, 96), "doped", 0.75, {"rank": 28}, [1792, 2688, 1664], 6240),
]


@pytest.mark.parametrize("sizes, kind, sparsity, structure, kept, parameters", SIZES)
def test_sizes_worked_out_by_hand(sizes, kind, sparsity, structure, kept, parameters):
    spec = iso_flop(sizes, kind, sparsity)
    assert {name: getattr(spec, name) for name in structure} == structure
    assert (spec.in_features, spec.out_features) == sizes
    got = [
        round((1 - one.sparsity) * one.in_features * one.out_features)
        for one in spec.linears.values()
    ]
    assert got == kept
    assert spec.parameter_count == parameters
    assert spec.flops_per_row == spec.dense_flops_per_row == 2 * sizes[0] * sizes[1]


@pytest.mark.parametrize("case", [1, 5, 7])
def test_what_is_drawn_has_as_many_weights(case):
    sizes, kind, sparsity, _, kept, _ = SIZES[case]
    params, topology = drawn(iso_flop(sizes, kind, sparsity))
    got = [int((each["kernel"] != 0).sum()) for each in params.values()]
    assert got == kept
    for name, where in topology.items():
        np.testing.assert_array_equal(where["kernel_mask"], params[name]["kernel"] != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_the_dense_layers(kind):
    """Exactly with masks, to half a block with blocks; the sparsity takes the rest."""
    for k, n in [(48, 80), (33, 70)]:
        for s in [0.3, 0.75, 0.9]:
            spec = iso_flop((k, n), kind, s)
            assert spec.flops_per_row == 2 * k * n
            # Rounding up gives sparsity s or more; the rank is rounded down.
            if kind == "doped":
                assert s - (k + n) / (k * n) <= spec.sparsity <= s + 1e-12
            else:
                assert spec.sparsity >= s - 1e-12
            blocks = iso_flop((k, n), kind, s, block_shape=(8, 16))
            assert abs(blocks.flops_per_row - 2 * k * n) <= 2 * 64


def test_block_sizes_are_multiples_of_the_block():
    # k = 2: 80 and 100 -> 160 and 200, to multiples of 32: 160 and 224.
    spec = iso_flop((80, 100), "wide", 0.75, block_shape=(16, 32))
    assert (spec.wide_in, spec.wide_out) == (160, 224)
    # 64 * 96 / 40 = 153.6, to multiples of 32: 160; 6144 / 512 = 12 blocks,
    # 12 * 64/160 = 4.8 -> 5 of them in U.
    spec = iso_flop((64, 96), "factorized", 0.75, block_shape=(16, 32))
    assert spec.inner == 160
    _, topology = drawn(spec)
    assert [int(t["kernel_layout"].count) for t in topology.values()] == [5, 7]
    # Rank 28 as without blocks; 1664 / 512 = 3.25 blocks.
    spec = iso_flop((64, 96), "doped", 0.75, block_shape=(16, 32))
    params, _ = drawn(spec)
    assert params["sparse"]["kernel"].shape == (3, 16, 32)
    assert spec.flops_per_row == 2 * (28 * 160 + 3 * 512)


def test_equations():
    """Against the sums written out over branches and factors, in float64."""
    x = jax.random.normal(jax.random.key(1), (3, 5, 12))
    x64 = np.asarray(x, np.float64)
    tanh_variance = 0.394294  # of tanh(z), z standard normal

    def parts(kind, **options):
        spec = iso_flop((12, 8), kind, 0.75, **options)
        params, topology = drawn(spec)
        some = lambda a: jax.random.normal(jax.random.key(2), a.shape)
        for each in params.values():
            if "bias" in each:
                each["bias"] = some(each["bias"])
        y = jax.jit(apply_iso_flop, static_argnums=0)(spec, params, topology, x)
        f64 = lambda a: np.asarray(a, np.float64)
        return spec, y, jax.tree.map(f64, params)

    spec, y, p = parts("parallel", activation=jnp.tanh)
    assert spec.branches == 4
    w, b = p["sparse"]["kernel"], p["sparse"]["bias"]
    branch = lambda j: np.tanh(x64 @ w[:, 8 * j : 8 * j + 8] + b[8 * j : 8 * j + 8])
    want = sum(branch(j) for j in range(4)) / math.sqrt(4 * tanh_variance)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)

    spec, y, p = parts("factorized", activation=jnp.tanh)
    u, v = p["sparse_in"]["kernel"], p["sparse_out"]["kernel"]
    assert u.shape == (12, 20) and "bias" not in p["sparse_in"]  # 96 / 20 * 4 = 19.2
    want = np.tanh(x64 @ u) @ v + p["sparse_out"]["bias"]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)

    spec, y, p = parts("doped", activation=jnp.tanh)  # rank 0.75 * 96 / 20 = 3.6 -> 3
    low_rank = x64 @ p["dense_in"]["kernel"] @ p["dense_out"]["kernel"]
    sparse = x64 @ p["sparse"]["kernel"] + p["sparse"]["bias"]
    gain = math.sqrt((1 - 3 * 20 / 96) / tanh_variance)
    want = low_rank + gain * np.tanh(sparse)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    spec, y, p = parts("doped")
    low_rank = x64 @ p["dense_in"]["kernel"] @ p["dense_out"]["kernel"]
    want = low_rank + x64 @ p["sparse"]["kernel"] + p["sparse"]["bias"]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


OPTIONS = [
    ("wide", {"block_shape": (16, 16)}),
    ("parallel", {"activation": jax.nn.gelu, "block_shape": (16, 16)}),
    ("parallel", {"activation": jnp.tanh, "own_masks": False}),
    ("factorized", {"activation": jax.nn.relu}),
    ("factorized", {"activation": jax.nn.silu, "own_masks": False}),
    ("doped", {}),
    ("doped", {"activation": jax.nn.relu}),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", OPTIONS)
def test_output_has_the_standard_deviation_of_a_dense_layers(kind, options):
    k, n = 384, 256
    spec = iso_flop((k, n), kind, 0.75, **options)
    params, topology = drawn(spec)
    if not spec.own_masks:
        assert not topology
        updater = sj.transforms.static(sparsity=spec.sparsity, key=jax.random.key(3))
        tx = sj.transforms.sparsify(
            optax.sgd(0.1), updater, leaf_filter="*sparse*/kernel"
        )
        masks = sj.transforms.get_masks(tx.init(params))
        params = sj.masks.apply_masks(params, masks)
    x = jax.random.normal(jax.random.key(1), (256, getattr(spec, "wide_in", k)))
    dense = np.random.default_rng(0).normal(size=(k, n)) / math.sqrt(k)
    want = np.std(np.asarray(x[:, :k]) @ dense)
    y = jax.jit(lambda x: apply_iso_flop(spec, params, topology, x))(x)
    assert abs(float(jnp.std(y)) / want - 1) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, distribution",
    [("parallel", "uniform"), ("doped", "uniform"), ("factorized", "erdos_renyi")],
)
def test_trains_under_rigl_at_equal_flops(kind, distribution):
    """Counts are exact at every step, and growth sees dense gradients."""
    spec = iso_flop((16, 24), kind, 0.75, own_masks=False)
    params, topology = drawn(spec)
    updater = sj.transforms.rigl(
        sparsity=spec.sparsity,
        end=8,
        every=2,
        distribution=getattr(sj.masks, distribution),
        key=jax.random.key(1),
    )
    tx = sj.transforms.sparsify(
        optax.adamw(1e-2), updater, leaf_filter="*sparse*/kernel"
    )
    state = tx.init(params)
    params = sj.masks.apply_masks(params, sj.transforms.get_masks(state))
    shape = (32, getattr(spec, "wide_in", 16)), (32, getattr(spec, "wide_out", 24))
    x, target = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shape))

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((apply_iso_flop(spec, p, topology, x) - target) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    first = sj.transforms.get_masks(state)
    losses = []
    for _ in range(12):
        params, state, value, grads = step(params, state)
        losses.append(float(value))
        counts = {name: int((p["kernel"] != 0).sum()) for name, p in params.items()}
        # One entry of rounding where the budget is split over two sparse factors.
        assert abs(sum(counts.values()) - 16 * 24) <= (kind == "factorized")
    assert losses[-1] < losses[0]
    masks = sj.transforms.get_masks(state)
    for name in spec.linears:
        if name.startswith("sparse"):
            assert (masks[name]["kernel"] != first[name]["kernel"]).any()
            assert (grads[name]["kernel"][~masks[name]["kernel"]] != 0).mean() > 0.5
        else:
            assert isinstance(masks[name]["kernel"], optax.MaskedNode)


def test_chains_keep_their_ends_and_their_flops():
    # An MLP of two layers, wide on one side each: 1/(1/4) = 4 times the hidden size.
    up, down = iso_flop_chain([64, 256, 96], "wide", 0.75)
    assert (up.wide_in, up.wide_out) == (64, 1024)
    assert (down.wide_in, down.wide_out) == (1024, 96)
    assert up.sparsity == down.sparsity == 0.75
    # Three layers: 2 times; sparsity 3/4 in the middle and 1 - 1/2 at the ends.
    specs = iso_flop_chain([10, 20, 30, 40], "wide", 0.75)
    widths = [(spec.wide_in, spec.wide_out) for spec in specs]
    assert widths == [(10, 40), (40, 60), (60, 40)]
    assert [spec.sparsity for spec in specs] == [0.5, 0.75, 0.5]
    # Of four layers the first and the last two: only what is between the latter, by 4.
    picked = [0, 2, 3]
    specs = iso_flop_chain([8, 8, 8, 8, 8], "wide", 0.75, chosen=picked, use_bias=False)
    dense = sj.layers.MaskedLinearSpec(in_features=8, out_features=8, use_bias=False)
    assert specs[:2] == [dense, dense]
    assert [(s.wide_in, s.wide_out) for s in specs[2:]] == [(8, 32), (32, 8)]
    # 2.5 times 5 is 12.5: one width for both of its layers.
    first, second, third = iso_flop_chain([7, 5, 5, 7], "wide", 0.84)
    assert first.wide_out == second.wide_in == 13 == second.wide_out == third.wide_in
    specs = iso_flop_chain([8, 16, 8], "parallel", 0.5, chosen=[1])
    assert specs[0] == sj.layers.MaskedLinearSpec(in_features=8, out_features=16)
    assert specs[1] == iso_flop((16, 8), "parallel", 0.5)


def test_a_dense_spec_hands_on_its_options():
    dense = sj.layers.MaskedLinearSpec(
        in_features=64, out_features=96, use_bias=False, param_dtype=jnp.bfloat16
    )
    spec = iso_flop(dense, "doped", 0.5, activation=jax.nn.gelu)
    params, topology = drawn(spec)
    assert "bias" not in params["sparse"]
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert apply_iso_flop(spec, params, topology, x).dtype == jnp.bfloat16
    assert iso_flop(dense, "wide", 0.5, use_bias=True).use_bias


def test_nine_tenths_is_ten_branches():
    """1 / (1 - 0.9) in floats is 10.000000000000002, which rounds up to 11."""
    assert iso_flop((64, 64), "parallel", 0.9).branches == 10
    # 1 - 0.8 = 0.19999999999999996: 160 * 160 / (320 * 0.2) = 400 exactly.
    assert iso_flop((160, 160), "factorized", 0.8).inner == 400


def test_no_sparsity_is_the_dense_layer():
    params, topology = drawn(iso_flop((8, 4), "wide", 0.0))
    assert params["sparse"]["kernel"].shape == (8, 4) and not topology
    assert iso_flop((8, 4), "parallel", 0.0).branches == 1


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity: got .*, needed a number in \[0"):
        iso_flop((8, 8), "parallel", sparsity)


@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize(
    "activation", [lambda z: z * 0, lambda z: z * 0 + 3.3, lambda z: z / 0]
)
def test_an_activation_that_does_not_vary(kind, activation):
    """Its spread is a divisor."""
    with pytest.raises(ValueError, match="activation: got .*a function that varies"):
        iso_flop((8, 8), kind, 0.5, activation=activation)


def test_errors():
    with pytest.raises(ValueError, match="kind: got 'thin', needed one of"):
        iso_flop((8, 8), "thin", 0.5)
    # A rank of (8, 8) costs 16 of 64: sparsity 0.2 leaves 12.8.
    with pytest.raises(ValueError, match="leaves no rank; needed at least 0.25"):
        iso_flop((8, 8), "doped", 0.2)
    with pytest.raises(ValueError, match="leaves no rank"):
        iso_flop((8, 8), "doped", 0.0)
    with pytest.raises(ValueError, match="sizes: got .*leaves 0 of the 1 weights"):
        iso_flop((1, 1), "factorized", 0.0)
    with pytest.raises(ValueError, match="leaves 0 of the 2 blocks"):
        iso_flop((8, 8), "parallel", 0.5, block_shape=(64, 8))
    with pytest.raises(ValueError, match="activation: got None"):
        iso_flop((8, 8), "parallel", 0.5, activation=None)
    with pytest.raises(ValueError, match="own_masks: got False with block_shape"):
        iso_flop((8, 8), "wide", 0.5, block_shape=(4, 4), own_masks=False)
    with pytest.raises(ValueError, match="block_shape: got"):
        iso_flop((8, 8), "wide", 0.5, block_shape=(0, 4))
    with pytest.raises(ValueError, match=r"dense: got sizes \(0, 8\), needed"):
        iso_flop((0, 8), "factorized", 0.5)
    with pytest.raises(ValueError, match="in_features, out_features: got 0, 8"):
        sj.layers.SparseParallelSpec(in_features=0, out_features=8, branches=2)
    sparse = sj.layers.MaskedLinearSpec(in_features=8, out_features=8, sparsity=0.5)
    with pytest.raises(ValueError, match="dense: got .*needed sparsity 0"):
        iso_flop(sparse, "wide", 0.5)
    wide = iso_flop((8, 8), "wide", 0.5)
    with pytest.raises(ValueError, match="wide_in, wide_out: got 7, 12, needed"):
        dataclasses.replace(wide, wide_in=7)
    # One rank of (1, 8) costs 9, of (2, 2) 4: whatever the sparsity.
    with pytest.raises(ValueError, match=r"dense: got sizes \(1, 8\), .*more than 9,"):
        iso_flop((1, 8), "doped", 0.5)
    with pytest.raises(ValueError, match=r"dense: got sizes \(2, 2\), .*more than 4,"):
        iso_flop((2, 2), "doped", 0.99)
    for sizes in [(4, 4, 4), (4,)]:
        with pytest.raises(ValueError, match=r"dense: got .*, needed sizes \(k, n\)"):
            iso_flop(sizes, "wide", 0.5)
    # Dense factors of inner size 3 have 48 weights, too few for 64.
    with pytest.raises(ValueError, match="leaves 32 of the 24 weights"):
        sj.layers.SparseFactorizedSpec(in_features=8, out_features=8, inner=3)
    with pytest.raises(ValueError, match="rank: got 4, needed"):
        sj.layers.SparseDopedSpec(in_features=8, out_features=8, rank=4)
    with pytest.raises(ValueError, match="branches: got 0"):
        sj.layers.SparseParallelSpec(in_features=8, out_features=8, branches=0)
    with pytest.raises(ValueError, match="needed two that follow each other"):
        iso_flop_chain([8, 8, 8, 8], "wide", 0.5, chosen=[0, 2])
    with pytest.raises(ValueError, match="sizes, chosen: got"):
        iso_flop_chain([8, 8], "wide", 0.5, chosen=[1])
