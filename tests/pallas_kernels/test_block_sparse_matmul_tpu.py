"""The TPU kernels, interpreted, against a dense float64 oracle."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul import _spec, mosaic_tpu


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


# Small tiles, so that small shapes have several of everything.
SMALL = {"tile_m": 32, "rows": 16, "unroll": 2, "unit_unroll": 2}


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_shape", [(16, 16), (48, 32), (256, 128)])
def test_dsd(block_shape, dtype, transpose):
    rng = np.random.default_rng(0)
    check_dsd(rng, 48, (4, 3), block_shape, 0.4, dtype, transpose, **SMALL)


@pytest.mark.parametrize(("m", "density"), [(1, 1.0), (77, 0.0), (40, 0.2)])
@pytest.mark.parametrize("block_shape", [(64, 32), (128, 128)])
def test_dsd_any_rows_and_density(block_shape, m, density):
    rng = np.random.default_rng(m)
    transpose = m == 40
    check_dsd(rng, m, (3, 4), block_shape, density, jnp.bfloat16, transpose, 3, **SMALL)


@pytest.mark.parametrize("more", [{"resident": False, "splits": 2}, {"cores": 2}])
@pytest.mark.parametrize("block_shape", [(64, 64), (128, 128)])
def test_dsd_tile_sizes(block_shape, more):
    rng = np.random.default_rng(3)
    tile = SMALL | more
    check_dsd(rng, 80, (3, 3), block_shape, 0.4, jnp.bfloat16, True, 2, **tile)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_shape", [(16, 16), (48, 32), (256, 128)])
def test_sdd(block_shape, out_dtype):
    rng = np.random.default_rng(4)
    check_sdd(rng, 80, (4, 3), block_shape, 0.4, jnp.bfloat16, out_dtype, **SMALL)


@pytest.mark.parametrize(("m", "density"), [(1, 0.3), (77, 1.0), (40, 0.0)])
@pytest.mark.parametrize("block_shape", [(64, 64), (128, 128)])
def test_sdd_float32_with_unused_slots(block_shape, m, density):
    rng = np.random.default_rng(m)
    f32 = jnp.float32
    tile = SMALL | {"splits": 3}
    check_sdd(rng, m, (3, 4), block_shape, density, f32, f32, 5, **tile)


@pytest.mark.parametrize("resident", [True, False])
def test_with_simulated_copies(resident):
    """Copies arrive when waited for; memory begins as NaN."""
    rng = np.random.default_rng(6)
    params = pltpu.InterpretParams(
        dma_execution_mode="on_wait", uninitialized_memory="nan"
    )
    tile = SMALL | {"resident": resident, "interpret": params}
    block_shape = (128, 128) if resident else (128, 64)
    bf16 = jnp.bfloat16
    check_dsd(rng, 40, (2, 2), block_shape, 0.5, bf16, resident, 2, **tile)
    if resident:
        check_sdd(rng, 40, (2, 2), block_shape, 0.5, bf16, bf16, 2, **tile)


@pytest.mark.parametrize("block_shape", [(64, 128), (128, 128)])
def test_new_contents_do_not_retrace(block_shape):
    traces = []
    bk, bn = block_shape
    spec = problem("dsd", 16, 3, 3, block_shape, 9, jnp.float32)
    config = dataclasses.replace(_spec.config_mosaic_tpu(spec, "v5e"), **SMALL)

    @jax.jit
    def both(x, dy, blocks, rows, cols, ptr, count):
        traces.append(0)
        y = mosaic_tpu.dsd(
            x, blocks, None, rows, ptr, transpose=False, config=config, interpret=True
        )
        dw = mosaic_tpu.sdd(
            x,
            dy,
            rows,
            cols,
            count,
            block_shape=block_shape,
            dtype=jnp.float32,
            config=config,
            interpret=True,
        )
        return y, dw

    rng = np.random.default_rng(7)
    for density in (0.2, 0.8):
        rows, cols, count = layout(rng, 3, 3, density, 9)
        rows, cols = rows[:9], cols[:9]
        x, dy = (
            normal(rng, (16, 3 * bk), "float32"),
            normal(rng, (16, 3 * bn), "float32"),
        )
        blocks = normal(rng, (9, bk, bn), "float32")
        ptr = ptr_of(cols, count, 3)
        y, dw = both(x, dy, blocks, rows, cols, ptr, np.int32(count))
        w = dense(f64(blocks), rows, cols, count, 3, 3)
        np.testing.assert_allclose(y, f64(x) @ w, atol=1e-3)
        full = (f64(x).T @ f64(dy)).reshape(3, bk, 3, bn)
        for p in range(count):
            np.testing.assert_allclose(dw[p], full[rows[p], :, cols[p]], atol=1e-3)
    assert len(traces) == 1


def test_under_shard_map():
    """The result varies over the mesh axes that the inputs vary over."""
    rng = np.random.default_rng(8)
    rows, cols, count = layout(rng, 2, 3, 0.5)
    spec = problem("dsd", 16, 2, 3, (128, 128), len(rows), jnp.float32)
    config = dataclasses.replace(_spec.config_mosaic_tpu(spec, "v5e"), **SMALL)
    x = normal(rng, (32, 256), "float32")
    blocks = normal(rng, (len(rows), 128, 128), "float32")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec_x, spec_0 = jax.P("data"), jax.P()

    def local(x, *rest):
        rest = (jax.lax.pcast(a, "data", to="varying") for a in rest)
        blocks, rows, ptr = rest
        return mosaic_tpu.dsd(
            x, blocks, None, rows, ptr, transpose=False, config=config
        )

    traced = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec_x, spec_0, spec_0, spec_0),
            out_specs=spec_x,
        )
    ).trace(x, blocks, rows, ptr_of(cols, count, 3))
    assert traced.out_info.shape == (32, 384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype is float16"),
        ({"out_dtype": "float32", "dtype": "bfloat16"}, "out_dtype is float32"),
        ({"block_shape": (24, 128)}, "bk=24"),
        ({"block_shape": (128, 512)}, "bn=512"),
        ({"m": 0}, "m is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": 10**6}, "slots is 1000000"),
        ({"k": 1 << 22}, "bytes of VMEM"),
    ],
)
def test_check_names_what_it_needs(change, message):
    good = _spec.Problem(
        "dsd", 64, 512, 512, (128, 128), 4, "bfloat16", change.get("dtype", "bfloat16")
    )
    _spec.check_mosaic_tpu(
        dataclasses.replace(good, dtype="bfloat16", out_dtype="bfloat16"), None
    )
    with pytest.raises(NotImplementedError, match=message):
        _spec.check_mosaic_tpu(dataclasses.replace(good, **change), None)
    with pytest.raises(NotImplementedError, match="chip is v3"):
        _spec.check_mosaic_tpu(good, "v3")
