"""Containers, stacked layers, optimizer states by hand, refusals, jit, sharding."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax.linen
import sparsejax.nnx
from sparsejax import routing
from sparsejax.upcycling import Copy, Drop, Ffn, Granular, Move, Shared, Spec, upcycle

ROUTER = functools.partial(routing.top_k, k=2, normalize="sum_stopgrad")
FFN = Ffn(source="mlp", w_in="up", w_out="down")
MOE = {"num_experts": 4, "router": ROUTER, "activation": jax.nn.relu}


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def shaped(**shapes):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def dense_of(d=2, f=4):
    up = jnp.arange(1.0, 1 + d * f).reshape(d, f)
    return {"mlp": {"up": up, "down": up.T * 10}, "scale": jnp.ones(d)}


def target_of(e=2, d=2, f=4, **more):
    layer = shaped(router=(d, e), w_in=(e, d, f), w_out=(e, f, d), **more)
    return {"mlp": layer, **shaped(scale=(d,))}


def spec_of(**arguments):
    fixed = {"target": target_of(), "ffns": [FFN], "router": ROUTER}
    return Spec(**{**fixed, **arguments})


def run(params=None, state=None, /, **arguments):
    params = dense_of() if params is None else params
    return upcycle(params, state, spec=spec_of(**arguments), key=jax.random.key(0))


# ---- Flax --------------------------------------------------------------------------


class NnxMlp(nnx.Module):
    def __init__(self, gated, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.up, self.down = linear(8, 16), linear(16, 8)
        if gated:
            self.gate = linear(8, 16)

    def __call__(self, x):
        up = self.up(x)
        gated = hasattr(self, "gate")
        return self.down(jax.nn.relu(self.gate(x)) * up if gated else jax.nn.relu(up))


class NnxBlock(nnx.Module):
    def __init__(self, moe, gated, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = (
            sparsejax.nnx.MoE(8, 16, **MOE, gated=gated, balance=True, rngs=rngs)
            if moe
            else NnxMlp(gated, rngs)
        )

    def __call__(self, x):
        y = self.mlp(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class NnxNet(nnx.Module):
    def __init__(self, moes, gated, rngs):
        self.blocks = nnx.List([NnxBlock(moe, gated, rngs) for moe in moes])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("pure", "gated"),
    [(False, True), (True, False)],
    ids=["state", "pure dict"],
)
@pytest.mark.slow
def test_nnx_every_second_layer(gated, pure):
    dense = NnxNet([0, 0, 0, 0], gated, nnx.Rngs(0))
    make = lambda: nnx.split(NnxNet([0, 1, 0, 1], gated, nnx.Rngs(1)))
    graphdef, target = nnx.eval_shape(make)
    before = state = nnx.state(dense)
    if pure:
        state, target = nnx.to_pure_dict(state), nnx.to_pure_dict(target)
    ffn = Ffn(
        source="blocks/*/mlp",
        w_in="up/kernel",
        w_out="down/kernel",
        w_gate="gate/kernel" if gated else None,
    )
    spec = Spec(target=target, ffns=[ffn], router=ROUTER)
    params, opt_state, report = upcycle(state, spec=spec, key=jax.random.key(0))
    assert opt_state is None
    assert report.exact and report.layers == ("blocks/1/mlp", "blocks/3/mlp")
    assert jax.tree.structure(params) == jax.tree.structure(target)
    assert before == nnx.state(dense)
    if pure:
        moe = nnx.merge(graphdef, nnx.eval_shape(make)[1])
        nnx.update(moe, params)
    else:
        moe = nnx.merge(graphdef, params)
    x = normal(2, 6, 8)
    np.testing.assert_allclose(moe(x), dense(x), rtol=0, atol=1e-5)
    # The second layer alone has experts, and those of the two layers differ.
    assert moe.blocks[1].mlp.w_in.shape == (4, 8, 16)
    assert jnp.abs(moe.blocks[1].mlp.w_in[0] - moe.blocks[3].mlp.w_in[0]).max() > 0.1
    assert jnp.abs(moe.blocks[1].mlp.router[...] - moe.blocks[3].mlp.router[...]).max()


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, use_bias=False, name="up")(x))
        return nn.Dense(8, use_bias=False, name="down")(x)


class LinenBlock(nn.Module):
    moe: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        if self.moe:
            y, _ = sparsejax.linen.MoE(8, 16, **MOE, name="mlp")(y)
        else:
            y = LinenMlp(name="mlp")(y)
        return x + y, None


class LinenPair(nn.Module):
    """A dense layer, then one with experts."""

    @nn.compact
    def __call__(self, x, _):
        x, _ = LinenBlock(False, name="first")(x, None)
        return LinenBlock(True, name="second")(x, None)


class LinenNet(nn.Module):
    block: Callable[..., nn.Module]
    layers: int
    axis: int | None = None

    @nn.compact
    def __call__(self, x):
        if self.axis is None:
            for i in range(self.layers):
                x, _ = self.block(name=f"layer_{i}")(x, None)
            return x
        scan = nn.scan(
            lambda block, x, _: block(x, None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan(self.block(name="layers"), x, None)[0]


def linen_case(dense, moe, ffns, x, **spec):
    variables = dense.init(jax.random.key(0), x)
    target = jax.eval_shape(moe.init, jax.random.key(1), x)
    spec = Spec(target=target, ffns=ffns, router=ROUTER, **spec)
    params, _, report = upcycle(variables, spec=spec, key=jax.random.key(0))
    assert report.exact, report
    difference = moe.apply(params, x) - dense.apply(variables, x)
    np.testing.assert_allclose(difference, jnp.zeros_like(x), rtol=0, atol=1e-5)
    return params, variables


SLOW = pytest.mark.slow
EVERY = [SLOW, pytest.mark.exhaustive]


@SLOW
@pytest.mark.parametrize("axis", [None, 1])
def test_linen_scanned_or_not(axis):
    dense = LinenNet(functools.partial(LinenBlock, False), 3, axis)
    moe = LinenNet(functools.partial(LinenBlock, True), 3, axis)
    ffn = Ffn(source="*/mlp", w_in="up/kernel", w_out="down/kernel", axis=axis)
    params, variables = linen_case(dense, moe, [ffn], normal(2, 6, 8))
    if axis == 1:  # of [d, layers, f] and [e, layers, d, f]
        w_in = params["params"]["layers"]["mlp"]["w_in"]
        up = variables["params"]["layers"]["mlp"]["up"]["kernel"]
        assert (w_in[3, 2] == up[:, 2]).all() and (w_in[3, 2] != w_in[3, 1]).any()


@SLOW
def test_every_second_of_scanned_layers():
    """[4, ...] of one block -> [2, ...] of pairs."""
    dense = LinenNet(functools.partial(LinenBlock, False), 4, 0)
    moe = LinenNet(LinenPair, 2, 0)
    ffn = Ffn(
        source="*/layers/mlp",
        target="*/layers/second/mlp",
        w_in="up/kernel",
        w_out="down/kernel",
        axis=0,
        layers=slice(1, None, 2),
    )
    even, odd = slice(0, None, 2), slice(1, None, 2)
    moves = [
        Move(source="*/layers/mlp/*", target="*/layers/first/mlp/*", layers=even),
        Move(source="*/layers/norm/*", target="*/layers/first/norm/*", layers=even),
        Move(source="*/layers/norm/*", target="*/layers/second/norm/*", layers=odd),
    ]
    linen_case(dense, moe, [ffn], normal(2, 6, 8), moves=moves)


def test_scanned_layers_draw_apart_and_unstack():
    f = 4
    dense = {"mlp": {"up": jnp.ones((2, 3, f)), "down": jnp.ones((2, f, 3))}}
    stacked = {"mlp": shaped(router=(2, 3, 2), w_in=(2, 2, 3, f), w_out=(2, 2, f, 3))}
    made, _, _ = run(
        dense,
        target=stacked,
        ffns=[Ffn(source="mlp", w_in="up", w_out="down", axis=0)],
        mode=Copy(noise=0.1),
    )
    router = made["mlp"]["router"]
    assert jnp.abs(router[0] - router[1]).max() > 1e-3
    # One layer of a stack, the other stays dense.
    alone = {"moe": shaped(router=(3, 2), w_in=(2, 3, f), w_out=(2, f, 3))}
    rest = {"mlp": shaped(up=(3, f), down=(f, 3))}
    ffn = {"source": "mlp", "w_in": "up", "w_out": "down", "axis": 0}
    moves = [Move(source="mlp/*", target="first/*", layers=0)]
    made, _, report = run(
        dense,
        target={**alone, "first": rest["mlp"]},
        ffns=[Ffn(**ffn, target="moe", layers=1)],
        moves=moves,
    )
    assert report.exact and made["moe"]["w_in"].shape == (2, 3, f)
    # A layer that goes nowhere: the function is another.
    _, _, report = run(dense, target=alone, ffns=[Ffn(**ffn, target="moe", layers=1)])
    assert not report.exact and "mlp/up is not used exactly once" in str(report)


# ---- values by hand ----------------------------------------------------------------


def test_granular_by_hand():
    """Four hidden units in two shards, two copies: experts are (a, b, a, b)."""
    router = functools.partial(routing.top_k, k=2, normalize="sum")
    target = target_of(e=4, f=2)
    made, _, report = run(target=target, mode=Granular(2), router=router)
    layer = made["mlp"]
    a, b = [[1.0, 2], [5, 6]], [[3.0, 4], [7, 8]]
    assert layer["w_in"].tolist() == [a, b, a, b]
    # Transposed, times 10, times the two shards that a token's weights of 1/2 halve.
    assert layer["w_out"][1].tolist() == [[60, 140], [80, 160]]
    columns = np.asarray(layer["router"])
    assert (columns[:, 0] == columns[:, 1]).all() and (
        columns[:, 0] != columns[:, 2]
    ).any()
    assert report.exact
    # Not normalized: 4 experts * 2 groups / k 2 = 4. Spread over two matrices: 2 each.
    router = functools.partial(routing.top_k, k=2)
    mode = Granular(2, scale="spread", homogeneous=1)
    layer = run(target=target, mode=mode, router=router).params["mlp"]
    assert layer["w_in"][0].tolist() == [[2, 4], [10, 12]]
    assert layer["w_out"][1].tolist() == [[60, 140], [80, 160]]


def test_noise_has_the_std_asked_for():
    d = f = 200
    dense = {"mlp": {"up": normal(1, d, f) * 3, "down": normal(2, f, d)}}
    layer = shaped(router=(d, 2), w_in=(2, d, f), w_out=(2, f, d))
    made = run(dense, target={"mlp": layer}, mode=Copy(noise=0.1)).params["mlp"]
    difference = made["w_in"] - dense["mlp"]["up"]
    # 40 000 draws of std 0.1 * 3: the sample's std is within a few times 0.3 / 283.
    np.testing.assert_allclose(jnp.std(difference, axis=(1, 2)), 0.3, rtol=0.02)
    assert abs(jnp.vdot(difference[0], difference[1])) < 0.05 * 0.09 * d * f


def test_drop_upcycling_draws_other_units_for_each_matrix():
    """There (1 - r)^3 of the units stay whole; here 1 - r do, and r are all new."""
    d, f, e = 40, 64, 3
    draw = {"up": normal(1, d, f) + 2, "gate": normal(2, d, f), "down": normal(3, f, d)}
    layer = shaped(router=(d, e), w_in=(e, d, f), w_gate=(e, d, f), w_out=(e, f, d))
    ffn = Ffn(source="mlp", w_in="up", w_out="down", w_gate="gate")
    made = run({"mlp": draw}, target={"mlp": layer}, ffns=[ffn], mode=Drop(0.25))
    made = made.params["mlp"]
    new = {
        "w_in": (made["w_in"] != draw["up"]).all(1),
        "w_gate": (made["w_gate"] != draw["gate"]).all(1),
        "w_out": (made["w_out"] != draw["down"]).all(2),
    }
    for units in new.values():
        assert (units == new["w_in"]).all()
        assert units.sum(1).tolist() == [16, 16, 16]  # a quarter of 64
    assert (new["w_in"][0] != new["w_in"][1]).any()
    kept = ~new["w_in"][0]
    assert (made["w_in"][0][:, kept] == draw["up"][:, kept]).all()
    # 640 draws of mean 2 and std 1.
    fresh = made["w_in"][0][:, new["w_in"][0]]
    np.testing.assert_allclose(jnp.mean(fresh), 2, atol=0.2)
    np.testing.assert_allclose(jnp.std(fresh), 1, atol=0.15)


def test_routers_are_normal_or_given():
    made = run(target=target_of(e=2), router_std=0.5).params["mlp"]["router"]
    again = run(target=target_of(e=2), router_std=0.25).params["mlp"]["router"]
    np.testing.assert_allclose(made, 2 * again, rtol=1e-6)
    mine = jnp.array([[1.0, 2], [3, 4]])
    made, _, report = run(given={"*/router": mine})
    assert made["mlp"]["router"].tolist() == mine.tolist()
    assert report.exact and report.given == ("mlp/router",)
    ones = lambda key, shape, dtype: jnp.ones(shape, dtype)
    made, _, report = run(given={"mlp/w_out": ones})
    assert made["mlp"]["w_out"].tolist() == np.ones((2, 4, 2)).tolist()
    assert not report.exact and "values other than the router's" in str(report)


# ---- optimizer states --------------------------------------------------------------


def state_after_a_step(optimizer, params, mu=None):
    """Adam's, with moments that are easy to read: mu the weights, nu their doubles."""
    state = optimizer.init(params)
    return jax.tree.map(lambda x: x + jnp.ones_like(x), state)


