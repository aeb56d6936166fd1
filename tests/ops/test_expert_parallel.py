"""Each exchange on eight devices against a per-token loop in float64 and one device.

XLA:CPU has no ragged all-to-all: here an emulation by all-gather, written from JAX's
documentation of the collective, stands in its place, and all around it is as on a chip;
tests/compile has the real one compiled for TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.ops import _exchange_ragged, expert_parallel_moe_mlp, moe_mlp
from sparsejax.routing import Routing, load_balance_loss, routing_metrics, top_k
from sparsejax.testing import assert_close

T, D, F, E, K = 64, 8, 6, 8, 2
LOCAL = T // 8  # tokens per device
EXCHANGES = ["all_to_all", "ragged_all_to_all", "gather_tokens", "gather_experts"]
AXES = ("data", "expert")


def emulated(rows, out, begin, sent, at, received, *, axis_name):
    """The collective by all-gather; NaN where the two sides disagree on a size."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    rows, begin, sent, at = gather(rows), gather(begin), gather(sent), gather(at)
    me, number = jax.lax.axis_index(axis_name), jnp.arange(out.shape[0])
    for peer in range(rows.shape[0]):
        inside = number - at[peer, me]
        segment = rows[peer].at[begin[peer, me] + inside].get(mode="clip")
        if jnp.issubdtype(out.dtype, jnp.floating):
            agreed = sent[peer, me] == received[peer]
            segment = jnp.where(agreed, segment, jnp.nan)
        inside = (0 <= inside) & (inside < received[peer])
        out = jnp.where(inside.reshape(-1, *(1,) * (out.ndim - 1)), segment, out)
    return out


@pytest.fixture(autouse=True)
def collective(monkeypatch):
    monkeypatch.setattr(_exchange_ragged, "_collective", emulated)


@functools.cache
def mesh(*sizes, names=AXES):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


@functools.cache
def arrays(dtype="float32"):
    """x, w_in, w_out, w_gate, dy."""
    rng = np.random.default_rng(0)
    shapes = (T, D), (E, D, F), (E, F, D), (E, D, F), (T, D)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def routed(indices, valid=None, e=E, by_expert=False):
    """A Routing with weights that no softmax would make."""
    rng = np.random.default_rng(1)
    indices = np.asarray(indices, np.int32)
    valid = np.ones(indices.shape, bool) if valid is None else valid
    weights = np.where(valid, rng.uniform(-1, 2, indices.shape), 0)
    rows = T if by_expert else indices.shape[0]
    return Routing(
        indices=jnp.asarray(indices),
        weights=jnp.asarray(weights, jnp.float32),
        valid=jnp.asarray(valid),
        probs=jnp.zeros((rows, e), jnp.float32),
        by_expert=by_expert,
    )


