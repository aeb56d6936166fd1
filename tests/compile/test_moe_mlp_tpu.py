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

from pallas_kernels.moe_mlp import _spec, mosaic_tpu  # noqa: E402

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