@pytest.mark.parametrize(
    ("policy", "mu", "nu"), [("zeros", 0, 0), ("copy", 1, 1), ("rescale", 1 / 2, 1 / 4)]
)
def test_moments_of_copies_by_hand(policy, mu, nu):
    """Two experts: mu / 2 and nu / 4."""
    optimizer = optax.adam(1e-3)
    params = dense_of()
    state = state_after_a_step(optimizer, params)
    made, new, _ = run(params, state, optimizer=optimizer, opt_state=policy)
    assert jax.tree.structure(new) == jax.tree.structure(optimizer.init(made))
    adam = new[0]
    assert (adam.mu["mlp"]["w_in"] == mu).all() and (
        adam.nu["mlp"]["w_out"] == nu
    ).all()
    assert (adam.mu["mlp"]["router"] == 0).all() and adam.nu["mlp"]["w_in"].shape == (
        2,
        2,
        4,
    )
    # What is no expert keeps its own, and the count goes on.
    assert (adam.mu["scale"] == 1).all() and (adam.nu["scale"] == 1).all()
    assert adam.count == 1
    _, new, _ = run(
        params, state, optimizer=optimizer, opt_state=policy, reset_count=True
    )
    assert new[0].count == 0 and (new[0].mu["scale"] == 1).all()


