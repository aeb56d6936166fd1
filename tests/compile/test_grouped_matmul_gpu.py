"""The grouped kernels by ptxas, for H100 and H200."""

import dataclasses
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

from pallas_kernels.grouped_matmul import _spec, mosaic_gpu  # noqa: E402

NAMES = {
    "grouped": "grouped_matmul",
    "grouped_transposed": "grouped_matmul_transposed",
    "grouped_sampled": "grouped_matmul_sampled",
}
# 1024 rows per group.
CANONICAL = _spec.Problem(
    op="grouped",
    m=8192,
    k=4096,
    n=4096,
    groups=8,
    dtype="bfloat16",
    out_dtype="bfloat16",
)


def kernel(problem, chip, **changes):
    """A kernel's call and the shapes of its arguments."""
    _spec.check_mosaic_gpu(problem, chip)
    config = dataclasses.replace(_spec.config_mosaic_gpu(problem, chip), **changes)
    m, k, n, groups = problem.m, problem.k, problem.n, problem.groups

    def array(*shape, dtype=problem.dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes = array(groups, dtype=jnp.int32)
    if problem.op == "grouped_sampled":
        fn = functools.partial(
            mosaic_gpu.sampled, dtype=problem.out_dtype, config=config
        )
        return fn, (array(m, k), array(m, n), sizes)
    transpose = problem.op == "grouped_transposed"
    fn = functools.partial(mosaic_gpu.product, transpose=transpose, config=config)
    return fn, (array(m, n if transpose else k), array(groups, k, n), sizes)


# A kernel already compiled for the same architecture is not given to ptxas again.
_reports = {}


def compiled(capfd, chip, problem, **changes):
    """Compiles a kernel; returns the text of its lowering and ptxas's report."""
    capfd.readouterr()
    lowered, _ = _gpu.compile_for(chip, *kernel(problem, chip, **changes))
    text = lowered.as_text()
    report = _gpu.ptxas_report("\n".join(capfd.readouterr()))
    key = _gpu.CHIPS[chip].capability, text
    if report.registers:
        _reports[key] = report
    return text, _reports[key]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_canonical(chip, op, capfd):
    text, report = compiled(capfd, chip, dataclasses.replace(CANONICAL, op=op))
    assert NAMES[op] in text
    assert report.clean, report


# Few rows and many; sides below, at and above a tile, and not a multiple of one; one
# group and more than a tile of rows has.
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize(
    ("m", "k", "n", "groups", "dtype"),
    [
        (1, 64, 64, 1, "bfloat16"),
        (77, 64, 320, 3, "float16"),
        (1000, 192, 128, 256, "bfloat16"),
        (4096, 320, 64, 4, "float16"),
        (513, 128, 192, 2, "bfloat16"),
        (65536, 2048, 512, 64, "bfloat16"),
    ],
)
def test_sweep(op, m, k, n, groups, dtype, capfd):
    wide = op == "grouped_sampled" and dtype == "float16"
    out_dtype = "float32" if wide else dtype
    problem = _spec.Problem(op, m, k, n, groups, dtype, out_dtype)
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report


def test_the_dtype_of_master_weights(capfd):
    problem = dataclasses.replace(
        CANONICAL, op="grouped_sampled", out_dtype="float32", groups=64
    )
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report
