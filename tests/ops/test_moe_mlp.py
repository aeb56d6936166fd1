"""Every implementation of moe_mlp against a float64 loop over tokens and experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.ops import moe_mlp, moe_mlp_reference
from sparsejax.ops._moe_mlp_implementations import MOE_MLP, MOE_MLP_GRADIENTS
from sparsejax.routing import Routing
from sparsejax.testing import assert_close, interpreted

NEW_PALLAS = tuple(int(v) for v in jax.__version__.split(".")[:2]) >= (0, 11)
# Mosaic GPU has an interpreter from jax 0.11 on; before, only the compile tests see it.
IMPLEMENTATIONS = [n for n in MOE_MLP if n != "mosaic_gpu" or NEW_PALLAS]

# name: (tokens, d, f, experts, choices of each token, gated, dtype)
CASES = {
    "plain": (14, 6, 10, 4, 2, False, "float32"),
    "gated": (14, 6, 10, 4, 2, True, "float32"),
    "by_expert": (12, 6, 10, 3, 5, True, "float32"),
    "one_expert": (9, 6, 10, 1, 1, False, "float32"),
    "every_expert": (9, 6, 10, 3, 3, True, "float32"),
    "all_on_one": (14, 6, 10, 4, 1, False, "float32"),
    "nobody": (8, 6, 10, 2, 2, True, "float32"),
    "gated_bf16": (24, 64, 64, 4, 2, True, "bfloat16"),
    "plain_f16": (16, 64, 64, 4, 2, False, "float16"),
    "several_tiles": (130, 6, 10, 3, 2, False, "float32"),
}

# The whole table of what a named implementation refuses; anything else must be served.
REFUSED = {
    ("mosaic_tpu", "plain_f16"): "dtype is float16",
    **{
        ("mosaic_gpu", name): "dtype is float32"
        for name, case in CASES.items()
        if case[-1] == "float32"
    },
}


def slowly(names):
    """The interpreted kernels' tests are marked slow."""
    marks = lambda name: [] if name in ("xla", None) else [pytest.mark.slow]
    return [pytest.param(name, marks=marks(name)) for name in names]


EXHAUSTIVE = pytest.mark.exhaustive


def by_hand(names):
    """The interpreted kernels, of which other tests have value and gradients."""
    marks = lambda name: [] if name in ("xla", None) else [EXHAUSTIVE]
    return [pytest.param(name, marks=marks(name)) for name in names]


def choice(name):
    return name if name in ("xla", None) else interpreted(name)


@functools.cache
def case(name):
    """x, the routing, the experts' weights, dy."""
    t, d, f, e, k, gated, dtype = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s) / 2, dtype)
    lists, among = (e, t) if name == "by_expert" else (t, e)
    indices = np.stack([rng.permutation(among)[:k] for _ in range(lists)])
    if name == "all_on_one":
        indices[:] = 2
    valid = rng.random((lists, k)) < (0 if name == "nobody" else 0.8)
    valid[0] = False  # a token with no expert, or an expert with no token
    if name == "gated":
        valid[indices == 3] = False  # an expert with no token
    routing = Routing(
        indices=jnp.asarray(indices, jnp.int32),
        weights=jnp.asarray(np.where(valid, rng.random((lists, k)), 0), jnp.float32),
        valid=jnp.asarray(valid),
        probs=jnp.zeros((t, e)),
        by_expert=name == "by_expert",
    )
    ws = [draw(e, d, f), draw(e, f, d), *([draw(e, d, f)] if gated else [])]
    return draw(t, d), routing, ws, draw(t, d)


def f64(a):
    return np.asarray(a, np.float64)


def silu(a):
    return a / (1 + np.exp(-a))


def silu_slope(a):
    s = 1 / (1 + np.exp(-a))
    return s + a * s * (1 - s)