def test_moments_of_other_modes_by_hand():
    optimizer, params = optax.adam(1e-3), dense_of()
    state = state_after_a_step(optimizer, params)
    arguments = {"optimizer": optimizer, "opt_state": "rescale"}
    # Two copies of two shards, w_out times 2: gradients 1 / 2 and 1 / 4.
    target = target_of(e=4, f=2)
    router = functools.partial(routing.top_k, k=2, normalize="sum")
    adam = run(
        params, state, target=target, mode=Granular(2), router=router, **arguments
    ).opt_state[0]
    assert (adam.mu["mlp"]["w_in"] == 1 / 2).all()
    assert (adam.mu["mlp"]["w_out"] == 1 / 4).all()
    assert (adam.nu["mlp"]["w_out"] == 1 / 16).all()
    # Half of the four units are new.
    made, new, _ = run(params, state, mode=Drop(0.5), **arguments)
    fresh = made["mlp"]["w_in"] != params["mlp"]["up"]
    expected = np.where(fresh, 0, 1 / 4)
    assert fresh.sum() == 2 * 2 * 2
    assert new[0].nu["mlp"]["w_in"].tolist() == expected.tolist()
    # The shared expert is the dense layer, the routed ones are new.
    target = target_of(shared_in=(2, 4), shared_out=(4, 2))
    for policy in ("zeros", "copy", "rescale"):
        more = {**arguments, "opt_state": policy}
        adam = run(params, state, target=target, mode=Shared(), **more).opt_state[0]
        assert (adam.mu["mlp"]["shared_in"] == 1).all()
        assert (adam.mu["mlp"]["w_in"] == 0).all()


