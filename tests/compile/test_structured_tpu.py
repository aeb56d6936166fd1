"""The kernels of structured products by the TPU compiler, for every chip."""

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
from pallas_kernels.kronecker_sparse_matmul import _spec, mosaic_tpu  # noqa: E402
from pallas_kernels.monarch_matmul import _spec as monarch_spec  # noqa: E402
from pallas_kernels.monarch_matmul import mosaic_tpu as monarch_tpu  # noqa: E402
from sparsejax.ops import long_conv, monarch_matmul  # noqa: E402

NAMES = {
    "kronecker": "kronecker_sparse_matmul",
    "kronecker_sampled": "kronecker_sparse_matmul_sampled",
}
S = jax.ShapeDtypeStruct


def check_compiled(chip, name, fn, *arrays):
    text, compiled = _tpu.compile_for(chip, fn, *arrays)
    assert f'kernel_name = "{name}"' in text
    assert "tpu_custom_call" in compiled.as_text()


def kronecker(chip, op, rows, pattern, dtype, out_dtype=None):
    a, b, c, d = pattern
    problem = _spec.Problem(op, rows, a, b, c, d, dtype, out_dtype or dtype)
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    assert config.vmem <= _chips.tpu_vmem(chip)
    x, y = S((rows, a * c * d), dtype), S((rows, a * b * d), dtype)
    if op == "kronecker":
        fn = functools.partial(mosaic_tpu.product, config=config)
        arrays = x, S((a, d, c, b), dtype)
    else:
        dtype = jnp.dtype(problem.out_dtype)
        fn = functools.partial(
            mosaic_tpu.sampled, pattern=pattern, dtype=dtype, config=config
        )
        arrays = x, y
    check_compiled(chip, NAMES[op], fn, *arrays)


def monarch(chip, rows, k, p, q, l, s, dtype):  # noqa: E741
    r = k * q // l
    problem = monarch_spec.Problem("monarch", rows, k, p, q, l, r, s, dtype)
    monarch_spec.check_mosaic_tpu(problem, chip)
    config = monarch_spec.config_mosaic_tpu(problem, chip)
    fn = functools.partial(monarch_tpu.product, config=config)
    x, left, right = (
        S((rows, k * p), dtype),
        S((k, 1, p, q), dtype),
        S((1, l, r, s), dtype),
    )
    check_compiled(chip, "monarch_matmul", fn, x, left, right)


@pytest.mark.parametrize("dtype", ["bfloat16", *_tpu.by_hand("float32")])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_kronecker(chip, op, dtype):
    """Left of a Monarch matrix."""
    kronecker(chip, op, 4096, (32, 128, 128, 1), dtype)


@pytest.mark.parametrize("dtype", ["float32", *_tpu.by_hand("bfloat16")])
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", ["v4", *_tpu.by_hand("v5e", "v5p", "v6e", "tpu7x")])
@pytest.mark.parametrize(
    "case",
    [
        (5, (3, 7, 9, 2)),
        *_tpu.by_hand(
            (1, (1, 1, 1, 1)),
            (1000, (1, 128, 128, 32)),
            (300, (64, 2, 2, 32)),
            (300, (1, 2, 2, 2048)),
            (8192, (1, 4096, 14336, 1)),
        ),
    ],
)
def test_other_patterns(case, chip, op, dtype):
    kronecker(chip, op, *case, dtype)


def test_64_bit_types_on():
    with jax.enable_x64(True):
        kronecker("v5e", "kronecker", 100, (4, 32, 32, 2), "bfloat16")
        kronecker("v5e", "kronecker_sampled", 100, (4, 32, 32, 2), "bfloat16")
        monarch("v5e", 100, 4, 128, 128, 4, 128, "bfloat16")


def test_float32_master_gradient():
    kronecker("v5e", "kronecker_sampled", 512, (8, 64, 64, 1), "bfloat16", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", *_tpu.by_hand("float32")])
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_monarch(chip, dtype):
    monarch(chip, 4096, 32, 128, 128, 32, 128, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
@pytest.mark.parametrize(
    ("rows", "k", "p", "q", "l", "s"),
    [
        (5, 4, 64, 120, 8, 64),
        (300, 3, 96, 384, 3, 40),
        (1000, 8, 128, 128, 8, 512),
        (1000, 4, 256, 512, 4, 128),
    ],
)
def test_other_monarch(rows, k, p, q, l, s, chip, dtype):  # noqa: E741
    monarch(chip, rows, k, p, q, l, s, dtype)


def test_monarch_by_a_kernel_for_each_factor():
    """The automatic choice, where no kernel serves both: 128 is no multiple of 3."""
    x, left, right = (
        S((64, 384), "bfloat16"),
        S((6, 1, 64, 128), "bfloat16"),
        S((1, 3, 256, 64), "bfloat16"),
    )
    text, compiled = _tpu.compile_for("v5e", monarch_matmul, x, left, right)
    assert text.count('kernel_name = "kronecker_sparse_matmul"') == 2
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", *_tpu.by_hand("float32")])
@pytest.mark.parametrize(
    "case",
    [
        (256, 32, {}),
        *_tpu.by_hand(
            (4096, 4096, {}),
            (4096, 4096, dict(causal=False)),
            (4096, 4096, dict(keep_frequencies=512)),
            (65536, 65536, {}),
        ),
    ],
)
def test_long_conv(case, dtype):
    """XLA's products, with gradients: no kernel, and no FFT."""
    t, taps, how = case

    def run(u, k, dy):
        y, vjp = jax.vjp(functools.partial(long_conv, **how), u, k)
        return y, *vjp(dy)

    u, k = S((8, 16, t), dtype), S((16, taps), dtype)
    _, compiled = _tpu.compile_for("v5e", run, u, k, u)
    text = compiled.as_text()
    assert "convolution(" in text or " dot(" in text
    assert " fft(" not in text