def oracle(x, routing, weights, w_in, w_out, w_gate=None, dy=None):
    """y and, by the chain rule written out, all gradients: one choice at a time."""
    x, w_in, w_out, dy = f64(x), f64(w_in), f64(w_out), f64(dy)
    y, dx, dweights = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weights.shape)
    ds = [np.zeros(w.shape) for w in (w_in, w_out)]
    d_gate = np.zeros(w_in.shape)
    for (i, j), part in np.ndenumerate(f64(weights)):
        if not routing.valid[i, j]:
            continue
        t, e = i, int(routing.indices[i, j])
        if routing.by_expert:
            t, e = e, t
        a = x[t] @ w_in[e]
        b = a if w_gate is None else x[t] @ f64(w_gate)[e]
        h = silu(a) if w_gate is None else silu(b) * a
        y[t] += part * (h @ w_out[e])
        dweights[i, j] = dy[t] @ (h @ w_out[e])
        dh = part * (w_out[e] @ dy[t])
        ds[1][e] += part * np.outer(h, dy[t])
        da = dh * (silu_slope(a) if w_gate is None else silu(b))
        ds[0][e] += np.outer(x[t], da)
        dx[t] += w_in[e] @ da
        if w_gate is not None:
            db = dh * a * silu_slope(b)
            d_gate[e] += np.outer(x[t], db)
            dx[t] += f64(w_gate)[e] @ db
    return y, dx, dweights, *ds, *([] if w_gate is None else [d_gate])


def plain(x, routing, w_in, w_out, *, w_gate=None):
    """The layer as a model in x's dtype has it: every product is rounded to it."""

    def product(equation, a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    up = product("td,edf->etf", x, w_in).astype(x.dtype)
    if w_gate is None:
        h = jax.nn.silu(up)
    else:
        h = jax.nn.silu(product("td,edf->etf", x, w_gate).astype(x.dtype)) * up
    z = product("etf,efd->etd", h, w_out).astype(x.dtype)
    tokens, experts, weights = routing.choices()
    z = z.at[experts, tokens].get(mode="fill", fill_value=0).astype(jnp.float32)
    z = jnp.where(experts[:, None] < routing.num_experts, z * weights[:, None], 0)
    return jnp.zeros(x.shape, jnp.float32).at[tokens].add(z).astype(x.dtype)


def layer_of(fn, routing, **how):
    """``fn`` as a function of the arrays that have gradients."""

    def layer(x, weights, w_in, w_out, w_gate=None):
        mine = dataclasses.replace(routing, weights=weights)
        return fn(x, mine, w_in, w_out, w_gate=w_gate, **how)

    return layer


QUICK = ["plain", "gated", "by_expert", "nobody", "gated_bf16"]


def marks_of(implementation, name):
    if implementation != "xla" and not REFUSED.get((implementation, name)):
        few = [] if name in ("gated", "by_expert", "gated_bf16") else [EXHAUSTIVE]
        return [pytest.mark.slow, *few]
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param(
            each,
            name,
            marks=marks_of(each, name),
        )
        for each in IMPLEMENTATIONS
        for name in CASES
    ],
)
def test_value_and_gradients(implementation, name):
    x, routing, ws, dy = case(name)
    layer = layer_of(moe_mlp, routing, implementation=choice(implementation))
    operands = x, routing.weights, *ws
    refusal = REFUSED.get((implementation, name))
    if refusal:
        with pytest.raises(NotImplementedError, match=f"{implementation}.*{refusal}"):
            layer(*operands)
        return

    @jax.jit
    def run(operands, dy):
        y, vjp = jax.vjp(layer, *operands)
        return y, *vjp(dy)

    got = run(operands, dy)
    low_y, low_vjp = jax.vjp(layer_of(plain, routing), *operands)
    want = oracle(x, routing, routing.weights, *ws, dy=dy)
    low = low_y, *low_vjp(dy)
    for a, b, c, of in zip(got, want, low, (x, *operands), strict=True):
        assert a.dtype == of.dtype
        assert_close(a, b, c)
    alone = ~np.isin(np.arange(len(x)), np.argwhere(want[0].any(1)))
    assert not f64(got[0])[alone].any()  # exactly 0 where no expert serves


