"""A projection per expert: equation, gradients, edges; NNX equals Linen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import layers
from sparsejax.routing import Routing
from sparsejax.testing import assert_close

T, D, N, E, K = 7, 5, 6, 3, 2


def make_routing(seed=0):
    """Token 0 has no expert, token 1 one, expert 2 nobody but token 3."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2, (T, K)).astype(np.int32)
    indices[3, 1] = 2
    valid = np.ones((T, K), bool)
    valid[0], valid[1, 0] = False, False
    weights = np.where(valid, rng.uniform(0.1, 1, (T, K)), 0).astype(np.float32)
    probs = np.full((T, E), 1 / E, np.float32)
    return Routing(*map(jnp.asarray, (indices, weights, valid, probs)))


def loop(form, x, kernel, weights, routing):
    """The equation, choice by choice, in float64."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    x = x.reshape(T, K, D) if form == "join" else x.reshape(T, D)
    each = np.zeros((T, K, N))
    for t in range(T):
        for j in range(K):
            if routing.valid[t, j]:
                row = x[t, j] if form == "join" else x[t]
                each[t, j] = row @ kernel[routing.indices[t, j]]
    return each if form == "split" else (each * weights[..., None]).sum(axis=1)


def plain(form, x, kernel, weights, routing):
    """The same by gathered kernels, differentiable by JAX."""
    kernels = kernel[routing.indices].astype(x.dtype)  # [t, k, d, n]
    rows = "tkd" if form == "join" else "td"
    each = jnp.einsum(f"{rows},tkdn->tkn", x, kernels)
    each = jnp.where(routing.valid[..., None], each, jnp.zeros_like(each))
    if form == "split":
        return each
    return jnp.einsum("tkn,tk->tn", each, weights.astype(x.dtype))


def inputs(form, dtype=jnp.float32, seed=0):
    shape = (T, K, D) if form == "join" else (T, D)
    spec = layers.GroupedProjectionSpec(
        in_features=D, out_features=N, num_experts=E, form=form, dtype=dtype
    )
    params = layers.init_grouped_projection(jax.random.key(seed), spec)
    x = jax.random.normal(jax.random.key(seed + 1), shape, dtype)
    return spec, params["kernel"], x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", ["mix", "split", "join"])
def test_equals_a_loop_over_choices(form, dtype):
    spec, kernel, x = inputs(form, dtype)
    routing = make_routing()
    y = layers.apply_grouped_projection(spec, {"kernel": kernel}, x, routing)
    assert y.dtype == dtype
    want = loop(form, x, kernel, routing.weights, routing)
    assert_close(y, want, plain(form, x, kernel, routing.weights, routing))
    assert not np.asarray(y[0]).any()  # no expert


@pytest.mark.parametrize("form", ["mix", "split", "join"])
def test_gradients_equal_differences_of_the_loop(form):
    """Linear in each argument: a difference of the loop is its derivative, exactly."""
    spec, kernel, x = inputs(form)
    routing = make_routing()
    valid = np.asarray(routing.valid, np.float32)
    cotangent = np.random.default_rng(2).normal(
        size=np.shape(loop(form, x, kernel, routing.weights, routing))
    )

    def loss(apply, x, kernel, weights):
        return jnp.sum(apply(x, kernel, weights) * cotangent.astype(np.float32))

    def layer(x, kernel, weights):
        chosen = dataclasses.replace(routing, weights=weights * valid)
        return layers.apply_grouped_projection(spec, {"kernel": kernel}, x, chosen)

    def other(x, kernel, weights):
        return plain(form, x, kernel, weights * valid, routing)

    arguments = (x, kernel, routing.weights)
    got = jax.grad(loss, (1, 2, 3))(layer, *arguments)
    low = jax.grad(loss, (1, 2, 3))(other, *arguments)
    arguments = [np.asarray(a, np.float64) for a in arguments]
    for i, (gradient, low_gradient) in enumerate(zip(got, low, strict=True)):
        want = np.zeros(arguments[i].shape)
        for at in np.ndindex(want.shape):
            step = np.zeros(want.shape)
            step[at] = 1
            ends = [
                loop(
                    form,
                    *arguments[:i],
                    arguments[i] + s * step,
                    *arguments[i + 1 :],
                    routing,
                )
                for s in (-0.5, 0.5)
            ]
            want[at] = np.sum((ends[1] - ends[0]) * cotangent)
        assert_close(gradient, want, low_gradient)


def test_choices_listed_by_expert():
    """Two experts take two tokens each: y[t] = sum of w x[t] kernel[e], by hand."""
    routing = Routing(
        indices=jnp.array([[0, 1], [1, 2]], jnp.int32),
        weights=jnp.array([[0.5, 2.0], [1.0, 0.0]]),
        valid=jnp.array([[True, True], [True, False]]),
        probs=jnp.ones((3, 2)),
        by_expert=True,
    )
    spec = layers.GroupedProjectionSpec(in_features=1, out_features=1, num_experts=2)
    kernel = jnp.array([[[10.0]], [[100.0]]])
    x = jnp.array([[1.0], [2.0], [3.0]])
    y = layers.apply_grouped_projection(spec, {"kernel": kernel}, x, routing)
    # token 0: 0.5 * 1 * 10; token 1: 2 * 2 * 10 + 1 * 2 * 100; token 2: none
    np.testing.assert_array_equal(y, [[5.0], [240.0], [0.0]])
    for form in ("split", "join"):
        with pytest.raises(ValueError, match="routing: got choices listed by expert"):
            layers.apply_grouped_projection(
                dataclasses.replace(spec, form=form), {"kernel": kernel}, x, routing
            )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mix", "split", "join"])
def test_nnx_equals_linen(form):
    arguments = dict(num_experts=E, form=form, dtype=jnp.bfloat16, gain=3.0)
    module = sj.nnx.GroupedProjection(D, N, **arguments, rngs=nnx.Rngs(0))
    linen = sj.linen.GroupedProjection(D, N, **arguments)
    routing = make_routing()
    x = jax.random.normal(jax.random.key(1), (T, K, D) if form == "join" else (T, D))
    variables = linen.init(jax.random.key(0), x, routing)
    kernel = variables["params"].pop("kernel")
    assert not variables["params"] and kernel.shape == (E, D, N)
    assert abs(float(kernel.std()) * D**0.5 / 3 - 1) < 0.2
    module.kernel.set_value(kernel)
    y = nnx.jit(lambda module, x: module(x, routing))(module, x)
    assert y.dtype == jnp.bfloat16
    assert y.shape == ((T, K, N) if form == "split" else (T, N))
    want = jax.jit(linen.apply)({"params": {"kernel": kernel}}, x, routing)
    np.testing.assert_array_equal(y, want)


def test_other_choices_do_not_recompile_and_tokens_keep_their_axes():
    spec, kernel, x = inputs("split")
    traces = []

    @jax.jit
    def apply(x, routing):
        traces.append(1)
        return layers.apply_grouped_projection(spec, {"kernel": kernel}, x, routing)

    # One sequence of one token more: [7, 1, d] -> [7, 1, k, n].
    y = [apply(x[:, None], make_routing(seed)) for seed in (0, 1)]
    assert len(traces) == 1 and y[0].shape == (T, 1, K, N)
    assert (y[0] != y[1]).any()


def test_bad_arguments():
    spec, kernel, x = inputs("mix")
    apply = lambda spec, x: layers.apply_grouped_projection(
        spec, {"kernel": kernel}, x, make_routing()
    )
    with pytest.raises(ValueError, match=r"x: got \(6, 5\), needed \[..., 5\] of the"):
        apply(spec, x[:6])
    with pytest.raises(ValueError, match=r"x: got \(7, 4\), needed"):
        apply(spec, x[:, :4])
    with pytest.raises(ValueError, match=r"x: got \(7, 5\), needed \[..., 2, 5\]"):
        apply(dataclasses.replace(spec, form="join"), x)
    with pytest.raises(ValueError, match="routing: got 3 experts, needed 4"):
        apply(dataclasses.replace(spec, num_experts=4), x)
    with pytest.raises(ValueError, match="form: got 'sum', needed one of"):
        dataclasses.replace(spec, form="sum")
    with pytest.raises(ValueError, match="num_experts: got 0, needed"):
        dataclasses.replace(spec, num_experts=0)
