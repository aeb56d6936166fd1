"""Each exchange on eight devices against a per-token loop in float64 and one device.

XLA:CPU has no ragged all-to-all: here an emulation by all-gather, written from JAX's
documentation of the collective, stands in its place, and all around it is as on a chip;
tests/compile has the real one compiled for TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.ops import _exchange_ragged, expert_parallel_moe_mlp, moe_mlp
from sparsejax.routing import Routing
from sparsejax.testing import assert_close

T, D, F, E, K = 64, 8, 6, 8, 2
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
    """The same over the devices: (y, gradients...), load, dropped, dropped by device."""
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


def check(got, routing, dtype="float32", want=None):
    """Value and gradients by the tolerance rule."""
    x, w_in, w_out, w_gate, dy = arrays(dtype)
    want = oracle(x, want or routing, w_in, w_out, w_gate, dy)
    low, _ = single(x, routing, w_in, w_out, w_gate, dy)
    for name, a, b, c in zip(
        ("y", "dx", "dweights", "dw_in", "dw_out", "dw_gate"),
        got,
        want,
        low,
        strict=True,
    ):
        if name == "dweights":
            a, c = jnp.where(routing.valid, a, 0), jnp.where(routing.valid, c, 0)
        assert a.dtype == c.dtype, name
        try:
            assert_close(a, b, c)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_equals_one_device(exchange, name):
    routing = ROUTINGS[name]
    x, w_in, w_out, w_gate, dy = arrays()
    got, load, dropped, _ = parallel(exchange)(x, routing, w_in, w_out, w_gate, dy)
    check(got, routing)
    valid, indices = np.asarray(routing.valid), np.asarray(routing.indices)
    np.testing.assert_array_equal(load, np.bincount(indices[valid], minlength=E))
    assert dropped == 0