def distinct(experts, seed=2):
    """K different ones of the experts for each token."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:K] for _ in range(T)])


def routings():
    rng = np.random.default_rng(3)
    some = rng.uniform(size=(T, K)) < 0.6
    some[:8] = False  # the first device has nothing to do
    padding = np.ones((T, K), bool)
    padding[rng.permutation(T)[:20]] = False
    return {
        "two of eight": routed(distinct(range(E))),
        "variable k": routed(distinct(range(E)), some),
        "padding": routed(distinct(range(E)), padding),
        "empty experts": routed(distinct([1, 2, 7])),
        "all on one expert": routed(np.full((T, K), 5), np.tile([True, False], (T, 1))),
        "nobody": routed(np.zeros((T, K)), np.zeros((T, K), bool)),
    }


ROUTINGS = routings()


def oracle(x, routing, w_in, w_out, w_gate, dy):
    """y and the gradients of x, weights, w_in, w_out, w_gate; silu(g) u, choice by
    choice, in float64."""
    x, w_in, w_out, w_gate, dy = (
        np.asarray(a, np.float64) for a in (x, w_in, w_out, w_gate, dy)
    )
    y, grads = np.zeros_like(x), [np.zeros_like(a) for a in (x, w_in, w_out, w_gate)]
    dx, dw_in, dw_out, dw_gate = grads
    dweights = np.zeros(routing.weights.shape)
    for a, b in np.argwhere(np.asarray(routing.valid)):
        i, weight = int(routing.indices[a, b]), float(routing.weights[a, b])
        t, e = (i, a) if routing.by_expert else (a, i)
        g, u = x[t] @ w_gate[e], x[t] @ w_in[e]
        s = 1 / (1 + np.exp(-g))
        h = g * s * u
        y[t] += weight * (h @ w_out[e])
        dweights[a, b] = dy[t] @ (h @ w_out[e])
        dh = weight * (w_out[e] @ dy[t])
        du, dg = dh * g * s, dh * u * (s + g * s * (1 - s))
        dx[t] += w_in[e] @ du + w_gate[e] @ dg
        dw_in[e] += np.outer(x[t], du)
        dw_gate[e] += np.outer(x[t], dg)
        dw_out[e] += weight * np.outer(h, dy[t])
    return y, dx, dweights, dw_in, dw_out, dw_gate


@jax.jit
def single(x, routing, w_in, w_out, w_gate, dy):
    """The same on one device, and the load."""

    def fn(x, weights, w_in, w_out, w_gate):
        here = Routing(
            routing.indices,
            weights,
            routing.valid,
            routing.probs,
            by_expert=routing.by_expert,
        )
        return moe_mlp(x, here, w_in, w_out, w_gate=w_gate)

    y, vjp = jax.vjp(fn, x, routing.weights, w_in, w_out, w_gate)
    return (y, *vjp(dy)), routing.counts()


@functools.cache
def parallel(exchange, check_vma=True, names=AXES, sizes=(2, 4), **options):
    """The same over devices: (y, gradients...), load, dropped, dropped by device."""
    tokens = P(names)
    weights = P("expert", "fsdp") if "fsdp" in names else P("expert")

    def run(x, routing, w_in, w_out, w_gate, dy):
        def local(x, routing, w_in, w_out, w_gate):
            if "fsdp" in names:
                gather = lambda w: jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)
                w_in, w_out, w_gate = gather(w_in), gather(w_out), gather(w_gate)
            y, dropped = expert_parallel_moe_mlp(
                x,
                routing,
                w_in,
                w_out,
                w_gate=w_gate,
                axis_name="expert",
                exchange=exchange,
                **options,
            )
            load = jax.lax.psum(routing.counts(), names)
            return y, (load, jax.lax.psum(dropped, names), dropped[None])

        mapped = jax.shard_map(
            local,
            mesh=mesh(*sizes, names=names),
            in_specs=(tokens, tokens, weights, weights, weights),
            out_specs=(tokens, (P(), P(), tokens)),
            check_vma=check_vma,
        )

        def fn(x, gates, w_in, w_out, w_gate):
            here = Routing(
                routing.indices,
                gates,
                routing.valid,
                routing.probs,
                by_expert=routing.by_expert,
            )
            return mapped(x, here, w_in, w_out, w_gate)

        y, vjp, counts = jax.vjp(fn, x, routing.weights, w_in, w_out, w_gate, has_aux=1)
        return (y, *vjp(dy)), *counts

    return jax.jit(run)


def in_parts(x, routing, *rest):
    """One device's result, added up in x's dtype from what would travel apart.

    A token's choices go to different devices; each device has its own gradient of the
    weights, of its own tokens.
    """

    def total(masks):
        parts = []
        for mask in masks:
            weights = jnp.where(mask, routing.weights, 0)
            part = dataclasses.replace(
                routing, valid=routing.valid & mask, weights=weights
            )
            parts.append(single(x, part, *rest)[0])
        return jax.tree.map(lambda *a: functools.reduce(jnp.add, a), *parts)

    by_choice = total(jnp.arange(K) == j for j in range(K))
    device = jnp.arange(T)[:, None] // LOCAL
    by_device = total(device == i for i in range(8))
    return *by_choice[:3], *by_device[3:]


def check(got, routing, dtype="float32"):
    """Value and gradients by the tolerance rule."""
    x, w_in, w_out, w_gate, dy = arrays(dtype)
    want = oracle(x, routing, w_in, w_out, w_gate, dy)
    low, _ = single(x, routing, w_in, w_out, w_gate, dy)
    if dtype == "bfloat16":
        low = in_parts(x, routing, w_in, w_out, w_gate, dy)
    for name, a, b, c in zip(
        ("y", "dx", "dweights", "dw_in", "dw_out", "dw_gate"),
        got,
        want,
        low,
        strict=True,
    ):
        assert a.dtype == c.dtype, name
        try:
            assert_close(a, b, c)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def slowly(names):
    """All but two are marked slow."""
    marks = lambda name: (
        [] if name in ("padding", "all on one expert") else [pytest.mark.slow]
    )
    return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.mark.parametrize("name", slowly(ROUTINGS))
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_equals_one_device(exchange, name):
    routing = ROUTINGS[name]
    x, *rest = arrays()
    # What no expert sees may hold anything.
    x = jnp.where(routing.valid.any(axis=1, keepdims=True), x, jnp.nan)
    got, load, dropped, _ = parallel(exchange)(x, routing, *rest)
    check(got, routing)
    valid, indices = np.asarray(routing.valid), np.asarray(routing.indices)
    np.testing.assert_array_equal(load, np.bincount(indices[valid], minlength=E))
    assert dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_token_to_every_expert(exchange):
    rng = np.random.default_rng(6)
    routing = routed(np.stack([rng.permutation(E) for _ in range(T)]))
    got, load, dropped, _ = parallel(exchange)(arrays()[0], routing, *arrays()[1:])
    check(got, routing)
    np.testing.assert_array_equal(load, [T] * E)
    assert dropped == 0


# --- Overflow -------------------------------------------------------------------------

BOUNDED = {
    # 16 choices per device: 4 rows to each of 4 peers.
    "all_to_all": dict(exchange="all_to_all", capacity_factor=1.0),
    # 12 rows at each receiver: ceil(0.7 * 16).
    "ragged_all_to_all": dict(exchange="ragged_all_to_all", capacity_factor=0.7),
    # One of the two experts of each peer.
    "gather_experts": dict(exchange="gather_experts", max_experts=1),
}


def served(exchange, routing):
    """Which valid choices find room, by hand, in storage order, device by device."""
    valid, indices = np.asarray(routing.valid), np.asarray(routing.indices)
    kept = np.zeros_like(valid)
    for group in range(2):
        arrived = np.zeros(4, int)  # at each receiver of the group
        for device in range(4 * group, 4 * group + 4):
            rows = range(device * LOCAL, (device + 1) * LOCAL)
            sent = np.zeros(4, int)
            load = np.zeros(E, int)
            for t in rows:
                load += np.bincount(indices[t][valid[t]], minlength=E)
            for t in rows:
                for j in range(K):
                    if not valid[t, j]:
                        continue
                    expert = indices[t, j]
                    peer = expert // 2
                    if exchange == "all_to_all":
                        kept[t, j] = sent[peer] < 4
                    elif exchange == "ragged_all_to_all":
                        kept[t, j] = arrived[peer] < 12
                    else:  # the expert chosen more, of two the first
                        pair = load[2 * peer : 2 * peer + 2]
                        kept[t, j] = expert == 2 * peer + int(np.argmax(pair))
                    sent[peer] += 1
                    arrived[peer] += 1
    return kept


@pytest.mark.parametrize("name", slowly(n for n in ROUTINGS if n != "nobody"))
@pytest.mark.parametrize("exchange", BOUNDED)
def test_overflow_is_counted_and_contributes_nothing(exchange, name):
    routing = ROUTINGS[name]
    kept = served(exchange, routing)
    got, load, dropped, by_device = parallel(**BOUNDED[exchange])(
        arrays()[0], routing, *arrays()[1:]
    )
    lost = np.asarray(routing.valid) & ~kept
    np.testing.assert_array_equal(by_device, lost.reshape(8, -1).sum(axis=1))
    assert dropped == lost.sum()
    np.testing.assert_array_equal(load, routing.counts())  # of what was asked
    left = dataclasses.replace(
        routing, valid=jnp.asarray(kept), weights=jnp.where(kept, routing.weights, 0)
    )
    check(got, left)


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        # Eight choices of each device go to one peer, which has room for 4 of each;
        ("all_to_all", [4] * 8),
        # for 12 in all: 8 of the first sender of each group, 4 of the second;
        ("ragged_all_to_all", [0, 4, 8, 8] * 2),
        # and expert 5 is fetched by all.
        ("gather_experts", [0] * 8),
    ],
)
def test_overflow_with_all_on_one_expert(exchange, expected):
    run = parallel(**BOUNDED[exchange])
    out = run(arrays()[0], ROUTINGS["all on one expert"], *arrays()[1:])
    np.testing.assert_array_equal(out[3], expected)


@pytest.mark.slow
def test_room_is_never_more_than_the_worst_case():
    routing = ROUTINGS["two of eight"]
    got, _, dropped, _ = parallel("all_to_all", capacity_factor=100.0)(
        arrays()[0], routing, *arrays()[1:]
    )
    check(got, routing)
    assert dropped == 0


@pytest.mark.slow
def test_a_token_that_chooses_an_expert_twice_is_counted_when_there_is_no_room():
    """Room for the worst case is 8 tokens x 1 expert of a peer, with eight peers."""
    twice = routed(np.zeros((T, K)))
    run = parallel("all_to_all", sizes=(1, 8), names=("data", "expert"))
    *_, by_device = run(arrays()[0], twice, *arrays()[1:])
    np.testing.assert_array_equal(by_device, [8] * 8)


# --- Other routings, meshes, dtypes ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_expert_choice(exchange):
    """Each expert takes 3 of each device's 8 tokens."""
    rng = np.random.default_rng(4)
    lists = np.stack(
        [rng.permutation(LOCAL)[:3] for _ in range(8 * E)]
    )  # of all devices
    routing = routed(lists, rng.uniform(size=lists.shape) < 0.9, by_expert=True)
    # The same by token: place e of a token is its choice by expert e.
    chosen = np.full((T, E), -1)
    for row, slot in np.argwhere(np.asarray(routing.valid)):
        device, expert = divmod(row, E)
        chosen[device * LOCAL + lists[row, slot], expert] = row * 3 + slot
    valid = jnp.asarray(chosen >= 0)
    by_token = Routing(
        indices=jnp.broadcast_to(jnp.arange(E), (T, E)),
        weights=jnp.where(valid, routing.weights.ravel()[chosen], 0),
        valid=valid,
        probs=routing.probs,
    )
    got, load, dropped, _ = parallel(exchange)(arrays()[0], routing, *arrays()[1:])
    dweights = got[2].ravel()[chosen]
    assert not got[2][~np.asarray(routing.valid)].any()
    check((*got[:2], jnp.where(valid, dweights, 0), *got[3:]), by_token)
    np.testing.assert_array_equal(load, by_token.counts())
    assert dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_data_expert_and_fsdp_axes(exchange):
    routing = ROUTINGS["variable k"]
    run = parallel(exchange, names=("data", "expert", "fsdp"), sizes=(2, 2, 2))
    got, load, dropped, _ = run(arrays()[0], routing, *arrays()[1:])
    check(got, routing)
    np.testing.assert_array_equal(load, routing.counts())
    assert dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16_without_checked_types(exchange):
    routing = ROUTINGS["variable k"]
    x, *rest = arrays("bfloat16")
    got, _, _, _ = parallel(exchange, check_vma=False)(x, routing, *rest)
    check(got, routing, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_float32_weights_multiplied_in_bfloat16(exchange):
    """Gradients keep their operands' dtypes."""
    run = parallel(exchange, dtype=jnp.bfloat16)
    x, *weights, dy = arrays()
    got, *_ = run(x, ROUTINGS["padding"], *weights, dy.astype(jnp.bfloat16))
    assert [a.dtype for a in got] == [jnp.bfloat16] + [jnp.float32] * 5


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_experts_over_two_axes(exchange):
    """One expert on each of eight devices, counted as the tokens are."""
    routing = ROUTINGS["two of eight"]
    x, w_in, w_out, _, _ = arrays()

    def local(x, routing, w_in, w_out):
        return expert_parallel_moe_mlp(
            x, routing, w_in, w_out, axis_name=AXES, exchange=exchange
        )[0]

    each = P(AXES)
    mapped = jax.shard_map(local, mesh=mesh(2, 4), in_specs=each, out_specs=each)
    got = jax.jit(mapped)(x, routing, w_in, w_out)
    low = moe_mlp(x, routing, w_in, w_out)
    np.testing.assert_allclose(got, low, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_router_losses_and_metrics_are_those_of_one_device(exchange):
    """From logits to loss: top-2 of a router, its balance loss, its metrics."""
    x, w_in, w_out, _, dy = arrays()
    router = jnp.asarray(np.random.default_rng(5).standard_normal((D, E)), jnp.float32)
    # As many on each device: the loss is the mean over devices. Metrics need no such.
    even, uneven = jnp.arange(T) % 4 != 0, jnp.arange(T) % 5 != 0

    def layer(axes, moe, x, even, uneven, dy, router, w_in, w_out):
        route = lambda tokens: top_k(x @ router, K, normalize="sum", mask=tokens)
        routing = route(even)
        y = moe(x, routing, w_in, w_out)
        over_all = (lambda a: a) if axes is None else lambda a: jax.lax.pmean(a, axes)
        balance = load_balance_loss(routing, axis_name=axes)
        loss = over_all(jnp.sum(y * dy) + balance)
        return loss, routing_metrics(route(uneven), axis_name=axes)

    def run(loss):
        fn = jax.value_and_grad(loss, argnums=(0, 4, 5, 6), has_aux=True)
        return jax.jit(fn)(x, even, uneven, dy, router, w_in, w_out)

    parallel_moe = lambda *args: expert_parallel_moe_mlp(
        *args, axis_name="expert", exchange=exchange
    )[0]
    mapped = jax.shard_map(
        functools.partial(layer, AXES, parallel_moe),
        mesh=mesh(2, 4),
        in_specs=(*(P(AXES),) * 4, P(), P("expert"), P("expert")),
        out_specs=P(),
    )
    (loss, metrics), grads = run(mapped)
    alone = functools.partial(layer, None, moe_mlp)
    # A mean over eight devices of sums over their tokens is an eighth of the sum.
    (want, want_metrics), want_grads = run(
        lambda x, even, uneven, dy, *rest: alone(x, even, uneven, dy / 8, *rest)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    close(loss, want)
    jax.tree.map(close, metrics, want_metrics)
    jax.tree.map(close, grads, want_grads)


# --- Refusals -------------------------------------------------------------------------


def test_ragged_exchange_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    x, w_in, w_out, _, _ = arrays()

    def local(x, routing, w_in, w_out):
        return expert_parallel_moe_mlp(
            x,
            routing,
            w_in,
            w_out,
            axis_name="expert",
            exchange="ragged_all_to_all",
        )[0]

    mapped = jax.shard_map(
        local,
        mesh=mesh(2, 4),
        in_specs=(P(AXES), P(AXES), P("expert"), P("expert")),
        out_specs=P(AXES),
    )
    call = lambda x, *weights: mapped(x, ROUTINGS["padding"], *weights)
    lowerable = jax.jit(call).trace(x, w_in, w_out)
    with pytest.raises(NotImplementedError, match="ragged_all_to_all.*TPU or a GPU"):
        lowerable.lower()
    text = lowerable.lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_all_to_all" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(exchange="all2all"), "exchange: got 'all2all', needed one of 'all_to_a"),
        (
            dict(axis_name="model"),
            "axis_name: got 'model', needed an axis of the jax.s",
        ),
        (dict(capacity_factor=0.0), "capacity_factor: got 0.0 .* needed a positive"),
        (
            dict(capacity_factor=1.0, exchange="gather_tokens"),
            "capacity_factor: got 1.0 with exchange='gather_tokens', needed",
        ),
        (dict(max_experts=1), "max_experts: got 1 with exchange='all_to_all', needed"),
        (
            dict(max_experts=3, exchange="gather_experts"),
            "max_experts: got 3 .* needed 1 to 2",
        ),
        (
            dict(max_experts=0, exchange="gather_experts"),
            "max_experts: got 0 .* needed 1 to 2",
        ),
        (
            dict(routing=routed(distinct(range(6)), e=6)),
            r"w_in: got shape \(2, 8, 6\) on each of 4 devices, needed .* 6 experts, "
            "which 4 devices cannot share equally",
        ),
        (
            dict(w_in=jnp.ones((4, D, F))),
            r"w_in: got shape \(1, 8, 6\) on each of 4 dev",
        ),
        (
            dict(w_out=jnp.ones((16, F, D))),
            r"w_out: got shape \(4, 6, 8\) on each of 4",
        ),
        (dict(x=jnp.ones((T // 2, D))), r"x: got shape \(4, 8\), needed \[8, d\]"),
        (
            dict(x=jnp.ones((T, D), jnp.int32)),
            "x: got dtype int32, needed one of float",
        ),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_refusals(change, message):
    x, w_in, w_out, _, _ = arrays()
    arguments = dict(x=x, routing=ROUTINGS["padding"], w_in=w_in, w_out=w_out)
    options = dict(axis_name="expert")
    for name, value in change.items():
        (arguments if name in arguments else options)[name] = value
    mapped = jax.shard_map(
        lambda *args: expert_parallel_moe_mlp(*args, **options),
        mesh=mesh(2, 4),
        in_specs=(P(AXES), P(AXES), P("expert"), P("expert")),
        out_specs=(P(AXES), P()),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, *arguments.values())