def by_layer(params):
    """Labels of multi_transform: experts' and feed-forward weights, the rest."""
    name = lambda path: jax.tree_util.keystr(path)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "ffn" if "mlp" in name(path) else "rest", params
    )


OPTIMIZERS = {
    "sgd": optax.sgd(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))
    ),
    "masked": optax.adamw(
        1e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "multi_transform": optax.multi_transform(
        {"ffn": optax.adam(1e-3), "rest": optax.sgd(1e-2, momentum=0.9)}, by_layer
    ),
    "frozen": optax.multi_transform(
        {"ffn": optax.set_to_zero(), "rest": optax.adam(1e-3)}, by_layer
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 2),
    "bfloat16 moments": optax.adam(1e-3, mu_dtype=jnp.bfloat16),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "adafactor, not factored": optax.adafactor(1e-3),
    "adadelta": optax.adadelta(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "nothing": optax.identity(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
}
QUICK = [
    ("inject_hyperparams", "rescale"),
    ("MultiSteps", "copy"),
    ("nothing", "copy"),
]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        (name, policy)
        if (name, policy) in QUICK
        else pytest.param(name, policy, marks=SLOW if policy == "rescale" else EVERY)
        for name in OPTIMIZERS
        for policy in ("zeros", "copy", "rescale")
    ],
)
def test_every_optimizer_goes_on(name, policy):
    optimizer, params = OPTIMIZERS[name], dense_of(d=4, f=8)
    state = state_after_a_step(optimizer, params)
    target = target_of(d=4, f=8)
    made, new, _ = run(
        params, state, target=target, optimizer=optimizer, opt_state=policy
    )
    with jax.numpy_dtype_promotion("standard"):
        fresh = optimizer.init(made)
        _, after = optimizer.update(made, new, made)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    assert jax.tree.all(jax.tree.map(same, new, fresh))
    assert jax.tree.structure(after) == jax.tree.structure(new)


def test_adafactor_factors_by_hand():
    """Rows [d] and columns [f] of two experts, each a quarter of the dense layer's."""
    optimizer = OPTIMIZERS["adafactor"]
    params, target = dense_of(d=4, f=8), target_of(d=4, f=8)
    state = jax.tree.map(jnp.zeros_like, optimizer.init(params))
    rows, columns = jnp.arange(4.0), 10 + jnp.arange(8.0)
    factored = state[0]
    factored.v_row["mlp"]["up"], factored.v_col["mlp"]["up"] = rows, columns
    arguments = {"optimizer": optimizer, "opt_state": "rescale", "target": target}
    _, new, _ = run(params, state, **arguments)
    assert new[0].v_row["mlp"]["w_in"].tolist() == [(rows / 4).tolist()] * 2
    assert new[0].v_col["mlp"]["w_in"].tolist() == [(columns / 4).tolist()] * 2
    # Rows of hidden units that are split or new cannot be known.
    with pytest.raises(ValueError, match="v_row .*mlp/up, means over an axis.*Drop"):
        run(params, state, **arguments, mode=Drop())
    run(params, state, **{**arguments, "opt_state": "zeros"}, mode=Drop())
    # 16 experts exceed the other axes: Adafactor would factor along them.
    many = {**arguments, "target": target_of(e=16, d=4, f=8)}
    with pytest.raises(ValueError, match="v_row of the target: mlp/w_in"):
        run(params, state, **many)


