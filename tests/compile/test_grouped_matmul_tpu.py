"""The grouped kernels by the TPU compiler, for every chip."""

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

from pallas_kernels import _chips  # noqa: E402
from pallas_kernels.grouped_matmul import _spec, mosaic_tpu  # noqa: E402

NAMES = {
    "grouped": "grouped_matmul",
    "grouped_transposed": "grouped_matmul_transposed",
    "grouped_sampled": "grouped_matmul_sampled",
}
S = jax.ShapeDtypeStruct


def check(chip, op, m, k, n, groups, dtype, out_dtype=None):
    problem = _spec.Problem(op, m, k, n, groups, dtype, out_dtype or dtype)
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    assert config.vmem <= _chips.tpu_vmem(chip)
    x, y, w = S((m, k), dtype), S((m, n), dtype), S((groups, k, n), dtype)
    if op == "grouped_sampled":
        fn = functools.partial(
            mosaic_tpu.sampled, dtype=jnp.dtype(problem.out_dtype), config=config
        )
        arrays = (x, y)
    else:
        transpose = op == "grouped_transposed"
        fn = functools.partial(mosaic_tpu.product, transpose=transpose, config=config)
        arrays = (y if transpose else x, w)
    text, compiled = _tpu.compile_for(chip, fn, *arrays, S((groups,), jnp.int32))
    assert f'kernel_name = "{NAMES[op]}"' in text
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_canonical(chip, op, dtype):
    check(chip, op, 8192, 4096, 4096, 8, dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_many_small_groups(chip, op):
    check(chip, op, 2048, 2048, 1408, 256, "bfloat16")


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "tpu7x")])
@pytest.mark.parametrize(
    ("m", "k", "n", "groups"),
    [(1, 1, 1, 1), (5, 7, 200, 3), (1000, 300, 77, 9), (300, 5000, 1000, 4)],
)
def test_sizes_that_do_not_divide(m, k, n, groups, chip, dtype, op):
    check(chip, op, m, k, n, groups, dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_long_contraction(chip, op, dtype):
    check(chip, op, 4096, 14336, 14336, 8, dtype)


def test_float32_master_gradient():
    check("v5e", "grouped_sampled", 512, 1024, 1024, 4, "bfloat16", "float32")
