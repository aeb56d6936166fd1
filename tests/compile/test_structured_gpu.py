"""The structured matrices' kernels by ptxas, for H100 and H200."""

import dataclasses
import functools
import math
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

import pallas_kernels.monarch_matmul._spec as monarch_spec  # noqa: E402
import pallas_kernels.monarch_matmul.mosaic_gpu as monarch_gpu  # noqa: E402
from pallas_kernels.kronecker_sparse_matmul import _spec, mosaic_gpu  # noqa: E402

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


def monarch(rows, k, p, q, l, s, dtype, chip):
    problem = monarch_spec.Problem("monarch", rows, k, p, q, l, k * q // l, s, dtype)
    monarch_spec.check_mosaic_gpu(problem, chip)
    config = monarch_spec.config_mosaic_gpu(problem, chip)
    fn = functools.partial(monarch_gpu.product, config=config)
    shapes = (rows, k * p), (k, 1, p, q), (1, l, problem.r, s)
    return fn, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


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


# 4096 x 4096 of 32 blocks.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_monarch(chip, dtype, capfd):
    call = monarch(4096, 32, 128, 128, 32, 128, dtype, chip)
    text, hlo, report = compiled(capfd, chip, call)
    assert "monarch_matmul" in text
    assert report.clean, report
    # Of h's size there are y, with right's blocks outermost and as it should be: no h.
    entry = hlo[hlo.index("ENTRY") :]
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?!parameter|bitcast)", entry)
    sizes = [math.prod(map(int, shape.split(","))) for shape in made]
    assert sizes.count(4096 * 4096) == 2, hlo


# 1, 2, 8, 16 and 64 columns that a block of left gives each of right.
@pytest.mark.parametrize(
    ("rows", "k", "p", "q", "l", "s"),
    [
        (9, 32, 64, 32, 32, 64),
        (2048, 32, 64, 64, 32, 64),
        (77, 8, 64, 32, 4, 192),
        (4096, 16, 256, 256, 16, 256),
        (1000, 8, 512, 512, 8, 512),
    ],
)
def test_monarch_sweep(rows, k, p, q, l, s, capfd):
    *_, report = compiled(
        capfd, "h200", monarch(rows, k, p, q, l, s, "bfloat16", "h200")
    )
    assert report.clean, report