def second_order(layer, count):
    """Gradients of a function of gradients: every derivative rule is differentiated."""
    every = tuple(range(count))

    def loss(*operands):
        return jnp.sum(jnp.sin(layer(*operands).astype(jnp.float32)))

    def of_gradients(*operands):
        square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
        return sum(map(square, jax.grad(loss, every)(*operands)))

    return jax.grad(of_gradients, every)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("xla", "gated"),
        pytest.param("xla", "by_expert", marks=pytest.mark.slow),
        *(
            pytest.param(each, "gated_bf16", marks=pytest.mark.slow)
            for each in IMPLEMENTATIONS
        ),
    ],
)
def test_gradient_of_gradient(implementation, name):
    x, routing, ws, _ = case(name)
    operands = x, routing.weights, *(w / 2 for w in ws)
    how = dict(implementation=choice(implementation))
    ours = second_order(layer_of(moe_mlp, routing, **how), len(operands))
    reference = second_order(layer_of(moe_mlp_reference, routing), len(operands))
    with jax.enable_x64(True):
        wide = [jnp.asarray(f64(a)) for a in operands]
        want = [np.asarray(a) for a in jax.jit(reference)(*wide)]
    low = jax.jit(second_order(layer_of(plain, routing), len(operands)))(*operands)
    for got, right, each in zip(jax.jit(ours)(*operands), want, low, strict=True):
        # sin' in float32 on bfloat16 values: both sides round y, so eps covers less.
        assert_close(got, right, each, eps=1e-5)


