"""``structure``: which layers are replaced, by what, with which error."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import structured as st

monarch = functools.partial(st.monarch, blocks=4, rank=2)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(12, 20, bias_init=nnx.initializers.ones, rngs=rngs)
        self.down = nnx.Linear(20, 12, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Mlp(rngs), Mlp(rngs)])
        self.heads = nnx.data({"a": nnx.Linear(12, 12, rngs=rngs)})
        self.tied = self.heads["a"]

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.tied(self.heads["a"](x))


def dense_of(layer):
    """What the layer multiplies by, from what it does to the identity."""
    w = layer(jnp.eye(layer.spec.in_features))
    bias = 0 if layer.bias is None else layer.bias.get_value()
    return np.asarray(w - bias, np.float64)


def error_of(w, of):
    w = np.asarray(w, np.float64)
    return np.linalg.norm(w - of) / np.linalg.norm(w)


def test_nnx_by_projection():
    model = Model()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    new, report = sj.nnx.structure(model, {"blocks/*/up": monarch})
    assert list(report.layers) == ["blocks/0/up", "blocks/1/up"]
    for i in range(2):
        layer, old = new.blocks[i].up, model.blocks[i].up
        assert isinstance(layer, sj.nnx.KroneckerSparseLinear)
        assert type(new.blocks[i].down) is nnx.Linear
        row = report.layers[f"blocks/{i}/up"]
        # The reported error is the true one; the weight is not of that form.
        true = error_of(old.kernel.get_value(), dense_of(layer))
        assert row.relative_error == pytest.approx(true, rel=1e-4) and true > 0.1
        # Best of its form: each of the 4 x 4 slices of 3 x 5 keeps two of three
        # singular values. w[(k, i), (o, j)], k and j below 4.
        slices = np.asarray(old.kernel.get_value(), np.float64).reshape(4, 3, 5, 4)
        s = np.linalg.svd(slices.transpose(0, 3, 1, 2), compute_uv=False)
        best = np.sqrt((s[..., 2:] ** 2).sum() / (s**2).sum())
        assert true == pytest.approx(best, rel=1e-4)
        # 12 * 20 + 20 before; factors of 4 blocks of 3 x 8 and 8 x 5, bias 20.
        assert (row.parameters_before, row.parameters_after) == (260, 96 + 160 + 20)
        # Low rank of 256 weights: 256 // 32 = 8 of 12 singular values.
        s = np.linalg.svd(np.asarray(old.kernel.get_value()), compute_uv=False)
        low = np.sqrt((s[8:] ** 2).sum() / (s**2).sum())
        assert row.low_rank_error == pytest.approx(low, rel=1e-4)
        assert row.no_better == (low <= true)
        np.testing.assert_array_equal(layer.bias.get_value(), old.bias.get_value())
    total = 2 * (260 + 240) + 12 * 12 + 12
    assert (report.parameters_before, report.parameters_after) == (total, total + 32)
    # The given model is as it was, and shares no layer with the new one.
    assert type(model.blocks[0].up) is nnx.Linear
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert new.tied is new.heads["a"] and new.tied is not model.tied
    assert new(jnp.ones((3, 12))).shape == (3, 12)
    text = str(report)
    assert "blocks/0/up  12x20  (4, 8, 3, 1) (1, 5, 8, 4)  260     276" in text
    assert f"parameters: {total:,} before, {total + 32:,} after" in text


def test_a_model_that_is_of_the_form_computes_the_same():
    model = nnx.Sequential(nnx.Linear(12, 20, rngs=nnx.Rngs(0)))
    factors = st.init_chain(jax.random.key(1), st.monarch(12, 20, blocks=4, rank=1))
    model.layers[0].kernel.set_value(st.to_dense(factors))
    new, report = sj.nnx.structure(
        model, {"*": lambda k, n: st.monarch(k, n, blocks=4, rank=1)}
    )
    x = jax.random.normal(jax.random.key(2), (5, 12))
    np.testing.assert_allclose(new(x), model(x), atol=1e-5)
    row = report.layers["layers/0"]
    assert row.relative_error < 1e-5 < row.low_rank_error and not row.no_better
    assert "would do as well" not in str(report)


@pytest.mark.slow
def test_a_shared_layer_stays_one_and_a_model_may_be_one_layer():
    rule = lambda path, shape: st.LowRank(*shape, 3) if shape == (12, 12) else None
    model = Model()
    new, report = sj.nnx.structure(model, rule)
    assert len(report.layers) == 1 and isinstance(new.tied, sj.nnx.LowRankLinear)
    assert new.tied is new.heads["a"]
    # 156 before, 3 * 24 + 12 after, counted once.
    assert report.parameters_before - report.parameters_after == 156 - 84
    # Best rank 3, by its singular values.
    w = np.asarray(model.tied.kernel.get_value(), np.float64)
    s = np.linalg.svd(w, compute_uv=False)
    best = np.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    (row,) = report.layers.values()
    assert row.relative_error == pytest.approx(best, rel=1e-4)
    assert row.low_rank_error is None and not row.no_better
    assert error_of(w, dense_of(new.tied)) == pytest.approx(best, rel=1e-4)

    layer = nnx.Linear(12, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    new, report = sj.nnx.structure(layer, {"*": monarch})
    assert isinstance(new, sj.nnx.KroneckerSparseLinear) and list(report.layers) == [""]
    assert new(jnp.ones((2, 12))).dtype == jnp.bfloat16


@pytest.mark.slow
def test_pixelfly():
    layer = nnx.Linear(24, 40, rngs=nnx.Rngs(0))
    form = st.Pixelfly(24, 40, (8, 8), size=1, rank=4)
    new, report = sj.nnx.structure(layer, {"*": form})
    assert isinstance(new, sj.nnx.PixelflyLinear)
    w = np.asarray(layer.kernel.get_value(), np.float64)
    error = error_of(w, dense_of(new))
    (row,) = report.layers.values()
    assert row.relative_error == pytest.approx(error, rel=1e-4)
    # Inside the blocks nothing is left; outside, what rank 4 leaves of it.
    mask = np.kron(form.block_mask, np.ones((8, 8)))
    s = np.linalg.svd(np.where(mask, 0, w), compute_uv=False)
    assert error <= np.linalg.norm(s[4:]) / np.linalg.norm(w) + 1e-6
    rest = np.where(mask, w - dense_of(new), 0)
    np.testing.assert_allclose(rest, 0, atol=1e-5)


@pytest.mark.slow
def test_afresh():
    model = Model()
    new, report = sj.nnx.structure(model, {"blocks/*": monarch}, key=jax.random.key(1))
    assert len(report.layers) == 4
    (row, *_) = report.layers.values()
    assert row.relative_error is None and row.low_rank_error is None
    factors = [new.blocks[i].up.factor_0.get_value() for i in range(2)]
    assert jnp.any(factors[0] != factors[1])
    np.testing.assert_array_equal(new.blocks[0].up.bias.get_value(), 0)


@pytest.mark.slow
def test_stacked_layers_stay_stacked():
    stack = nnx.vmap(lambda rngs: Mlp(rngs))(nnx.Rngs(0).split(3))
    new, report = sj.nnx.structure(stack, {"up": monarch})
    assert new.up.factor_0.get_value().shape == (3, 4, 1, 3, 8)
    row = report.layers["up"]
    assert (row.parameters_before, row.parameters_after) == (3 * 260, 3 * 276)
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    got = run(new.up, jnp.eye(12)) - new.up.bias.get_value()[:, None]
    w = stack.up.kernel.get_value()
    assert row.relative_error == pytest.approx(error_of(w, got), rel=1e-4)
    drawn, _ = sj.nnx.structure(stack, {"up": monarch}, key=jax.random.key(0))
    one, two, _ = drawn.up.factor_1.get_value()
    assert jnp.any(one != two)


def test_linen_tree():
    class Net(nn.Module):
        form: str = "dense"

        @nn.compact
        def __call__(self, x):
            if self.form == "dense":
                x = nn.Dense(20, bias_init=nn.initializers.ones, name="up")(x)
            else:
                x = sj.linen.MonarchLinear(12, 20, blocks=4, rank=2, name="up")(x)
            return nn.Dense(3, name="out")(nn.relu(x))

    x = jax.random.normal(jax.random.key(1), (5, 12))
    tree = Net().init(jax.random.key(0), x)
    new, report = sj.linen.structure(tree, {"*/up": monarch})
    assert list(report.layers) == ["params/up"]
    assert set(new["params"]["up"]) == {"factor_0", "factor_1", "bias"}
    assert set(tree["params"]["up"]) == {"kernel", "bias"}
    assert new["params"]["out"]["kernel"] is tree["params"]["out"]["kernel"]
    w, out = tree["params"]["up"], tree["params"]["out"]
    near = st.to_dense([new["params"]["up"][f"factor_{i}"] for i in range(2)])
    want = nn.relu(x @ near + w["bias"]) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(Net("monarch").apply(new, x), want, atol=1e-5)
    # The module that the report names.
    row = report.layers["params/up"]
    layer = sj.linen.KroneckerSparseLinear(**vars(row.spec))
    y = layer.apply({"params": new["params"]["up"]}, x)
    np.testing.assert_allclose(y, x @ near + w["bias"], atol=1e-5)


@pytest.mark.slow
def test_what_a_linen_tree_offers():
    """Matrices beside nothing but a bias; others only where declared as stacks."""
    leaf = lambda *shape: jax.random.normal(jax.random.key(0), shape)
    tree = {
        "dense": {"kernel": leaf(8, 8)},
        "heads": {"kernel": leaf(2, 8, 8), "bias": leaf(2, 8)},
        "masked": {"kernel": leaf(8, 8), "kernel_mask": jnp.ones((8, 8), bool)},
        "embed": {"embedding": leaf(8, 8)},
    }
    seen = []
    rule = lambda path, shape: seen.append((path, shape)) or st.LowRank(*shape, 2)
    new, _ = sj.layers.structure(tree, rule)
    assert seen == [("dense", (8, 8))] and set(new["dense"]) == {"down", "up"}
    new, _ = sj.layers.structure(tree, {"heads": rule_of_two}, stacked=["heads"])
    assert new["heads"]["down"].shape == (2, 8, 2)
    assert set(new["heads"]) == {"down", "up", "bias"}


def rule_of_two(k, n):
    return st.LowRank(k, n, 2)


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"*/none": monarch}, r"rule: every pattern must match.*'\*/none'"),
        (lambda path, shape: None, r"takes none of the dense layers \['down', 'up'\]"),
        (
            {"up": st.monarch(12, 12, blocks=4)},
            r"rule: at 'up', of \(12, 20\): pattern",
        ),
        ({"up": st.LowRank(12, 12, 3)}, r"at 'up', of \(12, 20\): got LowRank"),
        ({"up": lambda k, n: "monarch"}, "rule: got 'monarch' at 'up', needed a Chain"),
        (
            {"up": functools.partial(st.monarch, blocks=4, rank=4)},
            "rank: got 4, needed",
        ),
    ],
)
def test_rules_that_do_not_fit(rule, message):
    with pytest.raises(ValueError, match=message):
        sj.nnx.structure(Mlp(nnx.Rngs(0)), rule)
