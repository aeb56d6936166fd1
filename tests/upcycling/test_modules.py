"""Modes, gates and capacities with the modules: exact is what is measured.

Dense models and mixtures in NNX and Linen, their layers scanned or not, with the
library's own layers and operators throughout; the numpy loop is in test_exact.py.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax.linen
import sparsejax.nnx
from sparsejax import routing, upcycling

D, F, E, LAYERS, BATCH = 8, 24, 8, 2, (2, 10)
TOKENS = 20


class NnxMlp(nnx.Module):
    def __init__(self, gated, activation, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.up, self.down, self.activation = linear(D, F), linear(F, D), activation
        self.gate = linear(D, F) if gated else None

    def __call__(self, x):
        up = self.up(x)
        gate = self.activation(up if self.gate is None else self.gate(x))
        return self.down(gate if self.gate is None else gate * up)


class NnxBlock(nnx.Module):
    def __init__(self, moe, dense, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.mlp = (
            sparsejax.nnx.MoE(D, **moe, rngs=rngs) if moe else NnxMlp(*dense, rngs)
        )

    def __call__(self, x):
        y = self.mlp(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class NnxNet(nnx.Module):
    def __init__(self, moe, dense, scanned, rngs):
        make = lambda rngs: NnxBlock(moe, dense, rngs)
        if scanned:
            self.blocks = nnx.vmap(make)(rngs.split(LAYERS))
        else:
            self.blocks = nnx.List([make(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        if isinstance(self.blocks, nnx.List):
            for block in self.blocks:
                x = block(x)
            return x
        carry = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return carry(lambda block, x: block(x))(self.blocks, x)


class LinenBlock(nn.Module):
    moe: dict | None
    dense: tuple

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        if self.moe:
            y, _ = sparsejax.linen.MoE(D, **self.moe, name="mlp")(y)
        else:
            y = LinenMlp(*self.dense, name="mlp")(y)
        return x + y, None


class LinenMlp(nn.Module):
    gated: bool
    activation: object

    @nn.compact
    def __call__(self, x):
        linear = functools.partial(nn.Dense, use_bias=False)
        up = linear(F, name="up")(x)
        hidden = self.activation(linear(F, name="gate")(x) if self.gated else up)
        return linear(D, name="down")(hidden * up if self.gated else hidden)


class LinenNet(nn.Module):
    moe: dict | None
    dense: tuple
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            axes = {"params": 0, "balance": 0}
            block = nn.scan(
                LinenBlock,
                variable_axes=axes,
                split_rngs={"params": True},
                length=LAYERS,
            )
            return block(self.moe, self.dense, name="blocks")(x, None)[0]
        for i in range(LAYERS):
            x, _ = LinenBlock(self.moe, self.dense, name=f"blocks_{i}")(x, None)
        return x


def models(linen, scanned, dense, moe):
    """(the dense model's parameters, the target, and both as functions)."""
    x = jnp.zeros((*BATCH, D))
    if linen:
        small, large = LinenNet(None, dense, scanned), LinenNet(moe, dense, scanned)
        params = small.init(jax.random.key(0), x)
        target = jax.eval_shape(large.init, jax.random.key(1), x)
        return params, target, small.apply, large.apply
    make = lambda moe: nnx.split(NnxNet(moe, dense, scanned, nnx.Rngs(0)))
    graph, params = make(None)
    large, target = nnx.eval_shape(lambda: make(moe))
    return (
        params,
        target,
        lambda params, x: nnx.merge(graph, params)(x),
        lambda params, x: nnx.merge(large, params)(x),
    )


def upcycle(mode, router, *, gated, linen, scanned, balance=False, tokens=TOKENS):
    """(the report, largest difference relative to the dense model's largest output)."""
    homogeneous = getattr(mode, "homogeneous", None) == 1
    activation = jax.nn.relu if homogeneous else jax.nn.silu
    groups = mode.groups if isinstance(mode, upcycling.Granular) else 1
    narrow = 12 if isinstance(mode, upcycling.Adapters) else F // groups
    keeps = isinstance(mode, upcycling.Shared | upcycling.Adapters)
    moe = {
        "hidden_features": narrow,
        "num_experts": E,
        "router": router,
        "gated": gated,
        "activation": activation,
        "shared_experts": F // narrow if keeps else 0,
        "balance": balance,
    }
    params, target, dense, large = models(linen, scanned, (gated, activation), moe)
    spec = upcycling.Spec(
        target=target,
        ffns=[
            upcycling.Ffn(
                source="*/mlp",
                w_in="up/kernel",
                w_out="down/kernel",
                w_gate="gate/kernel" if gated else None,
                axis=0 if scanned else None,
            )
        ],
        mode=mode,
        router=router,
        tokens=tokens,
        router_std=0.3,
    )
    made, _, report = upcycling.upcycle(params, spec=spec, key=jax.random.key(3))
    assert jax.tree.structure(made) == jax.tree.structure(target)
    x = jax.random.normal(jax.random.key(4), (*BATCH, D))
    before, after = dense(params, x), large(made, x)
    # The residual stream would hide half of an error.
    size = jnp.abs(before - x).max()
    return report, float(jnp.abs(after - before).max() / size)


MODES = [
    upcycling.Copy(),
    upcycling.Copy(noise=0.05),
    upcycling.Granular(2),
    upcycling.Granular(2, scale="spread"),
    upcycling.Granular(2, scale="spread", homogeneous=1),
    upcycling.Drop(0.5),
    upcycling.Drop(0.01),
    upcycling.Shared(),
    upcycling.Shared(noise=0.5),
    upcycling.Adapters(),
    upcycling.Adapters(up=0.1),
]
NORMALIZE = st.sampled_from(["none", "sum", "sum_stopgrad"])
CAPACITY = st.sampled_from([None, TOKENS, 4])


@st.composite
def top_k(draw):
    score = draw(st.sampled_from(["softmax", "softmax_chosen", "sigmoid"]))
    normalize = draw(NORMALIZE)
    if (score, normalize) == ("softmax_chosen", "sum_stopgrad"):
        normalize = "none"
    return functools.partial(
        routing.top_k,
        k=draw(st.integers(1, E)),
        score=score,
        normalize=normalize,
        capacity=draw(CAPACITY),
        renormalize=draw(st.booleans()),
    )


@st.composite
def other(draw):
    function, fixed = draw(
        st.sampled_from(
            [
                (routing.top_p, {"p": 0.6}),
                (routing.top_p, {"p": 0.9, "max_k": 2}),
                (routing.threshold, {"threshold": 0.3}),
                (routing.threshold, {"threshold": 0.9, "at_least_one": True}),
                (routing.dense_to_sparse, {"k": 2, "temperature": 0.5}),
                (routing.sinkhorn, {"k": 2}),
                (routing.expert_choice, {"capacity": 5}),
            ]
        )
    )
    return functools.partial(function, **fixed, normalize=draw(NORMALIZE))


def check(mode, gated, linen, scanned, data):
    granular = isinstance(mode, upcycling.Granular)
    router = data.draw(top_k() if granular else st.one_of(top_k(), other()))
    knows_bias = router.func is routing.top_k
    report, error = upcycle(
        mode,
        router,
        gated=gated,
        linen=linen,
        scanned=scanned,
        balance=knows_bias and data.draw(st.booleans()),
    )
    case = f"{mode} {router} {error:.1e}\n{report}"
    if report.exact:
        assert error < 1e-5, case
    elif not any("may" in why or "known" in why for why in report.reasons):
        assert error > 1e-4, case
    always = isinstance(mode, upcycling.Shared) or mode == upcycling.Adapters()
    assert not always or report.exact, case


CASE = {
    "mode": st.sampled_from(MODES),
    "gated": st.booleans(),
    "linen": st.booleans(),
    "scanned": st.booleans(),
    "data": st.data(),
}


@pytest.mark.slow
@given(**CASE)
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
def test_exact_is_what_is_measured_with_modules(**case):
    check(**case)


@pytest.mark.parametrize(
    ("mode", "normalize", "where"),
    [
        pytest.param(
            upcycling.Granular(2),
            "sum_stopgrad",
            {"linen": True, "scanned": True},
            marks=pytest.mark.slow,
        ),
        (upcycling.Shared(), "none", {"linen": False, "scanned": True}),
    ],
    ids=["granular", "shared"],
)
def test_a_few_of_them(mode, normalize, where):
    router = functools.partial(routing.top_k, k=2, normalize=normalize)
    report, error = upcycle(mode, router, gated=True, balance=True, **where)
    assert report.exact and error < 1e-5, (report, error)