@pytest.mark.parametrize("implementation", slowly(IMPLEMENTATIONS))
def test_nothing_leaks_from_other_tokens(implementation):
    """A NaN reaches its token and the weights of its experts, and no others."""
    x, routing, ws, dy = case("gated_bf16")
    routing = dataclasses.replace(
        routing,
        indices=jnp.zeros_like(routing.indices).at[5].set(jnp.array([1, 2])),
        valid=jnp.ones_like(routing.valid).at[7].set(False),
    )
    x = x.at[5].set(jnp.nan).at[7].set(jnp.nan)
    dy = dy.at[7].set(jnp.nan)
    layer = layer_of(moe_mlp, routing, implementation=choice(implementation))
    y, vjp = jax.vjp(layer, x, routing.weights, *ws)
    bad = lambda a: np.flatnonzero(
        np.isnan(f64(a)).any(tuple(range(1, a.ndim)))
    ).tolist()
    dx, dweights, *dws = vjp(dy)
    assert bad(y) == bad(dx) == bad(dweights) == [5]
    assert [bad(dw) for dw in dws] == [[1, 2]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("implementation", by_hand(IMPLEMENTATIONS))
def test_vmap(implementation):
    """Of tokens and routing with shared weights: more tokens; of weights: in turn."""
    x, routing, ws, dy = case("gated_bf16")
    impl = choice(implementation)
    mirror = lambda a: jnp.stack([a, a[::-1]])
    xs, routings = mirror(x), jax.tree.map(mirror, routing)

    def run(x, routing, ws, dy):
        layer = layer_of(moe_mlp, routing, implementation=impl)
        y, vjp = jax.vjp(layer, x, routing.weights, *ws)
        return y, *vjp(dy)

    shared = jax.jit(jax.vmap(run, (0, 0, None, 0)))(xs, routings, ws, mirror(dy))
    own = [jnp.stack([w, -w]) for w in ws]
    apart = jax.jit(jax.vmap(run, (None, None, 0, None)))(x, routing, own, dy)
    for i, each in enumerate((1, -1)):
        member = jax.tree.map(lambda a: a[::each], (x, routing, dy))  # noqa: B023
        for got, ws_, (x_, routing_, dy_) in (
            (shared, ws, member),
            (apart, [each * w for w in ws], (x, routing, dy)),
        ):
            low_y, vjp = jax.vjp(layer_of(plain, routing_), x_, routing_.weights, *ws_)
            want = oracle(x_, routing_, routing_.weights, *ws_, dy=dy_)
            for a, b, c in zip(got, want, (low_y, *vjp(dy_)), strict=True):
                assert_close(a[i], b, c)


def test_shared_weights_under_vmap_are_one_layer():
    x, routing, ws, _ = case("plain")
    xs, routings = jax.tree.map(lambda a: jnp.stack([a] * 5), (x, routing))
    many = jax.vmap(lambda x, routing: moe_mlp(x, routing, *ws))
    assert "moe_mlp: 140 choices of 70 tokens" in sj.explain(many, xs, routings)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", by_hand([*IMPLEMENTATIONS, None]))
def test_scan_checkpoint_and_no_retrace(implementation):
    x, routing, ws, _ = case("gated_bf16")
    impl, traces = choice(implementation), []
    stacked = [jnp.stack([w, -w]) for w in ws]

    def loss(ws, routing):
        y = layer_of(moe_mlp, routing, implementation=impl)(x, routing.weights, *ws)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    @jax.jit
    def gradients(stacked, routing):
        traces.append(1)

        def scanned(stacked):
            body = jax.checkpoint(lambda c, ws: (c + loss(ws, routing), None))
            return jax.lax.scan(body, jnp.zeros((), jnp.float32), stacked)[0]

        return jax.grad(scanned)(stacked)

    other = dataclasses.replace(routing, indices=routing.indices[::-1])
    for each in (routing, other):
        got = gradients(stacked, each)
        want = jax.jit(jax.grad(loss))(ws, each)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(f64(a[0]), f64(b))
    assert len(traces) == 1


SLOPE = jnp.float32(0.3)
SLOPES = jnp.linspace(-1, 1, 10, dtype=jnp.float32)


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        jnp.arctan,  # no chip's kernel has it
        lambda a: jnp.where(a > 0, a, SLOPE * a),
        lambda a: jnp.where(a > 0, a, SLOPES * a),
    ],
)
def test_any_activation(activation):
    x, routing, ws, _ = case("plain")
    operands = x, routing.weights, *ws
    how = dict(activation=activation)
    total = lambda fn: lambda *args: jnp.sum(layer_of(fn, routing, **how)(*args))
    got = jax.jit(jax.grad(total(moe_mlp), range(4)))(*operands)
    want = jax.jit(jax.grad(total(moe_mlp_reference), range(4)))(*operands)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [pytest.param("plain", (), marks=pytest.mark.slow), ("by_expert", (10,))],
)
def test_an_activation_that_is_learned(name, shape):
    """Of a slope per hidden unit, or one of all: its gradient too, and vmap over it."""
    x, routing, ws, dy = case(name)
    slope = jnp.full(shape, 0.3)

    def loss(fn, slope, *operands):
        activation = lambda a: jnp.where(a > 0, a, slope * a)
        layer = layer_of(fn, routing, activation=activation)
        return jnp.sum(layer(*operands) * dy)

    operands = slope, x, routing.weights, *ws
    every = range(len(operands))
    gradients = {
        fn: jax.jit(jax.grad(functools.partial(loss, fn), every))
        for fn in (moe_mlp, moe_mlp_reference)
    }
    got, want = (fn(*operands) for fn in gradients.values())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    eager = jax.grad(loss, 1)(moe_mlp, *operands)
    np.testing.assert_allclose(eager, want[0], rtol=1e-4, atol=1e-5)
    mapped = jax.vmap(gradients[moe_mlp], (0, *[None] * len(operands[1:])))
    [many, *_] = mapped(jnp.stack([slope, 2 * slope]), *operands[1:])
    np.testing.assert_allclose(many[0], want[0], rtol=1e-4, atol=1e-5)


