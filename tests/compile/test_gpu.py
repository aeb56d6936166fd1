"""The Hopper kernels through the chips' own compiler, without the chips.

Run where the CUDA plugin is installed (see _gpu.py), with SPARSEJAX_COMPILE=gpu.
"""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import pytest
from jax import numpy as jnp

from pallas_kernels.block_sparse_matmul import _spec, mosaic_gpu

# pytest's importlib mode does not put the folder of a test on the path.
sys.path.append(str(pathlib.Path(__file__).parent))
import _gpu  # noqa: E402

KERNELS = {
    "dsd": "block_sparse_matmul_dsd",
    "dsd_transposed": "block_sparse_matmul_dsd_transposed",
    "sdd": "block_sparse_matmul_sdd",
}
SIZE = 4096
# 10% of the 32 x 32 places, and half of them: short lists and long ones.
CANONICAL = _spec.Problem(
    op="dsd",
    m=SIZE,
    k=SIZE,
    n=SIZE,
    block_shape=(128, 128),
    slots=102,
    dtype="bfloat16",
    out_dtype="bfloat16",
)


def kernel(problem, chip="h200", **changes):
    """A kernel's call and the shapes of its arguments."""
    _spec.check_mosaic_gpu(problem, chip)
    config = dataclasses.replace(_spec.config_mosaic_gpu(problem, chip), **changes)
    (bk, bn), slots = problem.block_shape, problem.slots

    def array(*shape, dtype=problem.dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def index(*shape):
        return array(*shape, dtype=jnp.int32)

    x, dy = array(problem.m, problem.k), array(problem.m, problem.n)
    blocks, entries = array(slots, bk, bn), index(slots)
    if problem.op == "dsd":

        def call(x, blocks, source, ptr):
            return mosaic_gpu.dsd(
                x, blocks, None, source, ptr, transpose=False, config=config
            )

        return call, (x, blocks, entries, index(problem.n // bn + 1))
    if problem.op == "dsd_transposed":

        def call(dy, blocks, order, source, ptr):
            return mosaic_gpu.dsd(
                dy, blocks, order, source, ptr, transpose=True, config=config
            )

        return call, (dy, blocks, entries, entries, index(problem.k // bk + 1))

    def call(x, dy, rows, cols, count):
        return mosaic_gpu.sdd(
            x,
            dy,
            rows,
            cols,
            count,
            block_shape=problem.block_shape,
            dtype=problem.out_dtype,
            config=config,
        )

    return call, (x, dy, entries, entries, index())


# A kernel already compiled for the same architecture is not given to ptxas again.
_reports = {}


def compiled(capfd, chip, problem, **changes):
    """Compiles a kernel; returns the text of its lowering and ptxas's report."""
    capfd.readouterr()
    lowered, _ = _gpu.compile_for(chip, *kernel(problem, **changes))
    text = lowered.as_text()
    report = _gpu.ptxas_report("\n".join(capfd.readouterr()))
    key = _gpu.CHIPS[chip].capability, text
    if report.registers:
        _reports[key] = report
    return text, _reports[key]


@pytest.mark.parametrize("slots", [102, 512])
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_canonical(chip, op, slots, capfd):
    problem = dataclasses.replace(CANONICAL, op=op, slots=slots)
    text, report = compiled(capfd, chip, problem)
    assert KERNELS[op] in text
    assert report.clean, report


def _sweep():
    blocks = [
        (16, 16),
        (32, 32),
        (64, 64),
        (128, 128),
        (256, 256),
        (16, 256),
        (32, 64),
        (128, 256),
        (256, 128),
        (48, 80),
        (96, 112),
        (208, 176),
    ]
    for number, (bk, bn) in enumerate(blocks):
        for op in KERNELS:
            # Few rows and short lists, then many rows and long lists; by turns the
            # other dtype, and for dW the output that master weights take.
            for m, slots, dtype in [(200, 17, "float16"), (SIZE, 192, "bfloat16")]:
                wide = op == "sdd" and number % 2 == (m == SIZE)
                yield _spec.Problem(
                    op=op,
                    m=m,
                    k=16 * bk,
                    n=16 * bn,
                    block_shape=(bk, bn),
                    slots=slots,
                    dtype=dtype,
                    out_dtype="float32" if wide else dtype,
                )


def _name(problem):
    bk, bn = problem.block_shape
    return f"{problem.op}-{bk}x{bn}-m{problem.m}-{problem.dtype}-{problem.out_dtype}"


@pytest.mark.parametrize("problem", list(_sweep()), ids=_name)
def test_sweep(problem, capfd):
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report


@pytest.mark.parametrize("op", ["dsd", "dsd_transposed"])
def test_tiles_for_tuning(op, capfd):
    # What config does not pick yet: taller tiles, blocks copied once for two programs.
    problem = dataclasses.replace(CANONICAL, op=op)
    for changes in [
        dict(tile_m=384, warpgroups=2, stages=2),
        dict(tile_m=256, warpgroups=2, stages=4, cluster=2),
        dict(tile_m=128, warpgroups=1, stages=3),
    ]:
        _, report = compiled(capfd, "h200", problem, **changes)
        assert report.clean, (changes, report)


@pytest.mark.parametrize("m", [1, 77])
@pytest.mark.parametrize("op", KERNELS)
def test_ragged_rows(op, m, capfd):
    problem = dataclasses.replace(CANONICAL, op=op, m=m, k=512, n=512, slots=9)
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report


def test_the_report_sees_spills(capfd):
    # A warpgroup has no registers for 256 x 128 of accumulator.
    _, report = compiled(capfd, "h200", CANONICAL, tile_m=256, warpgroups=1, stages=2)
    assert report.registers and report.spilled and not report.clean


@pytest.mark.parametrize(
    ("chip", "served"), [("h200", True), ("a100", False), ("b200", False)]
)
def test_chips_of_other_generations(chip, served):
    # check asks for no more than it must: their compiler refuses as well, in newer
    # versions by ending the process, hence one of its own.
    if served:
        _spec.check_mosaic_gpu(CANONICAL, chip)
    else:
        with pytest.raises(NotImplementedError, match=f"chip is {chip}"):
            _spec.check_mosaic_gpu(CANONICAL, chip)
    here = pathlib.Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n"
        "import test_gpu\n"
        "call = test_gpu.kernel(test_gpu.CANONICAL)\n"
        "print('traced', flush=True)\n"
        f"test_gpu._gpu.compile_for({chip!r}, *call)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "traced" in done.stdout, done.stderr
    assert (done.returncode == 0) == served, done.stderr
