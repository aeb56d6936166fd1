"""The kernels of the mixture of experts by ptxas, for H100 and H200."""

import functools
import os
import pathlib
import sys

import jax
import pytest
from jax import numpy as jnp

if os.environ["SPARSEJAX_COMPILE"] != "gpu":
    pytest.skip("asked for another compiler", allow_module_level=True)

sys.path.append(str(pathlib.Path(__file__).parent))
import _gpu  # noqa: E402

from pallas_kernels.moe_mlp import _spec, mosaic_gpu  # noqa: E402

OPS = ["moe_hidden", "moe_hidden_gated", "moe_down"]


def compiled(capfd, chip, problem, activation=jax.nn.silu, after=lambda z: z):
    """Compiles a kernel; what ptxas said and the program that it is in."""
    _spec.check_mosaic_gpu(problem, chip)
    config = _spec.config_mosaic_gpu(problem, chip)
    d, f, experts, c = problem.d, problem.f, problem.experts, problem.choices

    def array(*shape, dtype=problem.dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    chosen, sizes = array(c, dtype=jnp.int32), array(experts, dtype=jnp.int32)
    if problem.op == "moe_down":
        call = functools.partial(mosaic_gpu.down, config=config)
        gates = array(c, dtype=jnp.float32)
        args = array(c, f), array(experts, f, d), chosen, gates, sizes
    else:
        call = functools.partial(
            mosaic_gpu.hidden, activation=activation, config=config
        )
        w = array(experts, d, f)
        gate = w if problem.op == "moe_hidden_gated" else None
        args = array(problem.tokens, d), w, gate, chosen, sizes
    capfd.readouterr()
    lowered, program = _gpu.compile_for(chip, lambda *args: after(call(*args)), args)
    assert problem.op in lowered.as_text()
    return _gpu.ptxas_report("\n".join(capfd.readouterr())), program


# The sizes differ between the chips: a kernel that was compiled for the same
# architecture before is not given to ptxas again.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("chip", "tokens"), [("h100", 4096), ("h200", 2048)])
def test_canonical(chip, tokens, op, capfd):
    problem = _spec.Problem(op, tokens, 2 * tokens, 4096, 14336, 8, "bfloat16")
    report, _ = compiled(capfd, chip, problem)
    assert report.clean, report


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("tokens", "choices", "d", "f", "experts", "dtype"),
    [
        (1, 1, 64, 64, 1, "bfloat16"),
        (300, 1001, 192, 64, 2, "float16"),
        (300, 1000, 64, 320, 256, "bfloat16"),
        (2048, 16384, 2048, 768, 128, "bfloat16"),
    ],
)
def test_sweep(op, tokens, choices, d, f, experts, dtype, capfd):
    problem = _spec.Problem(op, tokens, choices, d, f, experts, dtype)
    report, _ = compiled(capfd, "h200", problem)
    assert report.clean, report


BETA = jnp.float32(1.7)
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "soft_sign": jax.nn.soft_sign,
    "clip": lambda x: jnp.clip(x, -1, 1),
    "powers": lambda x: x**3 + jnp.exp2(-jnp.abs(x)) + jax.lax.rsqrt(1 + x * x),
    "signs": lambda x: jnp.where(x > 0, jnp.sign(x), jnp.where(x <= -1, x, -x)),
    "equal": lambda x: jnp.where(
        x == 0, 1.0, jnp.where(x != x, 2.0, jnp.where(x >= 3, x, 4.0))
    ),
    "none": lambda x: x,
    "captured": lambda x: x * jax.nn.sigmoid(BETA * x),
    "in_bfloat16": lambda x: jax.nn.silu(x.astype("bfloat16")).astype(jnp.float32),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, capfd):
    # The gated kernel has the fewest registers to spare.
    number = list(ACTIVATIONS).index(name)
    problem = _spec.Problem(
        "moe_hidden_gated", 1024, 2048, 256, 256 + 64 * number, 4, "bfloat16"
    )
    report, _ = compiled(capfd, "h200", problem, ACTIVATIONS[name])
    assert report.clean, report


def test_the_sum_over_choices_takes_the_rows_where_they_are(capfd):
    """XLA's gather after the kernel makes no array of its own."""
    t, k, d = 4096, 2, 4096
    problem = _spec.Problem("moe_down", t, t * k, d, 1024, 8, "bfloat16")
    total = lambda z: jnp.sum(z.reshape(t, k, d), axis=1, dtype=jnp.float32)
    _, program = compiled(capfd, "h200", problem, after=total)
    rows = 2 * t * k * d  # bytes of what the kernel writes
    assert rows <= program.memory_analysis().temp_size_in_bytes < 1.1 * rows