def test_optimizer_states_are_refused_by_name():
    params = dense_of()
    state = optax.adam(1e-3).init(params)
    with pytest.raises(ValueError, match="optimizer: got None in the spec"):
        run(params, state)
    with pytest.raises(ValueError, match="opt_state: got a state that is not of the"):
        run(params, state, optimizer=optax.sgd(1e-3, momentum=0.9))
    free = optax.contrib.schedule_free_adamw(1e-3)
    with pytest.raises(ValueError, match="opt_state: got z, of which it is not known"):
        run(params, free.init(params), optimizer=free)
    average = optax.ema(0.9)
    arguments = {"optimizer": average, "opt_state": "rescale"}
    with pytest.raises(ValueError, match=r"such as moments=\{'ema': 1\}"):
        run(params, average.init(params), **arguments)
    state = state_after_a_step(average, params)
    _, new, _ = run(params, state, **arguments, moments={"ema": 1})
    assert (new.ema["mlp"]["w_in"] == 1 / 2).all()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.novograd(1e-3), r"got 0/nu \(\) of mlp/up, means over an axis, .* Copy"),
        (optax.sm3(1e-3), "got 0/mu with mlp/down/0, .*an array for each of mlp/down"),
        (optax.adan(1e-3), "got 0/m, of which it is not known what power"),
        (optax.flatten(optax.adam(1e-3)), "optimizer: got one whose state"),
    ],
    ids=["novograd", "sm3", "adan", "flatten"],
)
def test_states_unlike_parameters_are_refused_by_name(optimizer, message):
    params = dense_of()
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    with pytest.raises(ValueError, match=message):
        run(params, state, optimizer=optimizer, opt_state="copy")


def test_moments_that_the_dense_model_has_not_begin_at_zero_and_are_named():
    """Matrices have another optimizer than experts, as in Muon: by number of axes."""
    labels = lambda params: jax.tree.map(lambda x: "ab"[x.ndim == 2], params)
    adam = optax.adam(1e-3)
    optimizer = optax.multi_transform({"a": adam, "b": adam}, labels)
    state = state_after_a_step(optimizer, dense_of())
    _, new, report = run(None, state, optimizer=optimizer, opt_state="copy")
    mu = new.inner_states["a"].inner_state[0].mu
    assert (mu["scale"] == 1).all() and (mu["mlp"]["w_in"] == 0).all()
    assert "mu of mlp/w_in, mlp/w_out begins at zero" in report.warnings[0]


def test_factors_of_some_of_the_stacked_layers():
    """[4, d, f] is factored into [4, d] and [4, f], of which every second goes on."""
    optimizer = OPTIMIZERS["adafactor"]
    move = Move(source="norm", target="other", layers=slice(1, None, 2))
    arguments = {"moves": [move], "optimizer": optimizer}
    stack = {"norm": jnp.ones((4, 5, 6)), **dense_of()}
    state = jax.tree.map(jnp.zeros_like, optimizer.init(stack))
    state[0].v_row["norm"] = jnp.arange(20.0).reshape(4, 5)
    target = {**shaped(other=(2, 5, 6)), **target_of()}
    _, new, _ = run(stack, state, target=target, **arguments)
    rows = [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]
    assert new[0].v_row["other"].tolist() == rows
    # Layers are themselves among the factors where they are many.
    stack["norm"], target["other"] = jnp.ones((4, 2, 3)), shaped(x=(2, 2, 3))["x"]
    with pytest.raises(ValueError, match="of norm, .* the layers .* cannot be told"):
        run(stack, optimizer.init(stack), target=target, **arguments)


