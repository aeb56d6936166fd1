"""A mixture of experts: equation, gradients, balance, padding, initialisation."""

import dataclasses
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


# One compilation is quicker than one for each operation.
apply_moe = jax.jit(layers.apply_moe, static_argnums=0)


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


@pytest.mark.parametrize(
    ("case", "dtype", "mask"),
    [
        pytest.param("plain", jnp.float32, None, marks=pytest.mark.slow),
        ("gated", jnp.bfloat16, None),
        pytest.param("shared", jnp.bfloat16, MASK, marks=pytest.mark.slow),
        ("gated shared", jnp.float32, MASK),
    ],
)
def test_equals_a_loop_over_tokens(case, dtype, mask):
    spec, params, x = make(dtype=dtype, **CASES[case])
    mask = None if mask is None else jnp.asarray(mask)
    y, _ = apply_moe(spec, params, x, mask=mask)
    assert y.dtype == dtype
    low = jax.jit(plain, static_argnums=2)(params, x, dtype, mask)
    assert_close(y, loop(params, x, mask), low)


@pytest.mark.parametrize(
    "case", [pytest.param("plain", marks=pytest.mark.slow), "gated shared"]
)
def test_gradients_equal_differences_of_the_loop(case):
    spec, params, x = make(**CASES[case])
    cotangent = np.random.default_rng(2).normal(size=(T, D))
    arguments = {**params, "x": x}

    def gradients(apply):
        def loss(arguments):
            y = apply({name: arguments[name] for name in params}, arguments["x"])
            return jnp.sum(y * cotangent.astype(np.float32))

        return jax.jit(jax.grad(loss))(arguments)

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


def parted_tree(z, mask=None):
    """Two trees: two nodes and three leaves each."""
    nodes, leaves = z[:, :4].reshape(-1, 2, 2), z[:, 4:].reshape(-1, 2, 3)
    return routing.tree(nodes, leaves, mask=mask)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
IDS = np.array([4, 0, 1, 5, 3, 4])


@pytest.mark.parametrize(
    ("router", "more"),
    [
        (functools.partial(routing.top_k, k=2, capacity=2), {}),
        (functools.partial(routing.expert_choice, capacity=3), {}),
        (functools.partial(routing.hash_routing, num_experts=E, k=2), {"ids": IDS}),
        slow(functools.partial(routing.top_k, k=1), {}),
        slow(functools.partial(routing.top_k, k=E, score="sigmoid"), {}),
        slow(functools.partial(routing.sinkhorn, k=2), {}),
        slow(functools.partial(routing.threshold, threshold=0.3), {}),
        slow(functools.partial(routing.top_p, p=0.6), {}),
        slow(routing.relu, {}),
        slow(functools.partial(routing.dense_to_sparse, k=1), {"temperature": 0.5}),
        slow(parted_tree, {}),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", ""),
)
def test_any_router(router, more):
    """The choices that a router lists are those that are computed."""
    outputs = 10 if router is parted_tree else None
    spec, params, x = make(router=router, gated=True, router_outputs=outputs)
    more = {name: jnp.asarray(value) for name, value in more.items()}
    y, aux = apply_moe(spec, params, x, mask=jnp.asarray(MASK), **more)
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    row = np.asarray(x, np.float64)
    logits = jnp.asarray(np.asarray(x) @ np.asarray(params["router"]))
    if "ids" in more:
        chosen = router(logits=logits, mask=jnp.asarray(MASK), **more)
    else:
        chosen = router(logits, mask=jnp.asarray(MASK), **more)
    want = np.zeros((T, D))
    for t, e, w in zip(*map(np.asarray, chosen.choices()), strict=True):
        if e < E:
            want[t] += np.float64(w) * expert(
                row[t], p["w_in"][e], p["w_out"][e], p["w_gate"][e]
            )
    assert want.any() and not want[2].any()
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(aux.routing.indices, chosen.indices)
    np.testing.assert_array_equal(aux.metrics.load, chosen.counts())


def test_soft_moe():
    """Slots are means of tokens, tokens means of slots, by two softmaxes; float64."""
    spec, params, x = make(
        router=lambda z, mask: routing.soft(z.reshape(-1, E, 2), mask=mask),
        router_outputs=2 * E,
    )
    x = jnp.where(MASK[:, None], x, jnp.nan)  # padding
    y, aux = apply_moe(spec, params, x, mask=jnp.asarray(MASK))
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    tokens = np.asarray(x, np.float64)[MASK]
    scores = np.exp(tokens @ p["router"])  # [t, 2 e]
    slots = (scores / scores.sum(axis=0)).T @ tokens
    outputs = [
        expert(s, p["w_in"][i // 2], p["w_out"][i // 2], None)
        for i, s in enumerate(slots)
    ]
    want = (scores / scores.sum(axis=1, keepdims=True)) @ np.array(outputs)
    np.testing.assert_allclose(y[MASK], want, rtol=1e-4, atol=1e-5)
    assert not y[2].any()
    # As one that sends each token to all experts.
    np.testing.assert_array_equal(aux.counts, [5, 5, 5])
    np.testing.assert_allclose(aux.load_balance, 1.0, rtol=1e-6)
    assert aux.metrics.dropped == 0 and aux.metrics.unserved == 0
    shares = scores.reshape(-1, E, 2).sum(axis=2) / scores.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(shares), axis=1).mean()
    np.testing.assert_allclose(aux.metrics.entropy, entropy, rtol=1e-4)
    named = dataclasses.replace(spec, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="implementation: got 'mosaic_tpu'"):
        layers.apply_moe(named, params, x, mask=jnp.asarray(MASK))


def identity(x):
    return x


def by_hand(**changes):
    """Two experts of one unit: expert 0 has 10 x_0, expert 1 has 100 x_1."""
    spec = layers.MoESpec(
        features=2,
        hidden_features=1,
        num_experts=2,
        activation=identity,
        **{"router": functools.partial(routing.top_k, k=1), **changes},
    )
    params = {
        "router": jnp.eye(2),
        "w_in": jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]]),
        "w_out": jnp.array([[[10.0, 0.0]], [[0.0, 100.0]]]),
    }
    return spec, params


