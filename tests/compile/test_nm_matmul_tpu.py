"""The condensed N:M kernels by the TPU compiler, for every chip."""

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

from pallas_kernels.nm_matmul import _spec, mosaic_tpu  # noqa: E402
from sparsejax.ops import nm_matmul  # noqa: E402

NAMES = {
    "nm": "nm_matmul",
    "nm_transposed": "nm_matmul_transposed",
    "nm_sampled": "nm_matmul_sampled",
}
S = jax.ShapeDtypeStruct


def words(k, p, n, m):
    return S((-(-k // m * n * _spec.index_bits(m) // 32), p), jnp.uint32)


def check(chip, op, rows, k, p, n, m, dtype, out_dtype=None):
    problem = _spec.Problem(op, rows, k, p, n, m, dtype, out_dtype or dtype)
    _spec.check_mosaic_tpu(problem, chip)
    how = dict(n=n, m=m, config=_spec.config_mosaic_tpu(problem, chip))
    x, dy, values = S((rows, k), dtype), S((rows, p), dtype), S((k // m * n, p), dtype)
    if op == "nm_sampled":
        fn = functools.partial(mosaic_tpu.sampled, dtype=jnp.dtype(problem.out_dtype))
        arrays = (x, dy)
    else:
        transpose = op == "nm_transposed"
        fn = functools.partial(mosaic_tpu.product, transpose=transpose)
        arrays = (dy if transpose else x, values)
    fn = functools.partial(fn, **how)
    text, compiled = _tpu.compile_for(chip, fn, *arrays, words(k, p, n, m))
    assert f'kernel_name = "{NAMES[op]}"' in text
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_canonical(chip, op, dtype):
    for rows in (16, 4096):
        check(chip, op, rows, 4096, 4096, 2, 4, dtype)
    check(chip, op, 16, 4096, 4096, 1, 8, dtype)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 2), (3, 4), (5, 7), (8, 16), (1, 32), (4, 17), (1, 256)]
)
def test_groups(n, m, dtype, op):
    check("v5e", op, 100, 24 * m, 200, n, m, dtype)


@pytest.mark.parametrize("op", NAMES)
def test_most_selections_and_ragged_sizes(op):
    # 32:64 takes 32 * 64 of them, as many as are served; one row, p below 128.
    check("v4", op, 1, 640, 77, 32, 64, "bfloat16")
    check("v6e", op, 77, 44, 130, 2, 4, "bfloat16")


def test_float32_master_gradient():
    check("v5e", "nm_sampled", 512, 1024, 1024, 2, 4, "bfloat16", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_public_operator_chooses(dtype):
    """Value and both gradients; Mosaic has no float16 for TPU."""

    def run(x, values, indices):
        product = lambda x, v: nm_matmul(x, v, indices, n=2, m=4)
        loss = lambda x, v: jnp.sum(jnp.square(product(x, v).astype(jnp.float32)))
        return jax.value_and_grad(loss, (0, 1))(x, values)

    args = S((64, 512), dtype), S((256, 384), dtype), words(512, 384, 2, 4)
    text, _ = _tpu.compile_for("v5e", run, *args)
    for name in NAMES.values():
        assert (f'kernel_name = "{name}"' in text) == (dtype == "bfloat16"), name
