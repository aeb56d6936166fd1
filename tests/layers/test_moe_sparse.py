"""Experts' weights made sparse; what a train step of a mixture keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import layers, masks, routing, transforms

T, D, F, E, K = 26, 10, 14, 7, 3  # no two alike, nor their products
SPEC = layers.MoESpec(
    features=D,
    hidden_features=F,
    num_experts=E,
    gated=True,
    router=functools.partial(routing.top_k, k=K, normalize="sum_stopgrad"),
)
EXPERTS = ("w_in", "w_gate", "w_out")
STACKED = {"w_*": masks.Axes(fan_in=(1,), fan_out=(2,), stacked=(0,))}


def loss(params, x):
    y, aux = layers.apply_moe(SPEC, params, x)
    return jnp.sum(y**2) + aux.load_balance + aux.z + aux.metrics.dropped


def test_the_expert_axis_is_stacked_for_densities():
    """An expert of [d, f] has the density of a dense [d, f], whatever their number."""
    shapes = {"w_in": (E, D, F), "w_out": (E, F, 3 * D), "head": (D, 50)}
    found = masks.erdos_renyi(shapes, 0.3, axes=STACKED)
    # d_l = eps (fan-in + fan-out) / (fan-in fan-out), weighted mean 0.3
    parts = {"w_in": (D, F, E), "w_out": (F, 3 * D, E), "head": (D, 50, 1)}
    sizes = sum(m * n * e for m, n, e in parts.values())
    eps = 0.3 * sizes / sum((m + n) * e for m, n, e in parts.values())
    for name, (m, n, _) in parts.items():
        assert found[name] == pytest.approx(eps * (m + n) / (m * n))


@pytest.mark.slow
def test_sparsify_trains_sparse_experts():
    params, _ = layers.init_moe(jax.random.key(0), SPEC)
    tx = transforms.sparsify(
        optax.adamw(1e-2),
        transforms.rigl(
            sparsity=0.8,
            begin=1,
            end=8,
            every=2,
            key=jax.random.key(1),
            distribution=functools.partial(masks.erdos_renyi, axes=STACKED),
        ),
        leaf_filter="w_*",
    )
    x = jax.random.normal(jax.random.key(2), (T, D))
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        kept = transforms.get_masks(state)
        params = masks.apply_masks(params, kept)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(4):
            params, state = step(params, state)
    after = transforms.get_masks(state)
    # All three have 24 / 140 of the same eps: a fifth of 7 * 140 entries each.
    for name in EXPERTS:
        assert after[name].sum() == kept[name].sum() == round(0.2 * E * D * F)
        assert not np.asarray(params[name])[~np.asarray(after[name])].any()
        assert (after[name] != kept[name]).any()
    assert np.asarray(params["router"]).all()  # dense


def arrays_in(jaxpr):
    """Shapes of all arrays of a jaxpr and of those inside it."""
    yield from (v.aval.shape for v in [*jaxpr.invars, *jaxpr.constvars])
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


def test_a_train_step_holds_no_dispatch_tensor():
    """No [t, e, ...] beyond the scores [t, e]: neither one-hot nor every expert's y."""
    params, _ = layers.init_moe(jax.random.key(0), SPEC)
    x = jnp.ones((T, D))
    traced = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    shapes = set(arrays_in(traced.jaxpr))
    assert (T, E) in shapes and (E, D, F) in shapes
    for shape in shapes:
        of_tokens = any(size in (T, T * K) for size in shape)
        beside = [size for size in shape if size not in (1, T, T * K)]
        assert not (of_tokens and E in beside and len(beside) > 1), shape