def test_balance_moves_the_choice_and_neither_weights_nor_gradients():
    """softmax(1, 0) = (.731, .269) and softmax(.4, .2) = (.550, .450).

    Both choose expert 0. The step of 0.2 against loads (2, 0) makes the bias (-.2, .2):
    .531 > .469 stays at 0, .350 < .650 goes to 1 with its own score .450.
    """
    spec, params = by_hand(balance=True)
    x = jnp.array([[1.0, 0.0], [0.4, 0.2]])
    apply = lambda balance: apply_moe(spec, params, x, balance=balance)
    y, aux = apply(jnp.zeros(2))
    np.testing.assert_array_equal(aux.counts, [2, 0])
    np.testing.assert_allclose(y, [[7.310586, 0.0], [2.199336, 0.0]], rtol=1e-5)

    balance = routing.update_bias(jnp.zeros(2), aux.counts, rate=0.2)
    np.testing.assert_allclose(balance, [-0.2, 0.2], rtol=1e-6)
    y, aux = apply(balance)
    np.testing.assert_array_equal(aux.counts, [1, 1])
    np.testing.assert_allclose(y, [[7.310586, 0.0], [0.0, 9.003321]], rtol=1e-5)
    # f = (1/2, 1/2): whatever P is, the loss is 1.
    np.testing.assert_allclose(aux.load_balance, 1.0, rtol=1e-6)

    # Nor by a router that would let it pass.
    through = lambda logits, bias: routing.top_k(logits + bias, 1)
    spec, _ = by_hand(balance=True, router=through)
    y_of = lambda balance: layers.apply_moe(spec, params, x, balance=balance)[0]
    gradient = jax.grad(lambda balance: y_of(balance).sum())(balance)
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_losses_metrics_and_counts_are_returned():
    """Three tokens want expert 0, which serves two; one wants expert 1."""
    router = functools.partial(routing.top_k, k=1, capacity=2)
    spec, params = by_hand(router=router)
    x = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    y, aux = apply_moe(spec, params, x)
    np.testing.assert_array_equal(aux.counts, [3, 1])  # those turned away too
    np.testing.assert_array_equal(aux.metrics.load, [2, 1])
    assert aux.metrics.dropped == 0.25 and not y[3].any()
    # log(1 + e)^2, and 2 (3/4 P_0 + 1/4 P_1), P_0 = (3 * .731 + .269) / 4
    np.testing.assert_allclose(aux.z, 1.3132617**2, rtol=1e-5)
    np.testing.assert_allclose(aux.load_balance, 1.1155293, rtol=1e-5)
    np.testing.assert_array_equal(aux.routing.valid, [[1], [1], [1], [0]])


