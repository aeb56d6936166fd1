"""The TPU kernels, interpreted, against a dense float64 oracle."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul import _spec, mosaic_tpu

BLOCKS = [(16, 16), (32, 64), (64, 128), (128, 128), (128, 256), (256, 128), (48, 32)]


def layout(rng, tiles_k, tiles_n, density, extra=0):
    """(rows, cols, count): slots sorted by (col, row), ``extra`` of them unused."""
    mask = rng.random((tiles_k, tiles_n)) < density
    cols, rows = np.nonzero(mask.T)
    count = len(rows)
    if count + extra == 0:
        extra = 1
    pad = np.zeros(extra, np.int32)
    return (
        np.concatenate([rows, pad]).astype(np.int32),
        np.concatenate([cols, pad]).astype(np.int32),
        count,
    )


def ptr_of(index, count, tiles):
    return np.searchsorted(index[:count], np.arange(tiles + 1)).astype(np.int32)


def dense(blocks, rows, cols, count, tiles_k, tiles_n):
    """The matrix that the blocks stand for, float64."""
    _, bk, bn = blocks.shape
    w = np.zeros((tiles_k, bk, tiles_n, bn))
    for p in range(count):
        w[rows[p], :, cols[p]] = blocks[p]
    return w.reshape(tiles_k * bk, tiles_n * bn)


def normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def f64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def assert_close(out, low, ref):
    """The tolerance rule: twice the error of XLA's own product in this precision."""
    assert out.shape == ref.shape
    assert low.dtype == out.dtype
    eps = float(jnp.finfo(out.dtype).eps) * max(1.0, np.abs(ref).max())
    error = np.abs(f64(out) - ref).max(initial=0)
    assert error <= 2 * np.abs(f64(low) - ref).max(initial=0) + eps


def problem(op, m, tiles_k, tiles_n, block_shape, slots, dtype, out_dtype=None):
    bk, bn = block_shape
    dtype = jnp.dtype(dtype).name
    out_dtype = jnp.dtype(out_dtype or dtype).name
    return _spec.Problem(
        op, m, tiles_k * bk, tiles_n * bn, block_shape, slots, dtype, out_dtype
    )


def check_dsd(
    rng,
    m,
    tiles,
    block_shape,
    density,
    dtype,
    transpose,
    extra=0,
    interpret=True,
    **tile,
):
    tiles_k, tiles_n = tiles
    bk, bn = block_shape
    rows, cols, count = layout(rng, tiles_k, tiles_n, density, extra)
    slots = len(rows)
    blocks = normal(rng, (slots, bk, bn), dtype)
    if extra:
        # What unused slots hold must not matter.
        blocks = blocks.at[count:].set(jnp.nan)
    if transpose:
        order = np.concatenate(
            [np.lexsort((cols[:count], rows[:count])), np.arange(count, slots)]
        ).astype(np.int32)
        source, ptr = cols[order], ptr_of(rows[order], count, tiles_k)
        x = normal(rng, (m, tiles_n * bn), dtype)
    else:
        order, source, ptr = None, rows, ptr_of(cols, count, tiles_n)
        x = normal(rng, (m, tiles_k * bk), dtype)
    op = "dsd_transposed" if transpose else "dsd"
    spec = problem(op, m, tiles_k, tiles_n, block_shape, slots, dtype)
    _spec.check_mosaic_tpu(spec, "v5e")
    config = dataclasses.replace(_spec.config_mosaic_tpu(spec, "v5e"), **tile)
    order = None if order is None else jnp.asarray(order)
    out = jax.jit(
        lambda *a: mosaic_tpu.dsd(
            *a, transpose=transpose, config=config, interpret=interpret
        )
    )(x, blocks, order, jnp.asarray(source), jnp.asarray(ptr))
    w = dense(f64(blocks), rows, cols, count, tiles_k, tiles_n)
    w = w.T if transpose else w
    low = jnp.matmul(
        x, jnp.asarray(w, jnp.float32).astype(dtype), preferred_element_type=jnp.float32
    ).astype(dtype)
    assert_close(out, low, f64(x) @ w)


def check_sdd(
    rng,
    m,
    tiles,
    block_shape,
    density,
    dtype,
    out_dtype,
    extra=0,
    interpret=True,
    **tile,
):
    tiles_k, tiles_n = tiles
    bk, bn = block_shape
    rows, cols, count = layout(rng, tiles_k, tiles_n, density, extra)
    slots = len(rows)
    x = normal(rng, (m, tiles_k * bk), dtype)
    dy = normal(rng, (m, tiles_n * bn), dtype)
    spec = problem("sdd", m, tiles_k, tiles_n, block_shape, slots, dtype, out_dtype)
    _spec.check_mosaic_tpu(spec, "v5e")
    config = dataclasses.replace(_spec.config_mosaic_tpu(spec, "v5e"), **tile)
    out = jax.jit(
        lambda *a: mosaic_tpu.sdd(
            *a,
            block_shape=block_shape,
            dtype=out_dtype,
            config=config,
            interpret=interpret,
        )
    )(x, dy, jnp.asarray(rows), jnp.asarray(cols), jnp.int32(count))
    assert out.dtype == out_dtype

    def cut(w):
        w = np.asarray(w).reshape(tiles_k, bk, tiles_n, bn)
        picked = np.zeros((slots, bk, bn), w.dtype)
        for p in range(count):
            picked[p] = w[rows[p], :, cols[p]]
        return picked

    low = (x.astype(jnp.float32).T @ dy.astype(jnp.float32)).astype(out_dtype)
    assert_close(out, jnp.asarray(cut(low)), cut(f64(x).T @ f64(dy)))
    assert not np.asarray(out[count:].astype(jnp.float32)).any()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block_shape", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dsd(block_shape, dtype, transpose):
    rng = np.random.default_rng(0)
    check_dsd(rng, 80, (5, 7), block_shape, 0.3, dtype, transpose, tile_m=32)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_shape", BLOCKS)
def test_sdd(block_shape, out_dtype):
    rng = np.random.default_rng(1)
    check_sdd(rng, 80, (5, 7), block_shape, 0.3, jnp.bfloat16, out_dtype, tile_m=32)
    if out_dtype == jnp.float32:
        check_sdd(rng, 80, (5, 7), block_shape, 0.3, out_dtype, out_dtype, tile_m=32)
