"""The attention kernels by ptxas, for H100 and H200."""

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

from pallas_kernels.block_sparse_attention import _spec, mosaic_gpu  # noqa: E402

NAMES = {
    "forward": "block_sparse_attention",
    "backward_q": "block_sparse_attention_dq",
    "backward_kv": "block_sparse_attention_dkv",
}
CANONICAL = _spec.Problem(
    op="forward",
    b=2,
    h=8,
    h_kv=2,
    t=4096,
    s=4096,
    d=128,
    dv=128,
    block_q=128,
    block_k=128,
    capacity=8,
    mask_b=1,
    mask_h=8,
    dtype="bfloat16",
    rows=1,
    cols=1,
    scalars=1,
)


def documents(i, j, rows, cols, scalars, dense):
    return (i >= j) & (rows[0] == cols[0]) & ~(j < scalars[0])


def causal(i, j, rows, cols, scalars, dense):
    return i >= j


def given(i, j, rows, cols, scalars, dense):
    return dense[0] & ((i >= j) | ~dense[-1])


def kernel(problem, chip, **changes):
    """A kernel's call and the shapes of its arguments."""
    _spec.check_mosaic_gpu(problem, chip)
    config = dataclasses.replace(_spec.config_mosaic_gpu(problem, chip), **changes)
    b, h, h_kv, d, dv = problem.b, problem.h, problem.h_kv, problem.d, problem.dv
    nq, nk = -(-problem.t // problem.block_q), -(-problem.s // problem.block_k)
    t, s = nq * problem.block_q, nk * problem.block_k
    masks, capacity = (problem.mask_b, problem.mask_h), problem.capacity
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=problem.dtype)
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    keys = [(b, h_kv, s, d), (b, h_kv, s, dv)]
    options = {}
    if problem.paged:
        keys = [(99, h_kv, problem.block_k, size) for size in (d, dv)]
        options["page_table"] = ints((b, nk))
    if problem.bias:
        options["block_bias"] = numbers((1, h, nq, capacity))
    arrays = [array((b, h, t, d)), *(array(shape) for shape in keys)]
    if problem.op != "forward":
        arrays += [array((b, h, t, dv)), numbers((b, h, t)), numbers((b, h, t))]
    lists = (
        ints((*masks, nq, capacity)),
        ints((*masks, nq)),
        ints((*masks, nq, capacity)),
    )
    if problem.op == "backward_kv":
        flat = ints((*masks, nq * capacity))
        lists = flat, flat, ints((*masks, nk + 1)), flat
    operands = (
        [ints((b, 1, t))] * problem.rows,
        [ints((1, h, s))] * problem.cols,
        [ints((1, h))] * problem.scalars,
        [jax.ShapeDtypeStruct((b, 1, t, s), bool)] * problem.dense,
    )

    def fn(arrays, lists, operands, options):
        predicate = documents if problem.rows else causal
        predicate = given if problem.dense else predicate
        return getattr(mosaic_gpu, problem.op)(
            *arrays,
            lists,
            _spec.Elements(predicate, *operands),
            scale=d**-0.5,
            soft_cap=30.0 if problem.soft_cap else None,
            config=config,
            **options,
        )

    return fn, (arrays, lists, operands, options)


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


PLAIN, BOTH = dict(rows=0, cols=0, scalars=0), dict(soft_cap=True, bias=True)
SWEEP = {
    "32": dict(d=32, dv=32),
    "64": dict(d=64, dv=64),
    "96": dict(d=96, dv=96),
    "256": dict(d=256, dv=256),
    "192": PLAIN | dict(d=192, dv=192),
    "192, 128": PLAIN | dict(d=192, dv=128),
    "one head": dict(block_q=64, block_k=64, mask_h=8),
    "packed": dict(block_q=64, block_k=64, mask_h=1, dtype="float16"),
    "unlike": PLAIN | dict(d=128, dv=64, t=4000, s=1000, block_q=256),
    "options": PLAIN | BOTH,
    "given": PLAIN | dict(dense=1),
}
ALL_OF = {
    "192 with operands": dict(d=192, dv=192),
    "192, 128 with all": BOTH | dict(d=192, dv=128),
    "256 alone": PLAIN | dict(d=256, dv=256),
    "256 with options": PLAIN | BOTH | dict(d=256, dv=256),
    "256 with all": BOTH | dict(d=256, dv=256),
    "256 with all, one head": BOTH | dict(d=256, dv=256, block_q=64, block_k=64),
    "144, 176 with all": BOTH | dict(d=144, dv=176),
    "256, 64": dict(d=256, dv=64, dtype="float16"),
    "64, 256": dict(d=64, dv=256, block_q=64, mask_h=1),
    "48, 80": dict(d=48, dv=80),
    "16": dict(d=16, dv=16),
    "128 with all": BOTH,
    "given, of 64": PLAIN | BOTH | dict(dense=2, d=64, dv=64),
    "given, of 192": PLAIN | BOTH | dict(dense=1, d=192, dv=192),
    "given, of 256": PLAIN | dict(dense=1, d=256, dv=256),
    "given, of 256, with options": PLAIN | BOTH | dict(dense=1, d=256, dv=256),
}
NAMED = [*SWEEP, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ALL_OF)]
SWEEP |= ALL_OF


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("op", NAMES)
def test_sweep(op, name, capfd):
    problem = dataclasses.replace(CANONICAL, op=op, **SWEEP[name])
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report


EXACT = [name for name, how in SWEEP.items() if how.get("bias")]
EXACT = [
    pytest.param(name, marks=[pytest.mark.exhaustive] if name in ALL_OF else [])
    for name in EXACT
]


@pytest.mark.parametrize("name", EXACT)
def test_exact(name, capfd):
    """What is differentiated by a bias."""
    problem = dataclasses.replace(CANONICAL, exact=True, **SWEEP[name])
    text, report = compiled(capfd, "h200", problem)
    assert "tensor<2x8x4096x128xf32>" in text or problem.dv != 128
    assert report.clean, report


def test_pages(capfd):
    problem = dataclasses.replace(CANONICAL, t=1, block_q=64, paged=True)
    _, report = compiled(capfd, "h200", problem)
    assert report.clean, report