@pytest.mark.parametrize("case", ["gated", "shared"])
@pytest.mark.slow
def test_padding_has_no_influence_even_if_nan(case):
    """Peers route padding, or guess it from rows of zeros."""
    # This activation is 1 at 0: shared experts would give padding a value.
    spec, params, x = make(**CASES[case], activation=jnp.cosh)
    mask = jnp.asarray(MASK)
    padded = jnp.where(mask[:, None], x, jnp.nan)

    def loss(params, x, mask):
        y, aux = layers.apply_moe(spec, params, x, mask=mask)
        return jnp.sum(y**2) + aux.load_balance + aux.z, (y, aux)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (y, aux)), (of_params, of_x) = run(params, padded, mask)
    (want, (kept, alone)), (of_params_alone, of_x_alone) = run(
        params, x[mask], jnp.ones(5, bool)
    )
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(y[mask], kept, rtol=1e-4, atol=1e-6)
    assert not y[2].any() and not of_x[2].any()
    np.testing.assert_allclose(of_x[mask], of_x_alone, rtol=1e-3, atol=1e-5)
    for name, gradient in of_params.items():
        np.testing.assert_allclose(
            gradient, of_params_alone[name], rtol=1e-3, atol=1e-4
        )
    np.testing.assert_array_equal(aux.counts, alone.counts)
    np.testing.assert_allclose(aux.metrics.entropy, alone.metrics.entropy, rtol=1e-5)


def test_jitter_multiplies_the_inputs_of_the_router_alone():
    """Two experts, logits (u, -u) with u in [.5, 1.5): probabilities sigmoid(2 u)."""
    spec = layers.MoESpec(
        features=1,
        hidden_features=1,
        num_experts=2,
        router=TOP2,
        activation=identity,
        jitter=0.5,
    )
    params = {
        "router": jnp.array([[1.0, -1.0]]),
        "w_in": jnp.ones((2, 1, 1)),
        "w_out": jnp.ones((2, 1, 1)),
    }
    x = jnp.ones((200, 1))
    y, aux = apply_moe(spec, params, x, key=jax.random.key(0))
    p = np.asarray(aux.routing.probs[:, 0], np.float64)
    u = np.log(p / (1 - p)) / 2
    assert u.min() >= 0.5 - 1e-5 and u.max() < 1.5 and u.std() > 0.2
    np.testing.assert_allclose(y, x, rtol=1e-5)  # experts saw 1, and weights sum to 1
    _, still = apply_moe(spec, params, x)  # no key: evaluation
    np.testing.assert_allclose(still.routing.probs[:, 0], 0.8807971, rtol=1e-5)


@pytest.mark.slow
def test_the_router_takes_keys_and_arguments():
    seen = {}

    def router(logits, *, ids, other=None, key=None, mask=None):
        seen.update(ids=ids, other=other, key=key, mask=mask)
        return routing.top_k(logits, 1, mask=mask)

    spec, params = by_hand(router=router)
    x, key = jnp.ones((1, 2, 2)), jax.random.key(3)
    mask = jnp.array([[True, False]])
    ids = jnp.array([[5, 7]])
    layers.apply_moe(spec, params, x, key=key, mask=mask, ids=ids, other="given")
    assert seen["other"] == "given" and seen["key"] is key
    assert seen["mask"].tolist() == [True, False] and seen["ids"].tolist() == [5, 7]
    layers.apply_moe(spec, params, x, ids=ids)
    assert seen["key"] is None and seen["mask"] is None


