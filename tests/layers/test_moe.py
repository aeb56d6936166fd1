"""A mixture of experts: equation, gradients, balance, padding, initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import layers, routing
from sparsejax.testing import assert_close

T, D, F, E, K = 6, 4, 5, 3, 2
TOP2 = functools.partial(routing.top_k, k=2, normalize="sum")
CASES = {
    "plain": {},
    "gated": {"gated": True},
    "shared": {"shared_experts": 2},
    "gated shared": {"gated": True, "shared_experts": 1},
}


def make(seed=0, t=T, dtype=jnp.float32, **changes):
    spec = layers.MoESpec(
        features=D,
        hidden_features=F,
        num_experts=E,
        **{"router": TOP2, "dtype": dtype, **changes},
    )
    params, _ = layers.init_moe(jax.random.key(seed), spec)
    params["router"] *= 10  # routes that rounding does not change
    x = jax.random.normal(jax.random.key(seed + 1), (t, D), dtype)
    return spec, params, x


def silu(x):
    return x / (1 + np.exp(-x))


def expert(x, w_in, w_out, w_gate):
    if w_gate is None:
        return silu(x @ w_in) @ w_out
    return (silu(x @ w_gate) * (x @ w_in)) @ w_out


def loop(params, x, mask=None):
    """Token by token: softmax, the two best, weights that sum to 1; float64."""
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    x = np.asarray(x, np.float64)
    y = np.zeros(x.shape)
    for t, row in enumerate(x):
        if mask is not None and not mask[t]:
            continue
        scores = np.exp(row @ p["router"])
        best = np.argsort(-scores, kind="stable")[:K]
        for e in best:
            gate = p["w_gate"][e] if "w_gate" in p else None
            out = expert(row, p["w_in"][e], p["w_out"][e], gate)
            y[t] += scores[e] / scores[best].sum() * out
        if "shared_in" in p:
            y[t] += expert(row, p["shared_in"], p["shared_out"], p.get("shared_gate"))
    return y


def plain(params, x, dtype, mask=None):
    """The same by XLA: every expert on every token."""
    logits = x.astype(jnp.float32) @ params["router"]
    best, _ = jax.lax.top_k(logits, K)
    weights = jax.nn.softmax(jnp.where(logits >= best[:, -1:], logits, -jnp.inf))
    p = {name: a.astype(dtype) for name, a in params.items()}
    x = x.astype(dtype)
    hidden = jnp.einsum("td,edf->tef", x, p["w_in"])
    if "w_gate" in p:
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["w_gate"])) * hidden
    else:
        hidden = jax.nn.silu(hidden)
    y = jnp.einsum("tef,efd,te->td", hidden, p["w_out"], weights.astype(dtype))
    if "shared_in" in p:
        hidden = x @ p["shared_in"]
        if "shared_gate" in p:
            hidden = jax.nn.silu(x @ p["shared_gate"]) * hidden
        else:
            hidden = jax.nn.silu(hidden)
        y = y + hidden @ p["shared_out"]
    return y if mask is None else jnp.where(mask[:, None], y, jnp.zeros_like(y))


MASK = np.array([True, True, False, True, True, True])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_tokens(case, dtype, mask):
    spec, params, x = make(dtype=dtype, **CASES[case])
    mask = None if mask is None else jnp.asarray(mask)
    y, _ = layers.apply_moe(spec, params, x, mask=mask)
    assert y.dtype == dtype
    assert_close(y, loop(params, x, mask), plain(params, x, dtype, mask))


@pytest.mark.parametrize("case", ["plain", "gated shared"])
def test_gradients_equal_differences_of_the_loop(case):
    spec, params, x = make(**CASES[case])
    cotangent = np.random.default_rng(2).normal(size=(T, D))
    arguments = {**params, "x": x}

    def gradients(apply):
        def loss(arguments):
            y = apply({name: arguments[name] for name in params}, arguments["x"])
            return jnp.sum(y * cotangent.astype(np.float32))

        return jax.grad(loss)(arguments)

    mask = jnp.asarray(MASK)
    got = gradients(lambda params, x: layers.apply_moe(spec, params, x, mask=mask)[0])
    low = gradients(lambda params, x: plain(params, x, jnp.float32, mask))
    exact = {name: np.array(a, np.float64) for name, a in arguments.items()}

    def total():
        y = loop({name: exact[name] for name in params}, exact["x"], MASK)
        return np.sum(y * cotangent)

    for name, value in exact.items():
        want, step = np.zeros(value.shape), 1e-5
        for at in np.ndindex(value.shape):
            here = value[at]
            ends = []
            for sign in (1, -1):
                value[at] = here + sign * step
                ends.append(total())
            value[at] = here
            want[at] = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(want).max() > 1e-3, name
        assert_close(got[name], want, low[name])


@pytest.mark.parametrize(
    "router",
    [
        functools.partial(routing.top_k, k=1),
        functools.partial(routing.top_k, k=E, score="sigmoid"),
        functools.partial(routing.top_k, k=2, capacity=2),
    ],
    ids=["k=1", "k=E", "capacity"],
)
def test_any_router(router):
    """The choices that a router lists are those that are computed."""
    spec, params, x = make(router=router, gated=True)
    y, aux = layers.apply_moe(spec, params, x)
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    row = np.asarray(x, np.float64)
    logits = np.asarray(x) @ np.asarray(params["router"])
    chosen = router(jnp.asarray(logits))
    want = np.zeros((T, D))
    for t, e, w in zip(*map(np.asarray, chosen.choices()), strict=True):
        if e < E:
            want[t] += np.float64(w) * expert(
                row[t], p["w_in"][e], p["w_out"][e], p["w_gate"][e]
            )
    assert want.any()
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, aux.routing.indices, chosen.indices)
    )