def test_nnx_states_with_other_variables_than_parameters():
    """A dropout's key and count stay, and the optimizer knows parameters alone."""

    class Net(nnx.Module):
        def __init__(self, moe, rngs):
            self.block = NnxBlock(moe, False, rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    ffn = Ffn(source="block/mlp", w_in="up/kernel", w_out="down/kernel")
    dense = nnx.state(Net(False, nnx.Rngs(0)))
    target = nnx.eval_shape(lambda: nnx.state(Net(True, nnx.Rngs(0))))
    made, _, report = run(dense, target=target, ffns=[ffn])
    assert report.exact and jax.tree.structure(made) == jax.tree.structure(target)
    key = lambda state: jax.random.key_data(state.dropout.rngs.key.get_value())
    assert (key(made) == key(dense)).all()
    # Parameters alone, with their moments.
    params, shapes = (
        nnx.filter_state(dense, nnx.Param),
        nnx.filter_state(target, nnx.Param),
    )
    optimizer = optax.adam(1e-3)
    arguments = {"optimizer": optimizer, "opt_state": "rescale"}
    state = state_after_a_step(optimizer, params)
    made, new, _ = run(params, state, target=shapes, ffns=[ffn], **arguments)
    assert jax.tree.structure(new) == jax.tree.structure(optimizer.init(made))
    assert (new[0].mu.block.mlp.w_in[...] == 1 / 4).all()


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "pure"])
def test_the_state_that_nnx_optimizer_holds(pure):
    block, adam = NnxBlock(False, False, nnx.Rngs(0)), optax.adam(1e-3)
    held = nnx.Optimizer(block, adam, wrt=nnx.Param).opt_state
    held = nnx.as_pure(held) if pure else held
    held = jax.tree.map(lambda x: x + jnp.ones_like(x), held)
    target = nnx.eval_shape(lambda: nnx.state(NnxBlock(True, False, nnx.Rngs(0))))
    made, new, _ = run(
        nnx.state(block),
        held,
        target=target,
        ffns=[Ffn(source="mlp", w_in="up/kernel", w_out="down/kernel")],
        optimizer=adam,
        opt_state="copy",
    )
    assert jax.tree.structure(new) == jax.tree.structure(adam.init(made))
    assert (new[0].nu.mlp.w_out[...] == 1).all() and new[0].count == 1


def test_containers_and_leaves_of_all_kinds():
    more = {"list": [jnp.ones(1), None], "key": jax.random.key(3), "step": np.int32(7)}
    params = freeze({**jax.tree.map(np.asarray, dense_of()), **more})
    target = {**target_of(), **jax.eval_shape(lambda: more)}
    made, _, report = run(params, target=target)
    assert report.exact and type(made) is dict and made["step"] == 7
    frozen = run(params, target=freeze(target)).params
    assert jax.tree.structure(frozen) == jax.tree.structure(freeze(target))
    with pytest.raises(ValueError, match="params: got float for rate, needed an array"):
        run({**dense_of(), "rate": 0.1})


def test_bfloat16_stays_and_the_router_is_what_the_target_says():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), target_of()
    )
    target["mlp"]["router"] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    optimizer = optax.adam(1e-3)
    params = half(dense_of())
    state = state_after_a_step(optimizer, params)
    for mode in (Copy(noise=0.1), Drop(0.5)):
        made, new, _ = run(params, state, target=target, mode=mode, optimizer=optimizer)
        assert made["mlp"]["w_in"].dtype == new[0].nu["mlp"]["w_in"].dtype == "bfloat16"
    assert made["mlp"]["router"].dtype == jnp.float32


def test_labels_that_are_trees_come_as_a_pair():
    made = run().params
    optimizers = tuple(
        optax.multi_transform(
            {"ffn": optax.adam(1e-3), "rest": optax.set_to_zero()}, by_layer(params)
        )
        for params in (dense_of(), made)
    )
    state = optimizers[0].init(dense_of())
    _, new, _ = run(None, state, optimizer=optimizers)
    with jax.numpy_dtype_promotion("standard"):
        optimizers[1].update(made, new, made)


