"""Experts kept and dropped by hand, the way back from upcycling, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import layers, routing, upcycling
from sparsejax.upcycling import Ffn, Spec, prune_experts

D, F, E = 3, 4, 4
FFN = Ffn(source="mlp", w_in="up", w_out="down")


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def moe(**more):
    return {
        "router": normal(0, D, E),
        "w_in": normal(1, E, D, F),
        "w_out": normal(2, E, F, D),
        **more,
    }


def shaped(**shapes):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def test_the_most_used_stay_with_their_columns():
    """Of 1, 7, 2 and 7 tokens: the second and fourth expert, 14 of 17."""
    layer = moe(balance=jnp.array([0.0, 1, 2, 3]))
    params = {"mlp": layer, "scale": jnp.ones(D)}
    pruned, kept, share = prune_experts(
        params, {"mlp": jnp.array([1, 7, 2, 7])}, keep=2
    )
    assert kept["mlp"].tolist() == [1, 3]
    assert share["mlp"] == np.float32(14 / 17)
    assert (pruned["mlp"]["w_in"] == layer["w_in"][1::2]).all()
    assert (pruned["mlp"]["w_out"] == layer["w_out"][1::2]).all()
    assert (pruned["mlp"]["router"] == layer["router"][:, 1::2]).all()
    assert pruned["mlp"]["balance"].tolist() == [1, 3]
    assert pruned["scale"] is params["scale"]
    # Ties to the lowest; no token at all.
    _, kept, share = prune_experts(params, jnp.zeros(E, jnp.int32), keep=2)
    assert kept["mlp"].tolist() == [0, 1] and share["mlp"] == 0


@pytest.mark.slow
def test_pruned_computes_as_if_experts_had_minus_infinity():
    """Tokens of an expert that left go to the next in their order."""
    layer, x = moe(), normal(5, 20, D)
    router = functools.partial(routing.top_k, k=2, normalize="sum")
    make = functools.partial(
        layers.MoESpec, features=D, hidden_features=F, router=router
    )
    gone = jnp.array([False, False, True, False])
    without = lambda logits: router(jnp.where(gone, -jnp.inf, logits))
    y, _ = layers.apply_moe(make(num_experts=E, router=without), layer, x)
    pruned = prune_experts({"mlp": layer}, jnp.array([9, 9, 1, 9]), keep=3).params
    z, _ = layers.apply_moe(make(num_experts=3), pruned["mlp"], x)
    np.testing.assert_allclose(z, y, rtol=0, atol=1e-6)
    y, _ = layers.apply_moe(make(num_experts=E), layer, x)
    assert jnp.abs(z - y).max() > 1e-2


@pytest.mark.parametrize("axis", [None, 1])
def test_the_inverse_of_upcycle(axis):
    """Dense -> experts -> dense: bit for bit, layers stacked or not."""
    stacked = () if axis is None else (5,)
    up, down = normal(1, D, *stacked, F), normal(2, F, *stacked, D)
    dense = {"mlp": {"up": up, "down": down}, "scale": jnp.ones(D)}
    layer = shaped(
        router=(D, *stacked, E), w_in=(E, *stacked, D, F), w_out=(E, *stacked, F, D)
    )
    ffns = [Ffn(source="mlp", target="moe", w_in="up", w_out="down", axis=axis)]
    spec = Spec(target={"moe": layer, **shaped(scale=(D,))}, ffns=ffns)
    made = upcycling.upcycle(dense, spec=spec, key=jax.random.key(0)).params
    usage = jnp.tile(jnp.array([0, 1, 3, 2]), (*stacked, 1))
    if axis is not None:
        usage = usage.at[2].set(jnp.array([4, 0, 0, 0]))
    target = jax.eval_shape(lambda: dense)
    back, kept, share = prune_experts(made, {"moe": usage}, ffns=ffns, target=target)
    jax.tree.map(np.testing.assert_array_equal, back, dense)
    if axis is None:
        assert kept["moe"].tolist() == [2] and share["moe"] == 0.5
    else:
        assert kept["moe"].ravel().tolist() == [2, 2, 0, 2, 2]
        assert share["moe"].tolist() == [0.5, 0.5, 1, 0.5, 0.5]


def test_shared_experts_join_the_dense_layer():
    """[d, f] and [d, s] -> [d, f + s], which computes the sum of both."""
    shared = {"shared_in": normal(3, D, 2), "shared_out": normal(4, 2, D)}
    layer = moe(**shared)
    target = {"mlp": shaped(up=(D, F + 2), down=(F + 2, D))}
    usage = jnp.array([0, 0, 5, 0])
    made = prune_experts({"mlp": layer}, usage, ffns=[FFN], target=target).params
    x = np.asarray(normal(5, 7, D), np.float64)
    relu = lambda x: np.maximum(x, 0)
    layer = {name: np.asarray(w, np.float64) for name, w in layer.items()}
    y = relu(x @ layer["w_in"][2]) @ layer["w_out"][2]
    y += relu(x @ layer["shared_in"]) @ layer["shared_out"]
    z = relu(x @ np.asarray(made["mlp"]["up"])) @ np.asarray(made["mlp"]["down"])
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-6)


def test_jit_and_records_by_pattern_or_by_row():
    params = {"a": {"moe": moe()}, "b": {"moe": moe()}}
    rows = jnp.array([[1, 2, 3, 4], [4, 3, 2, 1]])
    by_row = prune_experts(params, rows, keep=1)
    assert [k.tolist() for k in by_row.kept.values()] == [[3], [0]]
    jitted = jax.jit(functools.partial(prune_experts, keep=1))(params, rows)
    jax.tree.map(np.testing.assert_array_equal, jitted, by_row)
    by_pattern = prune_experts(params, {"*/moe": rows[1]}, keep=1)
    assert [k.tolist() for k in by_pattern.kept.values()] == [[0], [0]]


USAGE = jnp.arange(E)
DENSE = {"mlp": shaped(up=(D, F), down=(F, D))}


@pytest.mark.parametrize(
    ("params", "usage", "arguments", "message"),
    [
        ({"a": jnp.ones(3)}, USAGE, {}, "params: got no MoE layer .* needed one in a"),
        (None, jnp.arange(3), {}, r"usage: got \(3,\) for mlp, needed \(4,\), its"),
        (None, jnp.ones((2, E)), {}, r"usage: got shape \(2, 4\), needed a row .* mlp"),
        (None, {"moe": USAGE}, {}, "usage: got none for mlp, and .* no layer: moe"),
        (None, USAGE, {"keep": 5}, "keep: got 5, needed 1 to 4, the experts of mlp"),
        (None, USAGE, {"keep": 0}, "keep: got 0, needed 1 to 4, the experts of mlp"),
        (None, USAGE, {"target": DENSE}, "ffns: got none, needed where the target's"),
        (
            None,
            USAGE,
            {"target": DENSE, "ffns": [FFN], "keep": 2},
            "keep: got 2, needed 1 for a dense target",
        ),
        (
            None,
            USAGE,
            {"target": {**DENSE, **shaped(scale=(D,))}, "ffns": [FFN]},
            "target: no source for scale; there are mlp/up, mlp/down",
        ),
        (
            None,
            USAGE,
            {"target": {"mlp": shaped(up=(D, 5), down=(5, D))}, "ffns": [FFN]},
            r"target: .*mlp/up: got float32 \(3, 4\), needed float32 \(3, 5\)",
        ),
        (
            {"mlp": {**moe(), "w_out": jnp.ones((E + 1, F, D))}},
            USAGE,
            {},
            r"mlp/w_out: got \(5, 4, 3\), needed 4 experts, as mlp/router has",
        ),
    ],
)
def test_what_does_not_fit_is_named(params, usage, arguments, message):
    params = {"mlp": moe()} if params is None else params
    before = jax.tree.map(np.array, params)
    with pytest.raises(ValueError, match=message):
        prune_experts(params, usage, **arguments)
    jax.tree.map(np.testing.assert_array_equal, params, before)
