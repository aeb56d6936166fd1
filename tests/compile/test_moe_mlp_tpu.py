"""The kernels of a mixture of experts' layer by the TPU compiler, for every chip."""

import functools
import os
import pathlib
import sys

import jax
import pytest
from jax import numpy as jnp

if os.environ["SPARSEJAX_COMPILE"] != "tpu":
    pytest.skip("asked for another compiler", allow_module_level=True)

sys.path.append(str(pathlib.Path(__file__).parent))
import _tpu  # noqa: E402

import sparsejax  # noqa: E402
from pallas_kernels.moe_mlp import _activation, _spec, mosaic_tpu  # noqa: E402

OPS = ["moe_hidden", "moe_hidden_gated", "moe_down"]
S = jax.ShapeDtypeStruct


def check(chip, op, tokens, choices, d, f, experts, dtype, activation=jax.nn.silu):
    problem = _spec.Problem(op, tokens, choices, d, f, experts, dtype)
    _spec.check_mosaic_tpu(problem, chip)
    how = dict(config=_spec.config_mosaic_tpu(problem, chip))
    x, h, ids = S((tokens, d), dtype), S((choices, f), dtype), S((choices,), jnp.int32)
    w, sizes = S((experts, d, f), dtype), S((experts,), jnp.int32)
    if op == "moe_down":
        fn = functools.partial(mosaic_tpu.down, **how)
        args = (h, S((experts, f, d), dtype), ids, S((choices,), jnp.float32), sizes)
    else:
        fn = functools.partial(mosaic_tpu.hidden, activation=activation, **how)
        args = (x, w, w if op == "moe_hidden_gated" else None, ids, sizes)
    text, compiled = _tpu.compile_for(chip, fn, *args)
    assert f'kernel_name = "{op}"' in text
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_canonical(chip, op, dtype):
    check(chip, op, 4096, 8192, 512, 2048, 32, dtype)
    check(chip, op, 8192, 16384, 4096, 14336, 8, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_many_small_experts(chip, op):
    check(chip, op, 256, 2048, 2048, 1408, 256, "bfloat16")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "tpu7x")])
def test_sizes_that_do_not_divide(chip, dtype, op):
    check(chip, op, 1, 1, 1, 1, 1, dtype)
    check(chip, op, 3, 5, 7, 200, 3, dtype)
    check(chip, op, 500, 1000, 300, 77, 9, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", ["v4", "v5e", *_tpu.by_hand("v5p", "v6e", "tpu7x")])
def test_as_many_choices_as_are_served(chip, op):
    check(chip, op, 2**15, 200_000, 256, 256, 64, "bfloat16")


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jnp.tanh])
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_activations(chip, activation):
    check(chip, "moe_hidden_gated", 64, 128, 256, 512, 4, "bfloat16", activation)


# By what it shows of the primitives that check_activation lets pass.
SERVED = {
    "abs add mul neg sign square sub": lambda x: (
        jnp.abs(x) + jnp.sign(x) * jnp.square(x) - (-x) * 0.5
    ),
    "div exp exp2 log logistic": lambda x: (
        jnp.exp(x) / jnp.exp2(x) + jnp.log(jax.nn.sigmoid(x))
    ),
    "eq ge gt le lt ne select_n": lambda x: sum(
        jnp.where(where, x, i)
        for i, where in enumerate((x == 0, x >= 1, x > 2, x <= 3, x < 4, x != 5))
    ),
    "and not or xor is_finite": lambda x: jnp.where(
        ((x > 0) & ~(x > 1)) | ((x < -2) ^ jnp.isfinite(x)), x, 0.0
    ),
    "max min clamp": lambda x: (
        jnp.maximum(x, 0.1) + jnp.minimum(x, 2.0) + jax.lax.clamp(-1.0, x, 1.0)
    ),
    "ceil floor round": lambda x: jnp.ceil(x) + jnp.floor(x) + jnp.round(x),
    "cos sin tan tanh": lambda x: jnp.cos(x) + jnp.sin(x) + jnp.tan(x) + jnp.tanh(x),
    "integer_pow pow rsqrt sqrt": lambda x: (
        x**3 + jnp.abs(x) ** 1.5 + jax.lax.rsqrt(x) + jnp.sqrt(x)
    ),
    "rem": lambda x: jax.lax.rem(x, jnp.full_like(x, 2.0)),
    "erf erfc expm1 log1p": lambda x: (
        jax.lax.erf(x) + jax.lax.erfc(x) + jnp.expm1(x) + jnp.log1p(x)
    ),
    "broadcast_in_dim convert_element_type copy": lambda x: (
        jax.nn.silu(x.astype("bfloat16")).astype("float32") + jnp.full_like(x, 2.0)
    ),
}


@pytest.mark.parametrize("names", SERVED)
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "tpu7x")])
def test_served_primitives(chip, names):
    check(chip, "moe_hidden", 64, 128, 256, 512, 4, "float32", SERVED[names])


def test_served_primitives_are_all():
    every = _activation._LOWERED["mosaic_tpu"] | set(_activation._REWRITTEN)
    assert every == set(" ".join(SERVED).split())


BETAS = jnp.linspace(-1, 1, 512)


@pytest.mark.parametrize(
    "activation",
    [
        jnp.arctan,
        lambda x: x * jax.nn.sigmoid(BETAS * x),
        lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y), x),
    ],
    ids=["arctan", "a_captured_array", "a_loop"],
)
def test_others_take_grouped_products(activation):
    """The operator by itself: no kernel of this layer, and it compiles."""
    t, d, f, e = 64, 256, 512, 4

    def layer(x, logits, w_in, w_out):
        routing = sparsejax.routing.top_k(logits, 2)
        y = sparsejax.ops.moe_mlp(x, routing, w_in, w_out, activation=activation)
        return jnp.sum(y)

    shapes = (t, d), (t, e), (e, d, f), (e, f, d)
    args = [S(shape, jnp.float32) for shape in shapes]
    text, _ = _tpu.compile_for("v5e", jax.grad(layer, (0, 1, 2, 3)), *args)
    assert "grouped" in text and "moe_hidden" not in text