def test_explain_says_which_activation_the_kernels_take():
    x, routing, ws, _ = case("plain")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *ws)]

    def text(activation):
        call = functools.partial(moe_mlp, activation=activation)
        layer = lambda x, w_in, w_out: call(
            x, routing, w_in, w_out, implementation="mosaic_tpu"
        )
        device = jax.sharding.AbstractDevice("TPU v5e", 1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return sj.explain(layer, *args)

    assert "in two kernels" in text(jax.nn.silu)
    assert "grouped products; rows are gathered" in text(jnp.arctan)


def test_master_weights_get_their_gradients_unrounded():
    """dtype=bfloat16 with float32 weights: the float32 sums come back as they are."""
    x, routing, ws, dy = case("gated_bf16")
    layer = layer_of(moe_mlp, routing, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(layer, x, routing.weights, *(w.astype(jnp.float32) for w in ws))
    dx, _, *dws = vjp(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    for dw in dws:
        assert dw.dtype == jnp.float32
        assert np.any(f64(dw) != f64(dw.astype(jnp.bfloat16)))


def test_float64():
    with jax.enable_x64(True):
        x, routing, ws, dy = case("gated")
        wide = lambda a: jnp.asarray(f64(a))
        operands = wide(x), routing.weights, *map(wide, ws)
        y, vjp = jax.vjp(layer_of(moe_mlp, routing), *operands)
        want = oracle(x, routing, routing.weights, *ws, dy=dy)
        for got, each in zip((y, *vjp(wide(dy))), want, strict=True):
            np.testing.assert_allclose(got, each, rtol=1e-6, atol=1e-6)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, want[0], rtol=0, atol=1e-13)


# --- Over devices ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AxisType.Explicit, "gated_bf16"),
        pytest.param(AxisType.Auto, "gated_bf16", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, "by_expert", marks=pytest.mark.slow),
    ],
)
def test_jit_over_a_mesh(kind, name):
    x, routing, ws, dy = case(name)
    mesh = jax.make_mesh((4, 2), ("data", "rest"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
        cut = () if routing.by_expert else ("data",)
        here = jax.tree.map(lambda a: put(a, *cut), routing)
        operands = put(x, "data"), here.weights, *(put(w) for w in ws)

        @jax.jit
        def run(operands, here, dy):
            y, vjp = jax.vjp(layer_of(moe_mlp, here), *operands)
            return y, *vjp(dy)

        got = run(operands, here, put(dy, *cut))  # as y is cut
    low_y, low_vjp = jax.vjp(layer_of(plain, routing), x, routing.weights, *ws)
    want = oracle(x, routing, routing.weights, *ws, dy=dy)
    for a, b, c in zip(got, want, (low_y, *low_vjp(dy)), strict=True):
        # Partial sums of four devices are rounded each, then added.
        assert_close(a, b, c, eps=1e-2 if x.dtype == jnp.bfloat16 else 1e-6)


# --- Memory, bad input, and what is said ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "gated", [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_memory_does_not_grow_with_the_experts(gated):
    """The budget's layer, compiled: far below 100 MiB, weights' gradients apart."""
    t, d, f = 4096, 512, 2048
    abstract = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

    def held(e):
        ws = [abstract(e, d, f), abstract(e, f, d), *[abstract(e, d, f)] * gated]

        def loss(x, logits, w_in, w_out, w_gate=None):
            routing = sj.routing.top_k(logits, 2)
            return jnp.sum(jnp.sin(moe_mlp(x, routing, w_in, w_out, w_gate=w_gate)))

        grad = jax.jit(jax.grad(loss, tuple(range(2 + len(ws)))))
        compiled = grad.trace(abstract(t, d), abstract(t, e), *ws).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at_32 = held(32)
    assert at_32 < 100 * 2**20
    assert held(64) < at_32 + 2**21


def test_bad_input_names_argument_got_and_needed():
    x, routing, (w_in, w_out, w_gate), _ = case("gated")
    layer = functools.partial(moe_mlp, w_gate=w_gate)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 14, 6\), needed \[t, d\]"):
        layer(jnp.stack([x, x]), routing, w_in, w_out)
    with pytest.raises(ValueError, match="routing: got 14 tokens, needed 13"):
        layer(x[1:], routing, w_in, w_out)
    with pytest.raises(
        ValueError, match=r"w_in: got shape \(3, 6, 10\), needed \[4, 6"
    ):
        layer(x, routing, w_in[1:], w_out)
    with pytest.raises(ValueError, match=r"w_out: got shape \(4, 6, 10\), needed \(4,"):
        layer(x, routing, w_in, w_in)
    with pytest.raises(
        ValueError, match=r"w_gate: got shape \(4, 10, 6\), needed \(4,"
    ):
        moe_mlp(x, routing, w_in, w_out, w_gate=w_out)
    with pytest.raises(ValueError, match="w_out: got dtype int32, needed one of"):
        layer(x, routing, w_in, w_out.astype(jnp.int32))
    with pytest.raises(ValueError, match="dtype: got dtype int32, needed one of"):
        layer(x, routing, w_in, w_out, dtype=jnp.int32)
    with pytest.raises(ValueError, match="implementation: got 'cuda', needed 'xla'"):
        layer(x, routing, w_in, w_out, implementation="cuda")


def test_choices_out_of_range_are_none():
    x, routing, ws, _ = case("plain")
    wrong = routing.indices.at[3, 0].set(-1).at[4, 1].set(4).at[5, 0].set(99)
    bad = dataclasses.replace(
        routing, indices=wrong, valid=jnp.ones_like(routing.valid)
    )
    right = (wrong >= 0) & (wrong < 4)
    good = dataclasses.replace(bad, indices=jnp.where(right, wrong, 0), valid=right)
    np.testing.assert_array_equal(moe_mlp(x, bad, *ws), moe_mlp(x, good, *ws))


def test_no_tokens():
    x, routing, ws, _ = case("plain")
    none = jax.tree.map(lambda a: a[:0], routing)
    assert moe_mlp(x[:0], none, *ws[:2]).shape == (0, 6)


@pytest.mark.parametrize("implementation", [n for n in MOE_MLP if n != "xla"])
def test_named_implementation_never_falls_back(implementation):
    x, routing, ws, _ = case("gated_bf16")
    needs = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}[implementation]
    with pytest.raises(NotImplementedError, match=f"needs platform {needs}, got cpu"):
        layer_of(moe_mlp, routing, implementation=implementation)(
            x, routing.weights, *ws
        )


def test_explain():
    x, routing, ws, _ = case("gated")
    layer = layer_of(moe_mlp, routing)
    loss = lambda *args: jnp.sum(layer(*args))
    text = sj.explain(jax.grad(loss, (0, 2)), x, routing.weights, *ws)
    assert "moe_mlp: 28 choices of 14 tokens, 4 gated experts 6x10, float32" in text
    assert "moe_mlp_gradients: 28 choices" in text
    assert "xla: one loop over the experts' tiles" in text
    assert "not mosaic_tpu: platform is cpu, it needs tpu" in text
    assert "not mosaic_gpu: mosaic_gpu: dtype is float32, needs bfloat16" in text
    heads = {line.split(":")[0] for line in text.splitlines() if line[0] != " "}
    assert heads == {"moe_mlp", "moe_mlp_gradients"}


def test_both_registries_have_the_same_names():
    assert list(MOE_MLP) == list(MOE_MLP_GRADIENTS)
    for registry in (MOE_MLP, MOE_MLP_GRADIENTS):
        assert all(name == each.name for name, each in registry.items())