def test_the_router_is_float32_in_earnest():
    """Low-precision routers choose other experts; a TPU's float32 product is one."""
    spec, params, x = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, t=32)
    assert params["router"].dtype == jnp.float32
    assert {a.dtype for name, a in params.items() if name != "router"} == {
        jnp.dtype(jnp.bfloat16)
    }
    apply = lambda x: layers.apply_moe(spec, params, x)[1].routing.probs
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"], np.float64)
    want = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(jax.jit(apply)(x), want, rtol=1e-5)
    products = [
        equation
        for equation in jax.make_jaxpr(apply)(x).eqns
        if equation.primitive.name == "dot_general"
    ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert any(equation.params["precision"] == highest for equation in products)


@pytest.mark.parametrize(
    ("k", "case"),
    [
        pytest.param(2, "plain", marks=pytest.mark.slow),
        pytest.param(4, "gated shared", marks=pytest.mark.slow),
        *(
            pytest.param(k, case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for k in (1, 3)
            for case in CASES
        ),
    ],
)
def test_initial_variance_is_a_dense_layers(k, case):
    d, f, t = 96, 128, 400
    spec = layers.MoESpec(
        features=d,
        hidden_features=f,
        num_experts=8,
        router=functools.partial(routing.top_k, k=k, normalize="sum"),
        **CASES[case],
    )
    params, _ = layers.init_moe(jax.random.key(0), spec)
    x = jax.random.normal(jax.random.key(1), (t, d))
    y, aux = apply_moe(spec, params, x)
    # A dense layer of variance 1 / fan-in, in numpy.
    rng = np.random.default_rng(0)
    draw = lambda m, n: rng.normal(size=(m, n)) / np.sqrt(m)
    gate = draw(d, f) if spec.gated else None
    dense = expert(np.asarray(x, np.float64), draw(d, f), draw(f, d), gate)
    assert abs(np.var(y) / np.var(dense) - 1) < 0.15
    # Logits of variance 0.1, and about balanced.
    logits = np.asarray(x) @ np.asarray(params["router"])
    assert abs(np.var(logits) / 0.1 - 1) < 0.2
    assert aux.metrics.max_over_mean < 2


def test_gain():
    std = lambda **changes: float(
        layers.init_moe(
            jax.random.key(0),
            layers.MoESpec(features=50, hidden_features=100, num_experts=4, **changes),
        )[0]["w_out"].std()
    )
    assert abs(std(router=functools.partial(routing.top_k, k=4)) / 0.2 - 1) < 0.02
    assert abs(std(router=lambda logits: None) / 0.1 - 1) < 0.02
    assert abs(std(router=TOP2, gain=3.0) / 0.3 - 1) < 0.02


@pytest.mark.slow
def test_scan_over_layers_with_remat_equals_a_loop_and_is_traced_once():
    spec, _, x = make(gated=True, shared_experts=1, balance=True)
    init = lambda key: layers.init_moe(key, spec)
    params, state = jax.vmap(init)(jax.random.split(jax.random.key(0), 3))
    traces = []

    def layer(x, values):
        params, state = values
        y, aux = layers.apply_moe(spec, params, x, **state)
        return x + y, (aux.load_balance, aux.z, aux.counts, aux.metrics)

    @jax.jit
    def scanned(params, x):
        traces.append(1)
        total = lambda params: jax.lax.scan(jax.checkpoint(layer), x, (params, state))

        def loss(params):
            y, (balance, z, counts, metrics) = total(params)
            return jnp.sum(y**2) + balance.sum() + z.sum(), (counts, metrics)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def looped(params):
        y, total, counts = x, 0.0, []
        for i in range(3):
            values = jax.tree.map(lambda a, i=i: a[i], (params, state))
            y, (balance, z, count, _) = layer(y, values)
            total, counts = total + balance + z, [*counts, count]
        return jnp.sum(y**2) + total, jnp.stack(counts)

    (value, (counts, metrics)), gradient = scanned(params, x)
    want, want_gradient = jax.jit(jax.value_and_grad(looped, has_aux=True))(params)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_array_equal(counts, want[1])
    assert metrics.usage.shape == (3,)
    for name in params:
        np.testing.assert_allclose(
            gradient[name], want_gradient[name], rtol=1e-3, atol=1e-4
        )
    scanned(params, x[::-1] * 2)  # other choices
    assert len(traces) == 1


def test_bad_arguments():
    spec, params, x = make()
    change = lambda **changes: dataclasses.replace(spec, **changes)
    for name, bad, needed in [
        ("features", 0, "a positive int"),
        ("num_experts", -1, "a positive int"),
        ("router_outputs", 0, "a positive int"),
        ("shared_experts", -1, "at least 0"),
        ("jitter", 1.0, r"a number in \[0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: got {bad}, needed {needed}"):
            change(**{name: bad})
    with pytest.raises(ValueError, match="needed a router that takes bias="):
        change(router=lambda logits, mask=None: None, balance=True)
    with pytest.raises(ValueError, match="balance: got a bias, needed None"):
        layers.apply_moe(spec, params, x, balance=jnp.zeros(E))
    with pytest.raises(ValueError, match="balance: got None, needed a bias"):
        layers.apply_moe(change(balance=True), params, x)
    with pytest.raises(ValueError, match=r"mask: got \(1, 6\), needed \(6,\), as x"):
        layers.apply_moe(spec, params, x, mask=jnp.ones((1, 6), bool))
    with pytest.raises(ValueError, match=r"ids: got \(5,\), needed \(6,\), as x"):
        layers.apply_moe(spec, params, x, ids=jnp.ones(5, int))
    with pytest.raises(ValueError, match=r"x: got \(6, 3\), needed \[..., 4\]"):
        layers.apply_moe(spec, params, x[:, :3])
    with pytest.raises(ValueError, match="router: got one that returns tuple"):
        layers.apply_moe(change(router=lambda logits: ()), params, x)
    fewer = lambda logits: routing.top_k(logits[:, :2], 1)
    with pytest.raises(ValueError, match=r"a routing of \(6, 2\), needed \(6, 3\)"):
        layers.apply_moe(change(router=fewer), params, x)
