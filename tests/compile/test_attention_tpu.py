"""The attention kernels by the TPU compiler, for every chip."""

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

from pallas_kernels.block_sparse_attention import _spec, mosaic_tpu  # noqa: E402

OPS = ["forward", "backward_q", "backward_kv"]
S = jax.ShapeDtypeStruct


def causal(i, j, rows, cols, scalars, dense):
    return i >= j


def documents(i, j, rows, cols, scalars, dense):
    return (i >= j) & (rows[0] == cols[0]) & (j < scalars[0])


def dense(i, j, rows, cols, scalars, dense):
    return dense[0] | (i == j)


def check(
    chip,
    op,
    dtype="bfloat16",
    *,
    b=1,
    h=4,
    h_kv=2,
    t=1024,
    s=None,
    d=128,
    block=(128, 128),
    capacity=4,
    mask_h=1,
    predicate=causal,
    soft_cap=None,
    bias=False,
    paged=False,
    exact=False,
):
    s = s or t
    bq, bk = block
    nq, nk = -(-t // bq), -(-s // bk)
    counts = {documents: (1, 1, 1, 0), dense: (0, 0, 0, 1)}.get(predicate, (0,) * 4)
    problem = _spec.Problem(
        *(op, b, h, h_kv, t, s, d, d, bq, bk, capacity, b, mask_h, dtype),
        *counts,
        soft_cap=soft_cap is not None,
        bias=bias,
        paged=paged,
        exact=exact,
    )
    _spec.check_mosaic_tpu(problem, chip)
    config = _spec.config_mosaic_tpu(problem, chip)
    i32, f32 = functools.partial(S, dtype=jnp.int32), jnp.float32
    padded = (nq * bq, nk * bk)
    elements = (
        (i32((b, 1, t)),) * counts[0],
        (i32((b, 1, s)),) * counts[1],
        (i32((b, 1)),) * counts[2],
        (S((1, mask_h, t, s), jnp.bool_),) * counts[3],
    )
    q, line = S((b, h, padded[0], d), dtype), S((b, h, padded[0]), f32)
    k = S((b * nk, h_kv, bk, d) if paged else (b, h_kv, padded[1], d), dtype)
    how = {"block_bias": S((1, h, nq, capacity), f32) if bias else None}
    if paged:
        how["page_table"] = i32((b, nk))
    flat = i32((b, mask_h, nq * capacity))
    entries = i32((b, mask_h, nq, capacity))
    lists = (entries, i32((b, mask_h, nq)), entries)
    if op == "backward_kv":
        lists = (flat, flat, i32((b, mask_h, nk + 1)), flat)
    arrays = (q, k, k) if op == "forward" else (q, k, k, q, line, line)
    kernel = functools.partial(
        getattr(mosaic_tpu, op), scale=0.1, soft_cap=soft_cap, config=config
    )

    def fn(arrays, lists, elements, how):
        return kernel(*arrays, lists, _spec.Elements(predicate, *elements), **how)

    text, compiled = _tpu.compile_for(chip, fn, arrays, lists, elements, how)
    assert f'kernel_name = "block_sparse_attention_{op}"' in text
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", *_tpu.by_hand("float32")])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", _tpu.TOPOLOGIES)
def test_causal(chip, op, dtype):
    check(chip, op, dtype)


@pytest.mark.parametrize("d", [128, *_tpu.by_hand(64, 256)])
@pytest.mark.parametrize("block", [(128, 128), *_tpu.by_hand((512, 512))])
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "v5p", "v6e", "tpu7x")])
def test_exact(chip, block, d):
    """What is differentiated by a bias."""
    check(chip, "forward", bias=True, exact=True, block=block, d=d, t=2048)


@pytest.mark.parametrize("dtype", ["float32", *_tpu.by_hand("bfloat16")])
@pytest.mark.parametrize("d", [256, *_tpu.by_hand(32, 64, 80, 128, 192)])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", ["v4", *_tpu.by_hand("v5e", "v5p", "v6e", "tpu7x")])
def test_head_sizes(chip, op, d, dtype):
    check(chip, op, dtype, d=d, block=(512, 512), t=2048)


LONG = dict(t=131_072, predicate=documents)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "v5p", "v6e", "tpu7x")])
@pytest.mark.parametrize(
    "how",
    [
        dict(h=2, h_kv=1, mask_h=2, capacity=1024),
        *_tpu.by_hand(
            dict(h=8, mask_h=8, capacity=64), dict(block=(512, 512), capacity=256)
        ),
    ],
)
def test_long(how, chip, op):
    """Lists of every head with room for all blocks: more than SMEM holds."""
    check(chip, op, **LONG, **how)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "how",
    [
        dict(predicate=None, t=200, s=1000, block=(64, 256)),
        dict(predicate=dense, mask_h=4, soft_cap=30.0, bias=True),
        *_tpu.by_hand(
            dict(predicate=documents, t=5, s=900, block=(1, 128), h=6),
            dict(predicate=dense, t=96, s=900, block=(24, 384), h=8),
            dict(predicate=documents, t=320, block=(160, 128), bias=True),
            dict(h=64, h_kv=1, block=(16, 128)),
            dict(block=(256, 1024), soft_cap=20.0),
        ),
    ],
)
@pytest.mark.parametrize("chip", ["v5e", *_tpu.by_hand("v4", "v5p", "v6e", "tpu7x")])
def test_others(chip, how, op):
    check(chip, op, **how)


@pytest.mark.parametrize("chip", ["v6e", *_tpu.by_hand("v4", "v5e", "v5p", "tpu7x")])
def test_decoding_by_pages(chip):
    how = dict(b=4, h=32, h_kv=8, t=1, s=4096, block=(1, 128), capacity=16)
    check(chip, "forward", **how, paged=True)


@pytest.mark.parametrize("op", OPS)
def test_64_bit_types_on(op):
    with jax.enable_x64(True):
        check("v5e", op, predicate=documents, bias=True)