# ---- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ffns": [Ffn(source="mpl", w_in="up", w_out="down")]},
            r"ffns: got source 'mpl' with 'up'.*\(there 'up' is below: mlp\)",
        ),
        (
            {"ffns": [Ffn(source="mlp", target="moe", w_in="up", w_out="down")]},
            "ffns: .*and in the target moe/router",
        ),
        (
            {"ffns": [Ffn(source="mlp", w_in="up", w_out="dwon")]},
            "ffns: got no leaf mlp/dwon in the source beside mlp/up",
        ),
        (
            {"target": {**target_of(), **shaped(bias=(2,))}},
            "target: no source for bias; of the source are left none",
        ),
        ({"target": target_of(f=8)}, "mlp: got 8 hidden units of an expert, needed 4"),
        (
            {"target": target_of(d=3)},
            r"mlp/router: got \(3, 2\) of one layer in the target, needed \(2, 2\)",
        ),
        (
            {"target": {**target_of(), **shaped(scale=(3,))}},
            r"target: scale: got float32 \(2,\), needed float32 \(3,\)",
        ),
        (
            {
                "target": jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), target_of()
                )
            },
            r"mlp/w_in: got float32 \(2, 2, 4\), needed bfloat16 \(2, 2, 4\)",
        ),
        (
            {"target": target_of(w_gate=(2, 2, 4))},
            "target: mlp has router, w_gate, w_in, w_out, needed router, w_in, w_out",
        ),
        (
            {
                "target": {
                    **target_of(),
                    "mlp": shaped(router=(2, 2), w_in=(3, 2, 4), w_out=(3, 4, 2)),
                }
            },
            r"mlp/router: got \(2, 2\) of one layer in the target, needed \(2, 3\)",
        ),
        ({"mode": Shared()}, "needed router, shared_in, shared_out, w_in, w_out of"),
        (
            {"moves": [Move(source="scale", target="mlp/router")]},
            "one source, got mlp/router from the layer mlp and scale",
        ),
        (
            {"moves": [Move(source="none")]},
            "moves: got source 'none', which matches no",
        ),
        ({"given": {"router": 1.0}}, "given: got 'router', which matches no leaf"),
        (
            {"given": {"mlp/router": jnp.ones(3)}},
            r"mlp/router: got float32 \(3,\), needed float32 \(2, 2\)",
        ),
        (
            {"router": functools.partial(routing.top_k, k=3)},
            "router: got k=3, needed 1 to 2, the experts",
        ),
        (
            {"mode": Granular(2), "target": target_of(e=3, f=2)},
            "4 hidden units and 3 experts, needed multiples of groups 2",
        ),
        (
            {"mode": Granular(2), "target": target_of(f=2), "router": None},
            "router: got None or an unknown function, needed a functools.partial",
        ),
        (
            {"ffns": [Ffn(source="mlp", w_in="up", w_out="down", axis=0)]},
            r"mlp/up: got shape \(2, 4\), needed two axes and that of layers",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(arguments, message):
    params = dense_of()
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    before = jax.tree.map(np.array, (params, state))
    with pytest.raises(ValueError, match=message):
        run(params, state, optimizer=optimizer, **arguments)
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec_of(ffns=[]), "ffns: got none"),
        (lambda: spec_of(router_std=-1.0), "router_std: got -1.0"),
        (lambda: Copy(noise=-1.0), "noise: got -1.0, needed at least 0"),
        (lambda: Drop(1.5), "fraction: got 1.5, needed 0 to 1"),
        (lambda: Granular(0), "groups: got 0, needed at least 1"),
        (lambda: Granular(2, scale="in"), "scale: got in, needed 'out' or 'spread'"),
        (
            lambda: Ffn(source="*/mlp", target="mlp", w_in="a", w_out="b"),
            r"got '\*/mlp' and 'mlp', needed as many \*",
        ),
        (
            lambda: Ffn(source="mlp", w_in="a", w_out="b", layers=1),
            "layers: got 1, needed the axis",
        ),
        (
            lambda: Ffn(source="mlp", w_in="a", w_out="b", axis=-3),
            "axis: got -3, needed one counted from the front",
        ),
    ],
)
def test_specs_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("layers", [2, -3, slice(5, None)], ids=str)
def test_layers_that_a_stack_has_not_are_refused(layers):
    stack = {"mlp": {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))}}
    target = {"mlp": shaped(router=(3, 2), w_in=(2, 3, 4), w_out=(2, 4, 3))}
    ffn = Ffn(source="mlp", w_in="up", w_out="down", axis=0, layers=layers)
    with pytest.raises(ValueError, match="layers: .* mlp/up .*has 2 on axis 0"):
        run(stack, target=target, ffns=[ffn])
    move = Move(source="scale", target="new", axis=1, layers=0)
    with pytest.raises(ValueError, match=r"layers: got 0 of scale \(2,\), which has 0"):
        run(target={**target_of(), **shaped(new=(2,))}, moves=[move])


def ids(**more):
    return functools.partial(routing.hash_routing, num_experts=2, **more)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (functools.partial(routing.top_p, p=0.6, normalize="sum"), None),
        (functools.partial(routing.top_p, p=0.6), "gates do not sum to 1"),
        (
            functools.partial(routing.threshold, threshold=0.6, normalize="sum"),
            "a token that reaches no threshold has no expert",
        ),
        (
            functools.partial(
                routing.threshold, threshold=0.6, normalize="sum", at_least_one=True
            ),
            None,
        ),
        (functools.partial(routing.sinkhorn, k=2, normalize="sum"), None),
        (functools.partial(routing.sinkhorn, k=2, score="sigmoid"), "gates do not"),
        (
            functools.partial(
                functools.partial(routing.dense_to_sparse, k=1, temperature=2.0),
                normalize="sum_stopgrad",
            ),
            None,
        ),
        (ids(), None),
        (ids(table=jnp.array([0, 1])), "an id that is not in the table"),
        (
            functools.partial(routing.expert_choice, capacity=1, normalize="sum"),
            "of this router it is not known",
        ),
        (lambda logits: ROUTER(logits), "of this router it is not known"),
        (None, "of this router it is not known"),
    ],
)
def test_the_report_knows_routers(router, reason):
    """What it says of them is measured in test_modules.py."""
    report = run(router=router).report
    assert report.exact == (reason is None)
    assert reason is None or reason in report.reasons[0]
    # Beside the dense layer anything is exact.
    shared = target_of(shared_in=(2, 4), shared_out=(4, 2))
    assert run(target=shared, mode=Shared(), router=router).report.exact


