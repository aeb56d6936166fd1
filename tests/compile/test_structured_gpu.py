"""The structured matrices' kernels by ptxas, for H100 and H200."""

import dataclasses
import functools
import os
import pathlib
import re
import sys

import jax
import pytest

if os.environ["SPARSEJAX_COMPILE"] != "gpu":
    pytest.skip("asked for another compiler", allow_module_level=True)

sys.path.append(str(pathlib.Path(__file__).parent))
import _gpu  # noqa: E402

from pallas_kernels.kronecker_sparse_matmul import (  # noqa: E402
    _spec,
    mosaic_gpu,
)

NAMES = {
    "kronecker": "kronecker_sparse_matmul",
    "kronecker_sampled": "kronecker_sparse_matmul_sampled",
}
# The first factor of a Monarch matrix 4096 x 4096 of 32 blocks.
CANONICAL = _spec.Problem(
    op="kronecker",
    rows=4096,
    a=32,
    b=128,
    c=128,
    d=1,
    dtype="bfloat16",
    out_dtype="bfloat16",
)


def kronecker(problem, chip):
    """A kernel's call and the shapes of its arguments."""
    _spec.check_mosaic_gpu(problem, chip)
    config = _spec.config_mosaic_gpu(problem, chip)
    rows, (a, b, c, d) = problem.rows, (problem.a, problem.b, problem.c, problem.d)

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, problem.dtype)

    x = array(rows, a * c * d)
    if problem.op == "kronecker_sampled":
        fn = functools.partial(
            mosaic_gpu.sampled,
            pattern=(a, b, c, d),
            dtype=problem.out_dtype,
            config=config,
        )
        return fn, (x, array(rows, a * b * d))
    fn = functools.partial(mosaic_gpu.product, config=config)
    return fn, (x, array(a, d, c, b))


# A kernel already compiled for the same architecture is not given to ptxas again.
_reports = {}


def compiled(capfd, chip, call):
    """Compiles a kernel; returns lowered text, compiled text and ptxas's report."""
    capfd.readouterr()
    lowered, done = _gpu.compile_for(chip, *call)
    text = lowered.as_text()
    report = _gpu.ptxas_report("\n".join(capfd.readouterr()))
    key = _gpu.CHIPS[chip].capability, text
    if report.registers:
        _reports[key] = report
    return text, done.as_text(), _reports[key]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_kronecker(chip, op, capfd):
    problem = dataclasses.replace(CANONICAL, op=op)
    text, _, report = compiled(capfd, chip, kronecker(problem, chip))
    assert NAMES[op] in text
    assert report.clean, report


@pytest.mark.parametrize("d", [1, 2])
def test_columns_are_moved_only_where_blocks_are_interleaved(d, capfd):
    problem = dataclasses.replace(CANONICAL, rows=256, a=2, d=d)
    _, hlo, _ = compiled(capfd, "h200", kronecker(problem, "h200"))
    moves = re.findall(r"= \S+ (?:transpose|copy)\(", hlo)
    assert len(moves) == (0 if d == 1 else 2), moves


# One row and many; sides below, at and above a tile, and not a multiple of one.
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize(
    ("rows", "pattern", "dtype"),
    [
        (1, (1, 64, 64, 1), "float16"),
        (77, (3, 320, 192, 2), "bfloat16"),
        (4096, (1, 128, 128, 32), "float16"),
    ],
)
def test_kronecker_sweep(op, rows, pattern, dtype, capfd):
    a, b, c, d = pattern
    wide = op == "kronecker_sampled" and dtype == "float16"
    out_dtype = "float32" if wide else dtype
    problem = _spec.Problem(op, rows, a, b, c, d, dtype, out_dtype)
    *_, report = compiled(capfd, "h200", kronecker(problem, "h200"))
    assert report.clean, report