def test_patterns_fit_whole_paths():
    params = {**dense_of(), "mlp2": dense_of()["mlp"]}
    target = {**target_of(), "mlp2": shaped(up=(2, 4), down=(4, 2))}
    report = run(params, target=target).report
    assert report.exact and report.layers == ("mlp",)


def test_what_is_left_over_is_said_and_not_exact():
    params = dense_of() | {"mlp": dense_of()["mlp"] | {"bias": jnp.ones(4)}}
    _, _, report = run(params)
    assert not report.exact and report.unmatched == ("mlp/bias",)
    assert str(report) == (
        "exact: no (leaves of the source are unmatched)\n"
        "layers: mlp\n"
        "unmatched: mlp/bias"
    )


# ---- the router's gradient ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Copy(), Copy(noise=0.1), Drop(0.5), Shared()])
@pytest.mark.parametrize("normalize", ["none", "sum", "sum_stopgrad"])
@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_report_foresees_the_gradient_of_the_router(mode, normalize, k):
    router = functools.partial(routing.top_k, k=k, normalize=normalize)
    d, f, e = 4, 8, 4
    shared = {"shared_in": (d, f), "shared_out": (f, d)}
    target = target_of(e=e, d=d, f=f, **(shared if mode == Shared() else {}))
    dense = {
        "mlp": {"up": normal(5, d, f), "down": normal(6, f, d)},
        "scale": jnp.ones(d),
    }
    params, _, report = run(
        dense, target=target, mode=mode, router=router, router_std=0.5
    )
    spec = sparsejax.layers.MoESpec(
        features=d,
        hidden_features=f,
        num_experts=e,
        router=router,
        shared_experts=int(mode == Shared()),
        gain=1.0,
    )
    x = normal(7, 32, d)

    def loss(layer):
        return jnp.sum(sparsejax.layers.apply_moe(spec, layer, x)[0] ** 3)

    gradient = jax.grad(loss)(params["mlp"])
    size = jnp.abs(gradient["router"]).max() / jnp.abs(gradient["w_out"]).max()
    assert (size > 1e-4) == report.router_gradient, (size, report)
    assert bool(report.warnings) != report.router_gradient


# ---- jit and sharding --------------------------------------------------------------


@pytest.mark.parametrize("mode", [Copy(noise=0.1), Drop(0.5)], ids=["noise", "drop"])
def test_jit_gives_the_same(mode):
    optimizer = optax.adamw(1e-3)
    state = state_after_a_step(optimizer, dense_of())
    spec = spec_of(mode=mode, optimizer=optimizer, opt_state="rescale")
    make = functools.partial(upcycle, spec=spec)
    plain = make(dense_of(), state, key=jax.random.key(4))
    jitted = jax.jit(make)(dense_of(), state, key=jax.random.key(4))
    assert plain.report == jitted.report
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, plain[:2], jitted[:2])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_shardings_are_kept(jitted):
    mesh = jax.make_mesh((8,), ("x",))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {
        "mlp": {"up": put(normal(1, 16, 32), "x"), "down": put(normal(2, 32, 16), "x")},
        "scale": put(jnp.ones(16)),
    }
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    wanted = NamedSharding(mesh, PartitionSpec(None, "x"))
    for policy in ("zeros", "copy"):
        spec = spec_of(
            target=target_of(e=4, d=16, f=32), optimizer=optimizer, opt_state=policy
        )
        make = functools.partial(upcycle, spec=spec, key=jax.random.key(0))
        made, new, _ = (jax.jit(make) if jitted else make)(params, state)
        for tree in (made, new[0].mu, new[0].nu):
            assert tree["mlp"]["w_in"].sharding.is_equivalent_to(wanted, 3)
            assert tree["mlp"]["w_out"].sharding.is_equivalent_to(wanted, 3)
            assert tree["scale"].sharding.is_equivalent_to(params["scale"].sharding, 1)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_shardings_of_the_target_hold(jitted):
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    specs = {
        "router": (),
        "w_in": ("expert", "fsdp"),
        "w_out": ("expert", None, "fsdp"),
    }
    shapes = target_of(e=4, d=16, f=32)
    target = {
        "scale": shapes["scale"],
        "mlp": {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(*specs[name]))
            for name, x in shapes["mlp"].items()
        },
    }
    params, optimizer = dense_of(d=16, f=32), optax.adam(1e-3)
    make = functools.partial(
        upcycle,
        spec=spec_of(target=target, optimizer=optimizer),
        key=jax.random.key(0),
    )
    made, new, _ = (jax.jit(make) if jitted else make)(params, optimizer.init(params))
    for tree in (made, new[0].mu, new[0].nu):
        for name, x in tree["mlp"].items():
            assert x.sharding.is_equivalent_to(place(*specs[name]), x.ndim), name
    assert (jax.device_get(made["mlp"]["w_in"])[2] == params["mlp"]["up"]).all()
